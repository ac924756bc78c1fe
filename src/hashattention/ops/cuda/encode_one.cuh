// Encode within the step, for few rows. The query's code: every block of the cluster reads its share of the weights once, all of it
// asked for at the start; the first stage is split by columns and the later ones by rows, so that a stage costs one exchange at
// most. The newest key's signature: one block of another cluster does all of it, because nothing waits for it.
#pragma once
#include "messages.cuh"

#if MODE == 3
constexpr int LAST = HIDDEN1 ? HIDDEN1 : HIDDEN0, OWN0 = HIDDEN0 / BLOCKS, OWN1 = HIDDEN1 / BLOCKS, OWN_LAST = LAST / BLOCKS;
constexpr int STAGES = HIDDEN1 ? 3 : 2;

__device__ __forceinline__ uint4 load_weights(const Short* p) {
    uint4 r;
    asm volatile("ld.global.nc.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

__device__ __forceinline__ void add_products(float (&sum)[8], float x, const uint4& w) {
    float2 a = widen(w.x), b = widen(w.y), c = widen(w.z), d = widen(w.w);
    sum[0] += x * a.x, sum[1] += x * a.y, sum[2] += x * b.x, sum[3] += x * b.y;
    sum[4] += x * c.x, sum[5] += x * c.y, sum[6] += x * d.x, sum[7] += x * d.y;
}

// Sums over a warp's lanes, of which those LANES apart hold the same 8 columns, to LANES * 8 floats: a lane halves the columns that it
// holds at each step, 7 shuffles where a butterfly of all takes 24.
template <int LANES>
__device__ __forceinline__ void sum_lanes(float (&sum)[8], float* to) {
    constexpr int LEFT = LANES > 32 ? 8 : LANES > 4 ? LANES / 4 : 1;
    int lane = threadIdx.x & 31, column = 0;
#pragma unroll
    for (int half = 4, step = 16; half >= LEFT; half /= 2, step /= 2) {
        bool upper = lane & step;
        column = column * 2 + upper;
#pragma unroll
        for (int w = 0; w < half; w++) {
            float kept = upper ? sum[w + half] : sum[w], sent = upper ? sum[w] : sum[w + half];
            sum[w] = kept + __shfl_xor_sync(~0u, sent, step);
        }
    }
#pragma unroll
    for (int step = 2; step >= LANES; step /= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], step);
    if (LANES < 4 && (lane & 3) >= LANES) return;
#pragma unroll
    for (int w = 0; w < LEFT; w++) to[threadIdx.x % LANES * 8 + column * LEFT + w] = sum[w];
}

// What the encoding of one code keeps in shared memory.
struct Workspace {
    float* sums;      // partial sums of one stage: SUMS
    float* hidden;    // OWN0, then OWN_LAST: this block's entries of the hidden layers
    float* received;  // HIDDEN1: every block's sums of this block's columns
    static constexpr int SUMS = 4096, ENTRIES = SUMS + 128 + HIDDEN1;

    __device__ explicit Workspace(float* base) : sums(base), hidden(sums + SUMS), received(hidden + 128) {}
};

// The codes of one row, OUT entries: a thread's weights in registers, and what it does with them between the cluster's barriers.
template <int IN, int OUT>
struct Encoder {
    static constexpr int SEGMENTS0 = OWN0 / 8, AT_ONCE0 = THREADS / SEGMENTS0, EACH0 = (IN + AT_ONCE0 - 1) / AT_ONCE0;
    static constexpr int LANES1 = HIDDEN1 ? HIDDEN1 / 8 : 1, AT_ONCE1 = THREADS / LANES1, EACH1 = HIDDEN1 ? (OWN0 + AT_ONCE1 - 1) / AT_ONCE1 : 1;
    static constexpr int LANES2 = OUT / 8, AT_ONCE2 = THREADS / LANES2, EACH2 = (OWN_LAST + AT_ONCE2 - 1) / AT_ONCE2;
    // Sums of the later stages, one a warp, or one of several warps for more than 256 columns.
    static constexpr int parts(int rows, int lanes) { return rows * lanes / (lanes > 32 ? lanes : 32); }
    static constexpr int PARTS1 = parts(OWN0 < AT_ONCE1 ? OWN0 : AT_ONCE1, LANES1), PARTS2 = parts(OWN_LAST < AT_ONCE2 ? OWN_LAST : AT_ONCE2, LANES2);
    static_assert(OWN0 % 8 == 0 && OWN0 <= 64 && OWN1 <= 64 && PARTS1 * HIDDEN1 <= Workspace::SUMS && PARTS2 * OUT <= Workspace::SUMS && PARTS2 > 0 && OUT <= THREADS && THREADS >= HIDDEN0 && THREADS >= HIDDEN1, "too wide");
    uint4 weights0[EACH0], weights1[EACH1], weights2[EACH2];
    Short x[EACH0];
    float bias0, bias1, bias2[OUT / 32];

    __device__ __forceinline__ void load(const Map& map, int64_t from, int head, int rank) {
        const Short* w0 = static_cast<const Short*>(map.weights[0]) + int64_t(head) * IN * HIDDEN0 + rank * OWN0 + threadIdx.x % SEGMENTS0 * 8;
#pragma unroll
        for (int i = 0; i < EACH0; i++) {
            int row = threadIdx.x / SEGMENTS0 + i * AT_ONCE0;
            bool inside = IN % AT_ONCE0 == 0 || row < IN;
            weights0[i] = inside ? load_weights(w0 + int64_t(row) * HIDDEN0) : make_uint4(0, 0, 0, 0);
            // Widened where it is used: a conversion here would wait for each load in turn.
            x[i] = static_cast<const Short*>(map.x)[from + (inside ? row : 0)];
        }
        if constexpr (HIDDEN1 > 0) {
            const Short* w1 = static_cast<const Short*>(map.weights[1]) + (int64_t(head) * HIDDEN0 + rank * OWN0) * HIDDEN1 + threadIdx.x % LANES1 * 8;
#pragma unroll
            for (int i = 0; i < EACH1; i++) {
                int row = threadIdx.x / LANES1 + i * AT_ONCE1;
                weights1[i] = row < OWN0 ? load_weights(w1 + row * HIDDEN1) : make_uint4(0, 0, 0, 0);
            }
        }
        const Short* w2 = static_cast<const Short*>(map.weights[STAGES - 1]) + (int64_t(head) * LAST + rank * OWN_LAST) * OUT + threadIdx.x % LANES2 * 8;
#pragma unroll
        for (int i = 0; i < EACH2; i++) {
            int row = threadIdx.x / LANES2 + i * AT_ONCE2;
            weights2[i] = row < OWN_LAST ? load_weights(w2 + row * OUT) : make_uint4(0, 0, 0, 0);
        }
        auto bias = [&](int stage, int width, int column) { return static_cast<const float*>(map.biases[stage])[int64_t(head) * width + column]; };
        bias0 = threadIdx.x < OWN0 ? bias(0, HIDDEN0, rank * OWN0 + threadIdx.x) : 0;
        bias1 = HIDDEN1 && threadIdx.x < OWN1 ? bias(1, HIDDEN1, rank * OWN1 + threadIdx.x) : 0;
#pragma unroll
        for (int w = 0; w < OUT / 32; w++) bias2[w] = bias(STAGES - 1, OUT, w * 32 + (threadIdx.x & 31));
    }

    // Every warp's sums of the first stage: sums[warp][OWN0].
    __device__ __forceinline__ void first_sums(Workspace& s) const {
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < EACH0; i++) add_products(sum, widen(x[i]), weights0[i]);
        sum_lanes<SEGMENTS0>(sum, s.sums + (threadIdx.x >> 5) * OWN0);
    }

    __device__ __forceinline__ void finish_first(Workspace& s) const {
        if (threadIdx.x >= OWN0) return;
        float total = bias0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) total += s.sums[w * OWN0 + threadIdx.x];
        s.hidden[threadIdx.x] = silu(total);
    }

    // Products of this block's rows of a later stage: sums[COUNT][columns].
    template <int LANES, int COUNT, int OWN, int EACH>
    __device__ __forceinline__ void later_sums(Workspace& s, const float* hidden, const uint4 (&weights)[EACH]) const {
        int group = threadIdx.x / LANES;
        constexpr int EVERY = LANES > 32 ? LANES : 32;
        if (threadIdx.x >= COUNT * EVERY) return;
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int row = group + i * (THREADS / LANES);
            if (row < OWN) add_products(sum, hidden[row], weights[i]);
        }
        sum_lanes<LANES>(sum, s.sums + threadIdx.x / EVERY * LANES * 8);
    }

    __device__ __forceinline__ void second_sums(Workspace& s) const { later_sums<LANES1, PARTS1, OWN0>(s, s.hidden, weights1); }

    // Hand this block's sums of every column to the block that owns it.
    __device__ __forceinline__ void share_second(const Inbox& inbox, Workspace& s, int rank) const {
        for (int i = threadIdx.x; i < HIDDEN1; i += THREADS) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < PARTS1; w++) total += s.sums[w * HIDDEN1 + i];
            constexpr int OWN = OWN1 ? OWN1 : 1;
            inbox.send(SECOND, i / OWN, s.received + rank * OWN + i % OWN, total);
        }
    }

    __device__ __forceinline__ void finish_second(Workspace& s) const {
        if (threadIdx.x >= OWN1) return;
        float total = bias1;
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) total += s.received[j * OWN1 + threadIdx.x];
        s.hidden[64 + threadIdx.x] = silu(total);
    }

    __device__ __forceinline__ void last_sums(Workspace& s) const { later_sums<LANES2, PARTS2, OWN_LAST>(s, s.hidden + (HIDDEN1 ? 64 : 0), weights2); }

    // Hand this block's sums of every logit to every block.
    __device__ __forceinline__ void share_last(const Inbox& inbox, const Workspace& s, float* logits, int rank) const {
        constexpr int TURNS = THREADS / OUT;
        int column = threadIdx.x % OUT;
        if constexpr (THREADS % OUT > 0) {
            if (threadIdx.x >= TURNS * OUT) return;
        }
        float total = 0;
#pragma unroll
        for (int w = 0; w < PARTS2; w++) total += s.sums[w * OUT + column];
#pragma unroll
        for (int to = threadIdx.x / OUT; to < BLOCKS; to += TURNS) inbox.send(LOGITS, to, logits + rank * OUT + column, total);
    }

    // Every warp for itself: a lane the logits of columns lane, lane + 32, ...
    __device__ __forceinline__ void finish_last(const float* logits, float (&own)[OUT / 32]) const {
#pragma unroll
        for (int w = 0; w < OUT / 32; w++) {
            own[w] = bias2[w];
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) own[w] += logits[j * OUT + w * 32 + (threadIdx.x & 31)];
        }
    }
};

// One stage by one block: y = x W + b, its SiLU but at the end.
template <int IN, int OUT>
__device__ void stage_alone(const Map& map, int stage, int head, const float* x, float* y, float* sums) {
    constexpr int LANES = OUT / 8, AT_ONCE = THREADS / LANES;
    const Short* weights = static_cast<const Short*>(map.weights[stage]) + int64_t(head) * IN * OUT + threadIdx.x % LANES * 8;
    float sum[8] = {};
#pragma unroll 8
    for (int row = threadIdx.x / LANES; row < IN; row += AT_ONCE) add_products(sum, x[row], load_weights(weights + row * OUT));
    float4* to = reinterpret_cast<float4*>(sums + threadIdx.x * 8);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]), to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    __syncthreads();
    if (threadIdx.x < OUT) {
        float total = static_cast<const float*>(map.biases[stage])[int64_t(head) * OUT + threadIdx.x];
#pragma unroll 8
        for (int g = 0; g < AT_ONCE; g++) total += sums[g * OUT + threadIdx.x];
        y[threadIdx.x] = stage < STAGES - 1 ? silu(total) : total;
    }
    __syncthreads();
}

// The logits of the newest key of a head, by one block.
__device__ const float* encode_key(const Arguments& a, float* sums, int request, int head) {
    float *x = sums + THREADS * 8, *y = x + HEAD_DIM, *z = y + HIDDEN0, *logits = z + HIDDEN1;
    const Short* from = static_cast<const Short*>(a.key.x) + request * a.key.x0 + head * a.key.x1;
    if (threadIdx.x < HEAD_DIM) x[threadIdx.x] = widen(from[threadIdx.x]);
    __syncthreads();
    stage_alone<HEAD_DIM, HIDDEN0>(a.key, 0, head, x, y, sums);
    if constexpr (HIDDEN1 > 0) stage_alone<HIDDEN0, HIDDEN1>(a.key, 1, head, y, z, sums);
    stage_alone<LAST, BITS>(a.key, STAGES - 1, head, HIDDEN1 ? z : y, logits, sums);
    return logits;
}

// Its signature, to its place in the cache or, where the row is to score it, to shared memory, `kept`.
__device__ __noinline__ void write_signature(const Arguments& a, float* scratch, uint32_t* kept, int request, int head) {
    if (threadIdx.x < STAGES) {
        int in = threadIdx.x == 0 ? HEAD_DIM : threadIdx.x == STAGES - 1 ? LAST : HIDDEN0, out = threadIdx.x == STAGES - 1 ? BITS : threadIdx.x ? HIDDEN1 : HIDDEN0;
        const Short* from = static_cast<const Short*>(a.key.weights[threadIdx.x]) + int64_t(head) * in * out;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(in * out * 2) : "memory");
    }
    const float* logits = encode_key(a, scratch, request, head);
    int lane = threadIdx.x & 31, token = a.end[request] - 1;
    if (threadIdx.x < 32) {
        int64_t place = place_signature(a, request, head, max(token, 0));
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            uint32_t word = __ballot_sync(~0u, logits[w * 32 + lane] > 0);
            if (lane == 0 && kept) kept[w] = word;
            else if (lane == 0 && token >= 0 && token < a.tokens) a.signatures[place + w] = word;
        }
    }
    __syncthreads();
}
#endif
