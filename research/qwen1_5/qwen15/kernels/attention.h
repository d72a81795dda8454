// out[t, h, :] = softmax(q[t, h, :] . K^T / sqrt(D)) V over the cached tokens of t's own sequence up to t's position.
//
//   q (T, H D) float32; caches (num_blocks, block_size, K, D) f32/f16/bf16, found through block_tables (B, M) int32;
//   query head h reads key/value head h / (H / K). Scores, softmax and output accumulate in float32. Against a bf16 cache
//   q and the softmax weights are rounded to bf16 where the CPU has bf16 dot products.
//
// Decode (a sequence with few new tokens): the cached blocks of all sequences are cut into equal pieces; a thread reads a
// piece in address order for all heads at once and leaves (maximum, sum, weighted V) per head; then pieces are merged.
// Splitting by head instead would make every thread stride through every block.
// Prefill: an item is one key/value head and a block of query tokens; keys stream by in blocks of 64 with a running
// maximum and sum (Milakov and Gimelshein, 2018, arXiv:1805.02867), so no T x T matrix ever exists.
#pragma once

namespace {

constexpr int kKeys = 64;            // keys per step of prefill
constexpr int kQueryRows = 96;       // (token, head) rows per item of prefill
constexpr int kDecodeKeys = 32;      // keys per step of decode
constexpr int64_t kFewQueries = 4;   // new tokens below which a sequence is treated as decode
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

template <class X>
void copy_row(const float* from, int64_t n, int64_t padded_n, X* to) {
  for (int64_t i = 0; i < padded_n; i += W) {
    int64_t left = n - i;
    store_activation<X>(to + i, left >= W ? v_load(from + i) : left > 0 ? v_load_part(from + i, (int)left) : v_zero());
  }
}

// ---------------------------------------------------------------- decode

// out[h * out_stride] = key . q[h] for `group` heads that share the key
template <class R>
inline void score_group(const typename R::E* key, int64_t dim, const typename R::X* q, int64_t q_stride, int64_t group,
                        float* out, int64_t out_stride) {
  for (int64_t h = 0; h < group; ++h) out[h * out_stride] = dot<R>(key, dim, q + h * q_stride);
}

// out[h * out_stride] = key[h] . q[h] for 4 heads with a key each, lying one after another
template <class R>
inline void score4(const typename R::E* key, int64_t dim, const typename R::X* q, int64_t q_stride, float* out,
                   int64_t out_stride) {
  V acc0 = v_zero(), acc1 = v_zero(), acc2 = v_zero(), acc3 = v_zero();
  int64_t i = 0;
  for (; i + R::step <= dim; i += R::step) {
    acc0 = R::mac(acc0, R::load(key + i), q + i);
    acc1 = R::mac(acc1, R::load(key + dim + i), q + q_stride + i);
    acc2 = R::mac(acc2, R::load(key + 2 * dim + i), q + 2 * q_stride + i);
    acc3 = R::mac(acc3, R::load(key + 3 * dim + i), q + 3 * q_stride + i);
  }
  if (i < dim) {
    int n = (int)(dim - i);
    acc0 = R::mac(acc0, R::load_part(key + i, n), q + i);
    acc1 = R::mac(acc1, R::load_part(key + dim + i, n), q + q_stride + i);
    acc2 = R::mac(acc2, R::load_part(key + 2 * dim + i, n), q + 2 * q_stride + i);
    acc3 = R::mac(acc3, R::load_part(key + 3 * dim + i, n), q + 3 * q_stride + i);
  }
  float sums[4];
  v_sum4(acc0, acc1, acc2, acc3, sums);
  for (int h = 0; h < 4; ++h) out[h * out_stride] = sums[h];
}

// Scores of one cached token's keys (K, D) for all heads: s[h * kDecodeKeys]
template <class R>
inline void score(const typename R::E* keys, int64_t dim, int64_t kv, int64_t group, const typename R::X* q,
                  int64_t q_stride, float* s) {
  int64_t g = 0;
  if (group == 1)
    for (; g + 4 <= kv; g += 4) score4<R>(keys + g * dim, dim, q + g * q_stride, q_stride, s + g * kDecodeKeys, kDecodeKeys);
  for (; g < kv; ++g)
    score_group<R>(keys + g * dim, dim, q + g * group * q_stride, q_stride, group, s + g * group * kDecodeKeys,
                   kDecodeKeys);
}

// acc[d] += sum_j p[j * p_stride] * values[j * stride + d] for 4 keys
template <class R>
inline void add_values4(const typename R::E* values, int64_t stride, const float* p, int64_t dim, float* acc) {
  V p0 = v_set(p[0]), p1 = v_set(p[1]), p2 = v_set(p[2]), p3 = v_set(p[3]);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    V a = v_load(acc + d);
    a = v_fma(R::floats(values + d), p0, a);
    a = v_fma(R::floats(values + stride + d), p1, a);
    a = v_fma(R::floats(values + 2 * stride + d), p2, a);
    a = v_fma(R::floats(values + 3 * stride + d), p3, a);
    v_store(acc + d, a);
  }
  if (d < dim) {
    int n = (int)(dim - d);
    V a = v_load(acc + d);
    a = v_fma(R::floats_part(values + d, n), p0, a);
    a = v_fma(R::floats_part(values + stride + d, n), p1, a);
    a = v_fma(R::floats_part(values + 2 * stride + d, n), p2, a);
    a = v_fma(R::floats_part(values + 3 * stride + d, n), p3, a);
    v_store(acc + d, a);
  }
}

template <class R>
inline void add_values1(const typename R::E* values, float weight, int64_t dim, float* acc) {
  V p = v_set(weight);
  int64_t d = 0;
  for (; d + W <= dim; d += W) v_store(acc + d, v_fma(R::floats(values + d), p, v_load(acc + d)));
  if (d < dim) v_store(acc + d, v_fma(R::floats_part(values + d, (int)(dim - d)), p, v_load(acc + d)));
}

// One token against cached tokens [begin, end): partial = (maximum (H), sum (H), weighted values (H, padded D)).
template <class R>
void decode_piece(Team& team, const float* q, int64_t heads, Paged paged, int64_t begin, int64_t end, float* partial) {
  typedef typename R::X X;
  const Cache& cache = paged.cache;
  int64_t dim = cache.head_dim, kv = cache.kv_heads, group = heads / kv;
  int64_t q_stride = round_up(dim, 2 * 16), acc_stride = round_up(dim, 16);
  char* memory = (char*)team.scratch(heads * (q_stride * sizeof(float) + kDecodeKeys * sizeof(float)));
  X* qs = (X*)memory;
  float* s = (float*)(memory + heads * q_stride * sizeof(float));  // (H, kDecodeKeys)
  float *maximum = partial, *sum = partial + heads, *acc = partial + 2 * heads;
  for (int64_t h = 0; h < heads; ++h) {
    copy_row<X>(q + h * dim, dim, q_stride, qs + h * q_stride);
    maximum[h] = kMinusInfinity;
    sum[h] = 0.0f;
  }
  memset(acc, 0, heads * acc_stride * sizeof(float));
  V scale = v_set(1.0f / __builtin_sqrtf((float)dim));
  for (int64_t at = begin; at < end;) {
    // as many keys as lie one after another: up to the end of the block
    int64_t count = cache.block_size - at % cache.block_size;
    if (count > kDecodeKeys) count = kDecodeKeys;
    if (count > end - at) count = end - at;
    const auto* keys = (const typename R::E*)cache.k + paged.offset(at);
    const auto* values = (const typename R::E*)cache.v + paged.offset(at);
    for (int64_t j = 0; j < count; ++j) score<R>(keys + j * kv * dim, dim, kv, group, qs, q_stride, s + j);
    for (int64_t h = 0; h < heads; ++h) {
      float* row = s + h * kDecodeKeys;
      for (int64_t j = count; j < kDecodeKeys; ++j) row[j] = kMinusInfinity;
      V high = v_load(row);
      for (int j = W; j < kDecodeKeys; j += W) high = v_max(high, v_load(row + j));
      float now = v_highest(v_mul(high, scale));
      if (now > maximum[h]) {
        float shrink = v_highest(v_exp(v_set(maximum[h] - now)));
        sum[h] *= shrink;
        for (int64_t d = 0; d < acc_stride; d += W)
          v_store(acc + h * acc_stride + d, v_mul(v_load(acc + h * acc_stride + d), v_set(shrink)));
        maximum[h] = now;
      }
      V top = v_set(maximum[h]), total = v_zero();
      for (int j = 0; j < kDecodeKeys; j += W) {
        V p = v_exp(v_sub(v_mul(v_load(row + j), scale), top));
        total = v_add(total, p);
        v_store(row + j, p);
      }
      sum[h] += v_sum(total);
    }
    int64_t j = 0, stride = kv * dim;
    for (; j + 4 <= count; j += 4)
      for (int64_t h = 0; h < heads; ++h)
        add_values4<R>(values + j * stride + h / group * dim, stride, s + h * kDecodeKeys + j, dim,
                       acc + h * acc_stride);
    for (; j < count; ++j)
      for (int64_t h = 0; h < heads; ++h)
        add_values1<R>(values + j * stride + h / group * dim, s[h * kDecodeKeys + j], dim, acc + h * acc_stride);
    at += count;
  }
}

// Walks decode's pieces in one fixed order: every token of every sequence with few new tokens, cut into pieces.
struct Pieces {
  const Batch& batch;
  int64_t block_size, blocks_per_piece;

  Pieces(const Batch& b, int64_t size, int threads) : batch(b), block_size(size) {
    int64_t total = 0;
    for (int64_t i = 0; i < b.sequences; ++i)
      if (b.query_lens[i] < kFewQueries) total += b.query_lens[i] * blocks(b.context_lens[i]);
    // About four pieces a thread, so that a thread that was held up does not hold up the others.
    blocks_per_piece = total / (4 * threads);
    if (blocks_per_piece < 1) blocks_per_piece = 1;
    // Short contexts: below about 64 tokens a piece is not worth its merge.
    int64_t least = (64 + size - 1) / size;
    if (blocks_per_piece < least) blocks_per_piece = least;
  }
  int64_t blocks(int64_t context) const { return (context + block_size - 1) / block_size; }
  int64_t count(int64_t context) const { return (blocks(context) + blocks_per_piece - 1) / blocks_per_piece; }
};

// out = sum_i exp(m_i - M) acc_i / sum_i exp(m_i - M) l_i
void merge(const float* partials, int64_t floats, int64_t count, int64_t heads, int64_t dim, int64_t h, float* out,
           Activations act, int64_t t, bool round_bf16) {
  int64_t acc_stride = round_up(dim, 16);
  float top = kMinusInfinity;
  for (int64_t i = 0; i < count; ++i) top = partials[i * floats + h] > top ? partials[i * floats + h] : top;
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i)
    total += partials[i * floats + heads + h] * v_highest(v_exp(v_set(partials[i * floats + h] - top)));
  V inverse = v_set(1.0f / total);
  for (int64_t d = 0; d < dim; d += W) {
    V y = v_zero();
    for (int64_t i = 0; i < count; ++i) {
      V weight = v_exp(v_set(partials[i * floats + h] - top));
      y = v_fma(v_load(partials + i * floats + 2 * heads + h * acc_stride + d), weight, y);
    }
    int n = dim - d < W ? (int)(dim - d) : W;
    write_output(out, heads * dim, act, t, h * dim + d, v_mul(y, inverse), n, round_bf16);
  }
  if (out == nullptr && h == heads - 1) clear_tail(act, t, heads * dim);
}

// ---------------------------------------------------------------- prefill

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
      __mmask16 part = left >= W ? 0xffff : (__mmask16)((1u << left) - 1);
      __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, rows[j] + at));
      __m512i odd = j + 1 < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, rows[j + 1] + at))
                                  : _mm512_setzero_si512();
      _mm512_storeu_si512(panel + (j / 2 * vecs + v) * 2 * W, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}
#endif

// Tokens [token, token + tokens) of one sequence, the first at `position`, for key/value head g.
template <class R>
void prefill_block(Team& team, const float* q, int64_t q_stride, int64_t heads, Paged paged, int64_t token,
                   int64_t tokens, int64_t position, int64_t g, float* out, Activations act, bool round_bf16) {
  typedef typename Packer<R>::Tile T;
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
      V top = v_set(maximum[r]), total = v_zero();
      for (int j = 0; j < kKeys; j += W) {
        V e = v_exp(v_sub(v_mul(v_load(row + j), scale), top));
        total = v_add(total, e);
        store_activation<A>(p + r * kKeys + j, e);
      }
      sum[r] += v_sum(total);
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
      write_output(out, heads * dim, act, t, h * dim + d, v_mul(v_load(o + r * o_stride + d), inverse), n, round_bf16);
    }
    if (out == nullptr && h == heads - 1) clear_tail(act, t, heads * dim);
  }
}

// ---------------------------------------------------------------- both

template <class R>
void attention_of(Team& team, const float* q, int64_t q_stride, int64_t heads, const Cache& cache, const Batch& batch,
                  float* out, Activations act, bool round_bf16, AttentionScratch& scratch) {
  int64_t kv = cache.kv_heads, dim = cache.head_dim, group = heads / kv;
  int64_t query_block = kQueryRows / group < 8 ? 8 : kQueryRows / group;
  Pieces pieces(batch, cache.block_size, team.size());
  int64_t floats = attention_partial_floats(heads, dim);

  int64_t wanted = team.take(), item = 0, partial = 0, token = 0;
  for (int64_t b = 0; b < batch.sequences; ++b) {
    int64_t queries = batch.query_lens[b], context = batch.context_lens[b];
    Paged paged = {cache, batch.block_tables + b * batch.table_stride};
    if (queries < kFewQueries) {
      for (int64_t i = 0; i < queries; ++i) {
        int64_t visible = context - queries + i + 1, count = pieces.count(visible);
        for (; wanted < item + count; wanted = team.take()) {
          int64_t begin = (wanted - item) * pieces.blocks_per_piece * cache.block_size;
          int64_t end = begin + pieces.blocks_per_piece * cache.block_size;
          decode_piece<R>(team, q + (token + i) * q_stride, heads, paged, begin, end < visible ? end : visible,
                          scratch.partials + (partial + wanted - item) * floats);
        }
        item += count;
        partial += count;
      }
    } else {
      int64_t blocks = (queries + query_block - 1) / query_block, count = blocks * kv;
      for (; wanted < item + count; wanted = team.take()) {
        // The last query blocks see most keys: they go first.
        int64_t block = blocks - 1 - (wanted - item) / kv, g = (wanted - item) % kv;
        int64_t start = block * query_block, size = queries - start < query_block ? queries - start : query_block;
        prefill_block<R>(team, q, q_stride, heads, paged, token + start, size, context - queries + start, g, out, act,
                         round_bf16);
      }
      item += count;
    }
    token += queries;
  }
  if (partial == 0) return;
  team.barrier();
  int64_t begin, end, row = 0;
  partial = 0;
  token = 0;
  int64_t rows = 0;
  for (int64_t b = 0; b < batch.sequences; ++b)
    if (batch.query_lens[b] < kFewQueries) rows += batch.query_lens[b] * heads;
  team.share(rows, 1, &begin, &end);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    int64_t queries = batch.query_lens[b];
    if (queries < kFewQueries)
      for (int64_t i = 0; i < queries; ++i, row += heads) {
        int64_t count = pieces.count(batch.context_lens[b] - queries + i + 1);
        for (int64_t h = begin > row ? begin - row : 0; h < heads && row + h < end; ++h)
          merge(scratch.partials + partial * floats, floats, count, heads, dim, h, out, act, token + i, round_bf16);
        partial += count;
      }
    token += queries;
  }
}

void attention(Team& team, const float* q, int64_t q_stride, int64_t heads, const Cache& cache, const Batch& batch,
               float* out, Activations act, bool round_bf16, AttentionScratch& scratch) {
  if (cache.dtype == DType::f32)
    attention_of<F32Row>(team, q, q_stride, heads, cache, batch, out, act, round_bf16, scratch);
  else if (cache.dtype == DType::f16)
    attention_of<F16Row>(team, q, q_stride, heads, cache, batch, out, act, round_bf16, scratch);
  else
    attention_of<PairRow>(team, q, q_stride, heads, cache, batch, out, act, round_bf16, scratch);
}

}  // namespace
