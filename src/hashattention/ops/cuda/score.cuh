// Score: the matches of every signature with the query code, weighted by its magnitudes, on the tensor cores' 1-bit products.
#pragma once
#include "common.cuh"

// d[row, column] += population count of (16 rows of 256 key bits) and (8 columns of planes).
__device__ __forceinline__ void count_and(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A lane loads 16 bytes of signatures (two such for 128 bits) and gets the scores of just these tokens: its words are one
// column block of the product's left side, and the columns that come back to it hold planes in that block alone.
constexpr int TOKENS = WORDS == 1 ? 4 : 2;           // tokens a lane scores at once
constexpr int CHUNK = TOKENS * 32;                   // tokens a warp scores at once
constexpr int LOADS = WORDS == 4 ? 2 : 1;           // 16-byte loads of a lane for them; each holds as much of a signature
constexpr int PRODUCTS = WORDS == 1 ? PLANES : (PLANES + 1) / 2;

struct Code {
    uint32_t sign[WORDS];
    uint32_t columns[PRODUCTS][LOADS][2];

    __device__ explicit Code(const uint32_t* planes) {
        int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
#pragma unroll
        for (int w = 0; w < WORDS; w++) sign[w] = planes[w];
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
            int plane = WORDS == 1 ? m : 2 * m + (g & 1);
#pragma unroll
            for (int i = 0; i < LOADS * 2; i++) {
                bool mine = g / 2 == c && plane < PLANES && (WORDS > 1 || (g & 1) == i);
                columns[m][i / 2][i % 2] = mine ? planes[(plane + 1) * WORDS + (WORDS == 1 ? 0 : i)] : 0;
            }
        }
    }

    // Scores of a lane's tokens, each plus `base`.
    __device__ __forceinline__ void match(const uint4 (&key)[LOADS], int base, int (&score)[TOKENS]) const {
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
            int d[4] = {};
            if (m == 0) {
                d[0] = d[2] = base;
                if (WORDS == 1) d[1] = d[3] = base;
            }
            if constexpr (WORDS == 1) {
                count_and(d, key[0].x ^ sign[0], key[0].z ^ sign[0], key[0].y ^ sign[0], key[0].w ^ sign[0], columns[m][0][0], columns[m][0][1]);
#pragma unroll
                for (int t = 0; t < 4; t++) score[t] = m ? score[t] + (d[t] << m) : d[t];
                continue;
            } else if constexpr (WORDS == 2) {
                count_and(d, key[0].x ^ sign[0], key[0].z ^ sign[0], key[0].y ^ sign[1], key[0].w ^ sign[1], columns[m][0][0], columns[m][0][1]);
            } else {
                count_and(d, key[0].x ^ sign[0], key[1].x ^ sign[0], key[0].y ^ sign[1], key[1].y ^ sign[1], columns[m][0][0], columns[m][0][1]);
                count_and(d, key[0].z ^ sign[2], key[1].z ^ sign[2], key[0].w ^ sign[3], key[1].w ^ sign[3], columns[m][1][0], columns[m][1][1]);
            }
            if constexpr (WORDS > 1) {
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    int sum = d[t * 2] + 2 * d[t * 2 + 1];
                    score[t] = m ? score[t] + (sum << 2 * m) : sum;
                }
            }
        }
    }
};

// The largest score a row's code can give.
__device__ __forceinline__ int largest_score(const uint32_t* planes) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < PLANES * WORDS; i++) sum += __popc(planes[WORDS + i]) << i / WORDS;
    return sum;
}

// Ask the L2 for this block's signatures.
__device__ __forceinline__ void prefetch(const Arguments& a, const Row& row, int first, int segment, int request, int head) {
    int stop = min(first + segment, row.local_begin);
    int each = PAGED ? 1 << a.page_shift : 1 << 14;
    for (int token = first + threadIdx.x * each; token < stop; token += blockDim.x * each) {
        // Sizes are multiples of 16 bytes: rows are aligned so, and pages hold 8 tokens at least.
        int count = min(PAGED ? each - (token & (each - 1)) : each, stop - token) & ~3;
        const uint32_t* from = a.signatures + place_signature(a, request, head, token);
        if (count > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(count * WORDS * 4) : "memory");
    }
}

__device__ __forceinline__ void store_entries(uint8_t* to, const uint32_t (&entry)[TOKENS]) {
    int lane = threadIdx.x & 31;
    if constexpr (WORDS == 1) reinterpret_cast<uint32_t*>(to)[lane] = entry[0] | entry[1] << 8 | entry[2] << 16 | entry[3] << 24;
    else if constexpr (WORDS == 2) reinterpret_cast<uint16_t*>(to)[lane] = entry[0] | entry[1] << 8;
    else to[lane] = entry[0], to[lane + 32] = entry[1];
}

// A candidate's entry is its score - `base`, kept within 0..255; any other token's is 0.
__device__ void score(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head, int base) {
    // Selection alone leaves registers for more blocks a multiprocessor.
    constexpr int UNROLL = (MODE == 1 ? 8 : 16) / LOADS, TOGETHER = 4;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t* dense = a.signatures + place_signature(a, request, head, PAGED ? 0 : first);
    Code code(s.planes);
    int chunks = (max(0, min(segment, row.local_begin - first)) + CHUNK - 1) / CHUNK;
    for (int begin = warp; begin < chunks; begin += WARPS * UNROLL) {
        uint4 key[UNROLL][LOADS];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
#pragma unroll
            for (int l = 0; l < LOADS; l++) {
                int offset = (begin + u * WARPS) * CHUNK + lane * (4 / WORDS) + l * 32;
                key[u][l] = make_uint4(0, 0, 0, 0);
                if (first + offset < row.local_begin && offset < segment) {
                    const uint32_t* from = PAGED ? a.signatures + place_signature(a, request, head, first + offset) : dense + int64_t(offset) * WORDS;
                    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(key[u][l].x), "=r"(key[u][l].y), "=r"(key[u][l].z), "=r"(key[u][l].w) : "l"(from));
                }
            }
        }
        // Several chunks between two branches, so that one's products run under another's.
#pragma unroll
        for (int v = 0; v < UNROLL; v += TOGETHER) {
            if (begin + v * WARPS >= chunks) break;
            uint32_t entry[TOGETHER][TOKENS];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                int found[TOKENS];
                code.match(key[v + u], -base, found);
#pragma unroll
                for (int t = 0; t < TOKENS; t += 2) {
                    // Both kept within 0..255 by one instruction.
                    uint32_t both = __vimin_s16x2_relu(__byte_perm(found[t], found[t + 1], 0x5410), 0x00ff00ff);
                    entry[u][t] = both & 0xffff, entry[u][t + 1] = both >> 16;
                }
            }
            int token = first + (begin + v * WARPS) * CHUNK, beyond = token + ((TOGETHER - 1) * WARPS + 1) * CHUNK;
            if (token < row.sink_stop || beyond > min(row.local_begin, first + segment)) {
#pragma unroll
                for (int u = 0; u < TOGETHER; u++) {
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) {
                        int at = token + u * WARPS * CHUNK + (WORDS == 4 ? lane + t * 32 : lane * TOKENS + t);
                        if (at < row.sink_stop || at >= min(row.local_begin, first + segment)) entry[u][t] = 0;
                    }
                }
            }
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                int chunk = begin + (v + u) * WARPS;
#pragma unroll
                for (int t = 0; t < TOKENS; t++) if (entry[u][t]) atomicAdd(s.counts + entry[u][t], 1);
                if (chunk < chunks) store_entries(s.scores() + chunk * CHUNK, entry[u]);
            }
        }
    }
    // The rest of the segment holds no candidate.
    for (int i = chunks * CHUNK + threadIdx.x * 16; i < segment; i += THREADS * 16) *reinterpret_cast<uint4*>(s.scores() + i) = make_uint4(0, 0, 0, 0);
}
