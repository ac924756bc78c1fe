// select: sink, local and the heavy tokens of a row, by counting; ties go to the more recent token.
#pragma once

#include <cstdint>
#include <cstring>

#include "bytes.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace HASHATTENTION_ISA {

// One row's plan: tokens low <= t < high compete for `heavy` places, `candidates` of them; sink and local lie outside.
struct Row {
    int64_t begin, low, high, end, candidates, heavy;
    const uint8_t* mask;
};

inline int64_t count_valid(const Row& row, int64_t first, int64_t last) {
    if (row.mask == nullptr) return last - first;
    int64_t count = 0;
    for (int64_t t = first; t < last; ++t) count += row.mask[t] != 0;
    return count;
}

inline Row plan_row(const hashattention::Bounds& bounds, int64_t request, const int32_t* budget, int64_t tokens) {
    Row row{};
    row.mask = bounds.mask == nullptr ? nullptr : bounds.mask + request * bounds.mask_stride;
    row.begin = clamp(bounds.start[request], 0, tokens);
    row.end = clamp(bounds.end[request], row.begin, tokens);
    int64_t local = clamp(budget[1], 0, bounds.capacity);
    int64_t sink = clamp(budget[0], 0, bounds.capacity - local);
    row.heavy = clamp(budget[2], 0, bounds.capacity - local - sink);
    if (row.mask == nullptr) {
        row.low = row.end - row.begin < sink ? row.end : row.begin + sink;
        row.high = row.end - row.low < local ? row.low : row.end - local;
    } else {
        for (row.low = row.begin; row.low < row.end && sink > 0; ++row.low) sink -= row.mask[row.low] != 0;
        for (row.high = row.end; row.high > row.low && local > 0; --row.high) local -= row.mask[row.high - 1] != 0;
    }
    row.candidates = count_valid(row, row.low, row.high);
    return row;
}

inline int32_t* take_range(const Row& row, int64_t first, int64_t last, int32_t* out) {
    if (row.mask == nullptr) {
        for (int64_t t = first; t < last; ++t) *out++ = static_cast<int32_t>(t);
    } else {
        for (int64_t t = first; t < last; ++t)
            if (row.mask[t] != 0) *out++ = static_cast<int32_t>(t);
    }
    return out;
}

// Which values of a histogram are taken: all above `level`, and the last `count[level] - skip` that equal it.
struct Cut {
    int64_t level, skip;
};

inline Cut find_cut(const uint32_t* histogram, int64_t bins, int64_t wanted) {
    int64_t left = wanted, level = bins - 1;
    while (level > 0 && static_cast<int64_t>(histogram[level]) < left) left -= histogram[level--];
    return {level, static_cast<int64_t>(histogram[level]) - left};
}

// Values of tokens first.. are counted; four histograms, `bins` apart, so that equal neighbours do not wait for each
// other.
inline void count_values(const uint16_t* values, int64_t count, const uint8_t* mask, uint32_t* histogram, int64_t bins) {
    if (mask != nullptr) {
        for (int64_t i = 0; i < count; ++i) histogram[values[i]] += mask[i] != 0;
        return;
    }
    uint32_t *a = histogram, *b = a + bins, *c = b + bins, *d = c + bins;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        uint16_t four[4];
        std::memcpy(four, values + i, 8);
        ++a[four[0]], ++b[four[1]], ++c[four[2]], ++d[four[3]];
    }
    for (; i < count; ++i) ++a[values[i]];
}

inline void merge_histograms(uint32_t* histogram, int64_t bins) {
    for (int64_t i = 0; i < bins; ++i)
        histogram[i] += histogram[bins + i] + histogram[2 * bins + i] + histogram[3 * bins + i];
}

// Writes the tokens `first` + i of the values at or above the cut, at most `wanted`, ascending. The values are readable
// to the next multiple of 32.
inline int32_t* take_best(const uint16_t* values, int64_t count, int64_t first, const uint8_t* mask, Cut cut,
                          int64_t wanted, int32_t* out) {
    const uint16_t level = static_cast<uint16_t>(cut.level);
    const int32_t* const full = out + wanted;
    int64_t equal = 0;
    for (int64_t i = 0; i < count; i += 32) {
        uint32_t hits = at_least(values + i, level);
        if (hits == 0) continue;
        if (count - i < 32) hits &= (1u << (count - i)) - 1;
        for (; hits != 0; hits &= hits - 1) {
            const int64_t at = i + __builtin_ctz(hits);
            if (mask != nullptr && mask[at] == 0) continue;
            // Also from here on nothing can be taken, and the next slot may be another thread's.
            if (out == full) return out;
            const bool tie = values[at] == level;
            *out = static_cast<int32_t>(first + at);
            out += !tie || equal >= cut.skip;
            equal += tie;
        }
    }
    return out;
}

// Order-preserving keys: a larger score is a larger key; NaN is largest, as torch sorts it, and -0 equals 0.
inline uint32_t key_of(int32_t score) { return static_cast<uint32_t>(score) ^ 0x80000000u; }
inline uint32_t key_of(float score) {
    if (score != score) return 0xffffffffu;
    const float canonical = score + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &canonical, 4);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The heavy tokens of a row by any 32-bit score: the upper halves of the keys are counted, then the lower ones of the
// boundary.
template <class Score>
int32_t* take_scored(const Row& row, const Score* scores, uint32_t* histogram, int32_t* out) {
    constexpr int64_t bins = 65536;
    const auto count = [&](auto bin_of) {
        std::memset(histogram, 0, bins * 4);
        for (int64_t t = row.low; t < row.high; ++t)
            if (row.mask == nullptr || row.mask[t] != 0) bin_of(key_of(scores[t]));
    };
    count([&](uint32_t key) { ++histogram[key >> 16]; });
    const Cut upper = find_cut(histogram, bins, row.heavy);
    const int64_t kept = static_cast<int64_t>(histogram[upper.level]) - upper.skip;
    count([&](uint32_t key) { histogram[key & 65535] += (key >> 16) == static_cast<uint64_t>(upper.level); });
    const Cut lower = find_cut(histogram, bins, kept);
    const uint32_t level = static_cast<uint32_t>(upper.level << 16 | lower.level);
    int64_t equal = 0;
    for (int64_t t = row.low; t < row.high; ++t) {
        const uint32_t key = key_of(scores[t]);
        if (key < level || (row.mask != nullptr && row.mask[t] == 0)) continue;
        if (key == level && equal++ < lower.skip) continue;
        *out++ = static_cast<int32_t>(t);
    }
    return out;
}

inline uint32_t* histogram_room(int64_t bins) {
    static thread_local Scratch scratch;
    return scratch.room<uint32_t>(bins);
}

// Sink, whatever `heavy` writes, and local; the rest of the row is -1.
template <class Heavy>
inline void write_row(const Row& row, int64_t capacity, int32_t* indices, int32_t* count, Heavy heavy) {
    int32_t* out = take_range(row, row.begin, row.low, indices);
    if (row.heavy >= row.candidates)
        out = take_range(row, row.low, row.high, out);
    else if (row.heavy > 0)
        out = heavy(out);
    out = take_range(row, row.high, row.end, out);
    *count = static_cast<int32_t>(out - indices);
    while (out < indices + capacity) *out++ = -1;
}

inline void select(const hashattention::Scores& scores, const hashattention::Bounds& bounds,
                   const hashattention::Chosen& chosen) {
    const int64_t rows = scores.batch * scores.heads;
    const int threads = threads_for(4 * rows * scores.tokens);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) {
        const Row row = plan_row(bounds, r / scores.heads, bounds.budgets + 3 * r, scores.tokens);
        const auto heavy = [&](int32_t* out) {
            uint32_t* histogram = histogram_room(65536);
            const int64_t at = r * scores.tokens;
            if (scores.real) return take_scored(row, static_cast<const float*>(scores.values) + at, histogram, out);
            return take_scored(row, static_cast<const int32_t*>(scores.values) + at, histogram, out);
        };
        write_row(row, bounds.capacity, chosen.indices + r * bounds.capacity, chosen.counts + r, heavy);
    }
}

}  // namespace HASHATTENTION_ISA
