#define HASHATTENTION_ISA hashattention_plain

#include "isa.hpp"

namespace hashattention {
const Kernels plain_kernels = {
    "plain", hashattention_plain::encode, hashattention_plain::pack,   hashattention_plain::score,
    hashattention_plain::select, hashattention_plain::score_select, hashattention_plain::attend, hashattention_plain::decode};
}

