// Vectors of bytes for the table lookups of the score: the few operations it needs, at the width of this build.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace HASHATTENTION_ISA {

#if defined(__AVX512BW__)

#define HASHATTENTION_BYTES 64
using Bytes = __m512i;

inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes zero() { return _mm512_setzero_si512(); }
inline Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
inline Bytes table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
inline Bytes add8(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes add16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes low8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes low16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes high16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes low64(Bytes a, Bytes b) { return _mm512_unpacklo_epi64(a, b); }
inline Bytes high64(Bytes a, Bytes b) { return _mm512_unpackhi_epi64(a, b); }
// The dwords of each 128-bit lane dealt out over the lanes: (lane, m) goes to m * lanes + lane.
inline Bytes deal(Bytes a) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a);
}
// Eight words, each widened to 64 bits.
inline Bytes load_words(const int32_t* p) {
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Bit i: 16-bit value i of the 32 at p is at least the one in `least`.
inline uint32_t at_least(const uint16_t* p, uint16_t least) {
    return _mm512_cmpge_epu16_mask(load(p), _mm512_set1_epi16(static_cast<int16_t>(least)));
}
// Adds 1 to sums[i] where 16-bit value i of the 32 at p is at least `least`.
inline void add_at_least(const uint16_t* p, uint16_t least, uint16_t* sums) {
    const __mmask32 hits = at_least(p, least);
    store(sums, _mm512_sub_epi16(load(sums), _mm512_movm_epi16(hits)));
}

#elif defined(__AVX2__)

#define HASHATTENTION_BYTES 32
using Bytes = __m256i;

inline Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Bytes a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Bytes zero() { return _mm256_setzero_si256(); }
inline Bytes low_nibbles(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
inline Bytes table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes add8(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes add16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes low8(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high8(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes low16(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes high16(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline Bytes low64(Bytes a, Bytes b) { return _mm256_unpacklo_epi64(a, b); }
inline Bytes high64(Bytes a, Bytes b) { return _mm256_unpackhi_epi64(a, b); }
inline Bytes deal(Bytes a) { return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
inline Bytes load_words(const int32_t* p) {
    return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline uint32_t at_least(const uint16_t* p, uint16_t least) {
    const Bytes limit = _mm256_set1_epi16(static_cast<int16_t>(least));
    const Bytes a = load(p), b = load(p + 16);
    const Bytes first = _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a);
    const Bytes second = _mm256_cmpeq_epi16(_mm256_max_epu16(b, limit), b);
    const Bytes both = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(both));
}
inline void add_at_least(const uint16_t* p, uint16_t least, uint16_t* sums) {
    const Bytes limit = _mm256_set1_epi16(static_cast<int16_t>(least));
    for (int half = 0; half < 32; half += 16) {
        const Bytes a = load(p + half);
        store(sums + half, _mm256_sub_epi16(load(sums + half), _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a)));
    }
}

#else

// Plain: the score looks up whole bytes, one token at a time.
#define HASHATTENTION_BYTES 0

inline uint32_t at_least(const uint16_t* p, uint16_t least) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(p[i] >= least) << i;
    return mask;
}
inline void add_at_least(const uint16_t* p, uint16_t least, uint16_t* sums) {
    for (int i = 0; i < 32; ++i) sums[i] = static_cast<uint16_t>(sums[i] + (p[i] >= least));
}

#endif

}  // namespace HASHATTENTION_ISA
