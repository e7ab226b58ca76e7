#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Vectors of float32 for the CPU kernels: the same names for every instruction set, chosen by the compiler's flags.
// Included only by files of csrc/cpu/kernels/, which are compiled once per instruction set (variants.h).
//
//   kWidth        lanes of Float and Int: 4, 8, 16
//   kRowVectors   register blocking of the matrix micro-kernels: at most so many Floats side by side,
//   kSteps        and so many rows of them; kRowVectors * (kSteps + 1) + 1 registers
//
// baseline is written with the compiler's vector extensions, so it also serves processors other than x86.
// Everything lives in the namespace of the instruction set (variants.h says why); kernels put their own code there too.
#if !defined(MAGE_ISA_NAMESPACE)
#error "MAGE_ISA_NAMESPACE must be defined: simd.h is for files added with mage_add_cpu_kernel"
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define MAGE_SIMD_AVX512 1
// GCC 12 warns about its own header's undefined values (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MAGE_SIMD_AVX2 1
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define MAGE_INLINE inline __attribute__((always_inline))

namespace mage::cpu {

// Storage of 16-bit floats. Memory only; arithmetic is in float32.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

namespace MAGE_ISA_NAMESPACE {

// ---------------------------------------------------------------------------------------------------------------------
// Scalars
// ---------------------------------------------------------------------------------------------------------------------

MAGE_INLINE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

MAGE_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

MAGE_INLINE float to_float(float value) { return value; }
MAGE_INLINE float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

MAGE_INLINE float to_float(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    // Shifting the 15 bits into place leaves an exponent that is 112 too small; the multiplication repairs it, for
    // subnormal numbers too. Infinity and NaN need the exponent of all ones.
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

MAGE_INLINE void from_float(float value, float* to) { *to = value; }

// Rounds to nearest, ties to even; NaN stays NaN.
MAGE_INLINE void from_float(float value, BFloat16* to) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        to->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
    } else {
        to->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

// Rounds to nearest, ties to even; NaN stays NaN, magnitudes of 65520 and more become infinity.
MAGE_INLINE void from_float(float value, Float16* to) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the rounded value, in units of 2^-24, in the low bits.
        half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | half);
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors
// ---------------------------------------------------------------------------------------------------------------------

#if defined(MAGE_SIMD_AVX512)

constexpr int kWidth = 16;
constexpr int kRowVectors = 3;
constexpr int kSteps = 8;

struct Float {
    __m512 v;
};
struct Int {
    __m512i v;
};
using Mask = __mmask16;

MAGE_INLINE Float set1(float x) { return {_mm512_set1_ps(x)}; }
MAGE_INLINE Float load(const float* from) { return {_mm512_loadu_ps(from)}; }
MAGE_INLINE Float load(const BFloat16* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
MAGE_INLINE Float load(const Float16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
MAGE_INLINE void store(float* to, Float x) { _mm512_storeu_ps(to, x.v); }
MAGE_INLINE void store(Float16* to, Float x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
MAGE_INLINE void store(BFloat16* to, Float x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}
MAGE_INLINE Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
MAGE_INLINE Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
MAGE_INLINE Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
MAGE_INLINE Float operator/(Float a, Float b) { return {_mm512_div_ps(a.v, b.v)}; }
MAGE_INLINE Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MAGE_INLINE Float fms(Float a, Float b, Float c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
MAGE_INLINE Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
MAGE_INLINE Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }
MAGE_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
MAGE_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
MAGE_INLINE Float select(Mask mask, Float yes, Float no) { return {_mm512_mask_blend_ps(mask, no.v, yes.v)}; }
MAGE_INLINE Int set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
MAGE_INLINE Int load_int(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
MAGE_INLINE Mask less(Int a, Int b) { return _mm512_cmplt_epi32_mask(a.v, b.v); }

MAGE_INLINE Float round_to_whole(Float x) {
    return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n where x >= -126 or x is NaN, else 0.
MAGE_INLINE Float scale_by_power(Float p, Float n, Float x) {
    const Mask normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(normal, p.v, n.v)};
}

#elif defined(MAGE_SIMD_AVX2)

constexpr int kWidth = 8;
constexpr int kRowVectors = 3;
constexpr int kSteps = 4;

struct Float {
    __m256 v;
};
struct Int {
    __m256i v;
};
using Mask = Int;  // lanes of all ones or all zeros

MAGE_INLINE Float set1(float x) { return {_mm256_set1_ps(x)}; }
MAGE_INLINE Float load(const float* from) { return {_mm256_loadu_ps(from)}; }
MAGE_INLINE Float load(const BFloat16* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
MAGE_INLINE Float load(const Float16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
MAGE_INLINE void store(float* to, Float x) { _mm256_storeu_ps(to, x.v); }
MAGE_INLINE void store(Float16* to, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
MAGE_INLINE void store(BFloat16* to, Float x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}
MAGE_INLINE Float operator+(Float a, Float b) { return {_mm256_add_ps(a.v, b.v)}; }
MAGE_INLINE Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.v, b.v)}; }
MAGE_INLINE Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.v, b.v)}; }
MAGE_INLINE Float operator/(Float a, Float b) { return {_mm256_div_ps(a.v, b.v)}; }
MAGE_INLINE Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MAGE_INLINE Float fms(Float a, Float b, Float c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
MAGE_INLINE Float max(Float a, Float b) { return {_mm256_max_ps(a.v, b.v)}; }
MAGE_INLINE Float min(Float a, Float b) { return {_mm256_min_ps(a.v, b.v)}; }
MAGE_INLINE Mask less(Float a, Float b) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
MAGE_INLINE Mask equal(Float a, Float b) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))}; }
MAGE_INLINE Float select(Mask mask, Float yes, Float no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(mask.v))};
}
MAGE_INLINE Int set1_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
MAGE_INLINE Int load_int(const int32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
MAGE_INLINE Mask less(Int a, Int b) { return {_mm256_cmpgt_epi32(b.v, a.v)}; }

MAGE_INLINE Float round_to_whole(Float x) {
    return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n where x >= -126 or x is NaN, else 0.
MAGE_INLINE Float scale_by_power(Float p, Float n, Float x) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    const __m256 scaled = _mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
    return {_mm256_and_ps(scaled, _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ))};
}

#else  // baseline

constexpr int kWidth = 4;
constexpr int kRowVectors = 3;
constexpr int kSteps = 4;

using FloatLanes = float __attribute__((vector_size(16)));
using IntLanes = int32_t __attribute__((vector_size(16)));
using UnsignedLanes = uint32_t __attribute__((vector_size(16)));
struct Float {
    FloatLanes v;
};
struct Int {
    IntLanes v;
};
using Mask = Int;  // lanes of all ones or all zeros

MAGE_INLINE Float set1(float x) { return {FloatLanes{x, x, x, x}}; }
MAGE_INLINE Float load(const float* from) {
    Float x;
    std::memcpy(&x.v, from, sizeof(x.v));
    return x;
}
MAGE_INLINE Float load(const BFloat16* from) {
    return {FloatLanes{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
}
MAGE_INLINE Float load(const Float16* from) {
    return {FloatLanes{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
}
MAGE_INLINE void store(float* to, Float x) { std::memcpy(to, &x.v, sizeof(x.v)); }
MAGE_INLINE void store(Float16* to, Float x) {
    for (int i = 0; i < kWidth; ++i) from_float(x.v[i], to + i);
}
MAGE_INLINE void store(BFloat16* to, Float x) {
    for (int i = 0; i < kWidth; ++i) from_float(x.v[i], to + i);
}
MAGE_INLINE Float operator+(Float a, Float b) { return {a.v + b.v}; }
MAGE_INLINE Float operator-(Float a, Float b) { return {a.v - b.v}; }
MAGE_INLINE Float operator*(Float a, Float b) { return {a.v * b.v}; }
MAGE_INLINE Float operator/(Float a, Float b) { return {a.v / b.v}; }
MAGE_INLINE Float fma(Float a, Float b, Float c) { return {a.v * b.v + c.v}; }
MAGE_INLINE Float fms(Float a, Float b, Float c) { return {a.v * b.v - c.v}; }
MAGE_INLINE Mask less(Float a, Float b) {
    Mask mask;
    const auto lanes = a.v < b.v;
    std::memcpy(&mask.v, &lanes, sizeof(mask.v));
    return mask;
}
MAGE_INLINE Mask equal(Float a, Float b) {
    Mask mask;
    const auto lanes = a.v == b.v;
    std::memcpy(&mask.v, &lanes, sizeof(mask.v));
    return mask;
}
MAGE_INLINE Float select(Mask mask, Float yes, Float no) {
    Int y, n;
    std::memcpy(&y.v, &yes.v, sizeof(y.v));
    std::memcpy(&n.v, &no.v, sizeof(n.v));
    const Int mixed = {(y.v & mask.v) | (n.v & ~mask.v)};
    Float x;
    std::memcpy(&x.v, &mixed.v, sizeof(x.v));
    return x;
}
MAGE_INLINE Float max(Float a, Float b) { return select(less(b, a), a, b); }
MAGE_INLINE Float min(Float a, Float b) { return select(less(a, b), a, b); }
MAGE_INLINE Int set1_int(int32_t x) { return {IntLanes{x, x, x, x}}; }
MAGE_INLINE Int load_int(const int32_t* from) {
    Int x;
    std::memcpy(&x.v, from, sizeof(x.v));
    return x;
}
MAGE_INLINE Mask less(Int a, Int b) {
    Mask mask;
    const auto lanes = a.v < b.v;
    std::memcpy(&mask.v, &lanes, sizeof(mask.v));
    return mask;
}

MAGE_INLINE Float round_to_whole(Float x) {
    // Adding 1.5 * 2^23 rounds to a whole number, to nearest; right for |x| < 2^22.
    const Float magic = set1(0x1.8p23f);
    return (x + magic) - magic;
}
// p * 2^n where x >= -126 or x is NaN, else 0.
MAGE_INLINE Float scale_by_power(Float p, Float n, Float x) {
    // Unsigned: NaN converts to the smallest int, and what becomes of it does not matter.
    const auto power = ((UnsignedLanes) __builtin_convertvector(n.v, IntLanes) + 127u) << 23u;
    Float factor;
    std::memcpy(&factor.v, &power, sizeof(factor.v));
    return select(less(x, set1(-126.0f)), set1(0.0f), p * factor);
}

#endif

// max(a, b) and min(a, b) return b where either is NaN.

constexpr float kInfinity = __builtin_inff();

MAGE_INLINE Float zero() { return set1(0.0f); }

// The first `count` < kWidth lanes.
MAGE_INLINE void store_partial(float* to, Float x, int count) {
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

// max(a, b), NaN where either is NaN.
MAGE_INLINE Float max_or_nan(Float a, Float b) { return select(equal(a, a), max(a, b), a); }

// Sum and maximum over the lanes, always in the same order: halves are folded together. NaN in any lane gives NaN.
MAGE_INLINE float reduce_add(Float x) {
    float lanes[kWidth];
    store(lanes, x);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

MAGE_INLINE float reduce_max(Float x) {
    float lanes[kWidth];
    store(lanes, x);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            // The comparison is false where either lane is NaN: NaN of the first stays, NaN of the second replaces it.
            if (lanes[i] == lanes[i] && !(lanes[i] >= lanes[i + half])) lanes[i] = lanes[i + half];
        }
    }
    return lanes[0];
}

// 2^x with a relative error below 2e-7 for x in [-126, 127.5]; 0 below (no subnormal results: they are slow in what
// follows), infinity somewhere from 127.5 to 128 on. exp2(-inf) = 0, exp2(inf) = inf, NaN stays NaN.
MAGE_INLINE Float exp2(Float x) {
    // The bound comes first in both calls, so that NaN survives.
    const Float bounded = min(set1(128.0f), max(set1(-127.0f), x));
    const Float whole = round_to_whole(bounded);
    const Float f = bounded - whole;  // [-0.5, 0.5]
    // Minimax polynomial of degree 6 for 2^f, relative error 2e-9 before rounding.
    Float p = set1(1.534581e-4f);
    p = fma(p, f, set1(1.339993120e-3f));
    p = fma(p, f, set1(9.618488963e-3f));
    p = fma(p, f, set1(5.550328777e-2f));
    p = fma(p, f, set1(2.402264689e-1f));
    p = fma(p, f, set1(6.931472057e-1f));
    p = fma(p, f, set1(1.0f));
    return scale_by_power(p, whole, x);
}

// Natural logarithm, lane by lane through the C library: for results that are few against the arithmetic around them.
MAGE_INLINE Float log(Float x) {
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < kWidth; ++i) lanes[i] = ::logf(lanes[i]);
    return load(lanes);
}

// dst[0..count) = src[0..count) as float32. Neither needs alignment.
template <typename T>
MAGE_INLINE void convert_row(const T* src, float* dst, int count) {
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) store(dst + i, load(src + i));
    for (; i < count; ++i) dst[i] = to_float(src[i]);
}

// dst[0..count) = src[0..count) rounded to T, to nearest even.
template <typename T>
MAGE_INLINE void round_row(const float* src, T* dst, int count) {
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) store(dst + i, load(src + i));
    for (; i < count; ++i) from_float(src[i], dst + i);
}

// dst[j][i] = src[i][j] for 4 x 4 floats; strides in floats.
MAGE_INLINE void transpose_4x4(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
#if defined(__SSE2__)
    __m128 r0 = _mm_loadu_ps(src), r1 = _mm_loadu_ps(src + src_stride);
    __m128 r2 = _mm_loadu_ps(src + 2 * src_stride), r3 = _mm_loadu_ps(src + 3 * src_stride);
    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
    _mm_storeu_ps(dst, r0);
    _mm_storeu_ps(dst + dst_stride, r1);
    _mm_storeu_ps(dst + 2 * dst_stride, r2);
    _mm_storeu_ps(dst + 3 * dst_stride, r3);
#else
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
    }
#endif
}

}  // namespace MAGE_ISA_NAMESPACE
}  // namespace mage::cpu
