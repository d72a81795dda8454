// Calls the kernel library for a test that runs in another process: under a sanitizer, or as another machine's code.
//
// Requests on stdin, answers on stdout; every number is little-endian and 64 bits wide.
//   request:  function, number of arguments, then each as a kind ('i' int64, 'd' double, 's' string, 'b' buffer) and its
//             value; strings and buffers are a length and their bytes
//   answer:   'i' or 's' and the result, then every buffer's bytes as the call has left them
// An operator's arguments are: callers, repeats, and for each parameter a dtype, its rank, its dimensions and a buffer. With
// several callers that many threads call at once, `repeats` times each, into outputs of their own, while another thread
// changes the size of the team; the outputs must not differ.
// decode_kept's are: rows, sequences, columns, logits, vocab, largest, then those of the operator decoder, which is called
// first and keeps the weights; memory that stays between requests there is none.
// Every buffer is a heap block of exactly its size, so that a read or write beyond it is seen.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

typedef int Operator(int, void**, int*, int64_t**, const char**, void*, void*);

#define OPERATORS(X) X(embed) X(qkv) X(attention) X(project) X(project_add) X(gate_up) X(head) X(decoder)

extern "C" {
#define DECLARE(name) Operator qwen15_##name;
OPERATORS(DECLARE)
#undef DECLARE
int64_t qwen15_open_binding(int cut);
void qwen15_close_binding(int64_t number);
int qwen15_decode_bound(int64_t number, const int32_t* rows, int64_t sequences, int64_t columns, float* logits, int64_t vocab,
                        int32_t* largest);
int qwen15_abi_version();
const char* qwen15_kernels_name();
const char* qwen15_last_error();
int qwen15_can_run(const char* name);
int qwen15_use_kernels(const char* name);
int qwen15_threads();
void qwen15_set_threads(int n);
int qwen15_exact_activations();
void qwen15_set_exact_activations(int exact);
void qwen15_argmax(const float* logits, int64_t rows, int64_t vocab, int32_t* ids);
int64_t qwen15_top_candidates(const float* logits, int64_t vocab, int64_t k, float* values, int32_t* ids);
int64_t qwen15_nucleus(const float* logits, int64_t vocab, float temperature, double top_p, float* values, int32_t* ids,
                       int64_t capacity, double* normaliser);
}

namespace {

struct Argument {
  char kind = 0;
  int64_t whole = 0;
  double real = 0;
  std::string text;
  std::unique_ptr<char[]> buffer;
  int64_t bytes = 0;

  template <class X>
  X* as() const {
    return reinterpret_cast<X*>(buffer.get());
  }
};

[[noreturn]] void broken(const char* what) {
  fprintf(stderr, "kernels_driver: %s\n", what);
  exit(2);
}

void read_bytes(void* to, size_t n) {
  if (n > 0 && fread(to, 1, n, stdin) != n) broken("the request ends early");
}
int64_t read_number() {
  int64_t n;
  read_bytes(&n, sizeof n);
  return n;
}
std::string read_text() {
  std::string text(read_number(), '\0');
  read_bytes(&text[0], text.size());
  return text;
}
void write_bytes(const void* from, size_t n) {
  if (n > 0 && fwrite(from, 1, n, stdout) != n) broken("the answer cannot be written");
}
void answer(int64_t n) {
  write_bytes("i", 1);
  write_bytes(&n, sizeof n);
}
void answer(const char* text) {
  int64_t n = static_cast<int64_t>(strlen(text));
  write_bytes("s", 1);
  write_bytes(&n, sizeof n);
  write_bytes(text, n);
}

struct Parameters {
  std::vector<void*> data;
  std::vector<int> ranks;
  std::vector<std::vector<int64_t>> dims;
  std::vector<int64_t*> shapes;
  std::vector<const char*> dtypes;
  int64_t output_bytes = 0;
};

int64_t run_operator(Operator* run, std::vector<Argument>& all) {
  int64_t callers = all[0].whole, repeats = all[1].whole;
  Parameters p;
  for (size_t i = 2; i < all.size();) {
    p.dtypes.push_back(all[i++].text.c_str());
    p.ranks.push_back(static_cast<int>(all[i++].whole));
    p.dims.emplace_back();
    for (int axis = 0; axis < p.ranks.back(); ++axis) p.dims.back().push_back(all[i++].whole);
    p.output_bytes = all[i].bytes;
    p.data.push_back(all[i++].buffer.get());
  }
  for (auto& dims : p.dims) p.shapes.push_back(dims.data());
  auto call = [&](void* output) {
    std::vector<void*> data = p.data;
    data.back() = output;
    return run(static_cast<int>(data.size()), data.data(), p.ranks.data(), p.shapes.data(), p.dtypes.data(), nullptr,
               nullptr);
  };
  int result = call(p.data.back());
  if (callers <= 1 || result != 0) return result;

  std::atomic<int> failures{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int64_t c = 0; c < callers; ++c)
    threads.emplace_back([&] {
      std::unique_ptr<char[]> output(new char[p.output_bytes]);
      for (int64_t i = 0; i < repeats; ++i)
        if (call(output.get()) != 0 || memcmp(output.get(), p.data.back(), p.output_bytes) != 0) ++failures;
    });
  int before = qwen15_threads();
  std::thread resizer([&] {
    for (int n = 1; !done.load(); n = n % 4 + 1) {
      qwen15_set_threads(n);
      std::this_thread::yield();
    }
  });
  for (auto& thread : threads) thread.join();
  done.store(true);
  resizer.join();
  qwen15_set_threads(before);
  return failures.load();
}

int64_t decode_kept(std::vector<Argument>& a) {
  constexpr size_t kOwn = 6;
  size_t i = kOwn + 2;  // of decoder's parameter 0
  for (int parameter = 0; parameter < 7; ++parameter) i += 3 + a[i + 1].whole;
  int64_t number = qwen15_open_binding(0);
  *a[i + 2 + a[i + 1].whole].as<int32_t>() = static_cast<int32_t>(number);
  // Moved out and back, so that the buffers stay where the binding knows them.
  std::vector<Argument> rest(std::make_move_iterator(a.begin() + kOwn), std::make_move_iterator(a.end()));
  int64_t result = run_operator(qwen15_decoder, rest);
  if (result == 0)
    result = qwen15_decode_bound(number, a[0].as<int32_t>(), a[1].whole, a[2].whole, a[3].as<float>(), a[4].whole,
                                 a[5].as<int32_t>());
  std::move(rest.begin(), rest.end(), a.begin() + kOwn);
  qwen15_close_binding(number);
  return result;
}

void run(const std::string& name, std::vector<Argument>& a) {
  static const std::map<std::string, Operator*> operators = {
#define NAMED(name) {"qwen15_" #name, qwen15_##name},
      OPERATORS(NAMED)
#undef NAMED
  };
  auto found = operators.find(name);
  if (found != operators.end()) return answer(run_operator(found->second, a));
  if (name == "decode_kept") return answer(decode_kept(a));
  if (name == "qwen15_abi_version") return answer(static_cast<int64_t>(qwen15_abi_version()));
  if (name == "qwen15_kernels_name") return answer(qwen15_kernels_name());
  if (name == "qwen15_last_error") return answer(qwen15_last_error());
  if (name == "qwen15_can_run") return answer(static_cast<int64_t>(qwen15_can_run(a[0].text.c_str())));
  if (name == "qwen15_use_kernels") return answer(static_cast<int64_t>(qwen15_use_kernels(a[0].text.c_str())));
  if (name == "qwen15_threads") return answer(static_cast<int64_t>(qwen15_threads()));
  if (name == "qwen15_set_threads") {
    qwen15_set_threads(static_cast<int>(a[0].whole));
    return answer(static_cast<int64_t>(0));
  }
  if (name == "qwen15_exact_activations") return answer(static_cast<int64_t>(qwen15_exact_activations()));
  if (name == "qwen15_set_exact_activations") {
    qwen15_set_exact_activations(static_cast<int>(a[0].whole));
    return answer(static_cast<int64_t>(0));
  }
  if (name == "qwen15_argmax") {
    qwen15_argmax(a[0].as<float>(), a[1].whole, a[2].whole, a[3].as<int32_t>());
    return answer(static_cast<int64_t>(0));
  }
  if (name == "qwen15_top_candidates")
    return answer(qwen15_top_candidates(a[0].as<float>(), a[1].whole, a[2].whole, a[3].as<float>(), a[4].as<int32_t>()));
  if (name == "qwen15_nucleus")
    return answer(qwen15_nucleus(a[0].as<float>(), a[1].whole, static_cast<float>(a[2].real), a[3].real, a[4].as<float>(),
                                 a[5].as<int32_t>(), a[6].whole, a[7].as<double>()));
  broken(("no function " + name).c_str());
}

}  // namespace

int main() {
  for (int first = getchar(); first != EOF; first = getchar()) {
    ungetc(first, stdin);
    std::string name = read_text();
    std::vector<Argument> arguments(read_number());
    for (Argument& a : arguments) {
      read_bytes(&a.kind, 1);
      if (a.kind == 'i') {
        a.whole = read_number();
      } else if (a.kind == 'd') {
        read_bytes(&a.real, sizeof a.real);
      } else if (a.kind == 's') {
        a.text = read_text();
      } else {
        a.bytes = read_number();
        a.buffer.reset(new char[a.bytes]);
        read_bytes(a.buffer.get(), a.bytes);
      }
    }
    run(name, arguments);
    for (const Argument& a : arguments)
      if (a.kind == 'b') write_bytes(a.buffer.get(), a.bytes);
    fflush(stdout);
  }
  return 0;
}
