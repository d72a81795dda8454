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
constexpr int64_t kPieceBytes = 16384;  // of activations that rows of weights meet before the next ones: they stay in L1

// How the columns of a quantised matrix are cut.
struct Cut {
  int64_t cols, group, segment;
  bool nibbles;

  explicit Cut(const Matrix& m) : cols(m.cols), group(m.cols / m.groups), nibbles(m.dtype == DType::q4) {
    segment = group % kSegment == 0 ? kSegment : group % (kSegment / 2) == 0 ? kSegment / 2 : kQuantBlock;
  }
  bool operator==(const Cut& other) const {
    return cols == other.cols && group == other.group && nibbles == other.nibbles;
  }
  // Segments in a vector of 4-bit columns, where it holds several.
  int64_t mixed() const { return nibbles && segment < kStep ? kStep / segment : 1; }
  int64_t segments() const { return cols / segment; }
  int64_t groups() const { return cols / group; }
};

// Rows of activations that weights meet at once: those of a group, `count` of all from `first` on. As many as there are
// kernels for (1 to 4, 6, 8): all rows in as few groups as can be, of nearly the same size.
struct RowGroup {
  int64_t first, count, left;  // `left` groups, this one included

  explicit RowGroup(int64_t rows) : first(0), left((rows + kQuantRows - 1) / kQuantRows) { measure(rows); }
  void next(int64_t rows) {
    first += count;
    --left;
    if (left > 0) measure(rows);
  }

 private:
  void measure(int64_t rows) {
    count = (rows - first + left - 1) / left;
    if (count > 4) count = round_up(count, 2);  // there is an even number of them
  }
};

constexpr int64_t quads_of(int64_t rows) { return (rows + 3) / 4; }
// Which of `rows` rows of a quad a lane has after its sums have been folded, see i_pair and i_quad; -1: none.
constexpr int row_of_lane(int64_t rows, int lane) {
  return rows == 1 ? 0 : rows == 2 ? lane % 2 : lane % 4 < rows ? lane % 4 : -1;
}

// Activations as int16 rows: one for each token, or two that add up to it. The rows of a group lie beside each other,
// as the loop over columns meets them:
//   q      (steps, rows, step) int16; for 4 bits in the order in which nibbles come out of a vector
//   scale  (segments, quads, W) float32, in the lanes where a row's sums are; where a vector holds several segments,
//          each in its part of the lanes, (steps, quads, W)
//   sums   (groups of columns, quads, W) float32: what scale q of a group sums up to, times -middle, in one lane a row;
//          of a single row (groups,), and zeros after them
struct Words {
  int64_t rows = 0, cols = 0;
  char* memory = nullptr;

  struct Group {
    int16_t* q;
    float *scale, *sums;
  };

  static int64_t scale_floats(int64_t cols) { return (round_up(cols, kStep) / kQuantBlock) * W; }
  static int64_t row_bytes(int64_t cols) { return round_up(cols, kStep) * 2 + 2 * scale_floats(cols) * 4; }
  static int64_t bytes(int64_t cols, int64_t count) { return count * row_bytes(cols); }

  void place(void* room, int64_t count, int64_t columns) {
    rows = count;
    cols = columns;
    memory = (char*)room;
  }
  Group group(const RowGroup& g) const {
    char* at = memory + g.first * row_bytes(cols);
    float* scale = (float*)(at + g.count * round_up(cols, kStep) * 2);
    return {(int16_t*)at, scale, scale + quads_of(g.count) * scale_floats(cols)};
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

// What a segment's words are worth: x[j] is about the scale times word j. store(j, a, b) gets 2 W words from column j on, as
// whole numbers; they are zero, and the scale is not a number, where something in the segment is not finite.
template <class Store>
inline float segment_words(const float* x, int64_t columns, Store store) {
  V high = v_zero(), nan = v_zero();
  for (int64_t i = 0; i < columns; i += W) {
    V v = v_load(x + i);
    high = v_max(high, v_max(v, v_sub(v_zero(), v)));
    nan = v_add(nan, v_sub(v, v));  // not a number where v is not finite
  }
  const float unit = v_highest(high) / kMostWord + v_sum(nan);
  const V inverse = v_set(unit > 1e-36f ? 1.0f / unit : 0.0f);
  for (int64_t i = 0; i < columns; i += 2 * W) {
    V a = v_zero(), b = v_zero();
    if (unit == unit) {
      a = v_round(v_mul(v_load(x + i), inverse));
      b = v_round(v_mul(v_load(x + i + W), inverse));
    }
    store(i, a, b);
  }
  return unit > 1e-36f || unit != unit ? unit : 0.0f;
}

// One row of x (cols,) -> row `row` of a group of `rows`, whose memory is zero; `rest` (cols,), where it is given,
// becomes what its int16 leave over. `middle` is the zero point where the weights have none of their own, 1 where they
// have.
inline void make_words(const float* x, const Cut& cut, float middle, const Words::Group& to, int64_t rows, int64_t row,
                       float* rest) {
  const int64_t step = cut.nibbles ? kStep : kQuantBlock, padded_cols = round_up(cut.cols, step);
  const int64_t quads = quads_of(rows), quad = row / 4, members = rows - 4 * quad < 4 ? rows - 4 * quad : 4;
  const int64_t mixed = cut.mixed();
  auto words = [&](int64_t column) {
    int64_t within = column & (step - 1);  // steps are powers of two
    return to.q + (column - within) * rows + row * step + within;
  };
  for (int64_t j = 0; j < cut.segments(); ++j) {
    const float* from = x + j * cut.segment;
    I total = i_zero();
    float scale = segment_words(from, cut.segment, [&](int64_t i, V a, V b) {
      total = s_store(words(j * cut.segment + i), a, b, total);
      if (rest == nullptr) return;
      v_store(rest + j * cut.segment + i, a);
      v_store(rest + j * cut.segment + i + W, b);
    });
    for (int64_t i = 0; rest != nullptr && i < cut.segment; i += W) {
      float* left = rest + j * cut.segment + i;
      v_store(left, v_fma(v_load(left), v_set(-scale), v_load(from + i)));
    }
    float* lanes = to.scale + (j / mixed * quads + quad) * W;
    for (int64_t lane = j % mixed * W / mixed, end = lane + W / mixed; lane < end; ++lane)
      if (row_of_lane(members, (int)lane) == row % 4) lanes[lane] = scale;
    int64_t g = j * cut.segment / cut.group;
    to.sums[rows == 1 ? g : (g * quads + quad) * W + row % 4] += -middle * scale * v_sum(i_float(total));
  }
#ifdef QWEN15_DOT_BYTES
  for (int64_t i = 0; i < padded_cols; i += kQuantBlock) part_words(words(i), cut.nibbles);
#else
  if (!cut.nibbles) return;
  const int quarters = W / 4;
  for (int64_t i = 0; i < padded_cols; i += kStep) {
    int16_t plain[kStep];
    memcpy(plain, words(i), sizeof plain);
    for (int b = 0; b < quarters; ++b)
      for (int k = 0; k < 4; ++k) memcpy(words(i) + (k * quarters + b) * 8, plain + b * kQuantBlock + k * 8, 16);
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
// acc[t] += 16 columns; x has the upper bytes of N rows, and kQuantBlock bytes further on the lower ones.
template <int N>
inline void mac_parts(I* acc, int8x16_t w, const char* x) {
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t, x += 2 * kQuantBlock)
    acc[t] = i_dot(acc[t], w, v_any<int8x16_t>(x), v_any<int8x16_t>(x + kQuantBlock));
}

// acc[t] += 32 columns of 8 bits
template <int N>
inline void mac_bytes(I* acc, const uint8_t* w, const int16_t* x) {
  mac_parts<N>(acc, v_any<int8x16_t>(w), (const char*)x);
  mac_parts<N>(acc, v_any<int8x16_t>(w + 16), (const char*)x + 16);
}

// acc[t] += a vector of 4-bit columns
template <int N>
inline void mac_nibbles(I* acc, S raw, const int16_t* x) {
  uint8x16_t bytes = vreinterpretq_u8_s16(raw);
  mac_parts<N>(acc, vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), (const char*)x);
  mac_parts<N>(acc, vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), (const char*)x + 16);
}
#else
// acc[t] += 32 columns of 8 bits
template <int N>
inline void mac_bytes(I* acc, const uint8_t* w, const int16_t* x) {
#pragma GCC unroll 4
  for (int i = 0; i < kQuantBlock; i += 2 * W) {
    S l = s_load_bytes(w + i);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) acc[t] = i_madd(acc[t], l, s_load(x + t * kQuantBlock + i));
  }
}

// acc[t] += a vector of 4-bit columns
template <int N>
inline void mac_nibbles(I* acc, S raw, const int16_t* x) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    S nibbles = s_nibble(raw, k);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) acc[t] = i_madd(acc[t], nibbles, s_load(x + t * kStep + k * 2 * W));
  }
}
#endif

// Sums of N rows, at most 4, in the lanes that row_of_lane says.
template <int N>
inline V fold(const I* acc) {
  if (N == 1) return i_float(acc[0]);
  if (N == 2) return i_pair(acc[0], acc[N - 1]);
  return i_quad(acc[0], acc[1 % N], acc[2 % N], acc[N - 1]);
}

// At most kScaleRows rows at P places against a group of N rows of x: out[(p * stride + t) * kRowBlock + r].
//
// Where many rows of x are more than stays in the first cache level, all rows of weights meet a piece of its
// columns, and then the next: read anew for each row, x would come from L2 in more time than its products take. What is
// asked for is then each row's next piece. With few rows of x the memory is what limits, and likes address order.
template <bool kNibbles, int kColumns, int N, int P>
__attribute__((noinline)) void quant_rows(const QuantPlace* places, int64_t rows, const Cut& cut, const Words::Group& x,
                                          Scales* scales, float* out, int64_t stride, int64_t ahead) {
  constexpr bool kMixed = kNibbles && kColumns < kStep;  // a vector has columns of several segments
  constexpr int kParts = kMixed ? (int)kStep / kColumns : 1, kQuads = (int)quads_of(N), kLast = N - 4 * (kQuads - 1);
  constexpr int64_t kAtOnce = kMixed ? kStep : kColumns;
  constexpr bool kPieces = P == 1 && N > 4;
  constexpr int64_t kPiece = kPieceBytes / 2 / N / kSegment * kSegment;  // whole segments and vectors
  const int64_t cols = cut.cols, segments = cut.segments(), groups = cut.groups(), row_bytes = places[0].m->row_bytes();
  const uint8_t* w[P];
  bool zeros[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    w[p] = places[p].data();
    zeros[p] = kNibbles || places[p].m->zero != nullptr;
    scales[p].read(*places[p].m, places[p].row, rows, cut);
  }
  float sums[P][kQuads][kScaleRows][4];
  V total[kScaleRows][P][kQuads];  // between two pieces
  const bool whole = !kPieces || cols <= kPiece + kPiece / 2;
  for (int64_t begin = 0, end; begin < cols; begin = end) {
    end = whole || cols - begin <= kPiece ? cols : begin + kPiece;
    if (!whole && ahead != 0) ahead = (end < cols ? kPiece : rows * cols - begin) * row_bytes / cols;
    for (int64_t r = 0; r < rows; ++r) {
      V sum[P][kQuads];
      const uint8_t* row[P];
      const float* s[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        row[p] = w[p] + r * row_bytes;
        s[p] = scales[p].scale + r * segments + begin / kAtOnce * kParts;
#pragma GCC unroll 2
        for (int q = 0; q < kQuads; ++q) sum[p][q] = kPieces && begin > 0 ? total[r][p][q] : v_zero();
        if ((kPieces && begin > 0) || !zeros[p]) continue;
        const float* zero = scales[p].zero + r * groups;
        if (N == 1)
          for (int64_t g = 0; g < groups; g += W) sum[p][0] = v_fma(v_load(zero + g), v_load(x.sums + g), sum[p][0]);
        else
          for (int64_t g = 0; g < groups; ++g)
#pragma GCC unroll 2
            for (int q = 0; q < kQuads; ++q)
              sum[p][q] = v_fma(v_set(zero[g]), v_load(x.sums + (g * kQuads + q) * W), sum[p][q]);
      }
      const int16_t* words = x.q + N * begin;
      const float* x_scale = x.scale + begin / kAtOnce * kQuads * W;
      for (int64_t i = begin, j = 0; i < end; i += kAtOnce, j += kParts, words += N * kAtOnce, x_scale += kQuads * W) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          I acc[N];
#pragma GCC unroll 8
          for (int t = 0; t < N; ++t) acc[t] = i_zero();
          if (kNibbles) {
#pragma GCC unroll 4
            for (int64_t at = 0; at < kAtOnce; at += kStep) {
              const uint8_t* from = row[p] + (i + at) / 2;
              if (at / 2 % 64 == 0) __builtin_prefetch(from + ahead, 0, 1);
              S raw;
              if (kMixed && i + kStep > cols) {
                uint8_t rest[kStep / 2] = {0};
                memcpy(rest, from, (cols - i) / 2);
                raw = s_load(rest);
              } else {
                raw = s_load(from);
              }
              mac_nibbles<N>(acc, raw, words + N * at);
            }
          } else {
#pragma GCC unroll 4
            for (int64_t at = 0; at < kAtOnce; at += kQuantBlock) {
              if (at % 64 == 0) __builtin_prefetch(row[p] + i + at + ahead, 0, 1);
              mac_bytes<N>(acc, row[p] + i + at, words + N * at);
            }
          }
          V scale = v_spread<kParts>(s[p] + j);
          if constexpr (kQuads == 2) sum[p][0] = v_fma(fold<4>(acc), v_mul(scale, v_load(x_scale)), sum[p][0]);
          const int last = kQuads - 1;
          sum[p][last] = v_fma(fold<kLast>(acc + 4 * last), v_mul(scale, v_load(x_scale + last * W)), sum[p][last]);
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int q = 0; q < kQuads; ++q) {
          if (!kPieces || end == cols) v_quarters(sum[p][q], sums[p][q][r]);
          else total[r][p][q] = sum[p][q];
        }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t) {
      float* to = out + (p * stride + t) * kRowBlock;
      const int members = t / 4 < kQuads - 1 ? 4 : kLast;
      for (int64_t r = 0; r < rows; ++r) {
        const float* lanes = sums[p][t / 4][r];
        to[r] = members == 1   ? (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
                : members == 2 ? lanes[t % 4] + lanes[t % 4 + 2]
                               : lanes[t % 4];
      }
    }
}

template <int N, int P>
void quant_group(const QuantPlace* places, int64_t rows, const Cut& cut, const Words::Group& x, Scales* scales,
                 float* out, int64_t stride, int64_t ahead) {
  auto* run = cut.nibbles ? cut.segment == 128  ? quant_rows<true, 128, N, P>
                            : cut.segment == 64 ? quant_rows<true, 64, N, P>
                                                : quant_rows<true, 32, N, P>
              : cut.segment == 128 ? quant_rows<false, 128, N, P>
              : cut.segment == 64  ? quant_rows<false, 64, N, P>
                                   : quant_rows<false, 32, N, P>;
  run(places, rows, cut, x, scales, out, stride, ahead);
}

// `rows` rows at each of P places against all rows of x, some of both at a time: the weights come from memory for the
// first rows of x and from the caches for the others.
template <int P>
void quant_block(const QuantPlace* places, int64_t rows, const Cut& cut, const Words& x, Scales* scales, float* out) {
  int64_t most = reading().hint == 0 ? 0 : reading().ahead;
  for (int64_t r = 0; r < rows; r += kScaleRows) {
    int64_t n = rows - r < kScaleRows ? rows - r : kScaleRows;
    QuantPlace here[P];
    for (int p = 0; p < P; ++p) here[p] = {places[p].m, places[p].row + r};
    for (RowGroup group(x.rows); group.left > 0; group.next(x.rows)) {
      int64_t ahead = group.first > 0 ? 0 : most;
      Words::Group words = x.group(group);
      float* to = out + group.first * kRowBlock + r;
      switch (group.count) {
        case 1: quant_group<1, P>(here, n, cut, words, scales, to, x.rows, ahead); break;
        case 2: quant_group<2, P>(here, n, cut, words, scales, to, x.rows, ahead); break;
        case 3: quant_group<3, P>(here, n, cut, words, scales, to, x.rows, ahead); break;
        case 4: quant_group<4, P>(here, n, cut, words, scales, to, x.rows, ahead); break;
        case 6: quant_group<(P == 1 ? 6 : 4), P>(here, n, cut, words, scales, to, x.rows, ahead); break;
        default: quant_group<(P == 1 ? 8 : 4), P>(here, n, cut, words, scales, to, x.rows, ahead);
      }
    }
  }
}

// out (2, x.rows, kRowBlock) = the rows at both places, of which the second may have fewer.
inline void quant_places(const QuantPlace* places, int64_t rows, int64_t second, const Cut& cut, const Words& x,
                         Scales* scales, float* out) {
  if (x.rows > kQuantRows / 2) {  // bound by arithmetic: both places at once would be one more function to compile
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
    memset(memory, 0, Words::bytes(cut.cols, words.rows));  // also the row that makes their number even
    int64_t row = 0;
    for (RowGroup group(words.rows); group.left > 0; group.next(words.rows))
      for (int64_t i = 0; i < group.count && row < tokens * each; ++i, ++row) {
        bool second = exact && row % 2 == 1;
        const float* from = second ? rest : (const float*)x.data + row / each * x.stride;
        make_words(from, cut, has_zero ? 1.0f : 8.0f, words.group(group), group.count, i,
                   exact && !second ? rest : nullptr);
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
