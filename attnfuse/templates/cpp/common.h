// What the kernels of this folder share: attention on processors with AVX-512, see templates/native.py.
//
// Packed numbers have 32 bits: a float, or, where the processor multiplies bfloat16 in vectors, and faster than floats, a pair of
// them that belong to neighbouring terms of a sum (PAIRS).
#ifndef __AVX512F__
#error "no AVX-512"
#endif
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#if defined(__AVX512BF16__) && FAST_PAIRS
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

// As native.py packs it.  Strides are in elements; those of last axes are 1, but those of bias and mask, which are 0 or 1.
struct Call {
  const void *q, *k, *v, *bias;
  // the keys that each row sees: from firsts[m] up to, without, lasts[m]; where they are null from first + down·m up to
  // last + right·m
  const int64_t *firsts, *lasts;
  // of these keys the ones that are allowed, null where all are
  const uint8_t* mask;
  // the hashes of rows [2, B, H, M] and of keys [2, N] that tell which weights are dropped (dropout.py), null where none are
  const int32_t *row_hashes, *key_hashes;
  void* out;
  float *lse, *scratch;
  // the backward's, null where they are not given or not wanted
  const void* dout;
  const float* dlse;
  void *dq, *dk, *dv;
  float* dscores;  // [B, H, M, N], the gradient of what is added to each score
  int64_t B, H, Hkv, M, N, D, Dv;
  int64_t q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, lse_b, lse_h;
  int64_t bias_b, bias_h, bias_m, bias_n, bias_is_float;
  int64_t mask_b, mask_h, mask_m, mask_n;
  int64_t dout_b, dout_h, dout_m, dlse_b, dlse_h, dlse_m, dq_b, dq_h, dq_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n;
  int64_t adds;  // dk and dv are float, and added to
  int64_t whole;  // lse is that of the keys of the call, so that the weights of a row add up to 1
  int64_t first, last, down, right;
  int64_t scratch_floats, threads;
  int64_t threshold;  // where the product of its hashes is below, a weight is dropped
  // `dead` is what a row of out is that sees keys, but no score above -inf; `kept` the factor of weights that are not dropped
  double scale, cap, dead, kept;
};

namespace {

constexpr long LANES = 16;
constexpr long PANEL = 64;  // columns of a panel: four vectors
constexpr long GROUP = 6;   // rows of a product that are held in registers
constexpr long STEPS = 128;  // terms, or pairs of them, of a sum that is made in one
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr long up(long x, long to) { return (x + to - 1) / to * to; }

inline __mmask16 lanes(long n) { return n >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max(n, 0L)) - 1); }

inline __m512 load(const float* x, __mmask16 some) { return _mm512_maskz_loadu_ps(some, x); }
inline __m512 load(const bf16* x, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x)), 16));
}
inline __m512 load(const f16* x, __mmask16 some) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, x)); }

inline float number(const float* x) { return *x; }
template <class T>
float number(const T* x) {
  return _mm512_cvtss_f32(load(x, 1));
}

inline void store(float* to, __m512 x, __mmask16 some) { _mm512_mask_storeu_ps(to, some, x); }
inline void store(f16* to, __m512 x, __mmask16 some) {
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(bf16* to, __m512 x, __mmask16 some) {
  // half of the last digit that stays, less one where that digit is even
  __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(bits));
}

inline __m512 polynomial(__m512 x, const float* from_highest, int count) {
  __m512 sum = _mm512_set1_ps(from_highest[0]);
  for (int i = 1; i < count; ++i) sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(from_highest[i]));
  return sum;
}

// (2^x - 1)/x for |x| <= 1/2, interpolated at Chebyshev's nodes; the error of 2^x is below 2^-26
constexpr float POWER[] = {1.54531634e-4f, 1.33908633e-3f, 9.61808302e-3f, 5.55035695e-2f, 2.40226507e-1f, 6.93147182e-1f};

// 2^x; what is below 2^-126 is 0, and of NaN it is NaN
inline __m512 exp2(__m512 x) {
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_sub_ps(x, whole);
  __m512 power = _mm512_fmadd_ps(polynomial(rest, POWER, std::size(POWER)), rest, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), power, whole);
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, which keeps its digits around 0
inline __m512 tanh(__m512 x) {
  __m512 doubled = _mm512_mul_ps(_mm512_set1_ps(2 * LOG2E), x);
  // beyond it is 1 in float; of NaN both are NaN
  doubled = _mm512_max_ps(_mm512_set1_ps(-30.0f), _mm512_min_ps(_mm512_set1_ps(30.0f), doubled));
  __m512 whole = _mm512_roundscale_ps(doubled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_sub_ps(doubled, whole), one = _mm512_set1_ps(1.0f);
  __m512 less_one = _mm512_mul_ps(polynomial(rest, POWER, std::size(POWER)), rest);
  __m512 scaled = _mm512_scalef_ps(one, whole);
  __m512 e = _mm512_fmadd_ps(scaled, less_one, _mm512_sub_ps(scaled, one));
  return _mm512_div_ps(e, _mm512_add_ps(e, _mm512_set1_ps(2.0f)));
}

template <bool PAIRS>
inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
#if HAS_PAIRS
  if constexpr (PAIRS) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return _mm512_fmadd_ps(a, b, c);
}

// Sums stay in registers where all loops over them are unrolled, which compilers do not do by themselves.
#define UNROLL _Pragma("GCC unroll 8")

template <bool PAIRS, bool ACROSS, int R, int C>
void tile(const float* a, long lda, const float* b, long ldb, long steps, float* c, long ldc, bool add) {
  __m512 sums[R][C];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int j = 0; j < C; ++j) sums[r][j] = _mm512_setzero_ps();
  for (long i = 0; i < steps; ++i) {
    __m512 row[C];
    UNROLL for (int j = 0; j < C; ++j) row[j] = _mm512_loadu_ps(b + i * ldb + j * LANES);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512 one = _mm512_set1_ps(ACROSS ? a[i * lda + r] : a[r * lda + i]);
      UNROLL for (int j = 0; j < C; ++j) sums[r][j] = multiply_add<PAIRS>(one, row[j], sums[r][j]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int j = 0; j < C; ++j) {
    float* at = c + r * ldc + j * LANES;
    if (add) sums[r][j] = _mm512_add_ps(_mm512_loadu_ps(at), sums[r][j]);
    _mm512_storeu_ps(at, sums[r][j]);
  }
}

using Tile = void (*)(const float*, long, const float*, long, long, float*, long, bool);

template <bool P, bool A, int R>
constexpr Tile TILES_OF[] = {tile<P, A, R, 1>, tile<P, A, R, 2>, tile<P, A, R, 3>, tile<P, A, R, 4>};
template <bool P, bool A>
constexpr const Tile* TILES[] = {TILES_OF<P, A, 1>, TILES_OF<P, A, 2>, TILES_OF<P, A, 3>,
                                 TILES_OF<P, A, 4>, TILES_OF<P, A, 5>, TILES_OF<P, A, 6>};

// c = a·b, or c + a·b: a [rows, steps], or ACROSS [steps, rows], b [steps, 16·vectors]; up to GROUP rows and four vectors.
template <bool PAIRS, bool ACROSS = false>
void product(long rows, long vectors, const float* a, long lda, const float* b, long ldb, long steps, float* c, long ldc,
             bool add) {
  const Tile run = TILES<PAIRS, ACROSS>[rows - 1][vectors - 1];
  // short sums of short sums keep more digits than a long one; one of nothing is zero
  long i = 0;
  do {
    run(a + (ACROSS ? i * lda : i), lda, b + i * ldb, ldb, std::min(STEPS, steps - i), c, ldc, add || i > 0);
  } while ((i += STEPS) < steps);
}

// c + a·b for the terms [first, last) of sums alone: a [rows, terms], b [terms, 16·vectors], in PAIRS two terms side by side.
template <bool PAIRS>
void product_of(long rows, long vectors, const float* a, long lda, const float* b, long ldb, long first, long last, float* c,
                long ldc) {
  if constexpr (PAIRS) {
    // weights of terms beside them are 0, but what these are multiplied with may be no number
    auto half = [&](long pair, uint32_t kept) {
      float row[PANEL];
      for (long j = 0; j < vectors * LANES; j += LANES) {
        const __m512i both = _mm512_loadu_si512(b + pair * ldb + j);
        _mm512_storeu_si512(row + j, _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(kept))));
      }
      product<PAIRS>(rows, vectors, a + pair, lda, row, PANEL, 1, c, ldc, true);
    };
    if (first % 2) half(first++ / 2, 0xffff0000u);
    if (last % 2 && first < last) half(--last / 2, 0xffffu);
    first /= 2, last /= 2;
  }
  if (first < last) product<PAIRS>(rows, vectors, a + first, lda, b + first * ldb, ldb, last - first, c, ldc, true);
}

// 16 x 16 numbers with rows and columns exchanged.
inline void transpose(__m512i* x) {
  __m512i y[LANES];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  // column 4·lane + i of rows r to r + 3 in the lanes of x[r + i]
  for (int r = 0; r < 16; r += 4) {
    x[r] = _mm512_unpacklo_epi64(y[r], y[r + 2]);
    x[r + 1] = _mm512_unpackhi_epi64(y[r], y[r + 2]);
    x[r + 2] = _mm512_unpacklo_epi64(y[r + 1], y[r + 3]);
    x[r + 3] = _mm512_unpackhi_epi64(y[r + 1], y[r + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), odd_low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    y[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  std::copy(y, y + LANES, x);
}

// Rows as columns, [steps, PANEL] of up to PANEL rows [rows, D].
template <bool PAIRS, class T>
void pack_columns(const T* x, long stride, long D, long rows, long steps, float* to) {
  for (long j = 0; j < PANEL; j += LANES)
    for (long i = 0; i < steps; i += LANES) {
      __m512i square[LANES];
      for (long l = 0; l < LANES; ++l) {
        const T* row = x + (j + l) * stride;
        if (j + l >= rows)
          square[l] = _mm512_setzero_si512();
        else if constexpr (PAIRS)
          square[l] = _mm512_maskz_loadu_epi16(D - 2 * i >= 32 ? ~0u : (1u << (D - 2 * i)) - 1, row + 2 * i);
        else
          square[l] = _mm512_castps_si512(load(row + i, lanes(D - i)));
      }
      transpose(square);
      for (long d = i; d < std::min(steps, i + LANES); ++d) _mm512_storeu_si512(to + d * PANEL + j, square[d - i]);
    }
}

// Rows as right operands, [padded, or half of it, width] of rows [rows, D].
template <bool PAIRS, class T>
void pack_rows(const T* x, long stride, long D, long rows, long padded, long width, float* to) {
  for (long d = 0; d < width; d += LANES) {
    const __mmask16 some = lanes(D - d);
    if constexpr (PAIRS) {
      auto row = [&](long n) {
        return n < rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x + n * stride + d)) : _mm512_setzero_si512();
      };
      for (long n = 0; n < padded; n += 2)
        _mm512_storeu_si512(to + n / 2 * width + d, _mm512_or_si512(row(n), _mm512_slli_epi32(row(n + 1), 16)));
    } else {
      for (long n = 0; n < padded; ++n)
        _mm512_storeu_ps(to + n * width + d, n < rows ? load(x + n * stride + d, some) : _mm512_setzero_ps());
    }
  }
}

// Rows as left operands, [rows, steps] of rows [rows, D].
template <bool PAIRS, class T>
void pack_left(const T* x, long stride, long D, long rows, long steps, float* to) {
  for (long r = 0; r < rows; ++r, x += stride, to += steps) {
    if constexpr (PAIRS) {
      if (D % 2) to[steps - 1] = 0;
      std::memcpy(to, x, D * sizeof(T));
    } else {
      for (long d = 0; d < D; d += LANES) store(to + d, load(x + d, lanes(D - d)), lanes(D - d));
    }
  }
}

struct Range {
  long first, last;
};

// The keys that row m sees.
inline Range seen_by(const Call& c, long m) {
  const long first = c.firsts != nullptr ? c.firsts[m] : c.first + c.down * m;
  const long last = c.lasts != nullptr ? c.lasts[m] : c.last + c.right * m;
  return {std::clamp(first, 0L, c.N), std::clamp(last, 0L, c.N)};
}

// Those of some of 16 keys from n on that are allowed.
inline __mmask16 allowed(const Call& c, long b, long h, long m, long n, __mmask16 some) {
  if (c.mask == nullptr) return some;
  const uint8_t* x = c.mask + b * c.mask_b + h * c.mask_h + m * c.mask_m + n * c.mask_n;
  if (c.mask_n == 0) return *x ? some : 0;
  const __m128i found = _mm_maskz_loadu_epi8(some, x);
  return _mm_test_epi8_mask(found, found);
}

// What is added to the scores of some of 16 keys from n on.
template <class T>
inline __m512 bias(const Call& c, long b, long h, long m, long n, __mmask16 some) {
  if (c.bias == nullptr) return _mm512_setzero_ps();
  const long at = b * c.bias_b + h * c.bias_h + m * c.bias_m + n * c.bias_n;
  auto of = [&](const auto* x) { return c.bias_n == 0 ? _mm512_set1_ps(number(x)) : load(x, some); };
  return c.bias_is_float ? of(static_cast<const float*>(c.bias) + at) : of(static_cast<const T*>(c.bias) + at);
}

// Which weights of a row are kept.
class Kept {
 public:
  Kept(const Call& c, long b, long h, long m) : c_(c) {
    if (c.row_hashes == nullptr) return;
    const int32_t* row = c.row_hashes + (b * c.H + h) * c.M + m;
    low_ = _mm512_set1_epi32(row[0]), high_ = _mm512_set1_epi32(row[c.B * c.H * c.M]);
  }

  // Those of 16 keys from n on.
  __mmask16 of(long n) const {
    if (c_.row_hashes == nullptr) return 0xffff;
    const __mmask16 some = lanes(c_.N - n);
    const __m512i low = _mm512_maskz_loadu_epi32(some, c_.key_hashes + n);
    const __m512i high = _mm512_maskz_loadu_epi32(some, c_.key_hashes + c_.N + n);
    const __m512i product = _mm512_mullo_epi32(_mm512_xor_si512(low_, low), _mm512_add_epi32(high_, high));
    return _mm512_cmpge_epi32_mask(product, _mm512_set1_epi32(static_cast<int32_t>(c_.threshold)));
  }

 private:
  const Call& c_;
  __m512i low_{}, high_{};
};

// Asks for the biases of row m for the keys [first, last), which come from memory while products are made.
template <class T>
void fetch_bias(const Call& c, long b, long h, long m, long first, long last) {
  if (c.bias == nullptr || c.bias_n == 0) return;
  const long size = c.bias_is_float ? sizeof(float) : sizeof(T);
  const char* row = static_cast<const char*>(c.bias) + (b * c.bias_b + h * c.bias_h + m * c.bias_m) * size;
  for (long at = first * size; at < last * size; at += 64) _mm_prefetch(row + at, _MM_HINT_T0);
}

}  // namespace
