#define HASHATTENTION_ISA hashattention_avx512
#if defined(__x86_64__)
#include "isa.hpp"

namespace hashattention {
const Kernels avx512_kernels = {
    "avx512", hashattention_avx512::encode, hashattention_avx512::pack,   hashattention_avx512::score,
    hashattention_avx512::select, hashattention_avx512::score_select, hashattention_avx512::attend, hashattention_avx512::decode};
}
#endif
