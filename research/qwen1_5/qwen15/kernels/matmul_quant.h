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
constexpr int64_t kScaleRows = 8;       // rows of weights whose scales are at hand
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
  float* sums = nullptr;    // (rows, sum_stride), what scale q of a group sums up to, times -middle; zeros after them
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

#ifdef QWEN15_DOT_BYTES
constexpr float kMostWord = 127 * 256 + 127;  // two signed bytes hold it

// Words of a block of columns -> their upper bytes, then their lower ones (256 upper + lower, both signed), each in the
// order in which the weights come out of 16 bytes: 4-bit ones as low halves, then as high ones.
inline void part_words(int16_t* q, bool nibbles) {
  int8_t bytes[2 * kQuantBlock];
  for (int i = 0; i < kQuantBlock; ++i) {
    int word = q[nibbles ? i / 16 * 8 + i % 16 / 2 + i % 2 * 16 : i], upper = (word + 128) >> 8;
    bytes[i] = (int8_t)upper;
    bytes[kQuantBlock + i] = (int8_t)(word - 256 * upper);
  }
  memcpy(q, bytes, sizeof bytes);
}
#else
constexpr float kMostWord = 32767;
#endif

// One row of x (cols,) -> int16; `rest` (cols,), where it is given, becomes what they leave over. `middle` is the zero
// point where the weights have none of their own, 1 where they have.
inline void make_words(const float* x, const Cut& cut, float middle, int16_t* q, float* scale, float* sums, float* rest,
                       int64_t padded_cols) {
  for (int64_t j = 0; j < cut.segments(); ++j) {
    const float* from = x + j * cut.segment;
    V high = v_zero(), nan = v_zero();
    for (int64_t i = 0; i < cut.segment; i += W) {
      V v = v_load(from + i);
      high = v_max(high, v_max(v, v_sub(v_zero(), v)));
      nan = v_add(nan, v_sub(v, v));  // not a number where v is not finite
    }
    float top = v_highest(high), bad = v_sum(nan), step = top / kMostWord + bad;
    float inverse = step > 1e-36f ? 1.0f / step : 0.0f;
    scale[j] = step > 1e-36f || step != step ? step : 0.0f;
    int16_t* to = q + j * cut.segment;
    I total = i_zero();
    for (int64_t i = 0; i < cut.segment; i += 2 * W) {
      V a = v_zero(), b = v_zero();  // and stay so where something is not finite: the scale says it
      if (step == step) {
        a = v_round(v_mul(v_load(from + i), v_set(inverse)));
        b = v_round(v_mul(v_load(from + i + W), v_set(inverse)));
      }
      total = s_store(to + i, a, b, total);
      if (rest != nullptr) {
        v_store(rest + j * cut.segment + i, v_fma(a, v_set(-scale[j]), v_load(from + i)));
        v_store(rest + j * cut.segment + i + W, v_fma(b, v_set(-scale[j]), v_load(from + i + W)));
      }
    }
    int64_t g = j * cut.segment / cut.group;
    float sum = -middle * scale[j] * v_sum(i_float(total));
    sums[g] = (j * cut.segment % cut.group == 0 ? 0.0f : sums[g]) + sum;
  }
  for (int64_t j = cut.segments(); j < Words::scales(cut.cols); ++j) scale[j] = 0.0f;
  for (int64_t g = cut.groups(); g < Words::scales(cut.cols); ++g) sums[g] = 0.0f;
  memset(q + cut.cols, 0, (padded_cols - cut.cols) * sizeof(int16_t));
#ifdef QWEN15_DOT_BYTES
  for (int64_t i = 0; i < padded_cols; i += kQuantBlock) part_words(q + i, cut.nibbles);
#else
  if (!cut.nibbles) return;
  constexpr int kBlocks = W / 4;  // of 32 columns in a vector
  for (int64_t i = 0; i < padded_cols; i += kStep) {
    int16_t step[kStep];
    memcpy(step, q + i, sizeof step);
    for (int b = 0; b < kBlocks; ++b)
      for (int k = 0; k < 4; ++k) memcpy(q + i + (k * kBlocks + b) * 8, step + b * kQuantBlock + k * 8, 16);
  }
#endif
}

// Where a row of a quantised matrix is.
struct QuantPlace {
  const Matrix* m;
  int64_t row;

  const uint8_t* data() const { return (const uint8_t*)m->data + row * m->row_bytes(); }
};

// Scales of some rows at a time, as floats.
struct Scales {
  float* scale;  // (kScaleRows, segments)
  float* zero;   // (kScaleRows, groups): scale times zero point, the scale alone where each zero point is the middle

  static int64_t floats(int64_t cols) { return 2 * (kScaleRows * (cols / kQuantBlock) + 32); }
  Scales(float* memory, int64_t cols) : scale(memory), zero(memory + floats(cols) / 2) {}
  // Reads those of `rows` rows from `row` on.
  void read(const Matrix& m, int64_t row, int64_t rows, const Cut& cut) {
    int64_t first = row * m.groups, count = rows * m.groups, each = cut.group / cut.segment;
    for (int64_t i = 0; i < count; i += W) {
      int n = count - i < W ? (int)(count - i) : W;
      V s = n == W ? load_vector(m.scale, first + i) : load_vector_part(m.scale, first + i, n);
      V z = s;
      if (m.zero != nullptr) {
        const int8_t* from = (const int8_t*)m.zero + first + i;
        int8_t part[W] = {0};
        if (n < W) memcpy(part, from, n);
        z = v_mul(s, v_load_bytes(n < W ? part : from));
      }
      v_store(zero + i, z);
      if (each == 1) v_store(scale + i, s);
      else
        for (int k = 0; k < n; ++k)
          for (int64_t e = 0; e < each; ++e) scale[(i + k) * each + e] = s[k];
    }
    for (int i = 0; i < 16; ++i) zero[count + i] = scale[count * each + i] = 0.0f;  // is read, and meets zeros
  }
};

#ifdef QWEN15_DOT_BYTES
// acc[t][p] += 16 columns w of each place; x has their upper bytes and kQuantBlock bytes further on the lower ones.
template <int N, int P>
inline void mac_parts(I* acc, const int8x16_t* w, const char* x, int64_t x_bytes) {
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) {
    int8x16_t upper = v_any<int8x16_t>(x + t * x_bytes), lower = v_any<int8x16_t>(x + t * x_bytes + kQuantBlock);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[t * P + p] = i_dot(acc[t * P + p], w[p], upper, lower);
  }
}

// acc[t][p] += 32 columns of 8 bits
template <int N, int P>
inline void mac_bytes(I* acc, const uint8_t* const* w, int64_t at, const int16_t* x, int64_t x_stride) {
#pragma GCC unroll 2
  for (int i = 0; i < kQuantBlock; i += 16) {
    int8x16_t l[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) l[p] = v_any<int8x16_t>(w[p] + at + i);
    mac_parts<N, P>(acc, l, (const char*)(x + at) + i, 2 * x_stride);
  }
}

// acc[t][p] += a vector of 4-bit columns
template <int N, int P>
inline void mac_nibbles(I* acc, const S* raw, const int16_t* x, int64_t x_stride) {
  int8x16_t low[P], high[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    uint8x16_t bytes = vreinterpretq_u8_s16(raw[p]);
    low[p] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    high[p] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
  }
  mac_parts<N, P>(acc, low, (const char*)x, 2 * x_stride);
  mac_parts<N, P>(acc, high, (const char*)x + 16, 2 * x_stride);
}
#else
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

#endif

// At most kScaleRows rows at P places against N rows of x from `first` on: out[(p * x.rows + first + t) * kRowBlock +
// r].
template <bool kNibbles, int kColumns, int N, int P>
__attribute__((noinline)) void quant_rows(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x,
                                          int64_t first, Scales* scales, float* out, int64_t ahead) {
  constexpr bool kMixed = kNibbles && kColumns < kStep;  // a vector has columns of several segments
  constexpr int kBlocks = W / 4, kSums = N * P;
  constexpr int64_t step = kMixed ? kStep : kColumns;
  const int16_t* q = x.q + first * x.stride;
  const int64_t x_stride = x.stride, cols = cut.cols, segments = cut.segments(), groups = cut.groups();
  const int64_t row_bytes = places[0].m->row_bytes(), scale_stride = x.scale_stride, sum_stride = x.sum_stride;
  const float *x_scale = x.scale + first * scale_stride, *x_sums = x.sums + first * sum_stride;
  const uint8_t* w[P];
  bool zeros[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    w[p] = places[p].data();
    zeros[p] = kNibbles || places[p].m->zero != nullptr;
    scales[p].read(*places[p].m, places[p].row, rows, cut);
  }
  for (int64_t r = 0; r < rows; ++r) {
    V total[kSums];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) total[t * P + p] = v_zero();
      if (zeros[p])
        for (int64_t g = 0; g < groups; g += W) {
          V z = v_load(scales[p].zero + r * groups + g);
#pragma GCC unroll 8
          for (int t = 0; t < N; ++t)
            total[t * P + p] = v_fma(z, v_load(x_sums + t * sum_stride + g), total[t * P + p]);
        }
    }
    const float* s[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) s[p] = scales[p].scale + r * segments;
    int64_t j = 0;
    for (int64_t i = 0; i < cols; i += step, ++j) {
      I acc[kSums];
#pragma GCC unroll 16
      for (int a = 0; a < kSums; ++a) acc[a] = i_zero();
      if (kNibbles) {
#pragma GCC unroll 4
        for (int64_t at = 0; at < step; at += kStep) {
          S raw[P];
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) {
            const uint8_t* from = w[p] + (i + at) / 2;
            if (at / 2 % 64 == 0) __builtin_prefetch(from + ahead, 0, 1);
            if (kMixed && i + kStep > cols) {
              uint8_t rest[kStep / 2] = {0};
              memcpy(rest, from, (cols - i) / 2);
              raw[p] = s_load(rest);
            } else {
              raw[p] = s_load(from);
            }
          }
          mac_nibbles<N, P>(acc, raw, q + i + at, x_stride);
        }
      } else {
#pragma GCC unroll 4
        for (int64_t at = 0; at < step; at += kQuantBlock) {
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p)
            if (at % 64 == 0) __builtin_prefetch(w[p] + i + at + ahead, 0, 1);
          mac_bytes<N, P>(acc, w, i + at, q, x_stride);
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        V weight_scale = kMixed ? v_spread(s[p] + j * kBlocks) : v_set(s[p][j]);
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) {
          const float* xs = x_scale + t * scale_stride;
          V both = v_mul(weight_scale, kMixed ? v_spread(xs + j * kBlocks) : v_set(xs[j]));
          total[t * P + p] = v_fma(i_float(acc[t * P + p]), both, total[t * P + p]);
        }
      }
    }
    float sums[round_up(kSums, 4)];
#pragma GCC unroll 4
    for (int a = 0; a < kSums; a += 4)
      v_sum4(total[a], total[a + 1 < kSums ? a + 1 : a], total[a + 2 < kSums ? a + 2 : a],
             total[a + 3 < kSums ? a + 3 : a], sums + a);
    for (int t = 0; t < N; ++t)
      for (int p = 0; p < P; ++p) out[(p * x.rows + first + t) * kRowBlock + r] = sums[t * P + p];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) w[p] += row_bytes;
  }
}

template <int N, int P>
void quant_group(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x, int64_t first, Scales* scales,
                 float* out, int64_t ahead) {
  auto* run = cut.nibbles ? cut.segment == 128  ? quant_rows<true, 128, N, P>
                            : cut.segment == 64 ? quant_rows<true, 64, N, P>
                                                : quant_rows<true, 32, N, P>
              : cut.segment == 128 ? quant_rows<false, 128, N, P>
              : cut.segment == 64  ? quant_rows<false, 64, N, P>
                                   : quant_rows<false, 32, N, P>;
  run(places, rows, cut, x, first, scales, out, ahead);
}

// `rows` rows at each of P places against all rows of x, some of both at a time: the weights come from memory for the
// first rows of x and from the caches for the others.
template <int P>
void quant_block(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x, Scales* scales, float* out) {
  constexpr int kMost = kQuantRows / P;
  int64_t groups = (x.rows + kMost - 1) / kMost, most = reading().hint == 0 ? 0 : reading().ahead;
  for (int64_t r = 0; r < rows; r += kScaleRows) {
    int64_t n = rows - r < kScaleRows ? rows - r : kScaleRows;
    QuantPlace here[P];
    for (int p = 0; p < P; ++p) here[p] = {places[p].m, places[p].row + r};
    for (int64_t t = 0, left = groups; left > 0; --left) {
      int64_t group = (x.rows - t + left - 1) / left, ahead = t > 0 ? 0 : most;
      if (group > 4) group = round_up(group, 2);  // there is an even number of them
      switch (group) {
        case 1: quant_group<1, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 2: quant_group<2, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 3: quant_group<3, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 4: quant_group<4, P>(here, n, cut, x, t, scales, out + r, ahead); break;
        case 6: quant_group<(6 < kMost ? 6 : kMost), P>(here, n, cut, x, t, scales, out + r, ahead); break;
        default: quant_group<kMost, P>(here, n, cut, x, t, scales, out + r, ahead);
      }
      t += group;
    }
  }
}

// out (2, x.rows, kRowBlock) = the rows at both places, of which the second may have fewer.
inline void quant_places(const QuantPlace* places, int64_t rows, int64_t second, const Cut& cut, const Words& x,
                         Scales* scales, float* out) {
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
  bool made = false, has_zero = false;

  QuantInput(const Matrix& first, Activations activations, int64_t token_count, bool all, void* room, float* rest_room)
      : x(activations), tokens(token_count), exact(all), memory(room), rest(rest_room), cut(first) {}

  static int64_t rows(int64_t tokens, bool exact) {
    int64_t count = exact ? 2 * tokens : tokens;
    return count > 4 ? round_up(count, 2) : count;
  }
  const Words& meet(const Matrix& m) {
    Cut wanted(m);
    if (made && cut == wanted && has_zero == (m.zero != nullptr)) return words;
    made = true;
    cut = wanted;
    has_zero = m.zero != nullptr;
    int each = exact ? 2 : 1;
    words.place(memory, rows(tokens, exact), cut.cols);
    int64_t padded_cols = round_up(cut.cols, kStep);
    if (int64_t last = words.rows - 1; last >= tokens * each) {  // stands where one is missing to an even number
      memset(words.q + last * words.stride, 0, words.stride * sizeof(int16_t));
      memset(words.scale + last * words.scale_stride, 0, words.scale_stride * sizeof(float));
      memset(words.sums + last * words.sum_stride, 0, words.sum_stride * sizeof(float));
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int e = 0; e < each; ++e) {
        int64_t row = t * each + e;
        const float* from = e == 0 ? (const float*)x.data + t * x.stride : rest;
        make_words(from, cut, has_zero ? 1.0f : 8.0f, words.q + row * words.stride,
                   words.scale + row * words.scale_stride, words.sums + row * words.sum_stride,
                   exact && e == 0 ? rest : nullptr, padded_cols);
      }
    return words;
  }
  // c (x.rows, kRowBlock) -> (tokens, kRowBlock)
  void add_up(float* c, int64_t rows) const {
    if (!exact) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < rows; ++r)
        c[t * kRowBlock + r] = c[2 * t * kRowBlock + r] + c[(2 * t + 1) * kRowBlock + r];
  }
};

void few_quantised(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  bool exact = x.exact;
  int64_t cols = jobs[0].w.cols, x_rows = QuantInput::rows(tokens, exact), sums = x_rows * kRowBlock;
  int64_t words_bytes = round_up(Words::bytes(cols, x_rows), 64), scale_floats = 2 * Scales::floats(cols);
  int64_t rest_floats = round_up(cols, kStep) + 32;
  char* memory = (char*)team.scratch(words_bytes + (scale_floats + rest_floats + 4 * sums) * sizeof(float));
  float* floats = (float*)(memory + words_bytes);
  Scales scales[2] = {Scales(floats, cols), Scales(floats + scale_floats / 2, cols)};
  float *rest = floats + scale_floats, *c = rest + rest_floats, *c_up = c + 2 * sums;
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
