// out[t, h, :] = softmax(q[t, h, :] . K^T / sqrt(D)) V over the cached tokens of t's own sequence up to t's position.
//
//   q (T, H D) float32; caches (num_blocks, block_size, K, D) f32/f16/bf16, found through block_tables (B, M) int32;
//   query head h reads key/value head h / (H / K). Scores, softmax and output accumulate in float32. Against a bf16 cache
//   q and the softmax weights are rounded to bf16 where the CPU has bf16 dot products.
//
// Decode (a sequence with few new tokens): the cached blocks of a sequence are cut into equal pieces; a thread reads a
// piece in address order for all heads at once and leaves (maximum, sum, weighted V) per head; then pieces are merged.
// Splitting by head instead would make every thread stride through every block.
// Prefill: an item is one key/value head and a block of query tokens; keys stream by in blocks of 128 with a running
// maximum and sum (Milakov and Gimelshein, 2018, arXiv:1805.02867), so no T x T matrix ever exists.
#pragma once
#include "amx.h"
#include "elementwise.h"
#include "matmul_dot.h"
#include "matmul_pack.h"
#include "team.h"

namespace qwen15 {
namespace {

constexpr int kKeys = 128;                  // keys per step of prefill
constexpr int64_t kQueryBytes = 3 * 32768;  // bytes of softmax weights of an item of prefill at such a step, and
constexpr int64_t kLeastRows = 96;          // (token, head) rows from which an item is not made smaller for the threads' sake
constexpr int kDecodeKeys = 32;             // keys per step of decode, at most, and
constexpr int64_t kDecodeBytes = 16384;     // about that many bytes of keys: they and their values stay in the first cache
constexpr float kMinusInfinity = -__builtin_inff();

struct Paged {
  const Cache& cache;
  const int32_t* table;
  // element offset of key/value head 0 of cached token `position`
  int64_t offset(int64_t position) const {
    int64_t block = table[position / cache.block_size];
    return (block * cache.block_size + position % cache.block_size) * cache.kv_heads * cache.head_dim;
  }
};

template <class R>
constexpr int kStepBytes = R::step * (int)sizeof(typename R::E);

template <class X>
void copy_row(const float* from, int64_t n, int64_t padded_n, X* to) {
  for (int64_t i = 0; i < padded_n; i += W) {
    int64_t left = n - i;
    store_activation<X>(to + i, left >= W ? v_load(from + i) : left > 0 ? v_load_part(from + i, (int)left) : v_zero());
  }
}

// ---------------------------------------------------------------- decode

constexpr int kValuePairs = kTileVecs >= 4 ? 2 : 1;  // pairs of vectors of a head's values taken at once

// out[i] = key_i . q[i] for 4 heads: with keys of their own, lying one after another, or with one that they share
template <class R, bool Shared>
inline void score4(const typename R::E* key, int64_t dim, const typename R::X* q, int64_t q_stride, float* out,
                   const char*& ahead) {
  constexpr int kLines = Shared ? 1 : 4;
  int64_t step = Shared ? 0 : dim, i = 0;
  V acc0 = v_zero(), acc1 = v_zero(), acc2 = v_zero(), acc3 = v_zero();
  for (; i + R::step <= dim; i += R::step) {
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l) __builtin_prefetch(ahead + l * kStepBytes<R>, 0, 3);
    ahead += kLines * kStepBytes<R>;
    acc0 = R::mac(acc0, R::load(key + i), q + i);
    acc1 = R::mac(acc1, R::load(key + step + i), q + q_stride + i);
    acc2 = R::mac(acc2, R::load(key + 2 * step + i), q + 2 * q_stride + i);
    acc3 = R::mac(acc3, R::load(key + 3 * step + i), q + 3 * q_stride + i);
  }
  if (i < dim) {
    int n = (int)(dim - i);
    __builtin_prefetch(ahead, 0, 3);
    ahead += kLines * n * sizeof(typename R::E);
    acc0 = R::mac(acc0, R::load_part(key + i, n), q + i);
    acc1 = R::mac(acc1, R::load_part(key + step + i, n), q + q_stride + i);
    acc2 = R::mac(acc2, R::load_part(key + 2 * step + i, n), q + 2 * q_stride + i);
    acc3 = R::mac(acc3, R::load_part(key + 3 * step + i, n), q + 3 * q_stride + i);
  }
  v_sum4(acc0, acc1, acc2, acc3, out);
}

// Scores of one cached token's keys (K, D) for all heads, s (H). As many bytes as are read are asked for at `ahead`.
template <class R>
inline void score(const typename R::E* keys, int64_t dim, int64_t kv, int64_t group, const typename R::X* q,
                  int64_t q_stride, float* s, const char*& ahead) {
  int64_t g = 0;
  if (group == 1)
    for (; g + 4 <= kv; g += 4) score4<R, false>(keys + g * dim, dim, q + g * q_stride, q_stride, s + g, ahead);
  for (; g < kv; ++g) {
    const typename R::X* mine = q + g * group * q_stride;
    const char* at = ahead;
    int64_t h = 0;
    for (; h + 4 <= group; h += 4) {
      at = ahead;
      score4<R, true>(keys + g * dim, dim, mine + h * q_stride, q_stride, s + g * group + h, at);
    }
    for (; h < group; ++h) s[g * group + h] = dot<R>(keys + g * dim, dim, mine + h * q_stride);
    int64_t bytes = dim * sizeof(typename R::E);
    if (group < 4)
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 3);
    ahead += bytes;
  }
}

// acc[h] = shrink[h] acc[h] + sum_j p[j * p_stride + h] values_h[j * stride] for H heads and P pairs of vectors (the
// first n elements of one pair if Part), in the order of `pair`. The heads share the values or have their own, `dim`
// apart. As many bytes as are read are asked for at `ahead`.
template <class R, int H, int P, bool Shared, bool Part>
__attribute__((noinline)) const char* add_values(const typename R::E* values, int64_t dim, int64_t stride, int64_t count,
                                                 const float* p, int64_t p_stride, float* acc, int64_t acc_stride,
                                                 const float* shrink, int n, const char* ahead) {
  V a[H][P][2];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < 2; ++u)
        a[h][i][u] = v_mul(v_load(acc + h * acc_stride + (2 * i + u) * W), v_set(shrink[h]));
  constexpr int kBytes = (Shared ? 1 : H) * P * 2 * W * (int)sizeof(typename R::E);
  for (int64_t j = 0; j < count; ++j, values += stride, p += p_stride) {
#pragma GCC unroll 16
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line, 0, 3);
    ahead += Part ? (Shared ? 1 : H) * n * (int)sizeof(typename R::E) : kBytes;
    V x[P][2];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      V weight = v_set(p[h]);
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) {
        if (!Shared || h == 0) {
          const typename R::E* from = values + h * dim + i * 2 * W;
          if (Part) R::pair_part(from, n, x[i]);
          else R::pair(from, x[i]);
        }
        a[h][i][0] = v_fma(x[i][0], weight, a[h][i][0]);
        a[h][i][1] = v_fma(x[i][1], weight, a[h][i][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < 2; ++u) v_store(acc + h * acc_stride + (2 * i + u) * W, a[h][i][u]);
  return ahead;
}

// The same for all of the head size.
template <class R, int H, bool Shared>
const char* add_heads(const typename R::E* values, int64_t dim, int64_t stride, int64_t count, const float* p,
                      int64_t p_stride, float* acc, int64_t acc_stride, const float* shrink, const char* ahead) {
  constexpr int kMost = kValuePairs * 2 * W;
  int64_t d = 0;
  for (; d + kMost <= dim; d += kMost)
    ahead = add_values<R, H, kValuePairs, Shared, false>(values + d, dim, stride, count, p, p_stride, acc + d,
                                                         acc_stride, shrink, 0, ahead);
  for (; d + 2 * W <= dim; d += 2 * W)
    ahead = add_values<R, H, 1, Shared, false>(values + d, dim, stride, count, p, p_stride, acc + d, acc_stride, shrink,
                                               0, ahead);
  if (d < dim)
    ahead = add_values<R, H, 1, Shared, true>(values + d, dim, stride, count, p, p_stride, acc + d, acc_stride, shrink,
                                              (int)(dim - d), ahead);
  return ahead;
}

// What one token's attention over a piece of its sequence leaves behind. Heads lie in the lanes of vectors.
struct Partial {
  int64_t heads, lanes, acc_stride;
  Partial(int64_t h, int64_t dim) : heads(h), lanes(round_up(h, 16)), acc_stride(round_up(dim, 32)) {}
  int64_t floats() const { return 2 * lanes + heads * acc_stride; }
  float* maximum(float* partial) const { return partial; }
  float* sum(float* partial) const { return partial + lanes; }
  float* acc(float* partial) const { return partial + 2 * lanes; }
};

// One token against cached tokens [begin, end). `next` gives the position from which this thread reads on afterwards,
// in the same sequence, or -1; it is asked when the last keys are at hand. While keys are scored their values are asked
// for, and while these are added the next keys: with a new place for every block the hardware's prefetcher does not
// keep up.
template <class R, class Next>
void decode_piece(Team& team, const float* q, int64_t heads, Paged paged, int64_t begin, int64_t end, float* partial,
                  Next next) {
  typedef typename R::X X;
  typedef typename R::E E;
  const Cache& cache = paged.cache;
  const Partial layout(heads, cache.head_dim);
  int64_t dim = cache.head_dim, kv = cache.kv_heads, group = heads / kv, lanes = layout.lanes, row = kv * dim;
  int64_t q_stride = round_up(dim, 2 * 16);
  int64_t keys_at_once = kDecodeBytes / (row * (int64_t)sizeof(E)) / 4 * 4;
  keys_at_once = keys_at_once > kDecodeKeys ? kDecodeKeys : keys_at_once < 8 ? 8 : keys_at_once;
  char* memory = (char*)team.scratch(heads * q_stride * sizeof(float) + (kDecodeKeys + 1) * lanes * sizeof(float));
  X* qs = (X*)memory;
  float* s = (float*)(memory + heads * q_stride * sizeof(float));  // (kDecodeKeys, lanes)
  float* shrink = s + kDecodeKeys * lanes;
  float *maximum = layout.maximum(partial), *sum = layout.sum(partial), *acc = layout.acc(partial);
  for (int64_t h = 0; h < heads; ++h) copy_row<X>(q + h * dim, dim, q_stride, qs + h * q_stride);
  for (int64_t h = 0; h < lanes; h += W) {
    v_store(maximum + h, v_set(kMinusInfinity));
    v_store(sum + h, v_zero());
  }
  memset(s, 0, kDecodeKeys * lanes * sizeof(float));
  memset(acc, 0, heads * layout.acc_stride * sizeof(float));
  V scale = v_set(1.0f / __builtin_sqrtf((float)dim));
  for (int64_t at = begin; at < end;) {
    // as many keys as lie one after another: up to the end of the block
    int64_t count = cache.block_size - at % cache.block_size;
    if (count > keys_at_once) count = keys_at_once;
    if (count > end - at) count = end - at;
    int64_t here = paged.offset(at), after = at + count < end ? at + count : next(), there = after < 0 ? here : paged.offset(after);
    const E *keys = (const E*)cache.k + here, *values = (const E*)cache.v + here;
    const char* ahead = (const char*)values;
    for (int64_t j = 0; j < count; ++j) score<R>(keys + j * row, dim, kv, group, qs, q_stride, s + j * lanes, ahead);
    for (int64_t h = 0; h < lanes; h += W) {
      V high = v_load(s + h);
      for (int64_t j = 1; j < count; ++j) high = v_max(high, v_load(s + j * lanes + h));
      V before = v_load(maximum + h), top = v_max(v_mul(high, scale), before), less = v_exp(v_sub(before, top));
      V total = v_mul(v_load(sum + h), less);
      for (int64_t j = 0; j < count; ++j) {
        V e = v_exp(v_sub(v_mul(v_load(s + j * lanes + h), scale), top));
        total = v_add(total, e);
        v_store(s + j * lanes + h, e);
      }
      v_store(maximum + h, top);
      v_store(sum + h, total);
      v_store(shrink + h, less);
    }
    ahead = (const char*)((const E*)cache.k + there);
    for (int64_t h = 0; h < heads;) {
      int64_t in_group = group - h % group, stride = layout.acc_stride;
      const E* v = values + h / group * dim;
      const char* from = h % group == 0 ? ahead : (const char*)v;  // what the first heads of a group asked for is enough
      float* to = acc + h * stride;
      int done = 1;
      if (group == 1 && h + 2 <= heads) {
        from = add_heads<R, 2, false>(v, dim, row, count, s + h, lanes, to, stride, shrink + h, from);
        done = 2;
      } else if (in_group >= 4) {
        from = add_heads<R, 4, true>(v, dim, row, count, s + h, lanes, to, stride, shrink + h, from);
        done = 4;
      } else if (in_group >= 2) {
        from = add_heads<R, 2, true>(v, dim, row, count, s + h, lanes, to, stride, shrink + h, from);
        done = 2;
      } else {
        from = add_heads<R, 1, true>(v, dim, row, count, s + h, lanes, to, stride, shrink + h, from);
      }
      if (h % group == 0) ahead = from;
      h += done;
    }
    at += count;
  }
}

// How a context is cut into pieces: by its own length alone, so that what a sequence gets does not hang on its company.
struct Pieces {
  int64_t block_size, most;

  Pieces(int64_t size, int threads) : block_size(size), most(attention_pieces(threads)) {}
  int64_t tokens(int64_t context) const {
    int64_t each = (context + most - 1) / most;
    return round_up(each < kPieceTokens ? kPieceTokens : each, block_size);
  }
  int64_t count(int64_t context) const { return (context + tokens(context) - 1) / tokens(context); }
};

// out[h] = sum_i exp(m_i - M) acc_i[h] / sum_i exp(m_i - M) l_i for heads [begin, end) of one token
template <class R>
void merge(Team& team, const Partial& layout, float* partials, int64_t count, int64_t dim, int64_t begin, int64_t end,
           float* out, Activations act, int64_t t) {
  int64_t floats = layout.floats(), columns = layout.heads * dim;
  float* weights = (float*)team.scratch(count * W * sizeof(float));
  for (int64_t first = begin / W * W; first < end; first += W) {
    V top = v_set(kMinusInfinity), total = v_zero();
    for (int64_t i = 0; i < count; ++i) top = v_max(top, v_load(layout.maximum(partials + i * floats) + first));
    for (int64_t i = 0; i < count; ++i) {
      V weight = v_exp(v_sub(v_load(layout.maximum(partials + i * floats) + first), top));
      total = v_fma(v_load(layout.sum(partials + i * floats) + first), weight, total);
      v_store(weights + i * W, weight);
    }
    V inverse = v_div(v_set(1.0f), total);
    for (int64_t i = 0; i < count; ++i) v_store(weights + i * W, v_mul(v_load(weights + i * W), inverse));
    for (int64_t h = first < begin ? begin : first; h < first + W && h < end; ++h)
      for (int64_t d = 0; d < dim; d += 2 * W) {
        V y[2] = {v_zero(), v_zero()};
        const float* from = layout.acc(partials) + h * layout.acc_stride + d;
        for (int64_t i = 0; i < count; ++i, from += floats) {
          V weight = v_set(weights[i * W + h - first]);
          y[0] = v_fma(v_load(from), weight, y[0]);
          y[1] = v_fma(v_load(from + W), weight, y[1]);
        }
        R::unpair(y);
        for (int64_t u = 0; u < 2 && d + u * W < dim; ++u) {
          int64_t left = dim - d - u * W;
          write_output(out, columns, act, t, h * dim + d + u * W, y[u], left < W ? (int)left : W);
        }
      }
  }
  if (out == nullptr && end == layout.heads) clear_tail(act, t, columns);
}

// ---------------------------------------------------------------- prefill

template <class R>
struct Prefill {  // the tile that keys and values are packed for
  typedef typename Packer<R>::Tile Tile;
};
#ifdef QWEN15_AMX
template <>
struct Prefill<PairRow> {
  typedef AmxPairs Tile;
};
#endif

// Values of `count` keys -> panel (count, vecs vectors) for the tile; dims [d, d + vecs W), zeros beyond `dim`.
template <class R>
void pack_values(const typename R::E* const* rows, int count, int64_t dim, int64_t d, int vecs, float* panel) {
  for (int j = 0; j < count; ++j)
    for (int v = 0; v < vecs; ++v) {
      int64_t at = d + v * W, left = dim - at;
      V x = left >= W ? R::floats(rows[j] + at) : R::floats_part(rows[j] + at, (int)left);
      v_store(panel + (j * vecs + v) * W, x);
    }
}
#ifdef QWEN15_BF16_PAIRS
template <class R>
void pack_values(const uint16_t* const* rows, int count, int64_t dim, int64_t d, int vecs, uint16_t* panel) {
  for (int j = 0; j < count; j += 2)
    for (int v = 0; v < vecs; ++v) {
      int64_t at = d + v * W, left = dim - at;
      int part = left >= W ? W : (int)left;
      V even = R::floats_part(rows[j] + at, part), odd = j + 1 < count ? R::floats_part(rows[j + 1] + at, part) : v_zero();
      PairTile::store(panel + (j / 2 * vecs + v) * 2 * W, b_floats(b_join(even, odd)));
    }
}
#endif

// p = exp(s * scale - top) for kKeys scores; returns the sum.
inline float weigh(const float* s, float* p, V scale, float top) {
  V total = v_zero(), high = v_set(top);
  for (int j = 0; j < kKeys; j += W) {
    V e = v_exp(v_sub(v_mul(v_load(s + j), scale), high));
    total = v_add(total, e);
    v_store(p + j, e);
  }
  return v_sum(total);
}
#ifdef QWEN15_BF16_PAIRS
inline float weigh(const float* s, uint16_t* p, V scale, float top) {
  V log2e = v_set(1.44269504088896341f), factor = v_mul(scale, log2e), high = v_mul(v_set(-top), log2e);
  V total = v_zero(), other = v_zero();
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; j += 2 * W) {
    V a = v_exp2_short(v_fma(v_load(s + j), factor, high)), b = v_exp2_short(v_fma(v_load(s + j + W), factor, high));
    total = v_add(total, a);
    other = v_add(other, b);
    v_store_bf16(p + j, a);
    v_store_bf16(p + j + W, b);
  }
  return v_sum(v_add(total, other));
}
#endif

// Tokens [token, token + tokens) of one sequence, the first at `position`, for key/value head g.
template <class R>
void prefill_block(Team& team, const float* q, int64_t q_stride, int64_t heads, Paged paged, int64_t token,
                   int64_t tokens, int64_t position, int64_t g, float* out, Activations act) {
  typedef typename Prefill<R>::Tile T;
  typedef typename T::A A;
  typedef typename T::P P;
  typedef typename R::E E;
  const Cache& cache = paged.cache;
  int64_t dim = cache.head_dim, kv = cache.kv_heads, group = heads / kv, rows = tokens * group;
  int64_t a_stride = round_up(dim, 32), o_stride = round_up(dim, W);
  int64_t panel_elements = kKeys * round_up(dim, 32);
  char* memory = (char*)team.scratch(rows * (a_stride * sizeof(A) + kKeys * (sizeof(float) + sizeof(A)) +
                                             o_stride * sizeof(float) + 2 * sizeof(float)) +
                                     panel_elements * sizeof(P) + 7 * 64);
  auto carve = [&memory](int64_t bytes) {
    char* part = memory;
    memory += round_up(bytes, 64);
    return part;
  };
  A* qs = (A*)carve(rows * a_stride * sizeof(A));
  float* s = (float*)carve(rows * kKeys * sizeof(float));
  A* p = (A*)carve(rows * kKeys * sizeof(A));
  float* o = (float*)carve(rows * o_stride * sizeof(float));
  float* maximum = (float*)carve(rows * sizeof(float));
  float* sum = (float*)carve(rows * sizeof(float));
  P* panel = (P*)carve(panel_elements * sizeof(P));

  for (int64_t r = 0; r < rows; ++r) {
    const float* from = q + (token + r / group) * q_stride + (g * group + r % group) * dim;
    copy_row<A>(from, dim, a_stride, qs + r * a_stride);
    maximum[r] = kMinusInfinity;
    sum[r] = 0.0f;
  }
  memset(o, 0, rows * o_stride * sizeof(float));
  V scale = v_set(1.0f / __builtin_sqrtf((float)dim));
  int64_t last = position + tokens;
  Ahead nothing;
  for (int64_t key = 0; key < last; key += kKeys) {
    int count = last - key < kKeys ? (int)(last - key) : kKeys;
    // Rows before `first` see none of these keys.
    int64_t first = key > position ? (key - position) * group : 0;
    const E *k_rows[kKeys], *v_rows[kKeys];
    for (int j = 0; j < count; ++j) {
      int64_t offset = paged.offset(key + j) + g * dim;
      k_rows[j] = (const E*)cache.k + offset;
      v_rows[j] = (const E*)cache.v + offset;
    }
    for (int n = 0; n < count; n += kTileVecs * W) {
      int left = count - n < kTileVecs * W ? count - n : kTileVecs * W, vecs = (left + W - 1) / W;
      Packer<R>::pack(k_rows + n, left, dim, vecs, panel);
      multiply_panel<T>(qs + first * a_stride, a_stride, rows - first, panel, vecs, dim, s + first * kKeys + n, kKeys,
                        false, nothing);
    }
    for (int64_t r = first; r < rows; ++r) {
      float* row = s + r * kKeys;
      int64_t visible = position + r / group - key + 1;
      if (visible > count) visible = count;
      for (int64_t j = visible; j < kKeys; ++j) row[j] = kMinusInfinity;
      V high = v_load(row);
      for (int j = W; j < kKeys; j += W) high = v_max(high, v_load(row + j));
      float now = v_highest(v_mul(high, scale));
      if (now > maximum[r]) {
        V shrink = v_exp(v_set(maximum[r] - now));
        sum[r] *= v_highest(shrink);
        if (key > 0)
          for (int64_t d = 0; d < o_stride; d += W)
            v_store(o + r * o_stride + d, v_mul(v_load(o + r * o_stride + d), shrink));
        maximum[r] = now;
      }
      sum[r] += weigh(row, p + r * kKeys, scale, maximum[r]);
    }
    for (int64_t d = 0; d < dim; d += kTileVecs * W) {
      int64_t left = dim - d < kTileVecs * W ? dim - d : kTileVecs * W;
      int vecs = (int)((left + W - 1) / W);
      pack_values<R>(v_rows, count, dim, d, vecs, panel);
      multiply_panel<T>(p + first * kKeys, kKeys, rows - first, panel, vecs, count, o + first * o_stride + d, o_stride,
                        true, nothing);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    int64_t t = token + r / group, h = g * group + r % group;
    V inverse = v_set(1.0f / sum[r]);
    for (int64_t d = 0; d < dim; d += W) {
      int n = dim - d < W ? (int)(dim - d) : W;
      write_output(out, heads * dim, act, t, h * dim + d, v_mul(v_load(o + r * o_stride + d), inverse), n);
    }
    if (out == nullptr && h == heads - 1) clear_tail(act, t, heads * dim);
  }
}

// ---------------------------------------------------------------- both

template <class R>
void attention_of(Team& team, const float* q, int64_t q_stride, int64_t heads, const Cache& cache, const Batch& batch,
                  float* out, Activations act, AttentionScratch& scratch) {
  int64_t kv = cache.kv_heads, dim = cache.head_dim, group = heads / kv;
  int64_t most = kQueryBytes / (kKeys * (int64_t)sizeof(typename Packer<R>::Tile::A));  // rows
  const Pieces pieces(cache.block_size, scratch.threads);
  const Partial layout(heads, dim);

  int64_t wanted = team.take(), item = 0, partial = 0, token = 0;
  for (int64_t b = 0; b < batch.sequences; ++b) {
    int64_t queries = batch.query_lens[b], context = batch.context_lens[b];
    Paged paged = {cache, batch.block_tables + b * batch.table_stride};
    if (queries < kFewQueries) {
      for (int64_t i = 0; i < queries; ++i) {
        int64_t visible = context - queries + i + 1, count = pieces.count(visible), size = pieces.tokens(visible);
        while (wanted < item + count) {
          int64_t begin = (wanted - item) * size, end = begin + size;
          float* to = scratch.partials + (partial + wanted - item) * layout.floats();
          decode_piece<R>(team, q + (token + i) * q_stride, heads, paged, begin, end < visible ? end : visible, to, [&] {
            wanted = team.take();
            return wanted < item + count ? (wanted - item) * size : -1;
          });
        }
        item += count;
        partial += count;
      }
    } else {
      int64_t rows = most;
      while (rows > kLeastRows && (queries * group + rows - 1) / rows * kv < 4 * scratch.threads) rows /= 2;
      int64_t query_block = rows / group < 8 ? 8 : rows / group;
      int64_t blocks = (queries + query_block - 1) / query_block, count = blocks * kv;
      for (; wanted < item + count; wanted = team.take()) {
        // The last query blocks see most keys: they go first.
        int64_t block = blocks - 1 - (wanted - item) / kv, g = (wanted - item) % kv;
        int64_t start = block * query_block, size = queries - start < query_block ? queries - start : query_block;
        prefill_block<R>(team, q, q_stride, heads, paged, token + start, size, context - queries + start, g, out, act);
      }
      item += count;
    }
    token += queries;
  }
  if (partial == 0) return;
  team.barrier();
  int64_t begin, end, row = 0, rows = 0;
  partial = 0;
  token = 0;
  for (int64_t b = 0; b < batch.sequences; ++b)
    if (batch.query_lens[b] < kFewQueries) rows += batch.query_lens[b] * heads;
  team.share(rows, 1, &begin, &end);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    int64_t queries = batch.query_lens[b];
    if (queries < kFewQueries)
      for (int64_t i = 0; i < queries; ++i, row += heads) {
        int64_t count = pieces.count(batch.context_lens[b] - queries + i + 1);
        int64_t first = begin > row ? begin - row : 0, last = end - row < heads ? end - row : heads;
        if (first < last)
          merge<R>(team, layout, scratch.partials + partial * layout.floats(), count, dim, first, last, out, act,
                   token + i);
        partial += count;
      }
    token += queries;
  }
}

[[maybe_unused]] void attention(Team& team, const float* q, int64_t q_stride, int64_t heads, const Cache& cache, const Batch& batch,
               float* out, Activations act, AttentionScratch& scratch) {
  if (cache.dtype == DType::f32)
    attention_of<F32Row>(team, q, q_stride, heads, cache, batch, out, act, scratch);
  else if (cache.dtype == DType::f16)
    attention_of<F16Row>(team, q, q_stride, heads, cache, batch, out, act, scratch);
  else
    attention_of<PairRow>(team, q, q_stride, heads, cache, batch, out, act, scratch);
}

}  // namespace
}  // namespace qwen15
