// The remainder: the mean value of all tokens for those left out, in a share of the attention that follows from three coefficients a
// query head, the logit of the mean key and how many tokens of how many were taken (`reference.add_remainder`). What it reads is
// copied to shared memory from the start on, and all that does not depend on the attention is there before the merge.
#pragma once
#include "messages.cuh"

#if REMAINDER
// Before the selection, unless blocks share a multiprocessor: then the row's bounds would leave their registers for it, and one block's
// waiting is another's work.
constexpr bool ASK_FIRST = RESIDENT == 1;

struct Known {
    // A query head: its mean key's logit + log(tokens taken), b, a + c log(taken / length), and the tokens left out over those taken;
    // logarithms and logits of base 2.
    float4* estimates;  // ROWS
    Short* queries;     // ROWS * HEAD_DIM
    float* sums;        // 2 HEAD_DIM + 1
    int* length;        // 1
    float* own;         // ROWS * 3: a, b and c
    static_assert(REMAINDER % 16 == 0 && REMAINDER >= ROWS * (16 + HEAD_DIM * 2 + 12) + (2 * HEAD_DIM + 2) * 4, "`remainder_bytes` of layout.py");

    __device__ explicit Known(const Shared& s) {
        estimates = reinterpret_cast<float4*>(s.known());
        queries = reinterpret_cast<Short*>(estimates + ROWS);
        sums = reinterpret_cast<float*>(queries + ROWS * HEAD_DIM);
        length = reinterpret_cast<int*>(sums + 2 * HEAD_DIM + 1);
        own = reinterpret_cast<float*>(length + 1);
    }
    __device__ float number() const { return sums[2 * HEAD_DIM]; }
};

// Ask for the queries, the sums (rows of an odd length: 4 bytes at a time), the length and the coefficients of this row.
__device__ __forceinline__ void ask_remainder(const Arguments& a, const Shared& s, int request, int head) {
    constexpr int QUERIES = ROWS * HEAD_DIM / 8, SUMS = 2 * HEAD_DIM + 1, NUMBERS = SUMS + 1 + ROWS * 3;
    Known known(s);
    const Short* q = static_cast<const Short*>(a.q) + request * a.q0 + head * ROWS * HEAD_DIM;
#pragma unroll
    for (int begin = 0; begin < QUERIES; begin += THREADS) {
        int i = begin + threadIdx.x;
        if (i < QUERIES) copy_async(known.queries + i * 8, q + i * 8);
    }
    const float *sums = a.sums + request * a.m0 + head / a.ratio * a.m1, *own = a.coefficients + head * ROWS * 3;
#pragma unroll
    for (int begin = 0; begin < NUMBERS; begin += THREADS) {
        int i = begin + threadIdx.x;
        const void* from = i < SUMS ? sums + i : i > SUMS ? own + i - SUMS - 1 : static_cast<const void*>(a.lengths + request);
        if (i < NUMBERS) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(known.sums + i)), "l"(from));
    }
}

// A warp a query head, for the `heads` from `first` on: what there is to know before the attention over `taken` tokens.
__device__ __forceinline__ void estimate_remainder(const Arguments& a, const Shared& s, int first, int heads, int taken) {
    static_assert(ROWS <= WARPS, "a warp a query head");
    constexpr float LOG2E = 1.4426950408889634f;
    Known known(s);
    int lane = threadIdx.x & 31, r = first + (threadIdx.x >> 5);
    if (r >= first + heads) return;
    float dot = 0;
#pragma unroll
    for (int d = lane * 2; d < HEAD_DIM; d += 64) {
        float2 q = widen(*reinterpret_cast<const uint32_t*>(known.queries + r * HEAD_DIM + d));
        dot += q.x * known.sums[d] + q.y * known.sums[d + 1];
    }
#pragma unroll
    for (int step = 16; step; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    float some = fmaxf(taken, 1.0f), left = taken > 0 && known.number() > 0 ? fmaxf(*known.length - some, 0.0f) : 0;
    float mu = __fdividef(dot * a.scale, fmaxf(known.number(), 1.0f));
    if (a.softcap != 0) mu = cap_softly(mu, a.softcap);
    const float* own = known.own + r * 3;
    float log_some = __log2f(some), log_share = log_some - __log2f(some + left);
    if (lane == 0) known.estimates[r] = make_float4(mu * LOG2E + log_some, own[1], own[0] * LOG2E + own[2] * log_share, __fdividef(left, some));
}

// Entry d of an output of query head r whose weights' logarithm (base 2) is `logsumexp`.
__device__ __forceinline__ float add_remainder(const Shared& s, int r, int d, float logsumexp, float out) {
    Known known(s);
    float4 e = known.estimates[r];
    float mean = __fdividef(known.sums[HEAD_DIM + d], fmaxf(known.number(), 1.0f)), power;
    // Where nothing was taken this is no number, and the least of it and 0 is 0: a weight of 0 all the same.
    float less = fminf(fmaf(e.y, e.x - logsumexp, e.z), 0.0f);
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(less));
    float weight = e.w * power;
    return out + __fdividef(weight, 1 + weight) * (mean - out);
}
#endif
