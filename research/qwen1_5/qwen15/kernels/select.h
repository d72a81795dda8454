// Passes over one row of logits (V,) float32 that selecting the next token is built on.
#pragma once

namespace {

// maxima[c] = largest of logits[256 c : 256 (c + 1)]; false when a logit is NaN.
bool chunk_maxima(const float* logits, int64_t n, float* maxima) {
  bool clean = true;
  for (int64_t c = 0; c * kLogitChunk < n; ++c) {
    const float* p = logits + c * kLogitChunk;
    int64_t count = n - c * kLogitChunk < kLogitChunk ? n - c * kLogitChunk : kLogitChunk;
    V high = v_set(-__builtin_inff());
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      V x = v_load(p + i);
      clean &= !v_any_nan(x);
      high = v_max(high, x);
    }
    float top = v_highest(high);
    for (; i < count; ++i) {
      clean &= p[i] == p[i];
      top = p[i] > top ? p[i] : top;
    }
    maxima[c] = top;
  }
  return clean;
}

// sum_i exp((logits[i] - top) / temperature), in double from float32 lanes chunk by chunk
double sum_exp(const float* logits, int64_t n, float inverse_temperature, float top) {
  double sum = 0.0;
  V scale = v_set(inverse_temperature), shift = v_set(top);
  for (int64_t c = 0; c < n; c += kLogitChunk) {
    int64_t end = n - c < kLogitChunk ? n : c + kLogitChunk, i = c;
    V total = v_zero();
    for (; i + W <= end; i += W) total = v_add(total, v_exp(v_mul(v_sub(v_load(logits + i), shift), scale)));
    sum += v_sum(total);
    for (; i < end; ++i) sum += __builtin_exp((double)(logits[i] - top) * inverse_temperature);
  }
  return sum;
}

// ---------------------------------------------------------------- probes for the bench

// Reads every byte and adds them up in 64-bit words: how fast memory can be read at all.
uint64_t read_bytes(const void* data, int64_t bytes) {
  typedef uint64_t Q __attribute__((vector_size(W * 4)));
  Q a = {0}, b = {0}, c = {0}, d = {0};
  const char* p = (const char*)data;
  for (int64_t i = 0; i + 4 * (int64_t)sizeof(Q) <= bytes; i += 4 * sizeof(Q)) {
    Q w[4];
    memcpy(w, p + i, sizeof w);
    a += w[0];
    b += w[1];
    c += w[2];
    d += w[3];
  }
  a = (a + b) + (c + d);
  uint64_t sum = 0;
  for (unsigned i = 0; i < sizeof(Q) / 8; ++i) sum += a[i];
  return sum;
}

// Runs the register tile on panels that stay in the first cache level; returns the floating point operations done.
template <class T>
double tile_flops(int64_t repeats, float* sink) {
  constexpr int k = 128;
  alignas(64) typename T::A a[kTileRows * k] = {0};
  alignas(64) typename T::P panel[k * kTileVecs * W] = {0};
  alignas(64) float c[kTileRows * kTileVecs * W];
  for (int64_t i = 0; i < repeats; ++i)
    tile<T, kTileRows, kTileVecs>(a, k, panel, k, c, kTileVecs * W, i > 0);
  *sink = c[0];
  return 2.0 * repeats * k * kTileRows * kTileVecs * W;
}

double peak_flops(int64_t repeats, DType dtype) {
  volatile float sink;
  float value;
  double done = dtype == DType::bf16 ? tile_flops<Packer<PairRow>::Tile>(repeats, &value)
                                     : tile_flops<FloatTile>(repeats, &value);
  sink = value;
  (void)sink;
  return done;
}

}  // namespace
