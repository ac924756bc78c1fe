// What the parts of the step share. Built with: HEAD_DIM, ROWS (query heads a selection head), WORDS (of a signature), PLANES
// (bits of a weight's magnitude), LEVELS, MIXED (codes a query, of whose scores the largest counts), PAGED, HALF (fp16, else bf16), HIDDEN0 and HIDDEN1 (0: no such stage), MODE, REMAINDER (shared
// bytes that a remainder takes, remainder.cuh; 0, which it is if not given: there is none), and the shape of a launch: THREADS of a block, BLOCKS of a row, RESIDENT blocks of a multiprocessor. The shape is known
// to the compiler because at batch 1 nearly all time is latency: a loop over the blocks of a cluster must be a handful of independent loads.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>

namespace cg = cooperative_groups;

// wide.cu says otherwise before it includes this.
#ifndef WIDE
#define WIDE 0
#endif

#ifndef REMAINDER
#define REMAINDER 0
#endif

#ifdef PROFILE
__device__ long long profile[64];
#define MARK(i) if (threadIdx.x == 0 && blockIdx.x + blockIdx.y + blockIdx.z == 0) { long long t; asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)); profile[i] = t; }
extern "C" int read_profile(long long* to) { return cudaMemcpyFromSymbol(to, profile, sizeof(profile)); }
#else
#define MARK(i)
#endif

#if HALF
typedef __half Short;
__device__ __forceinline__ float2 widen(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
__device__ __forceinline__ float widen(Short x) { return __half2float(x); }
#else
typedef __nv_bfloat16 Short;
__device__ __forceinline__ float2 widen(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)); }
__device__ __forceinline__ float widen(Short x) { return __bfloat162float(x); }
#endif

__device__ __forceinline__ uint32_t pack(float low, float high) {
#if HALF
    __half2 x = __floats2half2_rn(low, high);
#else
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
#endif
    return *reinterpret_cast<uint32_t*>(&x);
}

__device__ __forceinline__ float silu(float x) { return x / (1 + __expf(-x)); }

// CODE: words of one code in planes, its signs and then its magnitude's bit planes; COLUMNS: entries of all codes of a query.
constexpr int BITS = WORDS * 32, BINS = 128, WARPS = THREADS / 32, CODE = (PLANES + 1) * WORDS, COLUMNS = MIXED * BITS;
static_assert(MIXED == 1 || LEVELS > 0, "bit codes are not mixed");

// One warp: word w of all codes, a lane's weight each (a bit code's is 1 or -1), as signs and bit planes of the magnitudes.
__device__ __forceinline__ void store_planes(uint32_t* planes, int w, int code) {
    int lane = threadIdx.x & 31;
    planes += w / WORDS * CODE, w %= WORDS;
    uint32_t sign = __ballot_sync(~0u, code < 0);
    if (lane == 0) planes[w] = sign;
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        uint32_t plane = __ballot_sync(~0u, abs(code) >> p & 1);
        if (lane == 0) planes[(p + 1) * WORDS + w] = plane;
    }
}

// One warp: integer weights of the logits (a bit code: LEVELS 0); the codes of a mixture have one scale.
__device__ __forceinline__ void quantise(const float* logits, uint32_t* planes) {
    int lane = threadIdx.x & 31;
    uint32_t top = 0;
#pragma unroll
    for (int w = 0; w < MIXED * WORDS; w++) top = max(top, __float_as_uint(fabsf(logits[w * 32 + lane])));
    // Floats above 0 are ordered as their bits are.
    float scale = __fdividef(LEVELS, fmaxf(__uint_as_float(__reduce_max_sync(~0u, top)), 1e-30f));
#pragma unroll
    for (int w = 0; w < MIXED * WORDS; w++) {
        float logit = logits[w * 32 + lane];
        store_planes(planes, w, LEVELS ? __float2int_rn(logit * scale) : (logit > 0 ? 1 : -1));
    }
}

// One warp: the same of a code that is there already, int8 weights or packed bits.
__device__ __forceinline__ void read_code(const void* codes, int64_t row, uint32_t* planes) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int w = 0; w < MIXED * WORDS; w++) {
        int code = LEVELS ? static_cast<const int8_t*>(codes)[row * COLUMNS + w * 32 + lane]
                          : (static_cast<const uint32_t*>(codes)[row * WORDS + w] >> lane & 1 ? 1 : -1);
        store_planes(planes, w, code);
    }
}

// The MLP of one code: stage j's weights [H, in, out] and biases float32 [H, out].
struct Map {
    const void* x;                // [B, H, in], strides in entries
    const void* weights[3];
    const void* biases[3];
    int64_t x0, x1;
    int heads;
};

struct Arguments {
    const uint32_t* planes;       // [B, H, MIXED, PLANES + 1, WORDS]: the signs, then the magnitude's bit planes; MODE 1: a code
    uint32_t* signatures;         // dense [B, H, T, WORDS] or pages [P, H, N, WORDS]
    const int* start;             // [B]
    const int* end;               // [B]
    const int* budgets;           // [B, H, 3]
    const int* table;             // [B, M]
    const void* q;                // [B, H * ROWS, HEAD_DIM]
    const void* k;
    const void* v;
    void* out;                    // [B, H * ROWS, HEAD_DIM]
    float* logsumexp;             // [B, H * ROWS]
    int* indices;                 // [B, H, capacity]
    int* counts;                  // [B, H]
    int64_t s0, s1, k0, k1, k2, v0, v1, v2, q0, q1;
    int tokens, capacity, table_width, page_shift, ratio, list_capacity;
    int prefetch;                 // tokens of a block
    float scale, softcap;
    Map query, key;               // only where the step encodes; key.x may be null
    char* board;                  // wide.cu: rows of `board_row` bytes, as `Board` has it
    int64_t board_row;
    const float* sums;            // only with a remainder: [B, Hkv, 2 HEAD_DIM + 1], summed keys, summed values, their number
    const int* lengths;           // [B]
    const float* coefficients;    // [H * ROWS, 3]
    int64_t m0, m1;               // strides of the sums
};

struct Row {
    int begin, sink_stop, local_begin, stop, heavy;
};

__device__ __forceinline__ Row read_row(const Arguments& a, int request, int64_t row) {
    Row r;
    r.begin = max(a.start[request], 0);
    r.stop = max(min(a.end[request], a.tokens), r.begin);
    int local = min(max(a.budgets[row * 3 + 1], 0), a.capacity);
    int sink = min(max(a.budgets[row * 3], 0), a.capacity - local);
    r.heavy = min(max(a.budgets[row * 3 + 2], 0), a.capacity - local - sink);
    r.sink_stop = r.begin + min(sink, r.stop - r.begin);
    r.local_begin = max(r.stop - local, r.sink_stop);
    return r;
}

// Where a token's signature is, in words.
__device__ __forceinline__ int64_t place_signature(const Arguments& a, int request, int head, int token) {
    if (!PAGED) return request * a.s0 + head * a.s1 + int64_t(token) * WORDS;
    int page = a.table[int64_t(request) * a.table_width + (token >> a.page_shift)];
    return page * a.s0 + head * a.s1 + (token & ((1 << a.page_shift) - 1)) * WORDS;
}

// Shared memory, in this order. The last part serves the encoding, then the scores, then the warps' parts of the output.
// Blocks of a cluster only write to each other's memory, between two barriers: no remote read waits on a round trip.
struct Shared {
    uint16_t* slices;   // BLOCKS * BINS: every block's suffix sums
    int* counts;        // BINS: own histogram
    int* warps;         // 32
    uint32_t* planes;   // 32 * MIXED: the query code of this row
    float* stats;       // BLOCKS * 16: every block's maximum and sum of each query head
    float* parts;       // ROWS * HEAD_DIM: every block's part of the outputs that this block merges
    int* list;          // list_capacity, behind the remainder's bytes
    char* rest;

    __device__ Shared(char* base, const Arguments& a) {
        slices = reinterpret_cast<uint16_t*>(base);
        counts = reinterpret_cast<int*>(slices + BLOCKS * BINS);
        warps = counts + BINS;
        planes = reinterpret_cast<uint32_t*>(warps + 32);
        stats = reinterpret_cast<float*>(planes + 32 * MIXED);
        parts = stats + BLOCKS * 16;
        list = reinterpret_cast<int*>(known() + REMAINDER);
        rest = reinterpret_cast<char*>(list + a.list_capacity);
    }
    __device__ char* known() const { return reinterpret_cast<char*>(parts + ROWS * HEAD_DIM); }
    __device__ uint32_t* newest() const { return planes + 32 * MIXED - 4; }
    __device__ uint8_t* scores() const { return reinterpret_cast<uint8_t*>(rest); }
    __device__ float* scratch() const { return reinterpret_cast<float*>(rest); }
};
