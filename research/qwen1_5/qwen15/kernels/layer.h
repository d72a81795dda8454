// The network's steps, composed of kernels: each as one operator of its own, or all of them as one whole stack.
#pragma once
#include "ranks.h"
#include "types.h"

namespace qwen15 {

struct Qkv {
  Vector norm;  // (E,)
  float eps = 0;
  Matrix wq, wk, wv;  // (H D, E), (K D, E), (K D, E)
  Vector bq, bk, bv;
  const float *cos = nullptr, *sin = nullptr;  // (P, D)
  Cache cache;
};

struct GateUp {
  Vector norm;  // (E,)
  float eps = 0;
  Matrix w1, w3;  // (F, E)
};

struct Head {
  Vector norm;  // (E,)
  float eps = 0;
  Matrix w;  // (V, E)
};

struct Layer {
  Qkv qkv;
  Matrix wo;  // (E, H D)
  GateUp gate_up;
  Matrix w2;  // (E, F)
};

struct Stack {
  Matrix table;  // (V, E)
  const Layer* layers = nullptr;
  int64_t layer_count = 0;
  Head head;
  // Over several ranks: `layers` are slices of theirs. The head's rows are cut among them too, and where the vocabulary
  // is split, table and head hold this rank's rows only.
  Ranks* ranks = nullptr;
  bool split_vocab = false;

  int64_t vocab() const { return split_vocab ? head.w.rows * ranks->ranks() : head.w.rows; }
};

// Whether a few activations that meet quantised weights keep 31 bits, as float32 computing wants it (the default), or 16,
// which is more than bf16 has and takes half the arithmetic.
bool exact_activations();
void set_exact_activations(bool exact);

// Each is what the operator of the same name is; shapes in operators.cpp.
void embed_tokens(const int32_t* ids, int64_t tokens, Matrix table, float* out);
void qkv(const Qkv& step, const float* x, int64_t tokens, const int32_t* positions, const int32_t* slots, float* q);
void attention(const float* q, int64_t heads, const Cache& cache, const Batch& batch, float* out);
void project(Matrix w, const float* x, int64_t tokens, const float* residual, float* out);
void gate_up(const GateUp& step, const float* x, int64_t tokens, float* out);
void head(const Head& step, const float* x, const Batch& batch, float* logits);
// largest (B,), where it is given: the first column of each row's largest logit, -1 where that is not finite or one is NaN.
void decoder(const Stack& stack, const int32_t* ids, const Batch& batch, const int32_t* positions,
             const int32_t* slots, float* logits, int32_t* largest = nullptr);

}  // namespace qwen15
