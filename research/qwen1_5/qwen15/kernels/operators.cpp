// The operators as MindSpore's `ops.Custom(func_type="aot")` calls them, with their shape inference.
//
// MindSpore's convention: params holds the inputs, then the outputs; ndims, shapes and dtypes describe each. A result
// other than 0 becomes a RuntimeError; what was wrong is printed and kept for qwen15_last_error(). For an operator f,
// fInferShape gives the output's shape from the inputs' shapes. All int inputs are int32, activations float32; biases
// and norms f32/f16/bf16; caches f32/f16/bf16. A matrix (w and its like, table, head) is one f32/f16/bf16 input, or
// quantised several that follow one another: integers int8 (O, I) or uint8 (O, I / 2), scale (O, G) f32/f16/bf16, and
// where there are, zero (O, G) in the integers' dtype and order (I,) int32. See Matrix.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "layer.h"
#include "team.h"

class AotExtra;  // MindSpore's; only its address passes through here

#define QWEN15_API extern "C" __attribute__((visibility("default")))

namespace qwen15 {
namespace {

std::mutex error_mutex;
std::string error_text;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

void check_query_lens(const int32_t* lens, int64_t sequences, int64_t tokens) {
  int64_t sum = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    if (lens[s] < 1) fail("sequence %lld has %d new tokens", static_cast<long long>(s), lens[s]);
    sum += lens[s];
  }
  if (sum != tokens) fail("query_lens sum to %lld, there are %lld tokens", static_cast<long long>(sum),
                          static_cast<long long>(tokens));
}

// Every block a sequence needs must exist.
void check_batch(const Batch& b, int64_t num_blocks, int64_t block_size) {
  check_query_lens(b.query_lens, b.sequences, b.tokens);
  for (int64_t s = 0; s < b.sequences; ++s) {
    int64_t context = b.context_lens[s], blocks = (context + block_size - 1) / block_size;
    if (context < b.query_lens[s] || blocks > b.table_stride)
      fail("sequence %lld: context of %lld tokens with %d new ones and room for %lld", static_cast<long long>(s),
           static_cast<long long>(context), b.query_lens[s], static_cast<long long>(b.table_stride * block_size));
    for (int64_t n = 0; n < blocks; ++n) {
      int32_t block = b.block_tables[s * b.table_stride + n];
      if (block < 0 || block >= num_blocks)
        fail("sequence %lld: block table entry %lld is %d, the cache has %lld blocks", static_cast<long long>(s),
             static_cast<long long>(n), block, static_cast<long long>(num_blocks));
    }
  }
}

void check_between(const char* name, int64_t t, int32_t value, int64_t low, int64_t high) {
  if (value < low || value >= high)
    fail("%s[%lld] is %d, outside [%lld, %lld)", name, static_cast<long long>(t), value, static_cast<long long>(low),
         static_cast<long long>(high));
}

// The inputs and outputs of one call, with checks that name what does not fit.
class Call {
 public:
  Call(int count, void** params, int* ndims, int64_t** shapes, const char** dtypes)
      : count_(count), params_(params), ndims_(ndims), shapes_(shapes), dtypes_(dtypes) {}

  int count() const { return count_; }
  int64_t dim(int i, int axis) const { return shapes_[i][axis]; }

  void rank(int i, const char* name, int wanted) const {
    if (i >= count_) fail("%s (input %d) is missing", name, i);
    if (ndims_[i] != wanted) fail("%s (input %d) has %d dimensions, not %d", name, i, ndims_[i], wanted);
  }
  DType dtype(int i, const char* name) const {
    if (strcmp(dtypes_[i], "float32") == 0) return DType::f32;
    if (strcmp(dtypes_[i], "float16") == 0) return DType::f16;
    if (strcmp(dtypes_[i], "bfloat16") == 0) return DType::bf16;
    fail("%s (input %d) is %s, not float32, float16 or bfloat16", name, i, dtypes_[i]);
  }
  bool is(int i, const char* dtype, int wanted_rank) const {
    return i < count_ && ndims_[i] == wanted_rank && strcmp(dtypes_[i], dtype) == 0;
  }
  const int32_t* ints(int i, const char* name, int wanted_rank) const {
    rank(i, name, wanted_rank);
    if (strcmp(dtypes_[i], "int32") != 0) fail("%s (input %d) is %s, not int32", name, i, dtypes_[i]);
    return static_cast<const int32_t*>(params_[i]);
  }
  float* floats(int i, const char* name, int wanted_rank) const {
    rank(i, name, wanted_rank);
    if (strcmp(dtypes_[i], "float32") != 0) fail("%s (input %d) is %s, not float32", name, i, dtypes_[i]);
    return static_cast<float*>(params_[i]);
  }
  float number(int i, const char* name) const { return floats(i, name, 1)[0]; }
  Vector vector(int i, const char* name, int64_t size) const {
    rank(i, name, 1);
    if (dim(i, 0) != size)
      fail("%s (input %d) has %lld elements, not %lld", name, i, static_cast<long long>(dim(i, 0)),
           static_cast<long long>(size));
    Vector v;
    v.data = params_[i];
    v.dtype = dtype(i, name);
    return v;
  }
  // The matrix whose tensors begin at input i, which then is the input after them: the weight, or integers, scale, and
  // zero and order where it has them.
  Matrix matrix(int& i, const char* name, int64_t cols = -1, int64_t rows = -1) const {
    rank(i, name, 2);
    int first = i++;
    Matrix m;
    m.data = params_[first];
    m.rows = dim(first, 0);
    m.cols = dim(first, 1);
    if (is(first, "int8", 2)) m.dtype = DType::q8;
    else if (is(first, "uint8", 2)) m.dtype = DType::q4, m.cols *= 2;
    else m.dtype = dtype(first, name);
    check_size(first, name, m, cols, rows);
    if (is_quantised(m.dtype)) read_companions(first, name, m, i);
    return m;
  }
  // A matrix of which rows are looked up.
  Matrix table(int& i) const {
    Matrix m = matrix(i, "table");
    if (m.dtype == DType::q4 || m.order != nullptr)
      fail("the table is of 4 bits or has an order, which is not supported");
    return m;
  }
  // Key cache at i, value cache at i + 1.
  Cache cache(int i) const {
    rank(i, "key_cache", 4);
    rank(i + 1, "value_cache", 4);
    for (int axis = 0; axis < 4; ++axis)
      if (dim(i, axis) != dim(i + 1, axis)) fail("key_cache and value_cache (input %d) differ in axis %d", i, axis);
    Cache c;
    c.k = params_[i];
    c.v = params_[i + 1];
    c.dtype = dtype(i, "key_cache");
    if (dtype(i + 1, "value_cache") != c.dtype) fail("key_cache and value_cache (input %d) differ in dtype", i);
    c.num_blocks = dim(i, 0);
    c.block_size = dim(i, 1);
    c.kv_heads = dim(i, 2);
    c.head_dim = dim(i, 3);
    if (c.head_dim % 2 != 0) fail("head size %lld is odd", static_cast<long long>(c.head_dim));
    return c;
  }
  // query_lens at i, context_lens at i + 1, block_tables at i + 2; every block a sequence needs must exist.
  Batch batch(int i, int64_t tokens, int64_t num_blocks, int64_t block_size) const {
    Batch b;
    b.tokens = tokens;
    b.query_lens = ints(i, "query_lens", 1);
    b.context_lens = ints(i + 1, "context_lens", 1);
    b.block_tables = ints(i + 2, "block_tables", 2);
    b.sequences = dim(i, 0);
    b.table_stride = dim(i + 2, 1);
    if (dim(i + 1, 0) != b.sequences || dim(i + 2, 0) != b.sequences)
      fail("query_lens, context_lens and block_tables are for %lld, %lld and %lld sequences",
           static_cast<long long>(b.sequences), static_cast<long long>(dim(i + 1, 0)),
           static_cast<long long>(dim(i + 2, 0)));
    check_batch(b, num_blocks, block_size);
    return b;
  }
  // int32 values at i, each in [low, high)
  const int32_t* bounded(int i, const char* name, int64_t tokens, int64_t low, int64_t high) const {
    const int32_t* values = ints(i, name, 1);
    if (dim(i, 0) != tokens) fail("%s (input %d) has %lld values for %lld tokens", name, i,
                                  static_cast<long long>(dim(i, 0)), static_cast<long long>(tokens));
    for (int64_t t = 0; t < tokens; ++t) check_between(name, t, values[t], low, high);
    return values;
  }

 private:
  void check_size(int i, const char* name, const Matrix& m, int64_t cols, int64_t rows) const {
    if ((cols >= 0 && m.cols != cols) || (rows >= 0 && m.rows != rows))
      fail("%s (input %d) is (%lld, %lld), wanted (%lld, %lld), -1 for any", name, i, static_cast<long long>(m.rows),
           static_cast<long long>(m.cols), static_cast<long long>(rows), static_cast<long long>(cols));
  }
  void read_companions(int first, const char* name, Matrix& m, int& i) const {
    rank(i, "scale", 2);
    m.groups = dim(i, 1);
    if (dim(i, 0) != m.rows || m.groups < 1 || m.cols % m.groups != 0 || m.cols / m.groups % kQuantBlock != 0)
      fail("%s (input %d) is (%lld, %lld), its scale (%lld, %lld): groups have to be of a multiple of %d columns", name,
           first, static_cast<long long>(m.rows), static_cast<long long>(m.cols), static_cast<long long>(dim(i, 0)),
           static_cast<long long>(m.groups), static_cast<int>(kQuantBlock));
    m.scale.data = params_[i];
    m.scale.dtype = dtype(i++, "scale");
    // A matrix after this one has more columns than this one has groups.
    if (is(i, dtypes_[first], 2) && dim(i, 0) == m.rows && dim(i, 1) == m.groups) m.zero = params_[i++];
    if (is(i, "int32", 1)) {
      m.order = bounded(i, "order", m.cols, 0, m.cols);
      ++i;
    }
  }

  int count_;
  void** params_;
  int* ndims_;
  int64_t** shapes_;
  const char** dtypes_;
};

template <class F>
int guarded(const char* name, F&& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::lock_guard<std::mutex> lock(error_mutex);
    error_text = std::string(name) + ": " + error.what();
    fprintf(stderr, "qwen15 kernels: %s\n", error_text.c_str());
    return 1;
  }
}

void check_rope(const Call& call, int i, int64_t head_dim) {
  call.floats(i, "cos", 2);
  call.floats(i + 1, "sin", 2);
  if (call.dim(i, 1) != head_dim || call.dim(i + 1, 1) != head_dim || call.dim(i, 0) != call.dim(i + 1, 0))
    fail("cos and sin have %lld and %lld columns, head size is %lld", static_cast<long long>(call.dim(i, 1)),
         static_cast<long long>(call.dim(i + 1, 1)), static_cast<long long>(head_dim));
}

// norm, wq, bq, wk, bk, wv, bv from i on, which then is the input after them. What concerns the cache, cos and sin is
// left.
Qkv read_qkv(const Call& call, int& i, float eps, int64_t hidden) {
  Qkv s;
  s.eps = eps;
  s.norm = call.vector(i++, "norm", hidden);
  s.wq = call.matrix(i, "wq", hidden);
  s.bq = call.vector(i++, "bq", s.wq.rows);
  s.wk = call.matrix(i, "wk", hidden);
  s.bk = call.vector(i++, "bk", s.wk.rows);
  s.wv = call.matrix(i, "wv", hidden, s.wk.rows);
  s.bv = call.vector(i++, "bv", s.wv.rows);
  return s;
}

void check_heads(const Qkv& s) {
  int64_t kv_cols = s.cache.kv_heads * s.cache.head_dim;
  if (s.wk.rows != kv_cols)
    fail("wk has %lld rows, the cache is for %lld", static_cast<long long>(s.wk.rows), static_cast<long long>(kv_cols));
  if (s.wq.rows % kv_cols != 0)
    fail("%lld query columns are no multiple of %lld key columns", static_cast<long long>(s.wq.rows),
         static_cast<long long>(kv_cols));
}

// A layer's inputs from i on, which then is the input after them; cos and sin are at 8 and 9.
Layer read_layer(const Call& call, int& i, float eps, int64_t hidden) {
  Layer layer;
  layer.qkv = read_qkv(call, i, eps, hidden);
  layer.qkv.cos = call.floats(8, "cos", 2);
  layer.qkv.sin = call.floats(9, "sin", 2);
  layer.wo = call.matrix(i, "wo", layer.qkv.wq.rows, hidden);
  layer.gate_up.norm = call.vector(i++, "norm", hidden);
  layer.gate_up.eps = eps;
  layer.gate_up.w1 = call.matrix(i, "w1", hidden);
  layer.gate_up.w3 = call.matrix(i, "w3", hidden, layer.gate_up.w1.rows);
  layer.w2 = call.matrix(i, "w2", layer.gate_up.w1.rows, hidden);
  layer.qkv.cache = call.cache(i);
  i += 2;
  check_heads(layer.qkv);
  return layer;
}

void check_alike(const Layer& first, const Layer& layer, size_t l) {
  const Cache &c = layer.qkv.cache, &c0 = first.qkv.cache;
  if (c.dtype != c0.dtype || c.num_blocks != c0.num_blocks || c.block_size != c0.block_size ||
      c.kv_heads != c0.kv_heads || c.head_dim != c0.head_dim || layer.qkv.wq.rows != first.qkv.wq.rows ||
      layer.gate_up.w1.rows != first.gate_up.w1.rows)
    fail("layer %d: sizes or cache differ from layer 0's", static_cast<int>(l));
}

// The weights and caches of one network as a call of the whole stack was given them, for calls that name them by a
// number. MindSpore's preparation of a call costs microseconds for every input, and the whole stack has hundreds.
struct Bound {
  Stack stack;
  std::vector<Layer> layers;
  int64_t positions = 0;               // rows of cos and sin
  std::vector<const void*> addresses;  // of these inputs, in decoder's order: cos to the last value_cache
};

// How a network is cut, as `qwen15_open_binding` was told.
enum Cut : int { kWhole = 0, kSlices = 1, kSlicesAndVocabulary = 2 };

std::mutex bindings_mutex;
int64_t last_binding = 0;
std::map<int64_t, std::shared_ptr<const Bound>> bindings;  // of those that are open; null until the first whole call
std::map<int64_t, int> cuts;

void check_open(int64_t number) {
  if (bindings.find(number) == bindings.end()) fail("binding %lld is not open", static_cast<long long>(number));
}

void keep_bound(int64_t number, std::shared_ptr<const Bound> bound) {
  std::lock_guard<std::mutex> lock(bindings_mutex);
  check_open(number);
  bindings[number] = std::move(bound);
}

std::shared_ptr<const Bound> find_bound(int64_t number) {
  std::lock_guard<std::mutex> lock(bindings_mutex);
  check_open(number);
  if (!bindings[number]) fail("binding %lld has not been given any weights", static_cast<long long>(number));
  return bindings[number];
}

// Whether the network under this number is a rank's slice, and of what.
void read_cut(int64_t number, Stack* stack) {
  std::lock_guard<std::mutex> lock(bindings_mutex);
  check_open(number);
  int cut = cuts[number];
  if (cut == kWhole) return;
  stack->ranks = joined_ranks();
  if (stack->ranks == nullptr) fail("binding %lld is of a slice, and no ranks have been joined",
                                    static_cast<long long>(number));
  stack->split_vocab = cut == kSlicesAndVocabulary;
}

// Into how many parts the vocabulary is cut that the table and the head of this call hold one of: its binding is
// repeated so often, for InferShape, which sees no values.
void check_parts(int64_t parts, const Stack& stack) {
  if (parts != (stack.split_vocab ? stack.ranks->ranks() : 1))
    fail("binding is there %lld times", static_cast<long long>(parts));
}

}  // namespace
}  // namespace qwen15

using namespace qwen15;

// A new number for `decoder` to keep a network's weights and caches under, above 0; nothing is kept yet. cut: see Cut.
QWEN15_API int64_t qwen15_open_binding(int cut) {
  std::lock_guard<std::mutex> lock(bindings_mutex);
  bindings[++last_binding] = nullptr;
  cuts[last_binding] = cut;
  return last_binding;
}

// Forget what is kept under this number. To be called before the memory of the weights is given back.
QWEN15_API void qwen15_close_binding(int64_t number) {
  std::lock_guard<std::mutex> lock(bindings_mutex);
  bindings.erase(number);
  cuts.erase(number);
}

// Where the inputs kept under this number are in memory, see Bound; at most `room` of them. Returns how many there are,
// 0 when nothing is kept.
QWEN15_API int64_t qwen15_bound_addresses(int64_t number, int64_t* addresses, int64_t room) {
  std::lock_guard<std::mutex> lock(bindings_mutex);
  auto found = bindings.find(number);
  if (found == bindings.end() || !found->second) return 0;
  const std::vector<const void*>& kept = found->second->addresses;
  int64_t count = static_cast<int64_t>(kept.size());
  for (int64_t i = 0; i < count && i < room; ++i)
    addresses[i] = static_cast<int64_t>(reinterpret_cast<intptr_t>(kept[i]));
  return count;
}

// Join the other ranks through the memory of this file, see Ranks; 0, or 1 with the reason in qwen15_last_error().
QWEN15_API int qwen15_join_ranks(int file, int rank, int ranks, double limit_s) {
  return guarded("ranks", [&] { join_ranks(file, rank, ranks, limit_s); });
}

// Rank 0's ids (count,) in everyone's. 1 done, 0 not yet (call again), -1 failed.
QWEN15_API int qwen15_agree(int32_t* ids, int64_t count, double wait_s) {
  bool done = false;
  int failed = guarded("ranks", [&] {
    if (joined_ranks() == nullptr) fail("no ranks have been joined");
    done = joined_ranks()->agree(ids, count, wait_s);
  });
  return failed ? -1 : done;
}

// Seconds spent waiting for the other ranks, and how often; 0 without any.
QWEN15_API double qwen15_ranks_waited_seconds() { return joined_ranks() ? joined_ranks()->waited_seconds() : 0; }
QWEN15_API int64_t qwen15_ranks_waits() { return joined_ranks() ? joined_ranks()->waits() : 0; }

// What has gone wrong between the ranks, "" when nothing has.
QWEN15_API const char* qwen15_ranks_complaint() {
  static thread_local std::string copy;
  copy = joined_ranks() == nullptr ? "" : joined_ranks()->complaint();
  return copy.c_str();
}

// For tests: x (count,) += the ranks' partial (count,); 0, or 1 with the reason in qwen15_last_error().
QWEN15_API int qwen15_add_over_ranks(const float* partial, int64_t count, float* x) {
  return guarded("ranks", [&] {
    Ranks* ranks = joined_ranks();
    if (ranks == nullptr) fail("no ranks have been joined");
    run_team([&](Team& team) { ranks->add(team, partial, count, x); });
    if (!ranks->complaint().empty()) fail("%s", ranks->complaint().c_str());
  });
}

QWEN15_API const char* qwen15_last_error() {
  static thread_local std::string copy;
  std::lock_guard<std::mutex> lock(error_mutex);
  copy = error_text;
  return copy.c_str();
}

// ids (T,), table (V, E) -> (T, E)
QWEN15_API int qwen15_embed(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("embed", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    int i = 1;
    Matrix table = call.table(i);
    call.rank(0, "ids", 1);
    const int32_t* ids = call.bounded(0, "ids", call.dim(0, 0), 0, table.rows);
    embed_tokens(ids, call.dim(0, 0), table, call.floats(i, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_embedInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[0][0], shapes[1][1]};
}

// x (T, E), norm, wq, bq, wk, bk, wv, bv, cos (P, D), sin, positions (T,), slots (T,), key_cache, value_cache, eps (1,)
// -> q (T, H D)
QWEN15_API int qwen15_qkv(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("qkv", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    const float* x = call.floats(0, "x", 2);
    int64_t tokens = call.dim(0, 0);
    int i = 1;
    Qkv s = read_qkv(call, i, call.number(n - 2, "eps"), call.dim(0, 1));
    s.cache = call.cache(i + 4);
    check_heads(s);
    check_rope(call, i, s.cache.head_dim);
    s.cos = call.floats(i, "cos", 2);
    s.sin = call.floats(i + 1, "sin", 2);
    const int32_t* positions = call.bounded(i + 2, "positions", tokens, 0, call.dim(i, 0));
    const int32_t* slots = call.bounded(i + 3, "slots", tokens, -1, s.cache.num_blocks * s.cache.block_size);
    qkv(s, x, tokens, positions, slots, call.floats(i + 7, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_qkvInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[0][0], shapes[2][0]};
}

// q (T, H D), key_cache, value_cache, query_lens (B,), context_lens (B,), block_tables (B, M) -> (T, H D)
QWEN15_API int qwen15_attention(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("attention", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    const float* q = call.floats(0, "q", 2);
    Cache cache = call.cache(1);
    int64_t kv_cols = cache.kv_heads * cache.head_dim;
    if (call.dim(0, 1) % kv_cols != 0)
      fail("q has %lld columns, no multiple of %lld", static_cast<long long>(call.dim(0, 1)),
           static_cast<long long>(kv_cols));
    Batch batch = call.batch(3, call.dim(0, 0), cache.num_blocks, cache.block_size);
    attention(q, call.dim(0, 1) / cache.head_dim, cache, batch, call.floats(6, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_attentionInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[0][0], shapes[0][1]};
}

// x (T, I), w (O, I) -> (T, O)
QWEN15_API int qwen15_project(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("project", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    const float* x = call.floats(0, "x", 2);
    int i = 1;
    Matrix w = call.matrix(i, "w", call.dim(0, 1));
    project(w, x, call.dim(0, 0), nullptr, call.floats(i, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_projectInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[0][0], shapes[1][0]};
}

// x (T, I), w (O, I), residual (T, O) -> (T, O)
QWEN15_API int qwen15_project_add(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*,
                                  void*) {
  return guarded("project_add", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    const float* x = call.floats(0, "x", 2);
    int i = 1;
    Matrix w = call.matrix(i, "w", call.dim(0, 1));
    const float* residual = call.floats(i, "residual", 2);
    if (call.dim(i, 0) != call.dim(0, 0) || call.dim(i, 1) != w.rows) fail("residual does not have the output's shape");
    project(w, x, call.dim(0, 0), residual, call.floats(i + 1, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_project_addInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[0][0], shapes[1][0]};
}

// x (T, E), norm (E,), w1 (F, E), w3 (F, E), eps (1,) -> (T, F)
QWEN15_API int qwen15_gate_up(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("gate_up", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    const float* x = call.floats(0, "x", 2);
    GateUp s;
    s.norm = call.vector(1, "norm", call.dim(0, 1));
    int i = 2;
    s.w1 = call.matrix(i, "w1", call.dim(0, 1));
    s.w3 = call.matrix(i, "w3", call.dim(0, 1), s.w1.rows);
    s.eps = call.number(i, "eps");
    gate_up(s, x, call.dim(0, 0), call.floats(i + 1, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_gate_upInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[0][0], shapes[2][0]};
}

// x (T, E), query_lens (B,), norm (E,), w (V, E), eps (1,) -> (B, V)
QWEN15_API int qwen15_head(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("head", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    const float* x = call.floats(0, "x", 2);
    Batch batch;
    batch.tokens = call.dim(0, 0);
    batch.query_lens = call.ints(1, "query_lens", 1);
    batch.sequences = call.dim(1, 0);
    check_query_lens(batch.query_lens, batch.sequences, batch.tokens);
    Head s;
    s.norm = call.vector(2, "norm", call.dim(0, 1));
    int i = 3;
    s.w = call.matrix(i, "w", call.dim(0, 1));
    s.eps = call.number(i, "eps");
    head(s, x, batch, call.floats(i + 1, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_headInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[1][0], shapes[3][0]};
}

// ids (T,), positions (T,), slots (T,), query_lens (B,), context_lens (B,), block_tables (B, M), eps (1,),
// binding (P,), cos (P, D), sin (P, D), table (V, E), norm (E,), head (V, E), then for each layer: norm, wq, bq, wk, bk,
// wv, bv, wo, norm2, w1, w3, w2, key_cache, value_cache -> logits (B, V)
// binding: 0, or the number under which everything after it is kept for `decode`; repeated P times where table and head
// hold one of P parts of the vocabulary.
QWEN15_API int qwen15_decoder(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("decoder", [&] {
    constexpr int kBound = 8;
    Call call(n, params, ndims, shapes, dtypes);
    int inputs = n - 1, i = kBound + 2;
    float eps = call.number(6, "eps");
    auto bound = std::make_shared<Bound>();
    Stack& stack = bound->stack;
    stack.table = call.table(i);
    int64_t hidden = stack.table.cols;
    stack.head.norm = call.vector(i++, "norm", hidden);
    stack.head.w = call.matrix(i, "head", hidden);
    stack.head.eps = eps;
    std::vector<Layer>& all = bound->layers;
    while (i < inputs) all.push_back(read_layer(call, i, eps, hidden));
    if (all.empty()) fail("there is no layer");
    for (size_t l = 1; l < all.size(); ++l) check_alike(all[0], all[l], l);
    const Cache& cache = all[0].qkv.cache;
    check_rope(call, 8, cache.head_dim);
    bound->positions = call.dim(8, 0);
    call.rank(0, "ids", 1);
    int64_t tokens = call.dim(0, 0);
    if (int32_t number = call.ints(7, "binding", 1)[0]) read_cut(number, &stack);
    check_parts(call.dim(7, 0), stack);
    const int32_t* ids = call.bounded(0, "ids", tokens, 0, stack.vocab());
    const int32_t* positions = call.bounded(1, "positions", tokens, 0, bound->positions);
    const int32_t* slots = call.bounded(2, "slots", tokens, -1, cache.num_blocks * cache.block_size);
    Batch batch = call.batch(3, tokens, cache.num_blocks, cache.block_size);
    stack.layers = all.data();
    stack.layer_count = static_cast<int64_t>(all.size());
    if (int32_t number = call.ints(7, "binding", 1)[0]) {
      bound->addresses.assign(params + kBound, params + inputs);
      keep_bound(number, bound);
    }
    decoder(stack, ids, batch, positions, slots, call.floats(inputs, "output", 2));
  });
}
QWEN15_API std::vector<int64_t> qwen15_decoderInferShape(int* ndims, int64_t** shapes, AotExtra*) {
  int norm = 10;
  while (ndims[norm] != 1) ++norm;  // what comes before it belongs to the table
  return {shapes[3][0], shapes[7][0] * shapes[norm + 1][0]};
}

namespace {

constexpr int kTable = 3;  // column of rows at which the block table begins

// One new token for each sequence on what is bound: rows (B, columns), logits (B, V), largest (B,) or null.
void decode_bound(const Bound& bound, const int32_t* rows, int64_t sequences, int64_t columns, float* logits,
                  int32_t* largest) {
  const Stack& stack = bound.stack;
  if (sequences < 1 || columns <= kTable)
    fail("rows are (%lld, %lld): no sequence, or no block table", static_cast<long long>(sequences),
         static_cast<long long>(columns));
  const Cache& cache = stack.layers[0].qkv.cache;
  std::vector<int32_t> numbers(5 * sequences);
  int32_t *ids = numbers.data(), *ones = ids + sequences, *lens = ones + sequences, *positions = lens + sequences,
          *slots = positions + sequences;
  for (int64_t b = 0; b < sequences; ++b) {
    const int32_t* row = rows + b * columns;
    ids[b] = row[0];
    ones[b] = 1;
    lens[b] = row[1];
    positions[b] = row[1] - 1;
    slots[b] = row[2];
    check_between("ids", b, ids[b], 0, stack.vocab());
    check_between("positions", b, positions[b], 0, bound.positions);
    check_between("slots", b, slots[b], -1, cache.num_blocks * cache.block_size);
  }
  std::vector<int32_t> tables;
  tables.reserve(sequences * (columns - kTable));
  for (int64_t b = 0; b < sequences; ++b)
    tables.insert(tables.end(), rows + b * columns + kTable, rows + (b + 1) * columns);
  Batch batch;
  batch.tokens = batch.sequences = sequences;
  batch.query_lens = ones;
  batch.context_lens = lens;
  batch.block_tables = tables.data();
  batch.table_stride = columns - kTable;
  check_batch(batch, cache.num_blocks, cache.block_size);
  decoder(stack, ids, batch, positions, slots, logits, largest);
}

}  // namespace

// binding (P,), rows (B, 3 + M), head (V, E) -> logits (B, V): `decoder` with one new token for each sequence, on the
// weights and caches it has kept. A row is id, context_len, slot, then the sequence's block table. The head is passed
// for its shape; that it is the one that is kept is checked.
QWEN15_API int qwen15_decode(int n, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  return guarded("decode", [&] {
    Call call(n, params, ndims, shapes, dtypes);
    std::shared_ptr<const Bound> bound = find_bound(call.ints(0, "binding", 1)[0]);
    const Stack& stack = bound->stack;
    check_parts(call.dim(0, 0), stack);
    const int32_t* rows = call.ints(1, "rows", 2);
    int i = 2;
    if (call.matrix(i, "head", stack.head.w.cols, stack.head.w.rows).data != stack.head.w.data)
      fail("head is not the one that is kept under this binding");
    decode_bound(*bound, rows, call.dim(1, 0), call.dim(1, 1), call.floats(i, "output", 2), nullptr);
  });
}
// The same without MindSpore: rows (sequences, columns), logits (sequences, vocab) of the caller's, and largest
// (sequences,) as `decoder` gives it.
QWEN15_API int qwen15_decode_bound(int64_t number, const int32_t* rows, int64_t sequences, int64_t columns, float* logits,
                                   int64_t vocab, int32_t* largest) {
  return guarded("decode", [&] {
    std::shared_ptr<const Bound> bound = find_bound(number);
    if (vocab != bound->stack.vocab())
      fail("logits have %lld columns, the vocabulary %lld", static_cast<long long>(vocab),
           static_cast<long long>(bound->stack.vocab()));
    decode_bound(*bound, rows, sequences, columns, logits, largest);
  });
}
QWEN15_API std::vector<int64_t> qwen15_decodeInferShape(int*, int64_t** shapes, AotExtra*) {
  return {shapes[1][0], shapes[0][0] * shapes[2][0]};
}
