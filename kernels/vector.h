// One vector of floats in the instruction set that the including file is compiled for.
//
// isa_*.cc sets SAMBAY_ISA (a namespace) and one of SAMBAY_AVX512, SAMBAY_AVX2, SAMBAY_NEON or none of
// them. Only what the operators need is here. A store of int8_t rounds to nearest, ties to even, values of
// -128 to 127. `count` is 1 .. kWidth: the lanes of a partial vector;
// the others read as 0. max(a, b) and min(a, b) give b where a lane of either is NaN, so a NaN in the
// second argument stays.

#include "kernels.h"

namespace sambay::SAMBAY_ISA {

#if defined(SAMBAY_AVX512)

constexpr int kWidth = 16;
constexpr int kStripe = 4;  // vectors of output columns that a product keeps in registers

struct Vec {
  __m512 v;
};

inline __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(lanes(count), p)}; }
inline Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const Half* p, int64_t count) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), p))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), a.v); }
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// 2^n out of 1.5 * 2^23 + n: the low bits of that float are n. 0 for n = -127, infinity for 128.
inline Vec power_of_two(Vec biased) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(biased.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3F800000)))};
}

inline __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline __m512 add_quads(const Vec* rows) {
  const __m512d low = _mm512_castps_pd(add_pairs(rows[0].v, rows[1].v));
  const __m512d high = _mm512_castps_pd(add_pairs(rows[2].v, rows[3].v));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
}
inline __m512 add_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// Lane i of the result is the sum of rows[i].
inline Vec sums(const Vec* rows) {
  return {add_lanes(add_lanes(add_quads(rows), add_quads(rows + 4)),
                    add_lanes(add_quads(rows + 8), add_quads(rows + 12)))};
}

#elif defined(SAMBAY_AVX2)

constexpr int kWidth = 8;
constexpr int kStripe = 2;

struct Vec {
  __m256 v;
};

inline __m256i lanes(int64_t count) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
}
inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, lanes(count))}; }
inline Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load(const Half* p, int64_t count) {  // in registers: a copy through memory would be waited for
  uint64_t low = 0, high = 0;
  for (int64_t i = count - 1; i >= 4; --i) high = high << 16 | p[i].bits;
  for (int64_t i = (count < 4 ? count : 4) - 1; i >= 0; --i) low = low << 16 | p[i].bits;
  return {_mm256_cvtph_ps(_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t count) { _mm256_maskstore_ps(p, lanes(count), a.v); }
inline void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(int8_t* p, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline Vec power_of_two(Vec biased) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(biased.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3F800000)))};
}
inline __m256 add_quads(const Vec* rows) {
  return _mm256_hadd_ps(_mm256_hadd_ps(rows[0].v, rows[1].v), _mm256_hadd_ps(rows[2].v, rows[3].v));
}
inline Vec sums(const Vec* rows) {
  const __m256 a = add_quads(rows), b = add_quads(rows + 4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

#else  // four lanes: NEON, or plain C++ that a compiler can vectorise

constexpr int kWidth = 4;
constexpr int kStripe = 4;

#if defined(SAMBAY_NEON)

struct Vec {
  float32x4_t v;
};

inline Vec set(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const Half* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(Half* p, Vec a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}
inline Vec load(const int8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))))};
}
inline void store(int8_t* p, Vec a) {
  const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a.v));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(p, &four, sizeof four);
}
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float largest(Vec a) { return vmaxnmvq_f32(a.v); }
inline Vec power_of_two(Vec biased) {
  const uint32x4_t shifted = vshlq_n_u32(vreinterpretq_u32_f32(biased.v), 23);
  return {vreinterpretq_f32_u32(vaddq_u32(shifted, vdupq_n_u32(0x3F800000)))};
}
inline Vec sums(const Vec* r) {
  return {vpaddq_f32(vpaddq_f32(r[0].v, r[1].v), vpaddq_f32(r[2].v, r[3].v))};
}

#else

struct Vec {
  float v[4];
};

template <class F>
inline Vec each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline float from_half(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t rest = h.bits & 0x7FFF;
  uint32_t bits = (rest << 13) + (112u << 23);
  if (rest >= 0x7C00) bits = (rest << 13) | 0x7F800000;  // infinity, NaN
  float value;
  std::memcpy(&value, &bits, sizeof value);
  if (rest < 0x400) value = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal
  return sign ? -value : value;
}
inline Half to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  uint32_t half;
  if (bits > 0x7F800000) {
    half = 0x7E00;  // NaN
  } else if (bits >= 0x477FF000) {
    half = 0x7C00;  // rounds to infinity
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 lets the hardware round at 2^-24
    float small;
    std::memcpy(&small, &bits, sizeof small);
    small += 0.5f;
    std::memcpy(&bits, &small, sizeof bits);
    half = bits - 0x3F000000;
  } else {
    half = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;  // to nearest, ties to even
  }
  return {static_cast<uint16_t>(sign | half)};
}
inline Vec set(float x) { return {{x, x, x, x}}; }
inline Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Vec load(const Half* p) {
  return each([&](int i) { return from_half(p[i]); });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = a.v[i];
}
inline void store(Half* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = to_half(a.v[i]);
}
inline Vec load(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store(int8_t* p, Vec a) {
  constexpr float kBias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>((a.v[i] + kBias) - kBias);
}
inline Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
  float most = a.v[0];
  for (int i = 1; i < 4; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
inline Vec power_of_two(Vec biased) {
  uint32_t bits[4];
  std::memcpy(bits, biased.v, sizeof bits);
  for (uint32_t& each_bits : bits) each_bits = (each_bits << 23) + 0x3F800000u;
  std::memcpy(biased.v, bits, sizeof bits);
  return biased;
}
inline Vec sums(const Vec* rows) {
  return each([&](int i) { return sum(rows[i]); });
}

#endif

inline Vec load(const float* p, int64_t count) {
  float whole[4] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}
inline void store(float* p, Vec a, int64_t count) {
  float whole[4];
  store(whole, a);
  for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

#endif

template <class Cell>  // Half or int8_t
inline Vec load(const Cell* p, int64_t count) {
  Cell whole[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}
template <class Cell>
inline void store(Cell* p, Vec a, int64_t count) {
  Cell whole[kWidth];
  store(whole, a);
  for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

// --- requests for memory that is needed soon

constexpr int kLine = 64;  // bytes of a cache line

inline void prefetch(const void* p) {
#if defined(SAMBAY_AVX512) || defined(SAMBAY_AVX2)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#elif defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}
// Into the second cache: by the time it is needed, the first would have dropped it.
inline void prefetch_far(const void* p) {
#if defined(SAMBAY_AVX512) || defined(SAMBAY_AVX2)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#elif defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}
// The compiler moves no access to memory over this: requests stay apart as they are written. In bursts they wait
// for one another, and so does whatever comes after them.
inline void keep_order() {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#elif defined(_MSC_VER)
  _ReadWriteBarrier();
#endif
}

// Memory for one task, not initialised, from the start of a cache line on: a vector that reaches over two
// lines costs two loads. Not std::vector: its inline functions would be compiled with this file's
// instructions and then serve the whole library.
template <class Cell>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : cells_(static_cast<Cell*>(::operator new[](static_cast<size_t>(size) * sizeof(Cell), kAlignment))) {}
  ~Scratch() { ::operator delete[](cells_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Cell* data() const { return cells_; }

 private:
  static constexpr std::align_val_t kAlignment{kLine};
  Cell* const cells_;
};

// Calls body(offset, count) for the vectors of `size` values; count is kWidth but for the last.
// Where the body is inlined, whole vectors take the fast loads: see load_some and store_some.
template <class Body>
inline void for_vectors(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, int64_t{kWidth});
  if (i < size) body(i, size - i);
}
template <class Cell>
inline Vec load_some(const Cell* p, int64_t count) {
  return count == kWidth ? load(p) : load(p, count);
}
template <class Cell>
inline void store_some(Cell* p, Vec a, int64_t count) {
  if (count == kWidth) {
    store(p, a);
  } else {
    store(p, a, count);
  }
}

}  // namespace sambay::SAMBAY_ISA
