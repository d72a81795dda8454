// Steps of the network on a team of threads, and the whole stack in one dispatch.
#include "layer.h"

#include <stdlib.h>
#include <string.h>

#include <mutex>
#include <new>
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

int64_t activation_bytes(int64_t tokens, int64_t cols) { return Arena::rounded(tokens * padded(cols) * 4); }

// Activations that will meet a weight of `w`'s dtype.
Activations activations(Arena& memory, int64_t tokens, int64_t cols, const Matrix& w) {
  Activations x;
  x.pairs = rounds(w) && kernels().bf16_pairs;
  x.stride = padded(cols);
  x.data = x.pairs ? static_cast<void*>(memory.take<uint16_t>(tokens * x.stride))
                   : static_cast<void*>(memory.take<float>(tokens * x.stride));
  return x;
}

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

// norm + q/k/v + RoPE + cache write; ends with a barrier. width = (H + 2K) D
void qkv_step(Team& team, const Kernels& k, const Qkv& s, const float* x, int64_t tokens, const int32_t* positions,
              const int32_t* slots, Activations normed, float* out) {
  int64_t dim = s.cache.head_dim, q_cols = s.wq.rows, kv_cols = s.wk.rows, width = q_cols + 2 * kv_cols;
  Job jobs[3] = {plain(s.wq, s.bq, out, width), plain(s.wk, s.bk, out + q_cols, width),
                 plain(s.wv, s.bv, out + q_cols + kv_cols, width)};
  k.ask(team, jobs[0], tokens);
  k.rmsnorm(team, x, s.wq.cols, tokens, s.wq.cols, s.norm, s.eps, normed, rounds(s.wq));
  team.barrier();
  k.matmul(team, jobs, 3, normed, tokens);
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

// Final norm and logits of B rows; ends without a barrier.
void head_step(Team& team, const Kernels& k, const Head& s, const float* rows, int64_t count, Activations normed,
               float* logits) {
  Job job = plain(s.w, Vector(), logits, s.w.rows);
  k.ask(team, job, count);
  k.rmsnorm(team, rows, s.w.cols, count, s.w.cols, s.norm, s.eps, normed, rounds(s.w));
  team.barrier();
  k.matmul(team, &job, 1, normed, count);
}

}  // namespace

void embed_tokens(const int32_t* ids, int64_t tokens, Matrix table, float* out) {
  run_team([&](Team& team) { kernels().embed(team, ids, tokens, table, out); });
}

void qkv(const Qkv& s, const float* x, int64_t tokens, const int32_t* positions, const int32_t* slots, float* q) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  int64_t width = s.wq.rows + 2 * s.wk.rows;
  memory.reserve(activation_bytes(tokens, s.wq.cols) + Arena::rounded(tokens * width * 4));
  Activations normed = activations(memory, tokens, s.wq.cols, s.wq);
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
  AttentionScratch scratch = {memory.take<float>(floats)};
  run_team(size, [&](Team& team) {
    kernels().attention(team, q, heads * cache.head_dim, heads, cache, batch, out, Activations(), false, scratch);
  });
}

void project(Matrix w, const float* x, int64_t tokens, const float* residual, float* out) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  memory.reserve(activation_bytes(tokens, w.cols));
  Activations a = activations(memory, tokens, w.cols, w);
  run_team([&](Team& team) {
    kernels().prepare(team, x, w.cols, tokens, w.cols, a, rounds(w));
    team.barrier();
    Job job = adding(w, residual, out);
    kernels().matmul(team, &job, 1, a, tokens);
  });
}

void gate_up(const GateUp& s, const float* x, int64_t tokens, float* out) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  memory.reserve(activation_bytes(tokens, s.w1.cols));
  Activations normed = activations(memory, tokens, s.w1.cols, s.w1);
  run_team([&](Team& team) {
    kernels().rmsnorm(team, x, s.w1.cols, tokens, s.w1.cols, s.norm, s.eps, normed, rounds(s.w1));
    team.barrier();
    Job job = plain(s.w1, Vector(), out, s.w1.rows);
    job.up = s.w3;
    kernels().matmul(team, &job, 1, normed, tokens);
  });
}

void head(const Head& s, const float* x, const Batch& batch, float* logits) {
  std::lock_guard<std::mutex> lock(turn);
  Arena& memory = arena();
  int64_t count = batch.sequences, cols = s.w.cols;
  memory.reserve(activation_bytes(count, cols) + Arena::rounded(count * cols * 4));
  Activations normed = activations(memory, count, cols, s.w);
  float* rows = memory.take<float>(count * cols);
  run_team([&](Team& team) {
    last_tokens(team, x, cols, batch, rows);
    team.barrier();
    head_step(team, kernels(), s, rows, count, normed, logits);
  });
}

namespace {

struct Buffers {
  Activations normed, attended, gated;
  float *x, *qkv, *rows;
  Activations head_normed;
  AttentionScratch scratch;
};

// One piece of the batch through all layers; ends with a barrier and x holding the piece's last hidden states.
void run_layers(Team& team, const Kernels& k, const Stack& stack, const int32_t* ids, const Batch& batch,
                const int32_t* positions, const int32_t* slots, Buffers& m) {
  int64_t tokens = batch.tokens;
  k.embed(team, ids, tokens, stack.table, m.x);
  team.barrier();
  for (int64_t l = 0; l < stack.layer_count; ++l) {
    const Layer& layer = stack.layers[l];
    int64_t heads = layer.qkv.wq.rows / layer.qkv.cache.head_dim;
    int64_t width = layer.qkv.wq.rows + 2 * layer.qkv.wk.rows;
    qkv_step(team, k, layer.qkv, m.x, tokens, positions, slots, m.normed, m.qkv);
    k.attention(team, m.qkv, width, heads, layer.qkv.cache, batch, nullptr, m.attended, rounds(layer.wo), m.scratch);
    Job out = adding(layer.wo, m.x, m.x), down = adding(layer.w2, m.x, m.x), gated;
    gated.w = layer.gate_up.w1;
    gated.up = layer.gate_up.w3;
    gated.act = m.gated;
    k.ask(team, out, tokens);
    team.barrier();
    k.matmul(team, &out, 1, m.attended, tokens);
    team.barrier();
    k.ask(team, gated, tokens);
    k.rmsnorm(team, m.x, layer.wo.rows, tokens, layer.wo.rows, layer.gate_up.norm, layer.gate_up.eps, m.normed,
              rounds(layer.gate_up.w1));
    team.barrier();
    k.matmul(team, &gated, 1, m.normed, tokens);
    k.ask(team, down, tokens);
    team.barrier();
    k.matmul(team, &down, 1, m.gated, tokens);
    team.barrier();
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

}  // namespace

void decoder(const Stack& stack, const int32_t* ids, const Batch& batch, const int32_t* positions,
             const int32_t* slots, float* logits) {
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
  memory.reserve(activation_bytes(tokens, hidden) + activation_bytes(tokens, q_cols) + activation_bytes(tokens, inner) +
                 activation_bytes(sequences, hidden) + Arena::rounded(tokens * hidden * 4) +
                 Arena::rounded(tokens * width * 4) + Arena::rounded(sequences * hidden * 4) +
                 Arena::rounded(partials * 4));
  Buffers m;
  m.normed = activations(memory, tokens, hidden, first.qkv.wq);
  m.attended = activations(memory, tokens, q_cols, first.wo);
  m.gated = activations(memory, tokens, inner, first.w2);
  m.head_normed = activations(memory, sequences, hidden, stack.head.w);
  m.x = memory.take<float>(tokens * hidden);
  m.qkv = memory.take<float>(tokens * width);
  m.rows = memory.take<float>(sequences * hidden);
  m.scratch.partials = memory.take<float>(partials);
  Piece piece;
  run_team(size, [&](Team& team) {
    const Kernels& k = kernels();
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
    head_step(team, k, stack.head, m.rows, sequences, m.head_normed, logits);
  });
}

}  // namespace qwen15
