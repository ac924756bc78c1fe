// The kernels of one instruction set. Everything they use lives in the namespace HASHATTENTION_ISA, which each
// translation unit names: a linker that merged inline functions of two of them would run AVX-512 on a machine without.
#include "attend.hpp"
#include "encode.hpp"
#include "kernels.hpp"
#include "score.hpp"
#include "score_select.hpp"
#include "select.hpp"
#include "step.hpp"
