// What is not a matmul or attention: RMSNorm, the rounding of activations, RoPE with the cache write, the embedding.
//
//   rmsnorm        out[t, i] = w[i] * x[t, i] / sqrt(mean_i(x[t, i]^2) + eps)
//                  x (T, E) float32; w (E,) f32/f16/bf16; mean accumulated in float32 per vector lane
//   rope           (q[i], q[i + D/2]) turned by the angle of its position: cos/sin (P, D) float32
//   cache write    k, v (T, K D) float32 -> caches (num_blocks, block_size, K, D) f32/f16/bf16 at slots (T,) int32
//   embed          out[t, :] = table[ids[t], :], table (V, E) f32/f16/bf16 or of 8 bits, out float32
// Threads take contiguous ranges of tokens; a single token's elements are too few to be worth splitting.
#pragma once
#include "rows.h"
#include "team.h"

namespace qwen15 {
namespace {

void rmsnorm(Team& team, const float* x, int64_t x_stride, int64_t tokens, int64_t cols, Vector w, float eps,
             Activations out) {
  int64_t begin, end;
  team.share(tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t) {
    const float* row = x + t * x_stride;
    V sums[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int64_t i = 0;
    for (; i + 4 * W <= cols; i += 4 * W)
      for (int u = 0; u < 4; ++u) {
        V v = v_load(row + i + u * W);
        sums[u] = v_fma(v, v, sums[u]);
      }
    for (; i < cols; i += W) {
      V v = i + W <= cols ? v_load(row + i) : v_load_part(row + i, (int)(cols - i));
      sums[0] = v_fma(v, v, sums[0]);
    }
    float mean = v_sum(v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3]))) / (float)cols;
    V scale = v_set(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i + W <= cols; i += W)
      write_output(nullptr, 0, out, t, i, v_mul(v_mul(v_load(row + i), scale), load_vector(w, i)), W);
    if (i < cols) {
      int n = (int)(cols - i);
      write_output(nullptr, 0, out, t, i, v_mul(v_mul(v_load_part(row + i, n), scale), load_vector_part(w, i, n)), n);
    }
    clear_tail(out, t, cols);
  }
}

void prepare(Team& team, const float* x, int64_t x_stride, int64_t tokens, int64_t cols, Activations out) {
  int64_t begin, end;
  team.share(tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t) {
    const float* row = x + t * x_stride;
    int64_t i = 0;
    for (; i + W <= cols; i += W) write_output(nullptr, 0, out, t, i, v_load(row + i), W);
    if (i < cols) {
      int n = (int)(cols - i);
      write_output(nullptr, 0, out, t, i, v_load_part(row + i, n), n);
    }
    clear_tail(out, t, cols);
  }
}

// Turn one head in place.
inline void rotate(float* head, const float* __restrict cos, const float* __restrict sin, int64_t dim) {
  int64_t half = dim / 2, i = 0;
  for (; i + W <= half; i += W) {
    V a = v_load(head + i), b = v_load(head + i + half);
    v_store(head + i, v_sub(v_mul(a, v_load(cos + i)), v_mul(b, v_load(sin + i))));
    v_store(head + i + half, v_add(v_mul(b, v_load(cos + i + half)), v_mul(a, v_load(sin + i + half))));
  }
  for (; i < half; ++i) {
    float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

inline void write_cache_row(void* cache, DType dtype, int64_t offset, const float* values, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    V v = v_load(values + i);
    if (dtype == DType::f32) v_store((float*)cache + offset + i, v);
    else if (dtype == DType::f16) v_store_f16((uint16_t*)cache + offset + i, v);
    else v_store_bf16((uint16_t*)cache + offset + i, v);
  }
  for (; i < n; i += W) {
    int count = n - i < W ? (int)(n - i) : W;
    V v = count == W ? v_load(values + i) : v_load_part(values + i, count);
    if (dtype == DType::f32) {
      v_store_part((float*)cache + offset + i, v, count);
    } else {
      uint16_t bits[W];
      if (dtype == DType::f16) v_store_f16(bits, v);
      else v_store_bf16(bits, v);
      memcpy((uint16_t*)cache + offset + i, bits, count * sizeof(uint16_t));
    }
  }
}

void rope_and_cache(Team& team, float* qkv, int64_t tokens, int64_t heads, const float* cos, const float* sin,
                    const int32_t* positions, const int32_t* slots, const Cache& cache) {
  int64_t dim = cache.head_dim, kv = cache.kv_heads, width = (heads + 2 * kv) * dim;
  // One item is one head of one token, so that a single token's heads are shared out too.
  int64_t per_token = heads + kv, begin, end;
  team.share(tokens * per_token, 1, &begin, &end);
  for (int64_t item = begin; item < end; ++item) {
    int64_t t = item / per_token, h = item % per_token, position = positions[t];
    float* head = qkv + t * width + h * dim;
    rotate(head, cos + position * dim, sin + position * dim, dim);
    if (h >= heads && slots[t] >= 0) {
      int64_t offset = ((int64_t)slots[t] * kv + (h - heads)) * dim;
      write_cache_row(cache.k, cache.dtype, offset, head, dim);
      write_cache_row(cache.v, cache.dtype, offset, head + kv * dim, dim);
    }
  }
}

void gather(Team& team, Activations x, int64_t tokens, int64_t cols, const int32_t* order, Activations out) {
  int64_t begin, end;
  team.share(tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t) {
    const float* from = (const float*)x.data + t * x.stride;
    float* to = (float*)out.data + t * out.stride;
    for (int64_t j = 0; j < cols; ++j) to[j] = from[order[j]];
    clear_tail(out, t, cols);
  }
}

void combine(Team& team, const float* gate, const float* up, int64_t tokens, int64_t cols, float* out, Activations act) {
  int64_t begin, end;
  team.share(tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = 0; j < cols; j += W) {
      int n = cols - j < W ? (int)(cols - j) : W;
      V g = v_load_part(gate + t * cols + j, n), u = v_load_part(up + t * cols + j, n);
      write_output(out, cols, act, t, j, v_mul(v_silu(g), u), n);
    }
    if (out == nullptr) clear_tail(act, t, cols);
  }
}

// Row `id` of a table of 8 bits.
inline void embed_quantised(const Matrix& table, int64_t id, float* out) {
  int64_t group = table.cols / table.groups;
  const int8_t* q = (const int8_t*)table.data + id * table.cols;
  for (int64_t g = 0; g < table.groups; ++g) {
    V scale = v_set(load_scalar(table.scale, id * table.groups + g));
    V zero = v_set(table.zero == nullptr ? 0.0f : (float)((const int8_t*)table.zero)[id * table.groups + g]);
    for (int64_t i = g * group; i < (g + 1) * group; i += W)
      v_store(out + i, v_mul(v_sub(v_load_bytes(q + i), zero), scale));
  }
}

void embed(Team& team, const int32_t* ids, int64_t tokens, Matrix table, float* out) {
  int64_t begin, end, cols = table.cols;
  team.share(tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t) {
    if (table.dtype == DType::q8) {
      embed_quantised(table, ids[t], out + t * cols);
      continue;
    }
    Vector row = {(const char*)table.data + ids[t] * cols * dtype_bytes(table.dtype), table.dtype};
    int64_t i = 0;
    for (; i + W <= cols; i += W) v_store(out + t * cols + i, load_vector(row, i));
    if (i < cols) v_store_part(out + t * cols + i, load_vector_part(row, i, (int)(cols - i)), (int)(cols - i));
  }
}

}  // namespace
}  // namespace qwen15
