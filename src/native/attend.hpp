// attend: softmax over the selected rows of K and V, read once for all queries of a selection head.
#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>

#include "floats.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "rows.hpp"
#include "scratch.hpp"

namespace HASHATTENTION_ISA {

// Tokens handled at once: their K and V rows stay in the first cache between the queries of a group.
constexpr int64_t span = 32;

// The rows of one span.
template <class Value>
struct Rows {
    const Value* at[span];
    int64_t count;
};

// The rows of the span after this one, a key's and a value's at a time.
template <class Value>
struct Ahead {
    const Rows<Value>* keys;
    const Rows<Value>* values;
    int64_t key_dim, value_dim;

    // Row 2 i is the key of token i, row 2 i + 1 its value.
    HASHATTENTION_FETCH void fetch(int64_t row) const {
        const int64_t i = row / 2;
        if (i >= keys->count) return;
        if (row % 2 == 0)
            fetch_row(keys->at[i], key_dim * static_cast<int64_t>(sizeof(Value)));
        else
            fetch_row(values->at[i], value_dim * static_cast<int64_t>(sizeof(Value)));
    }
};

template <class Value>
inline void find_rows(const hashattention::Attention& a, const hashattention::Cache& cache, int64_t request, int64_t head,
                      const int32_t* indices, int64_t count, Rows<Value>& rows) {
    const Value* values = static_cast<const Value*>(cache.values);
    for (int64_t i = 0; i < count; ++i) rows.at[i] = values + find_row(a, cache, request, head, indices[i]);
    rows.count = count;
}

// Dot products of `Queries` queries with `Keys` keys, all sums in registers: out[key][query].
template <int Queries, int Keys, class Value>
inline void dot(const float* const* query, const Value* const* keys, int64_t dim, float (&out)[Keys][Queries]) {
    Floats sum[Keys * Queries] = {};
    int64_t d = 0;
    for (; d + 2 * lanes <= dim; d += 2 * lanes) {
        Pair k[Keys];
        for (int i = 0; i < Keys; ++i) k[i] = load_pair(keys[i] + d);
        for (int q = 0; q < Queries; ++q) {
            const Floats a = load(query[q] + d), b = load(query[q] + d + lanes);
            for (int i = 0; i < Keys; ++i) sum[i * Queries + q] += k[i].a * a;
            for (int i = 0; i < Keys; ++i) sum[i * Queries + q] += k[i].b * b;
        }
    }
    for (; d + lanes <= dim; d += lanes) {
        for (int i = 0; i < Keys; ++i) {
            const Floats k = load(keys[i] + d);
            for (int q = 0; q < Queries; ++q) sum[i * Queries + q] += k * load(query[q] + d);
        }
    }
    static_assert(Keys * Queries % 4 == 0);
    for (int i = 0; i < Keys * Queries; i += 4) sum_four(sum + i, &out[0][0] + i);
    for (; d < dim; ++d)
        for (int i = 0; i < Keys; ++i)
            for (int q = 0; q < Queries; ++q) out[i][q] += widen(keys[i][d]) * query[q][d];
}

// Logits [Queries][span] of queries [..][dim] for the rows of `keys`, `Keys` rows a turn, fetching `ahead` meanwhile.
template <int Queries, int Keys, class Value>
inline void make_logits(const float* query, int64_t dim, const Rows<Value>& keys, const Ahead<Value>* ahead,
                        float* logits) {
    const float* queries[Queries];
    for (int q = 0; q < Queries; ++q) queries[q] = query + q * dim;
    for (int64_t t = 0; t < keys.count; t += Keys) {
        const Value* some[Keys];
        for (int i = 0; i < Keys; ++i) {
            some[i] = keys.at[t + i < keys.count ? t + i : t];
            if (ahead != nullptr) ahead->fetch(t + i);
        }
        float out[Keys][Queries];
        dot<Queries, Keys>(queries, some, dim, out);
        for (int i = 0; i < Keys; ++i)
            for (int q = 0; q < Queries; ++q) logits[q * span + t + i] = out[i][q];
    }
}

template <class Value>
inline void make_group_logits(const float* query, int64_t group, int64_t dim, const Rows<Value>& keys,
                              const Ahead<Value>& all, float* logits) {
    for (int64_t g = 0; g < group;) {
        const Ahead<Value>* ahead = g == 0 ? &all : nullptr;
        if (group - g >= 4)
            make_logits<4, 2>(query + g * dim, dim, keys, ahead, logits + g * span), g += 4;
        else if (group - g >= 2)
            make_logits<2, 4>(query + g * dim, dim, keys, ahead, logits + g * span), g += 2;
        else
            make_logits<1, 4>(query + g * dim, dim, keys, ahead, logits + g * span), g += 1;
    }
}

// Running softmax of one query: the largest logit so far, the sum of weights and, elsewhere, the weighted values.
struct Softmax {
    float largest, sum;
};

// Turns a query's logits of one span into weights and returns what earlier sums must be multiplied by. Logits are
// readable and writable to the end of the span.
inline float step_softmax(const hashattention::Attention& a, float* logits, int64_t count, Softmax& state) {
    for (int64_t t = count; t % lanes != 0; ++t) logits[t] = -INFINITY;
    Floats most = all(state.largest);
    for (int64_t t = 0; t < count; t += lanes) {
        const Floats scaled = load(logits + t) * a.scale;
        store(logits + t, scaled);
        if (a.softcap != 0)
            for (int64_t i = t; i < t + lanes; ++i) logits[i] = i < count ? a.softcap * tanhf(logits[i] / a.softcap) : -INFINITY;
        const Floats logit = load(logits + t);
        most = larger(most, logit);
    }
    float largest = state.largest;
    for (int i = 0; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
    // Every logit is -inf (or NaN): nothing to be relative to.
    const float base = largest == -INFINITY ? 0 : largest;
    Floats sum = {};
    for (int64_t t = 0; t < count; t += lanes) {
        const Floats weight = exp_nonpositive(load(logits + t) - all(base));
        sum += weight;
        store(logits + t, weight);
    }
    const float total = sum_lanes(sum);
    const float kept = state.largest == -INFINITY ? 0 : expf(state.largest - base);
    state.largest = largest;
    state.sum = state.sum * kept + total;
    return kept;
}

// Adds weights [Queries][span] times rows to sums [Queries][dim], two vectors of the dimension at a time; fetches the
// rows `ahead` meanwhile.
template <int Queries, class Value>
inline void add_values(const float* weights, const float* kept, const Rows<Value>& rows, const Ahead<Value>* ahead,
                       int64_t dim, float* sums) {
    // The other half of the rows ahead, spread evenly, so that memory is never idle.
    const int64_t every = dim / (2 * lanes);
    int64_t fetched = ahead != nullptr ? span : 2 * span, wait = 1;
    int64_t d = 0;
    for (; d + 2 * lanes <= dim; d += 2 * lanes) {
        Floats a[Queries], b[Queries];
        for (int q = 0; q < Queries; ++q) {
            a[q] = load(sums + q * dim + d) * kept[q];
            b[q] = load(sums + q * dim + d + lanes) * kept[q];
        }
        for (int64_t t = 0; t < rows.count; ++t) {
            const Pair value = load_pair(rows.at[t] + d);
            if (--wait == 0 && fetched < 2 * span) ahead->fetch(fetched++), wait = every;
            for (int q = 0; q < Queries; ++q) {
                a[q] += value.a * weights[q * span + t];
                b[q] += value.b * weights[q * span + t];
            }
        }
        for (int q = 0; q < Queries; ++q) store(sums + q * dim + d, a[q]), store(sums + q * dim + d + lanes, b[q]);
    }
    for (; d < dim; ++d)
        for (int q = 0; q < Queries; ++q) {
            float sum = sums[q * dim + d] * kept[q];
            for (int64_t t = 0; t < rows.count; ++t) sum += weights[q * span + t] * widen(rows.at[t][d]);
            sums[q * dim + d] = sum;
        }
}

template <class Value>
inline void add_group_values(const float* weights, const float* kept, const Rows<Value>& rows, const Ahead<Value>& all,
                             int64_t group, int64_t dim, float* sums) {
    for (int64_t g = 0; g < group;) {
        const Ahead<Value>* ahead = g == 0 ? &all : nullptr;
        if (group - g >= 4)
            add_values<4>(weights + g * span, kept + g, rows, ahead, dim, sums + g * dim), g += 4;
        else if (group - g >= 2)
            add_values<2>(weights + g * span, kept + g, rows, ahead, dim, sums + g * dim), g += 2;
        else
            add_values<1>(weights + g * span, kept + g, rows, ahead, dim, sums + g * dim), g += 1;
    }
}

// Value d of a row of `dim`, where whole pairs of vectors are laid out as `load_pair` gives them.
template <class Value>
inline int64_t place_in_row(int64_t d, int64_t dim) {
    const int64_t pair = d / (2 * lanes) * (2 * lanes);
    return pair + 2 * lanes <= dim ? pair + place<Value>(d - pair) : d;
}

// A query in float32, laid out as the keys are read.
template <class Value>
inline void read_query(const hashattention::Attention& a, int64_t request, int64_t head, float* out) {
    const int64_t at = request * a.query_request_stride + head * a.query_head_stride;
    with_values(a.query_dtype, a.query, [&](auto* from) {
        for (int64_t d = 0; d < a.key.dim; ++d) out[d] = widen(from[at + place_in_row<Value>(d, a.key.dim)]);
    });
}

inline float* work_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<float>(count);
}

// Slots first .. first + count of one selection head: leaves the group's softmax states and sums [G][Dv].
template <class Value>
void attend_part(const hashattention::Attention& a, int64_t row, int64_t first, int64_t count, Softmax* states,
                 float* sums) {
    const int64_t group = a.query_heads / a.selection_heads;
    const int64_t request = row / a.selection_heads, selection_head = row % a.selection_heads;
    const int64_t kv_head = selection_head * a.kv_heads / a.selection_heads;
    float* query = work_room(group * (a.key.dim + span + 1));
    float* logits = query + group * a.key.dim;
    float* kept = logits + group * span;
    for (int64_t g = 0; g < group; ++g) {
        read_query<Value>(a, request, selection_head * group + g, query + g * a.key.dim);
        states[g] = {-INFINITY, 0};
    }
    std::memset(sums, 0, static_cast<size_t>(group * a.value.dim) * 4);
    const int32_t* indices = a.indices + row * a.slots + first;
    // Fetched a span ahead of use: more than the latency of memory and a page walk.
    Rows<Value> keys[2], values[2];
    const auto find = [&](int64_t done, int64_t turn) {
        const int64_t some = clamp(count - done, 0, span);
        find_rows(a, a.key, request, kv_head, indices + done, some, keys[turn % 2]);
        find_rows(a, a.value, request, kv_head, indices + done, some, values[turn % 2]);
        return Ahead<Value>{keys + turn % 2, values + turn % 2, a.key.dim, a.value.dim};
    };
    const Ahead<Value> first_rows = find(0, 0);
    for (int64_t row = 0; row < 2 * span; ++row) first_rows.fetch(row);
    for (int64_t done = 0, turn = 0; done < count; done += span, ++turn) {
        const Rows<Value>&now = keys[turn % 2], &now_values = values[turn % 2];
        const Ahead<Value> ahead = find(done + span, turn + 1);
        make_group_logits(query, group, a.key.dim, now, ahead, logits);
        for (int64_t g = 0; g < group; ++g) kept[g] = step_softmax(a, logits + g * span, now.count, states[g]);
        add_group_values(logits, kept, now_values, ahead, group, a.value.dim, sums);
    }
}

template <class Value, class Out>
void finish_query(const Softmax* states, const float* sums, int64_t parts, int64_t state_step, int64_t sum_step,
                  int64_t dim, Out* out, float* logsumexp) {
    float largest = -INFINITY, total = 0;
    for (int64_t p = 0; p < parts; ++p)
        if (states[p * state_step].largest > largest) largest = states[p * state_step].largest;
    const float base = largest == -INFINITY ? 0 : largest;
    for (int64_t p = 0; p < parts; ++p) {
        const Softmax& state = states[p * state_step];
        total += state.sum * (state.largest == -INFINITY ? 1 : expf(state.largest - base));
    }
    for (int64_t d = 0; d < dim; ++d) {
        float sum = 0;
        for (int64_t p = 0; p < parts; ++p) {
            const Softmax& state = states[p * state_step];
            sum += sums[p * sum_step + d] * (state.largest == -INFINITY ? 1 : expf(state.largest - base));
        }
        narrow(sum / total, out + place_in_row<Value>(d, dim));
    }
    *logsumexp = base + logf(total);
}

// Writes the output of one selection head from the states and sums of its parts.
template <class Value>
void finish_row(const hashattention::Attention& a, int64_t row, int64_t parts, const Softmax* states,
                       const float* sums) {
    const int64_t group = a.query_heads / a.selection_heads, dim = a.value.dim;
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = row * group + g;
        const auto finish = [&](auto* out) {
            if (a.counts[row] > 0) {
                finish_query<Value>(states + g, sums + g * dim, parts, group, group * dim, dim, out + head * dim,
                             a.logsumexp + head);
                return;
            }
            for (int64_t d = 0; d < dim; ++d) narrow(0, out + head * dim + d);
            a.logsumexp[head] = -INFINITY;
        };
        if (a.query_dtype == hashattention::Dtype::float32) finish(static_cast<float*>(a.out));
        if (a.query_dtype == hashattention::Dtype::bfloat16) finish(static_cast<bfloat16*>(a.out));
        if (a.query_dtype == hashattention::Dtype::float16) finish(static_cast<float16*>(a.out));
    }
}

inline float* parts_sums_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<float>(count);
}

// The whole of one selection head, by the calling thread.
template <class Value>
void attend_row(const hashattention::Attention& a, int64_t row) {
    const int64_t group = a.query_heads / a.selection_heads;
    float* own = parts_sums_room(group * (a.value.dim + 2));
    Softmax* states = reinterpret_cast<Softmax*>(own);
    float* sums = own + 2 * group;
    attend_part<Value>(a, row, 0, clamp(a.counts[row], 0, a.slots), states, sums);
    finish_row<Value>(a, row, 1, states, sums);
}

inline void attend_row(const hashattention::Attention& a, int64_t row) {
    if (a.cache_dtype == hashattention::Dtype::float32) attend_row<float>(a, row);
    if (a.cache_dtype == hashattention::Dtype::bfloat16) attend_row<bfloat16>(a, row);
    if (a.cache_dtype == hashattention::Dtype::float16) attend_row<float16>(a, row);
}

template <class Value>
void attend_in_parts(const hashattention::Attention& a, int64_t parts, int threads) {
    const int64_t rows = a.batch * a.selection_heads, group = a.query_heads / a.selection_heads;
    const int64_t item_floats = group * (a.value.dim + 2);
    float* shared = parts_sums_room(rows * parts * item_floats);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < rows * parts; ++item) {
        const int64_t row = item / parts, part = item % parts;
        const int64_t used = clamp(a.counts[row], 0, a.slots);
        const int64_t size = ((used + parts - 1) / parts + span - 1) / span * span;
        const int64_t first = part * size < used ? part * size : used;
        const int64_t count = used - first < size ? used - first : size;
        float* own = shared + row * parts * item_floats;
        Softmax* states = reinterpret_cast<Softmax*>(own);
        attend_part<Value>(a, row, first, count, states + part * group,
                           own + parts * group * 2 + part * group * a.value.dim);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float* own = shared + row * parts * item_floats;
        finish_row<Value>(a, row, parts, reinterpret_cast<const Softmax*>(own), own + parts * group * 2);
    }
}

// Rows are spread over threads; where rows are fewer, each is cut into `parts` that are merged at the end.
template <class Value>
void attend_rows(const hashattention::Attention& a) {
    const int64_t rows = a.batch * a.selection_heads, group = a.query_heads / a.selection_heads;
    if (rows == 0) return;
    const int64_t bytes = rows * a.slots * (a.key.dim + a.value.dim) * static_cast<int64_t>(sizeof(Value));
    const int threads = threads_for(bytes);
    const int64_t parts = rows >= threads ? 1 : clamp((threads + rows - 1) / rows, 1, (a.slots + span - 1) / span);
    if (parts > 1) return attend_in_parts<Value>(a, parts, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) attend_row<Value>(a, row);
}

inline void attend(const hashattention::Attention& a) {
    if (a.cache_dtype == hashattention::Dtype::float32) attend_rows<float>(a);
    if (a.cache_dtype == hashattention::Dtype::bfloat16) attend_rows<bfloat16>(a);
    if (a.cache_dtype == hashattention::Dtype::float16) attend_rows<float16>(a);
}

}  // namespace HASHATTENTION_ISA
