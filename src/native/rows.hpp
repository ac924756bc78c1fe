// Rows of a cache: where they lie, and fetching them ahead of use.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "parallel.hpp"

namespace HASHATTENTION_ISA {

inline int64_t size_of(hashattention::Dtype dtype) { return dtype == hashattention::Dtype::float32 ? 4 : 2; }

// The row that `index` names, in elements from the cache's first; a negative or too large one is clamped: no memory
// outside is ever read.
inline int64_t find_row(const hashattention::Attention& a, const hashattention::Cache& cache, int64_t request,
                        int64_t head, int64_t index) {
    const int64_t token = clamp(index, 0, a.tokens - 1), base = head * cache.head_stride;
    if (a.pages.table == nullptr) return base + request * cache.request_stride + token * cache.token_stride;
    const int64_t given = a.pages.table[request * a.pages.per_row + token / a.pages.size];
    const int64_t page = clamp(given, 0, a.pages.count - 1);
    return base + page * cache.request_stride + token % a.pages.size * cache.token_stride;
}

// Inlined by force: GCC takes a function that only fetches for one that does nothing, and drops its calls.
#define HASHATTENTION_FETCH __attribute__((always_inline)) inline

HASHATTENTION_FETCH void fetch_row(const void* row, int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    // Four instructions: a processor may take one that walks along a row for a stream, and fetch what follows it.
    int64_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
        __builtin_prefetch(p + i, 0, 3);
        __builtin_prefetch(p + i + 64, 0, 3);
        __builtin_prefetch(p + i + 128, 0, 3);
        __builtin_prefetch(p + i + 192, 0, 3);
    }
    for (; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}

// Rows of K and V to fetch while something else is computed in `turns` equal turns.
class Errand {
public:
    Errand() = default;
    Errand(const hashattention::Attention& a, const int32_t* indices, int64_t count, int64_t request, int64_t head,
           int64_t turns)
        : a_(&a), indices_(indices), count_(count), request_(request), head_(head), turns_(turns) {}

    HASHATTENTION_FETCH void step() {
        for (owed_ += count_; owed_ >= turns_ && next_ < count_; owed_ -= turns_, ++next_) {
            fetch(a_->key, indices_[next_]);
            fetch(a_->value, indices_[next_]);
        }
    }

private:
    HASHATTENTION_FETCH void fetch(const hashattention::Cache& cache, int32_t index) const {
        const int64_t size = size_of(a_->cache_dtype), row = find_row(*a_, cache, request_, head_, index);
        fetch_row(static_cast<const char*>(cache.values) + row * size, cache.dim * size);
    }

    const hashattention::Attention* a_ = nullptr;
    const int32_t* indices_ = nullptr;
    int64_t count_ = 0, request_ = 0, head_ = 0, turns_ = 1, owed_ = 0, next_ = 0;
};

}  // namespace HASHATTENTION_ISA
