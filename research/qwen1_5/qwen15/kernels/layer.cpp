// Steps of the network on a team of threads, and the whole stack in one dispatch.
#include "layer.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "team.h"

namespace qwen15 {

int64_t attention_partial_floats(int64_t heads, int64_t head_dim) {
  return 2 * ((heads + 15) / 16 * 16) + heads * ((head_dim + 31) / 32 * 32);
}

int64_t attention_partials(const Batch& batch, int threads) {
  int64_t count = 0, most = attention_pieces(threads);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    // A long prompt goes through the layers in pieces, of which the last may have few tokens.
    int64_t queries = batch.query_lens[b] < kFewQueries ? batch.query_lens[b] : kFewQueries - 1;
    int64_t pieces = batch.context_lens[b] / kPieceTokens + 1;
    count += queries * (pieces < most ? pieces : most);
  }
  return count;
}

namespace {

std::atomic<bool> keeps_all{true};

// Tokens that go through all layers together. Longer inputs go in pieces, so that memory for activations is bounded
// whatever the prompt; a piece attends to the cache, where the pieces before it already are.
constexpr int64_t kPiece = 1024;

// Aligned memory for the activations of one call, kept from call to call.
class Arena {
 public:
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= bytes_) return;
    free(data_);
    bytes_ = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(aligned_alloc(4096, bytes_));
    if (data_ == nullptr) {
      bytes_ = 0;
      throw std::bad_alloc();
    }
  }
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  template <class X>
  X* take(int64_t count) {
    X* part = reinterpret_cast<X*>(data_ + used_);
    used_ += rounded(count * static_cast<int64_t>(sizeof(X)));
    return part;
  }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0, used_ = 0;
};

// One arena for all callers, who take turns: the operators come from whichever thread of MindSpore's is free.
std::mutex turn;
Arena& arena() {
  static Arena* memory = new Arena();  // never destroyed, see Pool::instance
  return *memory;
}

bool rounds(const Matrix& w) { return w.dtype == DType::bf16; }

// The left operand (T, cols) of matmuls, in the forms that their matrices ask for.
class Operand {
 public:
  Operand(int64_t tokens, int64_t cols) : tokens_(tokens), cols_(cols) {}

  // A matrix that it will meet; all are named before `bytes` and `place`.
  void meets(const Matrix& w) {
    (rounds(w) ? rounded_ : exact_).asked = true;
    if (w.order != nullptr) ordered_.asked = true;
    if (is_quantised(w.dtype) && tokens_ >= kernels().spare_from) spare_.asked = true;
  }
  int64_t bytes() const {
    int64_t each = Arena::rounded(tokens_ * padded(cols_) * static_cast<int64_t>(sizeof(float)));
    return each * (rounded_.asked + exact_.asked + ordered_.asked + spare_.asked);
  }
  void place(Arena& memory) {
    for (Form* form : {&rounded_, &exact_, &ordered_, &spare_})
      if (form->asked) form->data = memory.take<float>(tokens_ * padded(cols_));
  }

  // The form for this matrix, in the order of x.
  Activations form(const Matrix& w) const {
    Activations x;
    x.stride = padded(cols_);
    x.rounded = rounds(w);
    x.pairs = x.rounded && kernels().bf16_pairs;
    x.exact = exact_activations();
    x.data = x.rounded ? rounded_.data : exact_.data;
    if (is_quantised(w.dtype)) x.spare = spare_.data;
    return x;
  }
  // The form for this matrix, in the order of its columns. Waits for the team where that is another one.
  Activations ordered(Team& team, const Kernels& k, const Matrix& w, int64_t tokens) const {
    Activations x = form(w);
    if (w.order == nullptr) return x;
    Activations out = x;
    out.data = ordered_.data;
    k.gather(team, x, tokens, w.cols, w.order, out);
    team.barrier();
    return out;
  }
  // RMSNorm of x (tokens, cols) in every form.
  void norm(Team& team, const Kernels& k, const float* x, int64_t tokens, Vector weight, float eps) const {
    for (const Form* form : {&rounded_, &exact_})
      if (form->asked) k.rmsnorm(team, x, cols_, tokens, cols_, weight, eps, every(form));
  }

 private:
  struct Form {
    bool asked = false;
    void* data = nullptr;
  };

  Activations every(const Form* form) const {
    Matrix w;
    w.dtype = form == &rounded_ ? DType::bf16 : DType::f32;
    return this->form(w);
  }

  int64_t tokens_, cols_;
  Form rounded_, exact_, ordered_, spare_;
};

// Room for the two products of a gated matmul whose matrices do not meet the same activations.
struct Products {
  bool asked = false;
  float *gate = nullptr, *up = nullptr;

  void meets(const GateUp& s) { asked = asked || !are_alike(s.w1, s.w3); }
  int64_t bytes(int64_t tokens, int64_t cols) const { return asked ? 2 * Arena::rounded(tokens * cols * 4) : 0; }
  void place(Arena& memory, int64_t tokens, int64_t cols) {
    if (!asked) return;
    gate = memory.take<float>(tokens * cols);
    up = memory.take<float>(tokens * cols);
  }
};

Job plain(const Matrix& w, Vector bias, float* out, int64_t stride) {
  Job job;
  job.w = w;
  job.bias = bias;
  job.out = out;
  job.out_stride = stride;
  return job;
}

Job adding(const Matrix& w, const float* residual, float* out) {
  Job job = plain(w, Vector(), out, w.rows);
  job.residual = residual;
  return job;
}

// Jobs on the same activations, those of matrices that are alike together. Ends without a barrier.
void multiply(Team& team, const Kernels& k, const Job* jobs, int count, const Operand& operand, int64_t tokens) {
  for (int first = 0; first < count;) {
    int last = first + 1;
    while (last < count && are_alike(jobs[first].w, jobs[last].w)) ++last;
    if (first > 0) team.barrier();
    k.matmul(team, jobs + first, last - first, operand.ordered(team, k, jobs[first].w, tokens), tokens);
    first = last;
  }
}

// norm + w1, w3 + SiLU, to `out` (T, F) or, where that is null, `act`. Ends without a barrier.
void gate_up_step(Team& team, const Kernels& k, const GateUp& s, const float* x, int64_t tokens, const Operand& normed,
                  const Products& products, float* out, Activations act) {
  int64_t inner = s.w1.rows;
  Job gated = plain(s.w1, Vector(), out, inner);
  gated.up = s.w3;
  gated.act = act;
  k.ask(team, gated, tokens);
  normed.norm(team, k, x, tokens, s.norm, s.eps);
  team.barrier();
  if (are_alike(s.w1, s.w3)) return multiply(team, k, &gated, 1, normed, tokens);
  Job jobs[2] = {plain(s.w1, Vector(), products.gate, inner), plain(s.w3, Vector(), products.up, inner)};
  multiply(team, k, jobs, 2, normed, tokens);
  team.barrier();
  k.combine(team, products.gate, products.up, tokens, inner, out, act);
}

// norm + q/k/v + RoPE + cache write; ends with a barrier. width = (H + 2K) D
void qkv_step(Team& team, const Kernels& k, const Qkv& s, const float* x, int64_t tokens, const int32_t* positions,
              const int32_t* slots, const Operand& normed, float* out) {
  int64_t dim = s.cache.head_dim, q_cols = s.wq.rows, kv_cols = s.wk.rows, width = q_cols + 2 * kv_cols;
  Job jobs[3] = {plain(s.wq, s.bq, out, width), plain(s.wk, s.bk, out + q_cols, width),
                 plain(s.wv, s.bv, out + q_cols + kv_cols, width)};
  k.ask(team, jobs[0], tokens);
  normed.norm(team, k, x, tokens, s.norm, s.eps);
  team.barrier();
  multiply(team, k, jobs, 3, normed, tokens);
  team.barrier();
  k.rope_and_cache(team, out, tokens, q_cols / dim, s.cos, s.sin, positions, slots, s.cache);
  team.barrier();
}

// The last token of every sequence, (B, E).
void last_tokens(Team& team, const float* x, int64_t cols, const Batch& batch, float* out) {
  int64_t begin, end, token = 0;
  team.share(batch.sequences, 1, &begin, &end);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    token += batch.query_lens[b];
    if (b >= begin && b < end) memcpy(out + b * cols, x + (token - 1) * cols, cols * sizeof(float));
  }
}

// Final norm and logits of B rows, of whose columns this thread's go into `largest` (B,) too, where it is given; ends
// without a barrier.
void head_step(Team& team, const Kernels& k, const Head& s, const float* rows, int64_t count, const Operand& normed,
               float* logits, Largest* largest = nullptr) {
  Job job = plain(s.w, Vector(), logits, s.w.rows);
  job.largest = largest;
  k.ask(team, job, count);
  normed.norm(team, k, rows, count, s.norm, s.eps);
  team.barrier();
  multiply(team, k, &job, 1, normed, count);
}

}  // namespace

bool exact_activations() { return keeps_all.load(std::memory_order_relaxed); }
void set_exact_activations(bool exact) { keeps_all.store(exact, std::memory_order_relaxed); }

void embed_tokens(const int32_t* ids, int64_t tokens, Matrix table, float* out) {
  run_team([&](Team& team) { kernels().embed(team, ids, tokens, table, out); });
}

void qkv(const Qkv& s, const float* x, int64_t tokens, const int32_t* positions, const int32_t* slots, float* q) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  int64_t width = s.wq.rows + 2 * s.wk.rows;
  Operand normed(tokens, s.wq.cols);
  for (const Matrix* w : {&s.wq, &s.wk, &s.wv}) normed.meets(*w);
  memory.reserve(normed.bytes() + Arena::rounded(tokens * width * 4));
  normed.place(memory);
  float* all = memory.take<float>(tokens * width);
  run_team([&](Team& team) {
    qkv_step(team, kernels(), s, x, tokens, positions, slots, normed, all);
    int64_t begin, end;
    team.share(tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; ++t) memcpy(q + t * s.wq.rows, all + t * width, s.wq.rows * sizeof(float));
  });
}

void attention(const float* q, int64_t heads, const Cache& cache, const Batch& batch, float* out) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  int size = threads();
  int64_t floats = attention_partial_floats(heads, cache.head_dim) * attention_partials(batch, size);
  memory.reserve(Arena::rounded(floats * 4));
  AttentionScratch scratch = {memory.take<float>(floats), size};
  run_team(size, [&](Team& team) {
    kernels().attention(team, q, heads * cache.head_dim, heads, cache, batch, out, Activations(), scratch);
  });
}

void project(Matrix w, const float* x, int64_t tokens, const float* residual, float* out) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  Operand operand(tokens, w.cols);
  operand.meets(w);
  memory.reserve(operand.bytes());
  operand.place(memory);
  run_team([&](Team& team) {
    kernels().prepare(team, x, w.cols, tokens, w.cols, operand.form(w));
    team.barrier();
    Job job = adding(w, residual, out);
    multiply(team, kernels(), &job, 1, operand, tokens);
  });
}

void gate_up(const GateUp& s, const float* x, int64_t tokens, float* out) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  Operand normed(tokens, s.w1.cols);
  normed.meets(s.w1);
  normed.meets(s.w3);
  Products products;
  products.meets(s);
  memory.reserve(normed.bytes() + products.bytes(tokens, s.w1.rows));
  normed.place(memory);
  products.place(memory, tokens, s.w1.rows);
  run_team([&](Team& team) {
    gate_up_step(team, kernels(), s, x, tokens, normed, products, out, Activations());
  });
}

void head(const Head& s, const float* x, const Batch& batch, float* logits) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  int64_t count = batch.sequences, cols = s.w.cols;
  Operand normed(count, cols);
  normed.meets(s.w);
  memory.reserve(normed.bytes() + Arena::rounded(count * cols * 4));
  normed.place(memory);
  float* rows = memory.take<float>(count * cols);
  run_team([&](Team& team) {
    last_tokens(team, x, cols, batch, rows);
    team.barrier();
    head_step(team, kernels(), s, rows, count, normed, logits);
  });
}

namespace {

struct Buffers {
  Operand normed, attended, gated, head_normed;
  Products products;
  float *x, *qkv, *rows;
  float *partial, *part;  // with several ranks: (T, E) of a sum's, (B, own rows of the head) of the logits
  AttentionScratch scratch;
};

// Embedding rows of a vocabulary that is split: each rank gives its own, and zeros for the others'.
void embed_split(Team& team, const Kernels& k, const Stack& stack, const int32_t* ids, int64_t tokens, Buffers& m) {
  int64_t rows = stack.table.rows, cols = stack.table.cols, first = stack.ranks->rank() * rows, begin, end;
  int32_t* own = reinterpret_cast<int32_t*>(m.qkv);  // which nobody needs yet
  team.share(tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t) own[t] = ids[t] >= first && ids[t] < first + rows ? ids[t] - first : 0;
  team.barrier();
  k.embed(team, own, tokens, stack.table, m.partial);
  team.barrier();
  for (int64_t t = begin; t < end; ++t) {
    memset(m.x + t * cols, 0, cols * sizeof(float));
    if (ids[t] < first || ids[t] >= first + rows) memset(m.partial + t * cols, 0, cols * sizeof(float));
  }
  team.barrier();
  stack.ranks->add(team, m.partial, tokens * cols, m.x);
}

// The sum of the ranks' x W^T added to m.x; W a slice of the columns. Without ranks that is one matmul. Begins behind a
// barrier that comes after the activations are whole, ends with a barrier.
void add_product(Team& team, const Kernels& k, const Stack& stack, const Job& job, const Operand& operand,
                 int64_t tokens, Buffers& m) {
  multiply(team, k, &job, 1, operand, tokens);
  team.barrier();
  if (stack.ranks != nullptr) stack.ranks->add(team, m.partial, tokens * job.w.rows, m.x);
}

// One piece of the batch through all layers; ends with a barrier and x holding the piece's last hidden states.
void run_layers(Team& team, const Kernels& k, const Stack& stack, const int32_t* ids, const Batch& batch,
                const int32_t* positions, const int32_t* slots, Buffers& m) {
  int64_t tokens = batch.tokens;
  if (stack.split_vocab) embed_split(team, k, stack, ids, tokens, m);
  else k.embed(team, ids, tokens, stack.table, m.x);
  team.barrier();
  for (int64_t l = 0; l < stack.layer_count; ++l) {
    const Layer& layer = stack.layers[l];
    int64_t heads = layer.qkv.wq.rows / layer.qkv.cache.head_dim;
    int64_t width = layer.qkv.wq.rows + 2 * layer.qkv.wk.rows;
    qkv_step(team, k, layer.qkv, m.x, tokens, positions, slots, m.normed, m.qkv);
    k.attention(team, m.qkv, width, heads, layer.qkv.cache, batch, nullptr, m.attended.form(layer.wo), m.scratch);
    bool alone = stack.ranks == nullptr;
    Job out = adding(layer.wo, alone ? m.x : nullptr, alone ? m.x : m.partial);
    Job down = adding(layer.w2, alone ? m.x : nullptr, alone ? m.x : m.partial);
    k.ask(team, out, tokens);
    team.barrier();
    add_product(team, k, stack, out, m.attended, tokens, m);
    gate_up_step(team, k, layer.gate_up, m.x, tokens, m.normed, m.products, nullptr, m.gated.form(layer.w2));
    k.ask(team, down, tokens);
    team.barrier();
    add_product(team, k, stack, down, m.gated, tokens, m);
  }
}

// Part of a batch: the tokens [begin, end) of it, as a batch of its own.
struct Piece {
  std::vector<int32_t> query_lens, context_lens, tables;
  std::vector<int64_t> finished;  // (sequence of the whole batch, or -1) for each sequence of the piece
  Batch batch;
};

void cut(const Batch& whole, int64_t begin, int64_t end, Piece* piece) {
  piece->query_lens.clear();
  piece->context_lens.clear();
  piece->tables.clear();
  piece->finished.clear();
  int64_t start = 0;
  for (int64_t b = 0; b < whole.sequences; ++b) {
    int64_t stop = start + whole.query_lens[b];
    int64_t from = start > begin ? start : begin, to = stop < end ? stop : end;
    if (from < to) {
      piece->query_lens.push_back(static_cast<int32_t>(to - from));
      piece->context_lens.push_back(static_cast<int32_t>(whole.context_lens[b] - (stop - to)));
      const int32_t* table = whole.block_tables + b * whole.table_stride;
      piece->tables.insert(piece->tables.end(), table, table + whole.table_stride);
      piece->finished.push_back(to == stop ? b : -1);
    }
    start = stop;
  }
  piece->batch.tokens = end - begin;
  piece->batch.sequences = static_cast<int64_t>(piece->query_lens.size());
  piece->batch.table_stride = whole.table_stride;
  piece->batch.query_lens = piece->query_lens.data();
  piece->batch.context_lens = piece->context_lens.data();
  piece->batch.block_tables = piece->tables.data();
}

// The head's rows from `begin` to `end`.
Head rows_of(const Head& head, int64_t begin, int64_t end) {
  Head part = head;
  Matrix& w = part.w;
  w.data = static_cast<const char*>(w.data) + begin * w.row_bytes();
  w.rows = end - begin;
  if (is_quantised(w.dtype)) {
    w.scale.data = static_cast<const char*>(w.scale.data) + begin * w.groups * dtype_bytes(w.scale.dtype);
    if (w.zero != nullptr) w.zero = static_cast<const char*>(w.zero) + begin * w.groups;
  }
  return part;
}

// Where each rank's columns of the logits begin, and V. Whole tables are cut in multiples of 64.
std::vector<int64_t> logit_columns(const Stack& stack) {
  int ranks = stack.ranks->ranks();
  int64_t vocab = stack.vocab(), each = stack.split_vocab ? stack.head.w.rows : (vocab / ranks + 63) / 64 * 64;
  std::vector<int64_t> begins;
  for (int r = 0; r < ranks; ++r) begins.push_back(each * r < vocab ? each * r : vocab);
  begins.push_back(vocab);
  return begins;
}

// What every thread of the team has found of B rows while it made the head's columns.
class Found {
 public:
  Found(int threads, int64_t rows) : rows_(rows), stride_((rows + 7) / 8 * 8), all_(threads * stride_) {}
  Largest* of(int rank) { return all_.data() + rank * stride_; }
  // Of all threads, row by row; `begin` is the number of their first column.
  void merge(int64_t begin, Largest* out) const {
    for (int64_t b = 0; b < rows_; ++b) {
      out[b] = Largest();
      for (size_t at = b; at < all_.size(); at += stride_) meet(&out[b], all_[at].value, all_[at].column);
      if (out[b].column != Largest::kNone && out[b].column != Largest::kNaN)
        out[b].column += static_cast<int32_t>(begin);
    }
  }

 private:
  int64_t rows_, stride_;  // whole cache lines for each thread
  std::vector<Largest> all_;
};

// The ranks' own (B,) -> of all of them, in `own`. Every thread of the team calls it, behind a barrier; `all`
// has room for those of every rank.
void join_largest(Team& team, Ranks& ranks, std::vector<Largest>* own, std::vector<Largest>* all) {
  constexpr int kFloats = sizeof(Largest) / sizeof(float);
  int64_t rows = static_cast<int64_t>(own->size());
  std::vector<int64_t> begins;
  for (int r = 0; r <= ranks.ranks(); ++r) begins.push_back(r * kFloats);
  ranks.join_columns(team, reinterpret_cast<const float*>(own->data()), rows, begins.data(), begins.back(),
                     reinterpret_cast<float*>(all->data()));
  if (team.rank() != 0) return;
  for (int64_t b = 0; b < rows; ++b) {
    Largest best;
    for (int r = 0; r < ranks.ranks(); ++r) {
      const Largest& other = (*all)[b * ranks.ranks() + r];
      meet(&best, other.value, other.column);
    }
    (*own)[b] = best;
  }
}

}  // namespace

void decoder(const Stack& stack, const int32_t* ids, const Batch& batch, const int32_t* positions,
             const int32_t* slots, float* logits, int32_t* largest) {
  const Layer& first = stack.layers[0];
  int64_t hidden = stack.table.cols, q_cols = first.qkv.wq.rows, width = q_cols + 2 * first.qkv.wk.rows;
  int64_t inner = first.gate_up.w1.rows, sequences = batch.sequences;
  int64_t heads = q_cols / first.qkv.cache.head_dim;
  int64_t tokens = batch.tokens < kPiece ? batch.tokens : kPiece;
  int size = threads();
  int64_t partials = attention_partial_floats(heads, first.qkv.cache.head_dim) *
                     attention_partials(batch, size);
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  Buffers m = {Operand(tokens, hidden), Operand(tokens, q_cols), Operand(tokens, inner), Operand(sequences, hidden),
               {}, nullptr, nullptr, nullptr, nullptr, nullptr, {}};
  Head own_head = stack.head;
  std::vector<int64_t> columns;
  int64_t partial_floats = 0, part_floats = 0;
  if (stack.ranks != nullptr) {
    columns = logit_columns(stack);
    int rank = stack.ranks->rank();
    if (!stack.split_vocab) own_head = rows_of(stack.head, columns[rank], columns[rank + 1]);
    partial_floats = tokens * hidden;
    part_floats = sequences * own_head.w.rows;
  }
  for (int64_t l = 0; l < stack.layer_count; ++l) {
    const Layer& layer = stack.layers[l];
    for (const Matrix* w : {&layer.qkv.wq, &layer.qkv.wk, &layer.qkv.wv, &layer.gate_up.w1, &layer.gate_up.w3})
      m.normed.meets(*w);
    m.attended.meets(layer.wo);
    m.gated.meets(layer.w2);
    m.products.meets(layer.gate_up);
  }
  m.head_normed.meets(stack.head.w);
  memory.reserve(m.normed.bytes() + m.attended.bytes() + m.gated.bytes() + m.head_normed.bytes() +
                 m.products.bytes(tokens, inner) + Arena::rounded(tokens * hidden * 4) +
                 Arena::rounded(tokens * width * 4) + Arena::rounded(sequences * hidden * 4) +
                 Arena::rounded(partials * 4) + Arena::rounded(partial_floats * 4) + Arena::rounded(part_floats * 4));
  for (Operand* operand : {&m.normed, &m.attended, &m.gated, &m.head_normed}) operand->place(memory);
  m.products.place(memory, tokens, inner);
  m.x = memory.take<float>(tokens * hidden);
  m.qkv = memory.take<float>(tokens * width);
  m.rows = memory.take<float>(sequences * hidden);
  m.scratch = {memory.take<float>(partials), size};
  m.partial = memory.take<float>(partial_floats);
  m.part = memory.take<float>(part_floats);
  Piece piece;
  Found found(largest == nullptr ? 0 : size, sequences);
  std::vector<Largest> best(largest == nullptr ? 0 : sequences);
  std::vector<Largest> bests(stack.ranks == nullptr ? 0 : stack.ranks->ranks() * best.size());
  run_team(size, [&](Team& team) {
    const Kernels& k = kernels();
    Largest* own = largest == nullptr ? nullptr : found.of(team.rank());
    for (int64_t at = 0; at < batch.tokens; at += kPiece) {
      if (team.rank() == 0) cut(batch, at, at + kPiece < batch.tokens ? at + kPiece : batch.tokens, &piece);
      team.barrier();
      run_layers(team, k, stack, ids + at, piece.batch, positions + at, slots + at, m);
      if (team.rank() == 0) {
        int64_t token = 0;
        for (int64_t i = 0; i < piece.batch.sequences; ++i) {
          token += piece.query_lens[i];
          if (piece.finished[i] >= 0)
            memcpy(m.rows + piece.finished[i] * hidden, m.x + (token - 1) * hidden, hidden * sizeof(float));
        }
      }
      team.barrier();
    }
    if (stack.ranks == nullptr) return head_step(team, k, stack.head, m.rows, sequences, m.head_normed, logits, own);
    if (own_head.w.rows > 0) head_step(team, k, own_head, m.rows, sequences, m.head_normed, m.part, own);
    team.barrier();
    if (largest != nullptr && team.rank() == 0) found.merge(columns[stack.ranks->rank()], best.data());
    stack.ranks->join_columns(team, m.part, sequences, columns.data(), columns.back(), logits);
    if (largest != nullptr) join_largest(team, *stack.ranks, &best, &bests);
  });
  if (largest != nullptr && stack.ranks == nullptr) found.merge(0, best.data());
  for (size_t b = 0; b < best.size(); ++b)
    largest[b] = best[b].column >= 0 && best[b].value - best[b].value == 0.0f ? best[b].column : -1;
  if (stack.ranks != nullptr && !stack.ranks->complaint().empty())
    throw std::runtime_error(stack.ranks->complaint());
}

}  // namespace qwen15
