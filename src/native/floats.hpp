// Vectors of float32 at the width of this build, and how values of a cache become them.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace HASHATTENTION_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
    const float tiny = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -tiny : tiny;
}

// Calls with a pointer to values of the type they have.
template <class Call>
inline void with_values(hashattention::Dtype dtype, const void* values, Call call) {
    if (dtype == hashattention::Dtype::float32) call(static_cast<const float*>(values));
    if (dtype == hashattention::Dtype::bfloat16) call(static_cast<const bfloat16*>(values));
    if (dtype == hashattention::Dtype::float16) call(static_cast<const float16*>(values));
}

inline Floats load(const float* p) {
    Floats value;
    std::memcpy(&value, p, sizeof value);
    return value;
}
inline Floats load(const bfloat16* p) {
    // Written out: GCC widens half a vector at a time.
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    Halves half;
    std::memcpy(&half, p, sizeof half);
    return (Floats)(__builtin_convertvector(half, Ints) << 16);
#endif
}
inline Floats load(const float16* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Floats value;
    for (int i = 0; i < lanes; ++i) value[i] = widen(p[i]);
    return value;
#endif
}

// Two vectors of successive values, in whichever order is cheapest to make: place<Value>(i) says which value is lane i
// of the two. Sums over a row do not care; what is laid out beside it must be laid out alike.
struct Pair {
    Floats a, b;
};
template <class Value>
inline Pair load_pair(const Value* p) {
    return {load(p), load(p + lanes)};
}
template <class Value>
constexpr int64_t place(int64_t i) {
    return i;
}
#if defined(__AVX2__)
// A bfloat16 is the upper half of a float: the odd values are there already, the even ones a shift away.
template <>
inline Pair load_pair(const bfloat16* p) {
    Ints both;
    std::memcpy(&both, p, sizeof both);
    return {(Floats)(both << 16), (Floats)(both & static_cast<int32_t>(0xffff0000))};
}
template <>
constexpr int64_t place<bfloat16>(int64_t i) {
    return i < lanes ? 2 * i : 2 * (i - lanes) + 1;
}
#endif

inline void store(float* p, Floats value) { std::memcpy(p, &value, sizeof value); }
inline Floats all(float value) { return value - Floats{}; }

// To the nearest, ties to even; NaN stays NaN.
inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, bfloat16* out) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = value != value ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1);
    out->bits = static_cast<uint16_t>(rounded >> 16);
}
inline void narrow(float value, float16* out) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u)
        half = 0x7e00;
    else if (rest >= 0x477ff000u)
        half = 0x7c00;
    else if (rest < 0x38800000u)
        // Adding 0.5 leaves the 24 bits of a subnormal half in the low end of the mantissa, rounded by the processor.
        half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    else
        half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
    out->bits = static_cast<uint16_t>(sign | half);
}

// Per lane the larger; of a NaN in `b` nothing is seen.
inline Floats larger(Floats a, Floats b) {
    const Ints above = b > a;
    return (Floats)(((Ints)b & above) | ((Ints)a & ~above));
}

// The sum of a vector, by halves: few roundings of any one value.
inline float sum_lanes(Floats a) {
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a[i] += a[i + half];
    return a[0];
}

// The sums of four vectors.
inline void sum_four(const Floats* a, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 half[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 whole = (__m512)a[i];
        half[i] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    }
#else
    const __m256 half[4] = {(__m256)a[0], (__m256)a[1], (__m256)a[2], (__m256)a[3]};
#endif
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int i = 0; i < 4; ++i) out[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
#endif
}

// exp of values <= 0 within 2 units in the last place; below -87 it is 0, NaN stays NaN. Cody and Waite's reduction
// with the polynomial of Cephes' expf.
inline Floats exp_nonpositive(Floats x) {
    const Floats shifter = all(12582912.0f);
    const Floats n = (x * 1.44269504088896341f + shifter) - shifter;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // Out of range n may be anything (also NaN): its exponent is masked before it is used.
    const Ints inside = x >= -87.0f;
    const Ints bits = (Ints)(n + shifter);
    const Ints power = ((bits - 0x4b400000 + 127) << 23) & inside;
    const Ints nan = x != x;
    return (Floats)(((Ints)(p * (Floats)power) & inside) | (nan & (Ints)x));
}

}  // namespace HASHATTENTION_ISA
