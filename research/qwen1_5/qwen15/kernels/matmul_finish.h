// What happens to y = x W^T on its way out: bias and residual are added and the largest is
// noted, or silu(y) meets the other matrix' product.
//
//   c (tokens, c_stride) float32 -> the job's output or activations
#pragma once
#include "matmul_dot.h"
#include "select.h"

namespace qwen15 {
namespace {

// c (tokens, n) -> the job's output, columns [row, row + n)
void finish(const Job& job, int64_t token, int64_t tokens, int64_t row, int64_t n, const float* c, const float* c_up,
            int64_t c_stride) {
  if (job.up.data != nullptr) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < n; j += W) {
        int part = n - j < W ? (int)(n - j) : W;
        V gate = v_load_part(c + t * c_stride + j, part), up = v_load_part(c_up + t * c_stride + j, part);
        V y = v_mul(v_silu(gate), up);
        write_output(job.out, job.out_stride, job.act, token + t, row + j, y, part);
      }
    if (job.out == nullptr && row + n == job.w.rows)
      for (int64_t t = 0; t < tokens; ++t) clear_tail(job.act, token + t, job.w.rows);
    return;
  }
  float bias[kRowBlock];
  for (int64_t j = 0; j < n; j += W) {
    int part = n - j < W ? (int)(n - j) : W;
    v_store_part(bias + j, job.bias.data == nullptr ? v_zero()
                           : part == W             ? load_vector(job.bias, row + j)
                                                   : load_vector_part(job.bias, row + j, part), part);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* out = job.out + (token + t) * job.out_stride + row;
    const float* y = c + t * c_stride;
    const float* residual = job.residual == nullptr ? nullptr : job.residual + (token + t) * job.out_stride + row;
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      V v = v_add(v_load(y + j), v_load(bias + j));
      v_store(out + j, residual == nullptr ? v : v_add(v, v_load(residual + j)));
    }
    for (; j < n; ++j) out[j] = y[j] + bias[j] + (residual == nullptr ? 0.0f : residual[j]);
    if (job.largest != nullptr) meet_columns(job.largest + token + t, out, n, row);
  }
}

}  // namespace
}  // namespace qwen15
