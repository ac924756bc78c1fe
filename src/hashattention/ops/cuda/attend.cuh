// Attend: an online softmax over a block's share of the selected rows, 16 tokens a warp at a time, then over warps and blocks.
#pragma once
#include "common.cuh"
#include "remainder.cuh"

// Tiles in flight a warp: where one block has a multiprocessor to itself, its registers hold two. At batch 1 they would be code that runs once.
constexpr int TILES = MODE != 3 && RESIDENT == 1 && THREADS <= 256 && HEAD_DIM <= 128 ? 2 : 1;
// And each logit is two sums, so that fewer products wait for one another.
constexpr int SUMS = RESIDENT == 1 ? 2 : 1;
// With several blocks a multiprocessor the query is read again from the first-level cache: no registers are left for it.
constexpr bool REREAD = RESIDENT > 1;
constexpr float LOG2E = 1.4426950408889634f;

// 16 bytes of a row of K or V. In the step the L2 asks the memory for the whole row at once; alone the gather is slower so.
__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 r;
#if MODE == 2
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
#elif HEAD_DIM < 128
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
#else
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
#endif
    return r;
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// How each of COUNT partial softmaxes (maximum and sum, base 2) enters their merge.
template <int COUNT>
__device__ __forceinline__ void merge(const float* tops, const float* sums, int stride, float (&factors)[COUNT], float& high, float& weight) {
    high = -INFINITY, weight = 0;
#pragma unroll
    for (int j = 0; j < COUNT; j++) factors[j] = tops[j * stride], high = fmaxf(high, factors[j]);
    float safe = high == -INFINITY ? 0 : high;
#pragma unroll
    for (int j = 0; j < COUNT; j++) factors[j] = exp2_fast(factors[j] - safe), weight += factors[j] * sums[j * stride];
}

constexpr int CHUNKS = HEAD_DIM / 32;

// Where a row's tokens are, and a lane's part of its queries: known before the list is, where registers hold it so long.
struct Place {
    const char *k, *v, *q;
    uint4 query[CHUNKS];

    __device__ __forceinline__ void prepare(const Arguments& a, int request, int head) {
        int kv_head = head / a.ratio;
        k = reinterpret_cast<const char*>(a.k) + (kv_head * a.k1 + (PAGED ? 0 : request * a.k0)) * 2;
        v = reinterpret_cast<const char*>(a.v) + (kv_head * a.v1 + (PAGED ? 0 : request * a.v0)) * 2;
        int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
        q = reinterpret_cast<const char*>(a.q) + (request * a.q0 + int64_t(head * ROWS + g) * a.q1) * 2 + c * 16;
        if (REREAD) return;
        // Here, not where they are used.
        asm volatile("" : "+l"(k), "+l"(v));
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) query[i] = load_query(i);
    }
    // Zeros for rows that there are not, without a move that would wait for the load.
    __device__ __forceinline__ uint4 load_query(int i) const {
        uint4 r = make_uint4(0, 0, 0, 0);
        int there = (threadIdx.x & 31) >> 2 < ROWS;
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                     : "+r"(r.x), "+r"(r.y), "+r"(r.z), "+r"(r.w) : "l"(q + i * 64), "r"(there));
        return r;
    }
};

// Entry d of query head r is kept at d ^ twist among a warp's outputs: in their order four lanes' would be in one bank.
__device__ __forceinline__ int twist_of(int d, int r) { return (d >> 4 & 2) ^ (r << 1 & 4); }

// One block's share, two outputs at a time to `hand`, with the maximum and the sum of their query head.
template <typename Hand>
__device__ __forceinline__ void attend_own(const Arguments& a, Shared& s, Place& at, int length, Hand hand) {
    constexpr int HALVES = HEAD_DIM / 64;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    float acc[HALVES * 4][4] = {};
    float top = -INFINITY, sum = 0;
    int mask = (1 << a.page_shift) - 1;
    auto place = [&](const char* base, int64_t d0, int64_t d2, int slot) {
        if (PAGED) return base + ((slot >> a.page_shift) * d0 + (slot & mask) * d2) * 2;
        return base + slot * d2 * 2;
    };
    // Slots beyond the end repeat the last token, at weight 0: what is not selected may hold anything.
    uint4 key[TILES][2][CHUNKS], value[TILES][4][HALVES];
    auto load = [&](int begin, uint4 (&key)[2][CHUNKS], uint4 (&value)[4][HALVES]) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const char* from = place(at.k, a.k0, a.k2, s.list[min(begin + t * 8 + g, length - 1)]) + c * 16;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) key[t][i] = load16(from + i * 64);
        }
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const char* from = place(at.v, a.v0, a.v2, s.list[min(begin + (t >> 1) * 8 + c * 2 + (t & 1), length - 1)]) + g * 16;
#pragma unroll
            for (int h = 0; h < HALVES; h++) value[t][h] = load16(from + h * 128);
        }
    };
    auto add = [&](int begin, const uint4 (&key)[2][CHUNKS], const uint4 (&value)[4][HALVES]) {
        float logit[2][SUMS][4] = {};
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (REREAD) at.query[i] = at.load_query(i);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                mma(logit[t][0], at.query[i].x, 0, at.query[i].y, 0, key[t][i].x, key[t][i].y);
                mma(logit[t][SUMS - 1], at.query[i].z, 0, at.query[i].w, 0, key[t][i].z, key[t][i].w);
            }
        }
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = logit[i >> 1][0][i & 1];
            if (SUMS > 1) x += logit[i >> 1][SUMS - 1][i & 1];
            p[i] = x * a.scale;
        }
        if (a.softcap != 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) p[i] = cap_softly(p[i], a.softcap);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = begin + (i >> 1) * 8 + c * 2 + (i & 1) < length ? p[i] * LOG2E : -INFINITY;
        float higher = fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]));
        higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
        higher = fmaxf(fmaxf(higher, __shfl_xor_sync(~0u, higher, 2)), top);
        if (__any_sync(~0u, higher > top)) {
            float fade = exp2_fast(top - higher);
            sum *= fade;
            float even = __shfl_sync(~0u, fade, c * 8), odd = __shfl_sync(~0u, fade, c * 8 + 4);
#pragma unroll
            for (int j = 0; j < HALVES * 4; j++) acc[j][0] *= even, acc[j][1] *= odd, acc[j][2] *= even, acc[j][3] *= odd;
            top = higher;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum += p[i] = exp2_fast(p[i] - top);
        uint32_t b0 = pack(p[0], p[1]), b1 = pack(p[2], p[3]);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const uint32_t *v0 = &value[0][h].x, *v1 = &value[1][h].x, *v2 = &value[2][h].x, *v3 = &value[3][h].x;
#pragma unroll
            for (int w = 0; w < 4; w++)
                mma(acc[h * 4 + w], __byte_perm(v0[w], v1[w], 0x5410), __byte_perm(v0[w], v1[w], 0x7632), __byte_perm(v2[w], v3[w], 0x5410),
                    __byte_perm(v2[w], v3[w], 0x7632), b0, b1);
        }
    };
#pragma unroll 1
    for (int begin = warp * 16; begin < length; begin += WARPS * 16 * TILES) {
        load(begin, key[0], value[0]);
        bool more = TILES > 1 && begin + WARPS * 16 < length;
        if (more) load(begin + WARPS * 16, key[TILES - 1], value[TILES - 1]);
        add(begin, key[0], value[0]);
        if (more) add(begin + WARPS * 16, key[TILES - 1], value[TILES - 1]);
    }
    MARK(12);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);

    // The warps' parts, then the blocks'. The scores are no longer needed.
    float* parts = s.scratch();
    float *tops = parts + WARPS * ROWS * HEAD_DIM, *sums = tops + WARPS * 8;
    if (c == 0) tops[warp * 8 + g] = top, sums[warp * 8 + g] = sum;
    int twist = twist_of(g * 8, c * 2);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float* to = parts + (warp * ROWS + c * 2) * HEAD_DIM + g * 8 + (j * 2 ^ twist);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (c * 2 + e < ROWS) *reinterpret_cast<float2*>(to + e * HEAD_DIM + h * 64) = make_float2(acc[h * 4 + j][e], acc[h * 4 + j][e + 2]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int first = 0; first < ROWS * HEAD_DIM; first += THREADS * 2) {
        int i = first + threadIdx.x * 2;
        if (i >= ROWS * HEAD_DIM) break;
        int r = i / HEAD_DIM;
        float high, weight, factors[WARPS];
        float2 value = {};
        merge<WARPS>(tops + r, sums + r, 8, factors, high, weight);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 part = *reinterpret_cast<const float2*>(parts + w * ROWS * HEAD_DIM + (i ^ twist_of(i, r)));
            value.x += factors[w] * part.x, value.y += factors[w] * part.y;
        }
        hand(i, r, value, high, weight);
    }
    MARK(13);
}

constexpr int SHARE = ROWS * HEAD_DIM / BLOCKS;

#if REMAINDER
// Of the query heads that this block merges.
__device__ __forceinline__ void estimate_own(const Arguments& a, const Shared& s, int rank, int taken) {
    int first = rank * SHARE / HEAD_DIM;
    estimate_remainder(a, s, first, ((rank + 1) * SHARE - 1) / HEAD_DIM + 1 - first, taken);
}
#endif

// Few threads a block: each sums its output over the blocks, in order, so that every run gives the same bits.
__device__ __forceinline__ void merge_blocks(const Arguments& a, const Shared& s, int rank, int64_t row_id) {
#pragma unroll
    for (int first = 0; first < SHARE; first += THREADS) {
        int i = first + threadIdx.x;
        if (i >= SHARE) break;
        int r = (rank * SHARE + i) / HEAD_DIM;
        float high, weight, value = 0, factors[BLOCKS];
        merge<BLOCKS>(s.stats + 2 * r, s.stats + 2 * r + 1, 16, factors, high, weight);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) value += factors[j] * s.parts[j * SHARE + i];
        float result = weight > 0 ? __fdividef(value, weight) : 0;
#if REMAINDER
        result = add_remainder(s, r, (rank * SHARE + i) % HEAD_DIM, high + __log2f(weight), result);
#endif
        int64_t place = row_id * ROWS * HEAD_DIM + rank * SHARE + i;
#if HALF
        reinterpret_cast<__half*>(a.out)[place] = __float2half_rn(result);
#else
        reinterpret_cast<__nv_bfloat16*>(a.out)[place] = __float2bfloat16_rn(result);
#endif
        if ((rank * SHARE + i) % HEAD_DIM == 0) a.logsumexp[row_id * ROWS + r] = weight > 0 ? (high + __log2f(weight)) * 0.6931471805599453f : -INFINITY;
    }
    MARK(15);
}

__device__ __forceinline__ void attend(const Inbox& inbox, const Arguments& a, Shared& s, Place& at, int rank, int length, int64_t row_id) {
    attend_own(a, s, at, length, [&](int i, int r, float2 value, float high, float weight) {
        inbox.send(PARTS, i / SHARE, s.parts + rank * SHARE + i % SHARE, value);
        if (i % HEAD_DIM < BLOCKS * 2) inbox.send(PARTS, i % HEAD_DIM / 2, s.stats + rank * 16 + 2 * r, make_float2(high, weight));
    });
    inbox.await(PARTS);
    MARK(14);
    merge_blocks(a, s, rank, row_id);
}
