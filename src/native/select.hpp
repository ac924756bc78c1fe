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

// How many of the values are at least each of four levels.
inline void count_at_least(const uint16_t* values, int64_t count, const int64_t (&levels)[4], int64_t (&found)[4]) {
    for (int n = 0; n < 4; ++n) found[n] = 0;
    // 16-bit lanes count a run at a time; sums of fewer than 65536 fit each.
    constexpr int64_t run = 32768, wide = 32;
    for (int64_t first = 0; first < count; first += run) {
        const int64_t last = count - first < run ? count : first + run;
        uint16_t sums[4][wide] = {};
        int64_t i = first;
        for (; i + wide <= last; i += wide)
            for (int n = 0; n < 4; ++n) add_at_least(values + i, static_cast<uint16_t>(levels[n]), sums[n]);
        for (int n = 0; n < 4; ++n) {
            for (int64_t t = i; t < last; ++t) found[n] += values[t] >= levels[n];
            for (int64_t lane = 0; lane < wide; ++lane) found[n] += sums[n][lane];
        }
    }
}

// The cut of `wanted` values out of more, without a histogram of all: a sample says where to look, exact counts decide.
inline Cut search_cut(const uint16_t* values, int64_t count, uint32_t* histogram, int64_t bins, int64_t wanted) {
    constexpr int64_t samples = 4096;
    std::memset(histogram, 0, static_cast<size_t>(bins) * 4);
    const int64_t step = (count + samples - 1) / samples, taken = (count + step - 1) / step;
    for (int64_t i = 0; i < count; i += step) ++histogram[values[i]];
    const int64_t guess = find_cut(histogram, bins, clamp(wanted * taken / count, 1, taken)).level;
    // At least `low` there are `enough` >= wanted values, at least `high` fewer than wanted.
    int64_t low = 0, high = bins, enough = count, levels[4], found[4];
    for (int n = 0; n < 4; ++n) levels[n] = clamp(guess - 1 + n, 0, bins - 1);
    while (true) {
        count_at_least(values, count, levels, found);
        for (int n = 0; n < 4; ++n) {
            if (found[n] >= wanted && levels[n] >= low) low = levels[n], enough = found[n];
            if (found[n] < wanted && levels[n] < high) high = levels[n];
        }
        if (high - low == 1) return {low, enough - wanted};
        for (int n = 0; n < 4; ++n) levels[n] = low + (high - low) * (n + 1) / 5;
    }
}

// The bits of a group of 32 values whose token may be attended.
inline uint32_t valid_bits(const uint8_t* mask, int64_t count) {
    uint32_t bits = count < 32 ? (1u << count) - 1 : 0xffffffffu;
    for (int64_t i = 0; mask != nullptr && i < 32 && i < count; ++i) bits &= ~(static_cast<uint32_t>(mask[i] == 0) << i);
    return bits;
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

// Writes `first` + i for the set bits, ascending; four at a time where there is room, as a guess costs more than a store.
inline int32_t* write_bits(uint32_t bits, int64_t first, const int32_t* full, int32_t* out) {
    if (full - out < 36) {
        for (; bits != 0; bits &= bits - 1) *out++ = static_cast<int32_t>(first + __builtin_ctz(bits));
        return out;
    }
    int32_t* const end = out + count_bits(bits);
    do {
        for (int n = 0; n < 4; ++n, bits &= bits - 1)
            out[n] = static_cast<int32_t>(first + __builtin_ctz(bits | 0x80000000u));
        out += 4;
    } while (bits != 0);
    return end;
}

// Writes the tokens `first` + i of the values at or above the cut, exactly `wanted`, ascending. The values are readable
// to the next multiple of 32.
inline int32_t* take_best(const uint16_t* values, int64_t count, int64_t first, const uint8_t* mask, Cut cut,
                          int64_t wanted, int32_t* out) {
    const uint16_t level = static_cast<uint16_t>(cut.level);
    const int32_t* const full = out + wanted;
    int64_t equal = 0;
    for (int64_t i = 0; i < count; i += 32) {
        uint32_t hits = at_least(values + i, level);
        const uint32_t above = level == 65535 ? 0 : at_least(values + i, static_cast<uint16_t>(level + 1));
        if (count - i < 32 || mask != nullptr) hits &= valid_bits(mask == nullptr ? mask : mask + i, count - i);
        uint32_t ties = hits & ~above;
        const int64_t before = equal;
        equal += count_bits(ties);
        if (equal <= cut.skip) {
            hits &= above;
        } else {
            // Ties from number `skip` on are taken.
            for (int64_t n = before; n < cut.skip; ++n) hits &= ~(ties & (~ties + 1)), ties &= ties - 1;
        }
        out = write_bits(hits, first + i, full, out);
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
