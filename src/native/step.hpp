// The whole step: encode; then row by row score and select, with the rows of K and V that the row before selected on
// their way meanwhile, and attend to those. Scoring waits for arithmetic, gathering for memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "attend.hpp"
#include "encode.hpp"
#include "score_select.hpp"

namespace HASHATTENTION_ISA {

// What is fetched for one row while the next is scored: no more than stays in a last-level cache that others use too.
constexpr int64_t most_errand_bytes = 2097152;

inline Errand plan_errand(const hashattention::Attention& a, int64_t row, int64_t turns) {
    const int64_t token_bytes = (a.key.dim + a.value.dim) * size_of(a.cache_dtype);
    const int64_t count = clamp(a.counts[row], 0, most_errand_bytes / token_bytes);
    const int64_t head = row % a.selection_heads * a.kv_heads / a.selection_heads;
    return {a, a.indices + row * a.slots, count, row / a.selection_heads, head, turns};
}

#if HASHATTENTION_BYTES
constexpr int64_t keys_a_turn = HASHATTENTION_BYTES;
#else
constexpr int64_t keys_a_turn = 1;
#endif

// Rows first .. last by one thread.
inline void step_rows(const hashattention::Codes& codes, const hashattention::Bounds& bounds,
                      const hashattention::Chosen& chosen, const hashattention::Attention& a, int64_t first,
                      int64_t last) {
    const int64_t turns = codes.tokens / keys_a_turn + 1;
    for (int64_t row = first; row < last; ++row) {
        Errand errand = row > first ? plan_errand(a, row - 1, turns) : Errand();
        select_row(codes, bounds, chosen, row, 1, row > first ? &errand : nullptr);
        if (row > first) attend_row(a, row - 1);
    }
    if (first < last) attend_row(a, last - 1);
}

inline int32_t* step_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<int32_t>(count);
}

// Puts the signature of every request's last token into the cache, whose memory the caller lends for it.
inline void sign_key(hashattention::Encoding key, const hashattention::Codes& codes, const int32_t* end,
                     int32_t* words) {
    key.out = words;
    encode(key);
    for (int64_t row = 0; row < codes.batch * codes.signature_heads; ++row) {
        const int64_t request = row / codes.signature_heads, head = row % codes.signature_heads;
        const int64_t token = end[request] - 1;
        if (token < 0 || token >= codes.tokens) continue;
        const int32_t* at = Signatures(codes, request, head).find(token);
        std::memcpy(const_cast<int32_t*>(at), words + row * codes.words, static_cast<size_t>(codes.words) * 4);
    }
}

// The code, the indices and the counts stay in the calling thread's own memory; `key` may be null.
inline void decode(hashattention::Encoding e, hashattention::Codes codes, const hashattention::Bounds& bounds,
                   hashattention::Attention a, const hashattention::Encoding* key) {
    const int64_t rows = codes.batch * codes.selection_heads, queries = e.batch * e.heads;
    const int64_t signed_words = codes.batch * codes.signature_heads * codes.words;
    int32_t* room = step_room(rows * (bounds.capacity + 1) + queries * (8 * codes.words + 1) + signed_words);
    if (key != nullptr) sign_key(*key, codes, bounds.end, room);
    const hashattention::Chosen chosen{room, room + rows * bounds.capacity};
    e.scales = reinterpret_cast<float*>(chosen.counts + rows);
    e.out = e.scales + queries;
    codes.code = e.out, codes.packed = e.levels == 0;
    a.indices = chosen.indices, a.counts = chosen.counts, a.slots = bounds.capacity;
    encode(e);
    const int threads = threads_for(4 * rows * codes.tokens * codes.words);
    if (rows < threads) {
        score_select(codes, bounds, chosen);
        attend(a);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t share = 0; share < threads; ++share)
        step_rows(codes, bounds, chosen, a, share * rows / threads, (share + 1) * rows / threads);
}

}  // namespace HASHATTENTION_ISA
