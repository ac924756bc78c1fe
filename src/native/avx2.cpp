#define HASHATTENTION_ISA hashattention_avx2
#if defined(__x86_64__)
#include "isa.hpp"

namespace hashattention {
const Kernels avx2_kernels = {
    "avx2", hashattention_avx2::encode, hashattention_avx2::pack,   hashattention_avx2::score,
    hashattention_avx2::select, hashattention_avx2::score_select, hashattention_avx2::attend, hashattention_avx2::decode};
}
#endif
