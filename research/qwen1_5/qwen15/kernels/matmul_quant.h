// Matmuls over few tokens with weights of 8 or 4 bits, multiplied as integers: nothing is dequantised in memory.
//
//   y[t, r] = sum over groups g of scale[r, g] (sum_j q[r, j] x[t, j] - zero[r, g] sum_j x[t, j]),  y float32
//   x is made int16 with one float32 scale a segment of a group, at most kSegment columns: 1 part in 65534 of the
//   segment's largest. Where that is not enough (see `exact`) what is left over is a second row of int16, 1 in 2^31.
//
// Products of int16 are summed in int32 over a segment, which cannot overflow: 128 columns x 128 x 32767 < 2^31. The
// zero points' part is known before the weights are read, and the sums begin with it. Threads share the rows as they do
// for other weights, see matmul_few.h.
#pragma once
#include "matmul_few.h"

namespace qwen15 {
namespace {

constexpr int64_t kSegment = 128;
constexpr int kQuantRows = 8;           // rows of int16 that weights meet at once
constexpr int64_t kQuantPackFrom = 32;  // tokens from which packing pays
constexpr int64_t kStep = 8 * W;        // columns of 4 bits in a vector

// How the columns of a quantised matrix are cut.
struct Cut {
  int64_t cols, group, segment;
  bool nibbles;

  explicit Cut(const Matrix& m) : cols(m.cols), group(m.cols / m.groups), nibbles(m.dtype == DType::q4) {
    segment = group % kSegment == 0 ? kSegment : group % (kSegment / 2) == 0 ? kSegment / 2 : kQuantBlock;
    // A vector of 4-bit columns that holds several segments has a scale for each block.
    if (nibbles && segment < kStep) segment = kQuantBlock;
  }
  bool operator==(const Cut& other) const {
    return cols == other.cols && group == other.group && nibbles == other.nibbles;
  }
  bool mixed() const { return nibbles && segment < kStep; }
  int64_t segments() const { return cols / segment; }
  int64_t groups() const { return cols / group; }
};

// Activations as int16 rows: one for each token, or two that add up to it.
struct Words {
  int16_t* q = nullptr;     // (rows, stride); for 4 bits in the order in which nibbles come out of a vector
  float* scale = nullptr;   // (rows, scale_stride), of each segment, zeros after them
  float* sums = nullptr;    // (rows, sum_stride), of scale q over each group, zeros after them
  int64_t rows = 0, stride = 0, scale_stride = 0, sum_stride = 0;

  static int64_t scales(int64_t cols) { return round_up(cols / kQuantBlock, 16) + 16; }
  static int64_t bytes(int64_t cols, int64_t rows) {
    return rows * ((round_up(cols, kStep) + 32) * 2 + 2 * scales(cols) * 4);
  }
  void place(void* memory, int64_t count, int64_t cols) {
    rows = count;
    stride = round_up(cols, kStep) + 32;
    scale_stride = sum_stride = scales(cols);
    scale = (float*)memory;
    sums = scale + rows * scale_stride;
    q = (int16_t*)(sums + rows * sum_stride);
  }
};

// One row of x (cols,) -> int16; `rest` (cols,), where it is given, becomes what they leave over.
inline void make_words(const float* x, const Cut& cut, int16_t* q, float* scale, float* sums, float* rest,
                       int64_t padded_cols) {
  for (int64_t j = 0; j < cut.segments(); ++j) {
    const float* from = x + j * cut.segment;
    V high = v_zero(), nan = v_zero();
    for (int64_t i = 0; i < cut.segment; i += W) {
      V v = v_load(from + i);
      high = v_max(high, v_max(v, v_sub(v_zero(), v)));
      nan = v_add(nan, v_sub(v, v));  // not a number where v is not finite
    }
    float top = v_highest(high), bad = v_sum(nan), step = top / 32767.0f + bad;
    float inverse = step > 1e-36f ? 1.0f / step : 0.0f;
    scale[j] = step > 1e-36f || step != step ? step : 0.0f;
    int16_t* to = q + j * cut.segment;
    I total = i_zero();
    for (int64_t i = 0; i < cut.segment; i += 2 * W) {
      V a = v_round(v_mul(v_load(from + i), v_set(inverse))), b = v_round(v_mul(v_load(from + i + W), v_set(inverse)));
      total = s_store(to + i, a, b, total);
      if (rest != nullptr) {
        v_store(rest + j * cut.segment + i, v_fma(a, v_set(-scale[j]), v_load(from + i)));
        v_store(rest + j * cut.segment + i + W, v_fma(b, v_set(-scale[j]), v_load(from + i + W)));
      }
    }
    int64_t g = j * cut.segment / cut.group;
    float sum = scale[j] * v_sum(i_float(total));
    sums[g] = (j * cut.segment % cut.group == 0 ? 0.0f : sums[g]) + sum;
  }
  for (int64_t j = cut.segments(); j < Words::scales(cut.cols); ++j) scale[j] = 0.0f;
  for (int64_t g = cut.groups(); g < Words::scales(cut.cols); ++g) sums[g] = 0.0f;
  memset(q + cut.cols, 0, (padded_cols - cut.cols) * sizeof(int16_t));
  if (!cut.nibbles) return;
  constexpr int kBlocks = W / 4;  // of 32 columns in a vector
  for (int64_t i = 0; i < padded_cols; i += kStep) {
    int16_t step[kStep];
    memcpy(step, q + i, sizeof step);
    for (int b = 0; b < kBlocks; ++b)
      for (int k = 0; k < 4; ++k) memcpy(q + i + (k * kBlocks + b) * 8, step + b * kQuantBlock + k * 8, 16);
  }
}

// Where a row of a quantised matrix is.
struct QuantPlace {
  const Matrix* m;
  int64_t row;

  const uint8_t* data() const { return (const uint8_t*)m->data + row * m->row_bytes(); }
};

// The scales of one row, one for each segment with zeros after them; and what its zero points subtract from each row of
// x, spread over a vector's lanes.
template <int N>
inline void row_start(const Matrix& m, int64_t row, const Cut& cut, const Words& x, int64_t first, float* scale, V* start) {
  int64_t groups = cut.groups(), each = cut.group / cut.segment;
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) start[t] = v_zero();
  bool zeros = cut.nibbles || m.zero != nullptr;
  for (int64_t g = 0; g < groups; g += W) {
    int n = groups - g < W ? (int)(groups - g) : W;
    V s = n == W ? load_vector(m.scale, row * groups + g) : load_vector_part(m.scale, row * groups + g, n);
    if (each == 1) v_store(scale + g, s);
    else
      for (int i = 0; i < n; ++i)
        for (int64_t e = 0; e < each; ++e) scale[(g + i) * each + e] = s[i];
    if (!zeros) continue;
    V z = v_set(8.0f);
    if (m.zero != nullptr) {
      float values[W] = {0};
      for (int i = 0; i < n; ++i)
        values[i] = cut.nibbles ? (float)((const uint8_t*)m.zero)[row * groups + g + i]
                                : (float)((const int8_t*)m.zero)[row * groups + g + i];
      z = v_load(values);
    }
    z = v_mul(s, z);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t)
      start[t] = v_sub(start[t], v_mul(z, v_load(x.sums + (first + t) * x.sum_stride + g)));
  }
  for (int64_t j = cut.segments(); j < round_up(cut.segments(), 16); ++j) scale[j] = 0.0f;
}

// acc[t][p] += 32 columns of 8 bits
template <int N, int P>
inline void mac_bytes(I* acc, const uint8_t* const* w, int64_t at, const int16_t* x, int64_t x_stride) {
#pragma GCC unroll 4
  for (int i = 0; i < kQuantBlock; i += 2 * W) {
    S l[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) l[p] = s_load_bytes(w[p] + at + i);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      S v = s_load(x + t * x_stride + at + i);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[t * P + p] = i_madd(acc[t * P + p], l[p], v);
    }
  }
}

// acc[t][p] += a vector of 4-bit columns
template <int N, int P>
inline void mac_nibbles(I* acc, const S* raw, const int16_t* x, int64_t x_stride) {
  if (N <= 2) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 2
      for (int t = 0; t < N; ++t) {
        S v = s_load(x + t * x_stride + k * 2 * W);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) acc[t * P + p] = i_madd(acc[t * P + p], s_nibble(raw[p], k), v);
      }
    return;
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    S n[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) n[k] = s_nibble(raw[p], k);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        acc[t * P + p] = i_madd(acc[t * P + p], n[k], s_load(x + t * x_stride + k * 2 * W));
  }
}

// `rows` rows at P places against N rows of x from `first` on: out[(p * x.rows + first + t) * kRowBlock + r].
template <bool kNibbles, bool kMixed, int N, int P>
__attribute__((noinline)) void quant_rows(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x,
                                          int64_t first, float* scales, float* out, int64_t ahead) {
  const int16_t* q = x.q + first * x.stride;
  const float* x_scale = x.scale + first * x.scale_stride;
  int64_t scale_room = Words::scales(cut.cols), row_bytes = places[0].m->row_bytes();
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* w[P];
    V total[N * P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      w[p] = places[p].data() + r * row_bytes;
      V start[N];
      row_start<N>(*places[p].m, places[p].row + r, cut, x, first, scales + p * scale_room, start);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) total[t * P + p] = start[t];
    }
    int64_t step = kMixed ? kStep : cut.segment, j = 0;
    for (int64_t i = 0; i < cut.cols; i += step, ++j) {
      I acc[N * P];
#pragma GCC unroll 16
      for (int a = 0; a < N * P; ++a) acc[a] = i_zero();
      if (kNibbles) {
        for (int64_t at = i; at < i + step; at += kStep) {
          S raw[P];
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) {
            if (W == 16 || at / 2 % 64 == 0) __builtin_prefetch(w[p] + at / 2 + ahead, 0, 0);
            if (kMixed && at + kStep > cut.cols) {
              uint8_t rest[kStep / 2] = {0};
              memcpy(rest, w[p] + at / 2, (cut.cols - at) / 2);
              raw[p] = s_load(rest);
            } else {
              raw[p] = s_load(w[p] + at / 2);
            }
          }
          mac_nibbles<N, P>(acc, raw, q + at, x.stride);
        }
      } else {
        for (int64_t at = i; at < i + step; at += kQuantBlock) {
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p)
            if (at % 64 == 0) __builtin_prefetch(w[p] + at + ahead, 0, 0);
          mac_bytes<N, P>(acc, w, at, q, x.stride);
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        const float* s = scales + p * scale_room;
        constexpr int kBlocks = W / 4;
        V weight_scale = kMixed ? v_spread(s + j * kBlocks) : v_set(s[j]);
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) {
          const float* xs = x_scale + t * x.scale_stride;
          V both = v_mul(weight_scale, kMixed ? v_spread(xs + j * kBlocks) : v_set(xs[j]));
          total[t * P + p] = v_fma(i_float(acc[t * P + p]), both, total[t * P + p]);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) out[(p * x.rows + first + t) * kRowBlock + r] = v_sum(total[t * P + p]);
  }
}

template <int N, int P>
void quant_group(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x, int64_t first, float* scales,
                 float* out, int64_t ahead) {
  if (!cut.nibbles) return quant_rows<false, false, N, P>(places, rows, cut, x, first, scales, out, ahead);
  if (cut.mixed()) return quant_rows<true, true, N, P>(places, rows, cut, x, first, scales, out, ahead);
  return quant_rows<true, false, N, P>(places, rows, cut, x, first, scales, out, ahead);
}

// `rows` rows at each of P places against all rows of x, some of them at a time; see dot_block.
template <int P>
void quant_block(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x, float* scales, float* out) {
  constexpr int kMost = kQuantRows / P;
  int64_t groups = (x.rows + kMost - 1) / kMost, step = groups == 1 ? rows : kReusedRows;
  for (int64_t r = 0; r < rows; r += step) {
    int64_t n = rows - r < step ? rows - r : step;
    QuantPlace here[P];
    for (int p = 0; p < P; ++p) here[p] = {places[p].m, places[p].row + r};
    for (int64_t t = 0, left = groups; left > 0; --left) {
      int64_t group = (x.rows - t + left - 1) / left, ahead = t > 0 ? 0 : kAheadBytes;
      switch (group) {
        case 1: quant_group<1, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 2: quant_group<2, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 3: quant_group<3, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 4: quant_group<4, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 5: quant_group<(5 < kMost ? 5 : kMost), P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 6: quant_group<(6 < kMost ? 6 : kMost), P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 7: quant_group<(7 < kMost ? 7 : kMost), P>(here, n, cut, x, t, scales, out + r, ahead); break;
        default: quant_group<kMost, P>(here, n, cut, x, t, scales, out + r, ahead);
      }
      t += group;
    }
  }
}

// out (2, x.rows, kRowBlock) = the rows at both places, of which the second may have fewer.
inline void quant_places(const QuantPlace* places, int64_t rows, int64_t second, const Cut& cut, const Words& x, float* scales,
                         float* out) {
  if (x.rows > kQuantRows / 2) {  // more rows of x at once are worth more than two places
    quant_block<1>(places, rows, cut, x, scales, out);
    if (second > 0) quant_block<1>(places + 1, second, cut, x, scales, out + x.rows * kRowBlock);
    return;
  }
  if (second > 0) quant_block<2>(places, second, cut, x, scales, out);
  QuantPlace rest = {places[0].m, places[0].row + second};
  if (rows > second) quant_block<1>(&rest, rows - second, cut, x, scales, out + second);
}

// The words of a matmul's activations, made when a matrix asks for another cut of them.
struct QuantInput {
  Activations x;
  int64_t tokens;
  bool exact;
  void* memory;
  float* rest;
  Words words;
  Cut cut;
  bool made = false;

  QuantInput(const Matrix& first, Activations activations, int64_t token_count, bool all, void* room, float* rest_room)
      : x(activations), tokens(token_count), exact(all), memory(room), rest(rest_room), cut(first) {}

  const Words& meet(const Matrix& m) {
    Cut wanted(m);
    if (made && cut == wanted) return words;
    made = true;
    cut = wanted;
    int each = exact ? 2 : 1;
    words.place(memory, tokens * each, cut.cols);
    int64_t padded_cols = round_up(cut.cols, kStep);
    for (int64_t t = 0; t < tokens; ++t)
      for (int e = 0; e < each; ++e) {
        int64_t row = t * each + e;
        make_words(e == 0 ? (const float*)x.data + t * x.stride : rest, cut, words.q + row * words.stride,
                   words.scale + row * words.scale_stride, words.sums + row * words.sum_stride,
                   exact && e == 0 ? rest : nullptr, padded_cols);
      }
    return words;
  }
  // c (x.rows, kRowBlock) -> (tokens, kRowBlock)
  void add_up(float* c, int64_t rows) const {
    if (!exact) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < rows; ++r) c[t * kRowBlock + r] = c[2 * t * kRowBlock + r] + c[(2 * t + 1) * kRowBlock + r];
  }
};

void few_quantised(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  bool exact = x.exact;
  int64_t cols = jobs[0].w.cols, x_rows = exact ? 2 * tokens : tokens, sums = x_rows * kRowBlock;
  int64_t words_bytes = round_up(Words::bytes(cols, x_rows), 64), scale_floats = 2 * Words::scales(cols);
  int64_t rest_floats = round_up(cols, kStep) + 32;
  char* memory = (char*)team.scratch(words_bytes + (scale_floats + rest_floats + 4 * sums) * sizeof(float));
  float* scales = (float*)(memory + words_bytes);
  float *rest = scales + scale_floats, *c = rest + rest_floats, *c_up = c + 2 * sums;
  QuantInput input(jobs[0].w, x, tokens, exact, memory, rest);
  auto places_of = [&](const Job& job, int owner) { return Places(team, owner, job, tokens); };
  for_blocks(team, jobs, job_count, places_of, [&](const Job& job, const Places& places, int64_t block) {
    int64_t row = places.begin + block * kRowBlock, n[2] = {places.rows(block, 0), places.rows(block, 1)};
    if (places.side_by_side) {
      QuantPlace both[2] = {{&job.w, row}, {&job.up, row}};
      quant_places(both, n[0], n[0], Cut(job.w), input.meet(job.w), scales, c);
      input.add_up(c, n[0]);
      input.add_up(c + sums, n[0]);
      return finish(job, 0, tokens, row, n[0], c, c + sums, kRowBlock);
    }
    for (int part = 0; part <= (job.up.data != nullptr ? 1 : 0); ++part) {
      const Matrix& m = part == 0 ? job.w : job.up;
      float* out = part == 0 ? c : c_up;
      QuantPlace both[2] = {{&m, row}, {&m, row + places.apart}};
      quant_places(both, n[0], n[1], Cut(m), input.meet(m), scales, out);
      for (int p = 0; p < 2; ++p) input.add_up(out + p * sums, n[p]);
    }
    for (int p = 0; p < 2; ++p)
      if (n[p] > 0) finish(job, 0, tokens, row + p * places.apart, n[p], c + p * sums, c_up + p * sums, kRowBlock);
  });
}

}  // namespace
}  // namespace qwen15
