// Integer arithmetic of quantized products, beside the floats of vector.h.
//
// A vector of 4 * kWidth bytes is taken as kWidth lanes of four bytes. The one operation that costs is
// the product: add_products adds, lane by lane, stored weights (unsigned) times quantized inputs (signed).
// SAMBAY_DOT: the including file's instructions do four such products and their sum at once.

namespace sambay::SAMBAY_ISA {

constexpr int kBytes = 4 * kWidth;
constexpr int kPrefetch = 1024, kPrefetchFar = 8192;  // bytes ahead
constexpr int kLargestInput = 127;  // -128 has no counterpart, which some products below would need

#if defined(SAMBAY_AVX512)

struct Bytes {
  __m512i v;
};
struct Ints {
  __m512i v;
};

inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline Bytes low_halves(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0xF))}; }
inline Bytes high_halves(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(0xF))};
}
inline Ints set_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints times_256(Ints a) { return {_mm512_slli_epi32(a.v, 8)}; }
inline Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Bytes repeat_four(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}

// Lane i: numbers[first + i / each]; each is 2, 4 or 8.
inline Vec spread(Vec numbers, int first, int each) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int shift = each == 2 ? 1 : each == 4 ? 2 : 3;
  const __m512i from = _mm512_add_epi32(_mm512_srli_epi32(lane, static_cast<unsigned>(shift)), _mm512_set1_epi32(first));
  return {_mm512_permutexvar_ps(from, numbers.v)};
}

// Lane i of out[j] is the j-th of the four 4-byte numbers at rows[i].
inline void turn_fours(const uint8_t* const* rows, Bytes* out) {
  __m512i part[4];
  for (int i = 0; i < 4; ++i) {
    const auto row = [&](int of) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4 * of]));
    };
    __m512i all = _mm512_castsi128_si512(row(0));
    all = _mm512_inserti32x4(all, row(1), 1);
    all = _mm512_inserti32x4(all, row(2), 2);
    part[i] = _mm512_inserti32x4(all, row(3), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpackhi_epi32(part[0], part[1]);
  const __m512i c = _mm512_unpacklo_epi32(part[2], part[3]), d = _mm512_unpackhi_epi32(part[2], part[3]);
  out[0].v = _mm512_unpacklo_epi64(a, c);
  out[1].v = _mm512_unpackhi_epi64(a, c);
  out[2].v = _mm512_unpacklo_epi64(b, d);
  out[3].v = _mm512_unpackhi_epi64(b, d);
}

#elif defined(SAMBAY_AVX2)

struct Bytes {
  __m256i v;
};
struct Ints {
  __m256i v;
};

inline Bytes load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void store_bytes(void* p, Bytes a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline Bytes low_halves(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(0xF))}; }
inline Bytes high_halves(Bytes a) {
  return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(0xF))};
}
inline Ints set_ints(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints times_256(Ints a) { return {_mm256_slli_epi32(a.v, 8)}; }
inline Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Bytes repeat_four(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return {_mm256_set1_epi32(four)};
}
inline Vec spread(Vec numbers, int first, int each) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int shift = each == 2 ? 1 : each == 4 ? 2 : 3;
  const __m256i from = _mm256_add_epi32(_mm256_srli_epi32(lane, shift), _mm256_set1_epi32(first));
  return {_mm256_permutevar8x32_ps(numbers.v, from)};
}

inline void turn_fours(const uint8_t* const* rows, Bytes* out) {
  __m256i part[4];
  for (int i = 0; i < 4; ++i) {
    const auto row = [&](int of) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4 * of]));
    };
    part[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(part[0], part[1]), b = _mm256_unpackhi_epi32(part[0], part[1]);
  const __m256i c = _mm256_unpacklo_epi32(part[2], part[3]), d = _mm256_unpackhi_epi32(part[2], part[3]);
  out[0].v = _mm256_unpacklo_epi64(a, c);
  out[1].v = _mm256_unpackhi_epi64(a, c);
  out[2].v = _mm256_unpacklo_epi64(b, d);
  out[3].v = _mm256_unpackhi_epi64(b, d);
}

#else  // sixteen bytes: NEON, or plain C++

#if defined(SAMBAY_NEON)

struct Bytes {
  uint8x16_t v;
};
struct Ints {
  int32x4_t v;
};

inline Bytes load_bytes(const void* p) { return {vld1q_u8(static_cast<const uint8_t*>(p))}; }
inline void store_bytes(void* p, Bytes a) { vst1q_u8(static_cast<uint8_t*>(p), a.v); }
inline Bytes low_halves(Bytes a) { return {vandq_u8(a.v, vdupq_n_u8(0xF))}; }
inline Bytes high_halves(Bytes a) { return {vshrq_n_u8(a.v, 4)}; }
inline Ints set_ints(int32_t x) { return {vdupq_n_s32(x)}; }
inline Ints load_ints(const int32_t* p) { return {vld1q_s32(p)}; }
inline Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.v, b.v)}; }
inline Ints times_256(Ints a) { return {vshlq_n_s32(a.v, 8)}; }
inline Vec to_floats(Ints a) { return {vcvtq_f32_s32(a.v)}; }
inline Bytes repeat_four(const void* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return {vreinterpretq_u8_u32(vdupq_n_u32(four))};
}

inline Vec spread(Vec numbers, int first, int each) {
  const uint32_t pairs[4] = {0, 0, 1, 1};
  const uint32x4_t lane = each == 2 ? vld1q_u32(pairs) : vdupq_n_u32(0);
  const uint32x4_t from = vaddq_u32(lane, vdupq_n_u32(static_cast<uint32_t>(first)));
  const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), from, 0x04040404);
  return {vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(numbers.v), vreinterpretq_u8_u32(bytes)))};
}

#else

struct Bytes {
  uint8_t v[16];
};
struct Ints {
  int32_t v[4];
};

inline Bytes load_bytes(const void* p) {
  Bytes a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void store_bytes(void* p, Bytes a) { std::memcpy(p, a.v, sizeof a.v); }
inline Bytes low_halves(Bytes a) {
  for (uint8_t& byte : a.v) byte &= 0xF;
  return a;
}
inline Bytes high_halves(Bytes a) {
  for (uint8_t& byte : a.v) byte >>= 4;
  return a;
}
inline Ints set_ints(int32_t x) { return {{x, x, x, x}}; }
inline Ints load_ints(const int32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Ints operator+(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints times_256(Ints a) {
  for (int32_t& lane : a.v) lane *= 256;
  return a;
}
inline Vec to_floats(Ints a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Bytes repeat_four(const void* p) {
  Bytes a;
  for (int i = 0; i < 4; ++i) std::memcpy(a.v + 4 * i, p, 4);
  return a;
}

inline Vec spread(Vec numbers, int first, int each_of) {
  return each([&](int i) { return numbers.v[first + i / each_of]; });
}

#endif

inline void turn_fours(const uint8_t* const* rows, Bytes* out) {
  for (int j = 0; j < 4; ++j) {
    uint8_t lanes[16];
    for (int i = 0; i < 4; ++i) std::memcpy(lanes + 4 * i, rows[i] + 4 * j, 4);
    out[j] = load_bytes(lanes);
  }
}

#endif

// Weights are stored with 8 or 128 added. The sum of what was added, times the inputs, is for the
// caller to take off; but where products want signed bytes, add_products takes the 128 off itself.
#if defined(SAMBAY_NEON) || (!defined(SAMBAY_DOT) && (defined(SAMBAY_AVX512) || defined(SAMBAY_AVX2)))
constexpr int kByteCentre = 0;
#else
constexpr int kByteCentre = 128;
#endif

// One step of a block's sum: lane i adds weight[4i+j] * input[4i+j], j = 0 .. 3. Weights of kBits
// bits, inputs of -127 .. 127. A sum starts as zeros, takes at most eight steps and is then whole_sum.
template <int kBits>
inline Ints add_products(Ints sum, Bytes weight, Bytes input) {
#if defined(SAMBAY_DOT) && defined(SAMBAY_AVX512)
  return {_mm512_dpbusd_epi32(sum.v, weight.v, input.v)};
#elif defined(SAMBAY_DOT) && defined(SAMBAY_AVX2)
  return {_mm256_dpbusd_avx_epi32(sum.v, weight.v, input.v)};
#elif defined(SAMBAY_AVX512)
  if (kBits == 4) {  // 16-bit lanes reach 8 * 2 * 15 * 127 = 30480: no overflow
    return {_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(weight.v, input.v))};
  }  // else |weight| * (input with the weight's sign), at most 2 * 128 * 127 = 32512
  const __m512i centred = _mm512_xor_si512(weight.v, _mm512_set1_epi8(-128));
  const __m512i turned =
      _mm512_mask_sub_epi8(input.v, _mm512_movepi8_mask(centred), _mm512_setzero_si512(), input.v);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(centred), turned);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif defined(SAMBAY_AVX2)
  if (kBits == 4) return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(weight.v, input.v))};
  const __m256i centred = _mm256_xor_si256(weight.v, _mm256_set1_epi8(-128));
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(input.v, centred));
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#elif defined(SAMBAY_NEON)
  const uint8x16_t centred = kBits == 4 ? weight.v : veorq_u8(weight.v, vdupq_n_u8(128));
  const int8x16_t a = vreinterpretq_s8_u8(centred), b = vreinterpretq_s8_u8(input.v);
#if defined(SAMBAY_DOT)
  return {vdotq_s32(sum.v, a, b)};
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
  return {vaddq_s32(sum.v, vpaddq_s32(low, high))};
#endif
#else
  for (int i = 0; i < 16; ++i) sum.v[i / 4] += weight.v[i] * static_cast<int8_t>(input.v[i]);
  return sum;
#endif
}

// Whether a block's sum may start with numbers of its own instead of zeros.
#if !defined(SAMBAY_DOT) && (defined(SAMBAY_AVX512) || defined(SAMBAY_AVX2))
template <int kBits>
constexpr bool kSumsStartAnywhere = kBits == 8;
#else
template <int kBits>
constexpr bool kSumsStartAnywhere = true;
#endif

template <int kBits>
inline Ints whole_sum(Ints sum) {
#if !defined(SAMBAY_DOT) && defined(SAMBAY_AVX512)
  if (kBits == 4) return {_mm512_madd_epi16(sum.v, _mm512_set1_epi16(1))};
#elif !defined(SAMBAY_DOT) && defined(SAMBAY_AVX2)
  if (kBits == 4) return {_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))};
#endif
  return sum;
}

}  // namespace sambay::SAMBAY_ISA
