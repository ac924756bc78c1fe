// A query code as lookup tables: how strongly a key's bits agree with it, four bits at a time.
//
// With integer weights w_j and key bits b_j, score = sum w_j (2 b_j - 1) = 2 u - bound, where bound = sum |w_j| and the
// agreement u sums |w_j| over the bits whose value is the sign of w_j. u is never negative, so small unsigned tables
// hold it, and it orders tokens exactly as the score does. A bit code is the case w_j = +-1.
#pragma once

#include <cstdint>

#include "bytes.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace HASHATTENTION_ISA {

constexpr int64_t most_bits = 256;

// The summed weights of all codes of a selection head that read one signature head.
struct Part {
    alignas(64) uint8_t low[most_bits / 4][16];
    alignas(64) uint8_t high[most_bits / 4][16];
#if HASHATTENTION_BYTES == 0
    uint16_t bytes[most_bits / 8][256];
#endif
    int32_t weights[most_bits];
    int64_t signature_head;
    int32_t largest;  // what one nibble can add
};

struct Query {
    Part* parts;
    int64_t count;
    int64_t bound;
};

inline int32_t magnitude(int32_t weight) { return weight < 0 ? -weight : weight; }

inline void add_code(const hashattention::Codes& codes, int64_t request, int64_t head, int32_t* weights) {
    const int64_t bits = 32 * codes.words, row = request * codes.heads + head;
    if (codes.packed) {
        const int32_t* words = static_cast<const int32_t*>(codes.code) + row * codes.words;
        for (int64_t j = 0; j < bits; ++j)
            weights[j] += ((static_cast<uint32_t>(words[j / 32]) >> (j % 32)) & 1) != 0 ? 1 : -1;
    } else {
        const int8_t* given = static_cast<const int8_t*>(codes.code) + row * bits;
        for (int64_t j = 0; j < bits; ++j) weights[j] += given[j];
    }
}

// Fills the tables of `part` from its weights and returns the largest agreement.
inline int64_t fill_tables(Part& part, int64_t bits) {
    int64_t bound = 0;
    part.largest = 0;
    for (int64_t nibble = 0; nibble < bits / 4; ++nibble) {
        const int32_t* w = part.weights + 4 * nibble;
        int32_t total = 0;
        for (int i = 0; i < 4; ++i) total += magnitude(w[i]);
        bound += total;
        if (total > part.largest) part.largest = total;
        for (int value = 0; value < 16; ++value) {
            int32_t agreement = 0;
            for (int i = 0; i < 4; ++i)
                if (((value >> i) & 1) == (w[i] > 0)) agreement += magnitude(w[i]);
            part.low[nibble][value] = static_cast<uint8_t>(agreement & 255);
            part.high[nibble][value] = static_cast<uint8_t>((agreement >> 8) & 255);
        }
    }
#if HASHATTENTION_BYTES == 0
    for (int64_t byte = 0; byte < bits / 8; ++byte)
        for (int value = 0; value < 256; ++value) {
            const int a = value & 15, b = value >> 4;
            const uint8_t(*low)[16] = part.low + 2 * byte;
            const uint8_t(*high)[16] = part.high + 2 * byte;
            part.bytes[byte][value] = static_cast<uint16_t>(low[0][a] + low[1][b] + ((high[0][a] + high[1][b]) << 8));
        }
#endif
    return bound;
}

// The query of one selection head; `parts` has room for its code heads.
inline Query make_query(const hashattention::Codes& codes, int64_t request, int64_t selection_head, Part* parts) {
    const int64_t share = codes.heads / codes.selection_heads, bits = 32 * codes.words;
    Query query{parts, 0, 0};
    for (int64_t head = selection_head * share; head < (selection_head + 1) * share; ++head) {
        const int64_t signature_head = head * codes.signature_heads / codes.heads;
        if (query.count == 0 || parts[query.count - 1].signature_head != signature_head) {
            Part& part = parts[query.count++];
            part.signature_head = signature_head;
            for (int64_t j = 0; j < bits; ++j) part.weights[j] = 0;
        }
        add_code(codes, request, head, parts[query.count - 1].weights);
    }
    for (int64_t i = 0; i < query.count; ++i) query.bound += fill_tables(parts[i], bits);
    return query;
}

// Signatures of tokens first.. of one head: contiguous, or found page by page.
struct Signatures {
    const int32_t* words;
    const hashattention::Codes* codes;
    int64_t request;

    Signatures(const hashattention::Codes& codes, int64_t request, int64_t head)
        : words(codes.signatures + head * codes.head_stride), codes(&codes), request(request) {
        if (codes.pages.table == nullptr) words += request * codes.request_stride;
    }

    bool paged() const { return codes->pages.table != nullptr; }
    const int32_t* at(int64_t token) const { return words + token * codes->words; }

    // One token's words, wherever they are.
    const int32_t* find(int64_t token) const {
        if (!paged()) return at(token);
        const hashattention::Pages& pages = codes->pages;
        const int64_t page = clamp(pages.table[request * pages.per_row + token / pages.size], 0, pages.count - 1);
        return words + page * codes->request_stride + token % pages.size * codes->words;
    }

    void copy(int64_t first, int64_t count, int32_t* out) const {
        const hashattention::Pages& pages = codes->pages;
        for (int64_t token = first; token < first + count;) {
            // A table may hold anything past a request's tokens: no page outside the cache is ever read.
            const int64_t page = clamp(pages.table[request * pages.per_row + token / pages.size], 0, pages.count - 1);
            const int64_t offset = token % pages.size, left = first + count - token;
            const int64_t run = left < pages.size - offset ? left : pages.size - offset;
            const int32_t* from = words + page * codes->request_stride + offset * codes->words;
            for (int64_t i = 0; i < run * codes->words; ++i) *out++ = from[i];
            token += run;
        }
    }
};

}  // namespace HASHATTENTION_ISA
