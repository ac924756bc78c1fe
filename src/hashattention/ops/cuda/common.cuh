// What the parts of the step share. Built with: HEAD_DIM, ROWS (query heads a selection head), WORDS (of a signature), PLANES
// (bits of a weight's magnitude), LEVELS, MIXED (codes a query, of whose scores the largest counts), PAGED, HALF (fp16, else bf16), HIDDEN0 and HIDDEN1 (0: no such stage), MODE, REMAINDER (shared
// bytes that a remainder takes, remainder.cuh; 0, which it is if not given: there is none), HELD (a block's signatures are copied to its shared memory while the code is made), and the shape of a launch: THREADS of a block, BLOCKS of a row, RESIDENT blocks of a multiprocessor. The shape is known
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

#ifndef HELD
#define HELD 0
#endif

#ifndef REMAINDER
#define REMAINDER 0
#endif

// Built with PROFILE: when each block passed mark i, in cycles of its multiprocessor; marks 0 and 15 also in nanoseconds of the chip, as marks 31 and 30.
#ifdef PROFILE
constexpr int MOST_BLOCKS = 2048, MARKS = 32;
__device__ long long profile[MOST_BLOCKS * MARKS];
__device__ __forceinline__ void mark(int i) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x || block >= MOST_BLOCKS) return;
    long long t;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(t));
    profile[block * MARKS + i] = t;
    if (i == 0 || i == 15) asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(profile[block * MARKS + (i ? 30 : 31)]));
}
#define MARK(i) mark(i)
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

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }

// cap * tanh(x / cap), by one exponential: that of the library is as long as many a loop here.
__device__ __forceinline__ float cap_softly(float x, float cap) { return cap * (1 - __fdividef(2, 1 + __expf(2 * __fdividef(x, cap)))); }

// CODE: words of one code in planes, its signs and then the slots of its magnitude; COLUMNS: entries of all codes of a query. Slots are
// bits, but for magnitudes up to 7 two of weight 1 and two of weight 3, so that the products of score.cuh sum those of one weight by themselves.
// Kinds of messages.cuh, of which PIECES are for signatures, and the bytes of their barriers.
constexpr int PIECES = 8, MESSAGES = 5 + PIECES, INBOX = 112;
constexpr bool THREES = PLANES == 3 && WORDS > 1;
constexpr int SLOTS = THREES ? 4 : PLANES;
constexpr int BITS = WORDS * 32, BINS = 128, WARPS = THREADS / 32, CODE = (SLOTS + 1) * WORDS, COLUMNS = MIXED * BITS;
static_assert(MIXED == 1 || LEVELS > 0, "bit codes are not mixed");

__device__ __forceinline__ constexpr int weight_of(int slot) { return THREES ? 1 + 2 * (slot & 1) : 1 << slot; }

// One warp: word w of all codes, a lane's weight each (a bit code's is 1 or -1), as signs and slots of the magnitudes; every lane calls
// put(index, word).
template <typename Put>
__device__ __forceinline__ void put_planes(int w, int code, Put put) {
    int first = w / WORDS * CODE + w % WORDS, size = abs(code);
    put(first, __ballot_sync(~0u, code < 0));
    int threes = size * 11 >> 5, ones = size - 3 * threes;
#pragma unroll
    for (int p = 0; p < SLOTS; p++) {
        bool in = THREES ? (p & 1 ? threes : ones) > p / 2 : size >> p & 1;
        put(first + (p + 1) * WORDS, __ballot_sync(~0u, in));
    }
}

// One warp: integer weights of a lane's logits of each word (a bit code: LEVELS 0); the codes of a mixture have one scale.
template <typename Put>
__device__ __forceinline__ void quantise(const float (&logits)[MIXED * WORDS], Put put) {
    uint32_t top = 0;
#pragma unroll
    for (int w = 0; w < MIXED * WORDS; w++) top = max(top, __float_as_uint(fabsf(logits[w])));
    // Floats above 0 are ordered as their bits are.
    float scale = __fdividef(LEVELS, fmaxf(__uint_as_float(__reduce_max_sync(~0u, top)), 1e-30f));
#pragma unroll
    for (int w = 0; w < MIXED * WORDS; w++) {
        put_planes(w, LEVELS ? __float2int_rn(logits[w] * scale) : (logits[w] > 0 ? 1 : -1), put);
    }
}

// One warp: the same of a code that is there already, int8 weights or packed bits.
__device__ __forceinline__ void read_code(const void* codes, int64_t row, uint32_t* planes) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int w = 0; w < MIXED * WORDS; w++) {
        int code = LEVELS ? static_cast<const int8_t*>(codes)[row * COLUMNS + w * 32 + lane]
                          : (static_cast<const uint32_t*>(codes)[row * WORDS + w] >> lane & 1 ? 1 : -1);
        put_planes(w, code, [&](int i, uint32_t word) {
            if (lane == 0) planes[i] = word;
        });
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
    void* planes;                 // [B, H, MIXED, SLOTS + 1, WORDS]: the signs, then the magnitude's slots, as encode.cu has them; MODE 1: a code
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
    int held;                     // shared bytes of a block's signatures
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

// A row's bounds as they are given, asked for where this stands and waited for where they are used.
struct Bounds {
    int start, end, sink, local, heavy;

    __device__ __forceinline__ void ask(const Arguments& a, int request, int64_t row) {
        auto load = [](const int* p) {
            int x;
            asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(p));
            return x;
        };
        start = load(a.start + request), end = load(a.end + request);
        sink = load(a.budgets + row * 3), local = load(a.budgets + row * 3 + 1), heavy = load(a.budgets + row * 3 + 2);
    }
    __device__ __forceinline__ Row row(const Arguments& a) const {
        Row r;
        r.begin = max(start, 0);
        r.stop = max(min(end, a.tokens), r.begin);
        int locals = min(max(local, 0), a.capacity), sinks = min(max(sink, 0), a.capacity - locals);
        r.heavy = min(max(heavy, 0), a.capacity - locals - sinks);
        r.sink_stop = r.begin + min(sinks, r.stop - r.begin);
        r.local_begin = max(r.stop - locals, r.sink_stop);
        return r;
    }
};

// Where a token's signature is, in words.
__device__ __forceinline__ int64_t place_signature(const Arguments& a, int request, int head, int token) {
    if (!PAGED) return request * a.s0 + head * a.s1 + int64_t(token) * WORDS;
    int page = a.table[int64_t(request) * a.table_width + (token >> a.page_shift)];
    return page * a.s0 + head * a.s1 + (token & ((1 << a.page_shift) - 1)) * WORDS;
}

// Shared memory, in this order. The last part serves the encoding, then the scores, then the warps' parts of the output.
// Blocks of a cluster only write to each other's memory, to what nothing else is kept in: no remote read waits on a round trip.
struct Shared {
    uint64_t* inbox;    // INBOX bytes: the barriers of messages.cuh
    uint16_t* slices;   // BLOCKS * BINS: every block's suffix sums
    int* counts;        // BINS: own histogram
    int* warps;         // 32
    uint32_t* planes;   // 32 * MIXED: the query code of this row
    float* stats;       // BLOCKS * 16: every block's maximum and sum of each query head, side by side
    float* parts;       // ROWS * HEAD_DIM: every block's part of the outputs that this block merges
    float* logits;      // LOGITS: every block's sums of all logits of the code
    int* list;          // list_capacity, behind the remainder's bytes
    char* keys;         // HELD: signatures
    char* rest;

    __device__ Shared(char* base, const Arguments& a) {
        inbox = reinterpret_cast<uint64_t*>(base);
        slices = reinterpret_cast<uint16_t*>(base + INBOX);
        counts = reinterpret_cast<int*>(slices + BLOCKS * BINS);
        warps = counts + BINS;
        planes = reinterpret_cast<uint32_t*>(warps + 32);
        stats = reinterpret_cast<float*>(planes + 32 * MIXED);
        parts = stats + BLOCKS * 16;
        logits = parts + ROWS * HEAD_DIM;
        list = reinterpret_cast<int*>(known() + REMAINDER);
        keys = reinterpret_cast<char*>(list + a.list_capacity);
        rest = keys + a.held;
    }
    static constexpr int LOGITS = MODE == 3 && !WIDE ? BLOCKS * COLUMNS : 0;
    __device__ char* known() const { return reinterpret_cast<char*>(logits + LOGITS); }
    __device__ uint32_t* newest() const { return planes + 32 * MIXED - 4; }
    __device__ uint8_t* scores() const { return reinterpret_cast<uint8_t*>(rest); }
    __device__ float* scratch() const { return reinterpret_cast<float*>(rest); }
};
