// What the kernels share: dtypes, views of memory, and the table of functions every instruction set fills in.
//
// Shapes use one alphabet: T tokens, B sequences, H query heads, K key/value heads, D head size, E hidden,
// F intermediate, V vocabulary. Matrices are row-major. Nothing here owns memory.
#pragma once
#include <stdint.h>

namespace qwen15 {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, q8 = 3, q4 = 4 };  // q8, q4: quantised, see Matrix

constexpr int64_t kQuantBlock = 32;  // columns of a quantised matrix come in such blocks

static inline bool is_quantised(DType dtype) { return dtype == DType::q8 || dtype == DType::q4; }
// Of one element; only for those that are not quantised.
static inline int64_t dtype_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Vector {  // (n,)
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// (rows, cols), rows are outputs and cols are inputs, as checkpoints store linear layers.
//
// A quantised one means scale (q - zero), with a scale and a zero point for each row and group of cols / groups
// columns.
//   q8  data int8 (rows, cols)
//   q4  data uint8 (rows, cols / 2): 32 columns are 16 bytes, eight little-endian words of 16 bits; bits 4k to 4k + 3
//       of word l are column 8k + l, 0 to 15
// cols and the columns of a group are multiples of 32. Its columns may be stored in another order: stored column j
// belongs to input order[j].
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  Vector scale;                    // (rows, groups)
  const void* zero = nullptr;      // (rows, groups) int8 (q8) or uint8 (q4); null: 0 or 8 everywhere
  int64_t groups = 0;
  const int32_t* order = nullptr;  // (cols,)

  int64_t row_bytes() const {
    return dtype == DType::q8 ? cols : dtype == DType::q4 ? cols / 2 : cols * dtype_bytes(dtype);
  }
};

// Left operand of a matmul, (T, stride) with the row's tail beyond the matrix' cols zero. Rounded to bf16 when the
// weight it meets is bf16 and float32 otherwise; `pairs` says how it is stored, because only instruction sets with a
// bf16 dot product keep it as 16 bits.
struct Activations {
  void* data = nullptr;
  int64_t stride = 0;    // in elements
  bool rounded = false;  // to bf16
  bool pairs = false;    // true: uint16 bf16; false: float
  bool exact = false;    // when few meet quantised weights they keep 31 bits, not 16
  void* spare = nullptr; // room for (T, stride) floats where many meet quantised weights and the kernels ask for it
};

// Elements per row that keep every vector load inside the row, whatever the instruction set. One cache line more, so
// that the rows of a power of two do not all fall into the same few sets of the cache.
static inline int64_t padded(int64_t cols) { return (cols + 63) / 64 * 64 + 32; }

struct Cache {  // one layer's keys and values, each (num_blocks, block_size, K, D)
  void* k = nullptr;
  void* v = nullptr;
  DType dtype = DType::f32;
  int64_t num_blocks = 0, block_size = 0, kv_heads = 0, head_dim = 0;
};

// The largest of a row's values met so far, in any order: the first of equal ones, as NumPy's argmax finds it.
struct Largest {
  static constexpr int32_t kNone = INT32_MAX, kNaN = -1;
  float value = -__builtin_inff();
  int32_t column = kNone;  // kNaN: one of the values was not a number
};

static inline void meet(Largest* best, float value, int32_t column) {
  if (best->column == Largest::kNaN || column == Largest::kNone) return;
  if (column == Largest::kNaN || value > best->value || (value == best->value && column < best->column))
    best->value = value, best->column = column;
}

// One matmul y = x W^T with what is done to y on its way out:
//   plain  out = y + bias + residual        (bias and residual optional; residual may be out itself)
//   gated  act = silu(x W^T) * (x U^T)       (when `up` is given)
struct Job {
  Matrix w;
  Vector bias;
  const float* residual = nullptr;  // (T, out_stride)
  float* out = nullptr;             // (T, out_stride)
  int64_t out_stride = 0;
  Largest* largest = nullptr;       // (T,) plain: meets the caller's columns of y while they are in its caches
  Matrix up;
  Activations act;  // gated: written here unless `out` is given
};

// Whether the same activations meet both matrices, and their rows can be taken side by side.
inline bool are_alike(const Matrix& a, const Matrix& b) {
  return is_quantised(a.dtype) == is_quantised(b.dtype) && (is_quantised(a.dtype) || a.dtype == b.dtype) &&
         a.order == b.order;
}

// The flat batch: T tokens of B sequences, one after the other.
struct Batch {
  int64_t tokens = 0, sequences = 0, table_stride = 0;
  const int32_t* query_lens = nullptr;    // (B,) sums to T
  const int32_t* context_lens = nullptr;  // (B,) length of the sequence, these tokens included
  const int32_t* block_tables = nullptr;  // (B, table_stride)
};

// Where decode's partial results meet; see Partial in attention.h.
struct AttentionScratch {
  float* partials = nullptr;
  int threads = 1;  // that there are: how many work changes, and the sums must not
};
constexpr int64_t kFewQueries = 4;    // new tokens below which a sequence is treated as decode
constexpr int64_t kPieceTokens = 64;  // cached tokens for which it is worth to leave a partial result, and
static inline int64_t attention_pieces(int threads) { return threads > 8 ? 4 * threads : 32; }  // how many at most a token
int64_t attention_partial_floats(int64_t heads, int64_t head_dim);
int64_t attention_partials(const Batch& batch, int threads);

class Team;

// The functions one instruction set provides. All of them are called by every thread of a team with the same
// arguments; `team` says which share is the caller's. None of them waits for the others unless it says so.
struct Kernels {
  const char* name;
  bool bf16_pairs;  // has a bf16 dot product, so activations for bf16 weights are stored as bf16
  int64_t spare_from;  // tokens from which `Activations::spare` is wanted

  // out[t, :] = x[t, :] * rsqrt(mean(x[t]^2) + eps) * w, for t in [0, T); x (T, x_stride) float32
  void (*rmsnorm)(Team& team, const float* x, int64_t x_stride, int64_t tokens, int64_t cols, Vector w, float eps,
                  Activations out);
  // out = x as activations
  void (*prepare)(Team& team, const float* x, int64_t x_stride, int64_t tokens, int64_t cols, Activations out);
  // The matrices of all jobs are alike, and in stored order. Waits for the team where activations have a `spare`.
  void (*matmul)(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens);
  // Prefetches the first weights that this thread reads in a matmul which begins with `job`.
  void (*ask)(Team& team, const Job& job, int64_t tokens);
  // q and k of qkv (T, (H + 2K) D) rotated in place, k and v written to their slots; slot -1 writes nothing
  void (*rope_and_cache)(Team& team, float* qkv, int64_t tokens, int64_t heads, const float* cos, const float* sin,
                         const int32_t* positions, const int32_t* slots, const Cache& cache);
  // q (T, q_stride) holding H D columns, out as activations or float32 (T, H D). Waits for the team inside.
  void (*attention)(Team& team, const float* q, int64_t q_stride, int64_t heads, const Cache& cache,
                    const Batch& batch, float* out, Activations act, AttentionScratch& scratch);
  // out[t, j] = x[t, order[j]] for both float
  void (*gather)(Team& team, Activations x, int64_t tokens, int64_t cols, const int32_t* order, Activations out);
  // silu(gate) * up (T, cols) float32, as activations or float32 (T, cols)
  void (*combine)(Team& team, const float* gate, const float* up, int64_t tokens, int64_t cols, float* out,
                  Activations act);
  void (*embed)(Team& team, const int32_t* ids, int64_t tokens, Matrix table, float* out);

  // Over one row of logits; see select.h.
  bool (*chunk_maxima)(const float* logits, int64_t n, float* maxima);
  double (*sum_exp)(const float* logits, int64_t n, float inverse_temperature, float top);
  // Probes for the bench: a sum over `bytes` of memory; floating point operations done in `repeats` rounds. See
  // probe.h.
  uint64_t (*read_bytes)(const void* data, int64_t bytes, bool split);
  double (*peak_flops)(int64_t repeats, DType dtype);
};

constexpr int kLogitChunk = 256;  // logits per maximum of chunk_maxima

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;  // its null functions are kernels_avx512_bf16's
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dot;  // its null functions are kernels_neon's
extern const Kernels kernels_neon_bf16;

}  // namespace qwen15
