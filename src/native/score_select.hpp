// score_select: the agreements of a row stay in a thread's own memory, are counted while they are made, and only the
// chosen tokens leave.
#pragma once

#include <cstdint>
#include <cstring>

#include "score.hpp"
#include "select.hpp"

namespace HASHATTENTION_ISA {

inline uint16_t* values_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<uint16_t>(count + 64);
}

inline int32_t* scores_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<int32_t>(count);
}

// Agreements of tokens first .. first + count, and how often each value occurs (four histograms, merged into the first).
inline void agree_and_count(const hashattention::Codes& codes, const Query& query, int64_t request, const Row& row,
                            int64_t first, int64_t count, uint16_t* values, uint32_t* histogram,
                            Errand* errand = nullptr) {
    const int64_t bins = query.bound + 1;
    std::memset(histogram, 0, static_cast<size_t>(4 * bins) * 4);
    for (int64_t done = 0; done < count; done += chunk) {
        const int64_t some = count - done < chunk ? count - done : chunk;
        agree(codes, query, request, first + done, some, values + done, errand);
        const uint8_t* mask = row.mask == nullptr ? nullptr : row.mask + first + done;
        count_values(values + done, some, mask, histogram, bins);
    }
    merge_histograms(histogram, bins);
}

// From so many tokens on a few counts of all cost less than a histogram.
constexpr int64_t long_row = 8192;

inline int32_t* take_heavy(const hashattention::Codes& codes, const Query& query, int64_t request, const Row& row,
                           int32_t* out, Errand* errand = nullptr) {
    const int64_t count = row.high - row.low;
    if (query.bound > most_agreement) {
        int32_t* scores = scores_room(row.high);
        score_wide(codes, query, request, row.low, count, scores + row.low);
        return take_scored(row, scores, histogram_room(65536), out);
    }
    uint16_t* values = values_room(count);
    const int64_t bins = query.bound + 1;
    uint32_t* histogram = histogram_room(4 * bins);
    Cut cut;
    if (row.mask == nullptr && count >= long_row) {
        agree(codes, query, request, row.low, count, values, errand);
        cut = search_cut(values, count, histogram, bins, row.heavy);
    } else {
        agree_and_count(codes, query, request, row, row.low, count, values, histogram, errand);
        cut = find_cut(histogram, bins, row.heavy);
    }
    const uint8_t* mask = row.mask == nullptr ? nullptr : row.mask + row.low;
    return take_best(values, count, row.low, mask, cut, row.heavy, out);
}

// One piece of a row that several threads share: its histogram gives each its place in the output.
struct Piece {
    int64_t first, count, skip, wanted, offset;
};

inline int64_t place_pieces(Piece* pieces, int64_t count, const uint32_t* histograms, int64_t bins, uint32_t* total,
                            int64_t wanted) {
    std::memset(total, 0, static_cast<size_t>(bins) * 4);
    for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < bins; ++i) total[i] += histograms[4 * p * bins + i];
    const Cut cut = find_cut(total, bins, wanted);
    int64_t skip = cut.skip, offset = 0;
    for (int64_t p = 0; p < count; ++p) {
        const uint32_t* histogram = histograms + 4 * p * bins;
        int64_t above = 0;
        for (int64_t i = cut.level + 1; i < bins; ++i) above += histogram[i];
        const int64_t equal = histogram[cut.level];
        pieces[p].skip = skip < equal ? skip : equal;
        pieces[p].wanted = above + equal - pieces[p].skip;
        pieces[p].offset = offset;
        skip -= pieces[p].skip;
        offset += pieces[p].wanted;
    }
    return cut.level;
}

inline Piece* pieces_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<Piece>(count);
}

// As `take_heavy`, one row spread over `threads` threads.
inline int32_t* take_heavy_together(const hashattention::Codes& codes, const Query& query, int64_t request,
                                    const Row& row, int64_t threads, int32_t* out) {
    if (query.bound > most_agreement) return take_heavy(codes, query, request, row, out);
    const int64_t bins = query.bound + 1, count = row.high - row.low;
    // Pieces begin at multiples of 64 values, so that no two threads write one cache line.
    const int64_t size = ((count + threads - 1) / threads + 63) / 64 * 64, many = (count + size - 1) / size;
    uint16_t* values = values_room(count);
    uint32_t* histograms = histogram_room((4 * many + 1) * bins);
    Piece* pieces = pieces_room(many);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (int64_t p = 0; p < many; ++p) {
        const int64_t first = p * size;
        pieces[p].first = first;
        pieces[p].count = count - first < size ? count - first : size;
        agree_and_count(codes, query, request, row, row.low + first, pieces[p].count, values + first,
                        histograms + 4 * p * bins);
    }
    const int64_t level = place_pieces(pieces, many, histograms, bins, histograms + 4 * many * bins, row.heavy);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (int64_t p = 0; p < many; ++p) {
        const Piece& piece = pieces[p];
        const int64_t token = row.low + piece.first;
        const uint8_t* mask = row.mask == nullptr ? nullptr : row.mask + token;
        take_best(values + piece.first, piece.count, token, mask, {level, piece.skip}, piece.wanted, out + piece.offset);
    }
    return out + row.heavy;
}

// One row, by `threads` threads together or, of one, with an errand on the way.
inline void select_row(const hashattention::Codes& codes, const hashattention::Bounds& bounds,
                       const hashattention::Chosen& chosen, int64_t r, int threads, Errand* errand = nullptr) {
    const int64_t request = r / codes.selection_heads;
    const Row row = plan_row(bounds, request, bounds.budgets + 3 * r, codes.tokens);
    const auto heavy = [&](int32_t* out) {
        const Query query = make_query(codes, request, r % codes.selection_heads, parts_room(codes));
        if (threads > 1) return take_heavy_together(codes, query, request, row, threads, out);
        return take_heavy(codes, query, request, row, out, errand);
    };
    write_row(row, bounds.capacity, chosen.indices + r * bounds.capacity, chosen.counts + r, heavy);
}

inline void score_select(const hashattention::Codes& codes, const hashattention::Bounds& bounds,
                         const hashattention::Chosen& chosen) {
    const int64_t rows = codes.batch * codes.selection_heads;
    const int threads = threads_for(4 * rows * codes.tokens * codes.words);
    const bool together = rows < threads;
    const int across = together ? 1 : threads;
#pragma omp parallel for schedule(dynamic) num_threads(across) if (across > 1)
    for (int64_t r = 0; r < rows; ++r) select_row(codes, bounds, chosen, r, together ? threads : 1);
}

}  // namespace HASHATTENTION_ISA
