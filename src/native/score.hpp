// score: the agreement of a query with every signature, and the score it stands for.
#pragma once

#include <cstdint>
#include <cstring>

#include "query.hpp"
#include "rows.hpp"
#include "scratch.hpp"

namespace HASHATTENTION_ISA {

constexpr int64_t chunk = 2048;
constexpr int64_t most_agreement = 65535;

#if HASHATTENTION_BYTES

constexpr int64_t block = HASHATTENTION_BYTES;
constexpr int64_t keys_a_vector = HASHATTENTION_BYTES / 8;

// Eight vectors of 8-byte keys -> plane j holds byte j of all of them; per 128-bit lane first the even keys, then the odd.
inline void transpose(const Bytes (&r)[8], Bytes (&plane)[8]) {
    Bytes half[2][4];
    for (int odd = 0; odd < 2; ++odd) {
        Bytes a[4], low[2], high[2];
        for (int m = 0; m < 4; ++m) a[m] = odd != 0 ? high8(r[m], r[m + 4]) : low8(r[m], r[m + 4]);
        for (int m = 0; m < 2; ++m) low[m] = low8(a[m], a[m + 2]), high[m] = high8(a[m], a[m + 2]);
        half[odd][0] = low8(low[0], low[1]), half[odd][1] = high8(low[0], low[1]);
        half[odd][2] = low8(high[0], high[1]), half[odd][3] = high8(high[0], high[1]);
    }
    for (int pair = 0; pair < 4; ++pair) {
        plane[2 * pair] = low64(half[0][pair], half[1][pair]);
        plane[2 * pair + 1] = high64(half[0][pair], half[1][pair]);
    }
}

inline Bytes look_up(const uint8_t (*tables)[16], int nibble, const Bytes& plane) {
    return lookup(table(tables[nibble]), (nibble & 1) != 0 ? high_nibbles(plane) : low_nibbles(plane));
}

// Adds the agreements of `Planes` bytes to 16-bit sums. Run: how many nibbles a byte can hold the sum of; 0: not one.
template <int Run, int Planes>
inline void accumulate(const Bytes (&plane)[8], const Part& part, int64_t first_nibble, Bytes& even, Bytes& odd) {
    const uint8_t(*low)[16] = part.low + first_nibble;
    const uint8_t(*high)[16] = part.high + first_nibble;
    constexpr int run = Run > 0 ? Run : 1;
    for (int nibble = 0; nibble < 2 * Planes; nibble += run) {
        Bytes sum = look_up(low, nibble, plane[nibble / 2]);
        for (int i = 1; i < run; ++i) sum = add8(sum, look_up(low, nibble + i, plane[(nibble + i) / 2]));
        const Bytes above = Run > 0 ? zero() : look_up(high, nibble, plane[nibble / 2]);
        even = add16(even, low8(sum, above));
        odd = add16(odd, high8(sum, above));
    }
}

// The 64 bits of every key of a block that start at word `word`.
template <int Words>
inline void load_keys(const int32_t* keys, int64_t words, int64_t word, Bytes (&r)[8]) {
    if constexpr (Words == 1) {
        for (int m = 0; m < 8; ++m) r[m] = load_words(keys + m * keys_a_vector);
    } else if constexpr (Words == 2) {
        for (int m = 0; m < 8; ++m) r[m] = load(keys + 2 * m * keys_a_vector);
    } else {
        uint64_t staged[block];
        const size_t bytes = words - word > 1 ? 8 : 4;
        for (int64_t i = 0; i < block; ++i) {
            staged[i] = 0;
            if (bytes == 8)
                std::memcpy(&staged[i], keys + i * words + word, 8);
            else
                std::memcpy(&staged[i], keys + i * words + word, 4);
        }
        for (int m = 0; m < 8; ++m) r[m] = load(staged + m * keys_a_vector);
    }
}

template <int Run, int Words>
void agree_blocks(const Part& part, const int32_t* keys, int64_t words, int64_t blocks, uint16_t* out, bool add,
                  Errand* errand) {
    // The processor's own prefetching stops at every page. An address past the end is never looked at.
    const int64_t bytes = 4 * block * words;
    for (int64_t i = 0; i < blocks; ++i, keys += block * words, out += block) {
        const uintptr_t next = reinterpret_cast<uintptr_t>(keys) + 8192;
        for (int64_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(reinterpret_cast<const void*>(next + static_cast<uintptr_t>(line)));
        if (errand != nullptr) errand->step();
        Bytes even = zero(), odd = zero();
        for (int64_t word = 0; word < words; word += 2) {
            Bytes r[8], plane[8];
            load_keys<Words>(keys, words, word, r);
            transpose(r, plane);
            if (Words == 1 || (Words == 0 && word + 1 == words))
                accumulate<Run, 4>(plane, part, 8 * word, even, odd);
            else
                accumulate<Run, 8>(plane, part, 8 * word, even, odd);
        }
        Bytes first = deal(low16(even, odd)), second = deal(high16(even, odd));
        if (add) first = add16(first, load(out)), second = add16(second, load(out + block / 2));
        store(out, first);
        store(out + block / 2, second);
    }
}

template <int Run>
void agree_words(const Part& part, const int32_t* keys, int64_t words, int64_t blocks, uint16_t* out, bool add,
                 Errand* errand) {
    if (words == 1)
        agree_blocks<Run, 1>(part, keys, words, blocks, out, add, errand);
    else if (words == 2)
        agree_blocks<Run, 2>(part, keys, words, blocks, out, add, errand);
    else
        agree_blocks<Run, 0>(part, keys, words, blocks, out, add, errand);
}

inline void agree_whole(const Part& part, const int32_t* keys, int64_t words, int64_t blocks, uint16_t* out, bool add,
                        Errand* errand) {
    if (part.largest <= 31)
        agree_words<8>(part, keys, words, blocks, out, add, errand);
    else if (part.largest <= 127)
        agree_words<2>(part, keys, words, blocks, out, add, errand);
    else if (part.largest <= 255)
        agree_words<1>(part, keys, words, blocks, out, add, errand);
    else
        agree_words<0>(part, keys, words, blocks, out, add, errand);
}

// Agreements of `count` successive keys, written to or added to `out`.
inline void agree_run(const Part& part, const int32_t* keys, int64_t words, int64_t count, uint16_t* out, bool add,
                      Errand* errand) {
    const int64_t whole = count / block, rest = count % block;
    agree_whole(part, keys, words, whole, out, add, errand);
    if (rest == 0) return;
    int32_t padded[block * 8] = {};
    uint16_t agreement[block];
    std::memcpy(padded, keys + whole * block * words, static_cast<size_t>(rest * words) * 4);
    agree_whole(part, padded, words, 1, agreement, false, nullptr);
    out += whole * block;
    for (int64_t i = 0; i < rest; ++i) out[i] = static_cast<uint16_t>(add ? out[i] + agreement[i] : agreement[i]);
}

#else

inline void agree_run(const Part& part, const int32_t* keys, int64_t words, int64_t count, uint16_t* out, bool add,
                      Errand*) {
    for (int64_t i = 0; i < count; ++i, keys += words) {
        uint32_t sum = add ? out[i] : 0;
        for (int64_t w = 0; w < words; ++w) {
            const uint32_t word = static_cast<uint32_t>(keys[w]);
            for (int byte = 0; byte < 4; ++byte) sum += part.bytes[4 * w + byte][(word >> (8 * byte)) & 255];
        }
        out[i] = static_cast<uint16_t>(sum);
    }
}

#endif

// Agreements of tokens first .. first + count of one selection head; the query's bound must fit 16 bits. The errand is
// run a step a block of keys.
inline void agree(const hashattention::Codes& codes, const Query& query, int64_t request, int64_t first, int64_t count,
                  uint16_t* out, Errand* errand = nullptr) {
    for (int64_t p = 0; p < query.count; ++p) {
        const Part& part = query.parts[p];
        const Signatures keys(codes, request, part.signature_head);
        if (!keys.paged()) {
            agree_run(part, keys.at(first), codes.words, count, out, p > 0, p == 0 ? errand : nullptr);
            continue;
        }
        int32_t staged[256 * 8];
        for (int64_t done = 0; done < count; done += 256) {
            const int64_t some = count - done < 256 ? count - done : 256;
            keys.copy(first + done, some, staged);
            agree_run(part, staged, codes.words, some, out + done, p > 0, p == 0 ? errand : nullptr);
        }
    }
}

// The same as 32-bit scores, bit by bit: for weights whose sum does not fit 16 bits.
inline void score_wide(const hashattention::Codes& codes, const Query& query, int64_t request, int64_t first,
                       int64_t count, int32_t* out) {
    int32_t key[8];
    for (int64_t i = 0; i < count; ++i) {
        int32_t sum = 0;
        for (int64_t p = 0; p < query.count; ++p) {
            const Signatures keys(codes, request, query.parts[p].signature_head);
            if (keys.paged())
                keys.copy(first + i, 1, key);
            else
                std::memcpy(key, keys.at(first + i), static_cast<size_t>(codes.words) * 4);
            for (int64_t j = 0; j < 32 * codes.words; ++j) {
                const bool bit = ((static_cast<uint32_t>(key[j / 32]) >> (j % 32)) & 1) != 0;
                sum += bit ? query.parts[p].weights[j] : -query.parts[p].weights[j];
            }
        }
        out[i] = sum;
    }
}

inline void score_run(const hashattention::Codes& codes, const Query& query, int64_t request, int64_t first,
                      int64_t count, int32_t* out) {
    if (query.bound > most_agreement) return score_wide(codes, query, request, first, count, out);
    uint16_t agreement[chunk];
    for (int64_t done = 0; done < count; done += chunk) {
        const int64_t some = count - done < chunk ? count - done : chunk;
        agree(codes, query, request, first + done, some, agreement);
        const int32_t bound = static_cast<int32_t>(query.bound);
        for (int64_t i = 0; i < some; ++i) out[done + i] = 2 * static_cast<int32_t>(agreement[i]) - bound;
    }
}

inline Part* parts_room(const hashattention::Codes& codes) {
    static thread_local Scratch scratch;
    return scratch.room<Part>(codes.heads / codes.selection_heads);
}

inline void score(const hashattention::Codes& codes, int32_t* out) {
    const int64_t rows = codes.batch * codes.selection_heads, pieces = (codes.tokens + 8 * chunk - 1) / (8 * chunk);
    const int threads = threads_for(4 * rows * codes.tokens * codes.words);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < rows * pieces; ++item) {
        const int64_t row = item / pieces, first = item % pieces * 8 * chunk, left = codes.tokens - first;
        const int64_t request = row / codes.selection_heads;
        const Query query = make_query(codes, request, row % codes.selection_heads, parts_room(codes));
        score_run(codes, query, request, first, left < 8 * chunk ? left : 8 * chunk, out + row * codes.tokens + first);
    }
}

}  // namespace HASHATTENTION_ISA
