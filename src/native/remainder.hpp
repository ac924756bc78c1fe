// The mean value of all tokens for those that were not selected (ops.add_remainder). A few thousand multiplications a
// step: one thread, no vectors by hand.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "floats.hpp"

namespace HASHATTENTION_ISA {

// out [B, Hq, Dv], logsumexp [B, Hq], sums [B, Hkv, dim + value_dim + 1], taken [B, Hsel], lengths [B], coefficients
// [Hq, 3]; strides count elements.
struct Remainder {
    const void* query;
    int64_t query_request_stride, query_head_stride;
    const float *sums, *logsumexp, *coefficients;
    int64_t sums_request_stride, sums_head_stride;
    const int32_t *taken, *lengths;
    int64_t batch, query_heads, kv_heads, selection_heads, dim, value_dim;
    float scale, softcap;
};

// The share of the attention that the tokens left out are estimated to have.
template <class Value>
float share_of(const Remainder& r, const Value* query, const float* sums, int32_t taken, int32_t length, float logsumexp,
               const float* coefficients) {
    const float number = sums[r.dim + r.value_dim];
    if (taken <= 0 || !(number > 0)) return 0;
    float mu = 0;
    for (int64_t d = 0; d < r.dim; ++d) mu += widen(query[d]) * sums[d];
    mu *= r.scale / number;
    if (r.softcap != 0) mu = r.softcap * std::tanh(mu / r.softcap);
    const float some = static_cast<float>(taken), left = std::max(static_cast<float>(length) - some, 0.0f);
    const float mean_weight = logsumexp - std::log(some);
    const float less = coefficients[0] + coefficients[1] * (mu - mean_weight) + coefficients[2] * std::log(some / (some + left));
    const float weight = left / some * std::exp(std::min(less, 0.0f));
    return weight / (1 + weight);
}

template <class Value>
void add_remainder(const Remainder& r, const Value* out, Value* mixed) {
    for (int64_t b = 0; b < r.batch; ++b)
        for (int64_t h = 0; h < r.query_heads; ++h) {
            const int64_t row = b * r.query_heads + h;
            const float* sums = r.sums + b * r.sums_request_stride + h / (r.query_heads / r.kv_heads) * r.sums_head_stride;
            const Value* query =
                static_cast<const Value*>(r.query) + b * r.query_request_stride + h * r.query_head_stride;
            const int32_t taken = r.taken[b * r.selection_heads + h / (r.query_heads / r.selection_heads)];
            const float share = share_of(r, query, sums, taken, r.lengths[b], r.logsumexp[row], r.coefficients + 3 * h);
            const float one_over = 1 / std::max(sums[r.dim + r.value_dim], 1.0f);
            for (int64_t d = 0; d < r.value_dim; ++d) {
                const float own = widen(out[row * r.value_dim + d]);
                narrow(own + share * (sums[r.dim + d] * one_over - own), mixed + row * r.value_dim + d);
            }
        }
}

}  // namespace HASHATTENTION_ISA
