// How many threads a piece of work is worth.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace HASHATTENTION_ISA {

// Threads for `bytes` of memory to read: one alone under `grain`, as waking others costs microseconds.
inline int threads_for(int64_t bytes, int64_t grain = 262144) {
#if defined(_OPENMP)
    const int64_t most = omp_in_parallel() ? 1 : omp_get_max_threads();
    const int64_t worth = bytes / grain + 1;
    return static_cast<int>(worth < most ? worth : most);
#else
    (void)bytes, (void)grain;
    return 1;
#endif
}

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

}  // namespace HASHATTENTION_ISA
