// One selection head of one request a cluster: score all signatures, select, attend to the selected rows, in one launch.
// Built with: HEAD_DIM, ROWS (query heads a selection head), WORDS, PLANES, BINS, PAGED, HALF (fp16, else bf16).
// MODE 0: the whole step; 1: select only, indices out; 2: attend to given indices.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>

namespace cg = cooperative_groups;

#ifdef PROFILE
__device__ long long profile[64];
#define MARK(i) if (threadIdx.x == 0 && blockIdx.x + blockIdx.y + blockIdx.z == 0) { long long t; asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)); profile[i] = t; }
extern "C" int read_profile(long long* to) { return cudaMemcpyFromSymbol(to, profile, sizeof(profile)); }
#else
#define MARK(i)
#endif

struct Arguments {
    const uint32_t* planes;       // [B, H, PLANES + 1, WORDS]: the signs, then the magnitude's bit planes
    const uint32_t* signatures;   // dense [B, H, T, WORDS] or pages [P, H, N, WORDS]
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
    int tokens, capacity, table_width, page_shift, page_shift_s, ratio, segment_capacity, list_capacity, waits;
    float scale, softcap;
};

constexpr int PER_VECTOR = 4 / WORDS;   // tokens in 16 bytes of signatures
constexpr int UNROLL = 8;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
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

__device__ __forceinline__ uint32_t pack(float low, float high) {
#if HALF
    __half2 x = __floats2half2_rn(low, high);
#else
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
#endif
    return *reinterpret_cast<uint32_t*>(&x);
}

struct Row {
    int begin, sink_stop, local_begin, stop, heavy;
};

__device__ Row read_row(const Arguments& a, int request, int64_t row) {
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

// Shared memory, in this order; the scores are used again for the parts of the output.
struct Shared {
    int* counts;    // BINS + 1: own histogram, then its suffix sums
    int* total;     // BINS + 1: suffix sums of the whole row
    int* slice;     // BINS: this block's share of the reduction
    int* warps;     // 64
    int* facts;     // 16
    float* stats;   // 2 * 8 of the block, for the cluster
    float* part;    // ROWS * HEAD_DIM of the block, for the cluster
    int* list;      // list_capacity
    uint16_t* scores;

    __device__ Shared(char* base, const Arguments& a) {
        counts = reinterpret_cast<int*>(base);
        total = counts + BINS + 4;
        slice = total + BINS + 4;
        warps = slice + BINS;
        facts = warps + 64;
        stats = reinterpret_cast<float*>(facts + 16);
        part = stats + 16;
        list = reinterpret_cast<int*>(part + ROWS * HEAD_DIM);
        scores = reinterpret_cast<uint16_t*>(list + a.list_capacity);
    }
};

__device__ __forceinline__ int count_matches(const uint32_t* key, const uint32_t (&planes)[PLANES + 1][WORDS]) {
    int total = 0;
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        int count = 0;
#pragma unroll
        for (int w = 0; w < WORDS; w++) count += __popc((key[w] ^ planes[0][w]) & planes[p + 1][w]);
        total += count << p;
    }
    return total;
}

template <int THREADS>
__device__ void score(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head, int64_t row_id, bool wait) {
    // A candidate's entry is its matches + 1, any other's 0.
    const char* base = reinterpret_cast<const char*>(a.signatures + head * a.s1);
    const int* table = a.table + int64_t(request) * a.table_width;
    if (!PAGED) base += request * a.s0 * 4;
    uint32_t planes[PLANES + 1][WORDS];
    int vectors = segment / PER_VECTOR;
    for (int begin = 0; begin < vectors; begin += THREADS * UNROLL) {
        uint4 key[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int vector = begin + u * THREADS + threadIdx.x;
            int token = first + vector * PER_VECTOR;
            key[u] = make_uint4(0, 0, 0, 0);
            if (vector < vectors && token < row.local_begin) {
                int64_t offset = int64_t(token) * WORDS;
                if (PAGED) offset = table[token >> a.page_shift_s] * a.s0 + (token & ((1 << a.page_shift_s) - 1)) * WORDS;
                key[u] = load16(base + offset * 4);
            }
        }
        if (begin == 0) {
            if (wait) asm volatile("griddepcontrol.wait;" ::: "memory");
            const uint32_t* from = a.planes + row_id * (PLANES + 1) * WORDS;
#pragma unroll
            for (int i = 0; i < (PLANES + 1) * WORDS; i++) planes[i / WORDS][i % WORDS] = __ldcg(from + i);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int vector = begin + u * THREADS + threadIdx.x;
            int token = first + vector * PER_VECTOR;
            if (vector >= vectors) continue;
            const uint32_t* words = reinterpret_cast<const uint32_t*>(&key[u]);
            uint16_t entry[PER_VECTOR];
#pragma unroll
            for (int i = 0; i < PER_VECTOR; i++) {
                int matches = count_matches(words + i * WORDS, planes) + 1;
                bool candidate = token + i >= row.sink_stop && token + i < row.local_begin;
                entry[i] = candidate ? matches : 0;
                if (candidate) atomicAdd(s.counts + matches, 1);
            }
            if constexpr (PER_VECTOR == 4) reinterpret_cast<uint2*>(s.scores)[vector] = make_uint2(entry[0] | uint32_t(entry[1 % PER_VECTOR]) << 16, entry[2 % PER_VECTOR] | uint32_t(entry[3 % PER_VECTOR]) << 16);
            else if constexpr (PER_VECTOR == 2) reinterpret_cast<uint32_t*>(s.scores)[vector] = entry[0] | uint32_t(entry[1 % PER_VECTOR]) << 16;
            else s.scores[vector] = entry[0];
        }
    }
}

// counts[b] becomes the number of this block's entries >= b.
template <int THREADS>
__device__ void suffix(Shared& s) {
    constexpr int EACH = BINS > THREADS ? BINS / THREADS : 1;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int bin = BINS - EACH * (threadIdx.x + 1);
    int own[EACH], sum = 0;
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) sum += own[i] = bin >= 0 ? s.counts[bin + i] : 0;
    int scan = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, scan, step);
        if (lane >= step) scan += other;
    }
    if (lane == 31) s.warps[warp] = scan;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; w++) before += s.warps[w];
    before += scan - sum;
    if (bin >= 0) {
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--) s.counts[bin + i] = before += own[i];
    }
    if (threadIdx.x == 0) s.counts[BINS] = s.total[BINS] = 0;
}

struct Border {
    int entry, skip, heavy, above, equal;   // above, equal: entries of the blocks before this one
};

template <int THREADS>
__device__ Border find_border(cg::cluster_group& cluster, Shared& s, int heavy) {
    int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    int share = BINS / blocks;
    cluster.sync();
    MARK(12);
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        const int* remote = cluster.map_shared_rank(s.counts, i / share);
        atomicAdd(s.slice + i % share, remote[rank * share + i % share]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) cluster.map_shared_rank(s.total, i / share)[rank * share + i % share] = s.slice[i % share];
    MARK(13);
    cluster.sync();
    MARK(14);
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (i > 0 && s.total[i] >= heavy && s.total[i + 1] < heavy + (heavy == 0)) {
            if (heavy > 0 || i == BINS - 1) s.facts[0] = i;
        }
    }
    __syncthreads();
    Border b;
    b.entry = s.facts[0];
    if (threadIdx.x < 32) {
        int above = 0, equal = 0;
        if (threadIdx.x < rank) {
            const int* remote = cluster.map_shared_rank(s.counts, threadIdx.x);
            above = remote[b.entry + 1];
            equal = remote[b.entry] - above;
        }
        above = __reduce_add_sync(~0u, above);
        equal = __reduce_add_sync(~0u, equal);
        if (threadIdx.x == 0) s.facts[1] = above, s.facts[2] = equal;
    }
    b.heavy = min(heavy, s.total[1]);
    int ties = b.heavy - s.total[b.entry + 1];
    b.skip = b.entry > 0 ? s.total[b.entry] - s.total[b.entry + 1] - ties : 0x7fffffff;
    return b;
}

// The bits of `above` and `equal` say which of a lane's eight entries lie above and at the border.
__device__ __forceinline__ void classify(const uint16_t* scores, int offset, int segment, int border, uint32_t& above, uint32_t& equal) {
    above = equal = 0;
    if (offset >= segment) return;
    uint4 x = *reinterpret_cast<const uint4*>(scores + offset);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int entry = (words[i / 2] >> (i % 2 * 16)) & 0xffff;
        above |= uint32_t(entry > border) << i;
        equal |= uint32_t(entry == border) << i;
    }
}

template <int THREADS, typename Emit>
__device__ void compact(Shared& s, Border& b, int first, int segment, Emit emit) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int steps = (segment + 255) / 256;
    int each = (steps + THREADS / 32 - 1) / (THREADS / 32);
    uint32_t above, equal;
    int found = 0;
    for (int i = 0; i < each; i++) {
        classify(s.scores, (warp * each + i) * 256 + lane * 8, segment, b.entry, above, equal);
        found += __popc(above) | __popc(equal) << 16;
    }
    found = __reduce_add_sync(~0u, found);
    if (lane == 0) s.warps[warp] = found;
    __syncthreads();
    int above_before = s.facts[1], equal_before = s.facts[2];
    for (int w = 0; w < warp; w++) above_before += s.warps[w] & 0xffff, equal_before += s.warps[w] >> 16;
    for (int i = 0; i < each; i++) {
        int offset = (warp * each + i) * 256 + lane * 8;
        classify(s.scores, offset, segment, b.entry, above, equal);
        int own = __popc(above) | __popc(equal) << 16, scan = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(~0u, scan, step);
            if (lane >= step) scan += other;
        }
        int a = above_before + ((scan - own) & 0xffff), e = equal_before + ((scan - own) >> 16);
        for (uint32_t left = above | equal; left; left &= left - 1) {
            int bit = __ffs(left) - 1;
            bool tie = equal >> bit & 1;
            if (!tie || e >= b.skip) emit(a + max(0, e - b.skip), first + offset + bit);
            a += !tie, e += tie;
        }
        int all = __shfl_sync(~0u, scan, 31);
        above_before += all & 0xffff, equal_before += all >> 16;
    }
}

template <int THREADS>
__device__ void attend(cg::cluster_group& cluster, const Arguments& a, Shared& s, int length, int request, int head, int64_t row_id) {
    constexpr int WARPS = THREADS / 32, CHUNKS = HEAD_DIM / 32, HALVES = HEAD_DIM / 64;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    int kv_head = head / a.ratio;
    const char* k = reinterpret_cast<const char*>(a.k) + (kv_head * a.k1 + (PAGED ? 0 : request * a.k0)) * 2;
    const char* v = reinterpret_cast<const char*>(a.v) + (kv_head * a.v1 + (PAGED ? 0 : request * a.v0)) * 2;
    const char* q = reinterpret_cast<const char*>(a.q) + (request * a.q0 + int64_t(head * ROWS + g) * a.q1) * 2;
    uint4 query[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) query[i] = g < ROWS ? *reinterpret_cast<const uint4*>(q + i * 64 + c * 16) : make_uint4(0, 0, 0, 0);
    float acc[HALVES * 4][4] = {};
    float top = -INFINITY, sum = 0;
    int mask = (1 << a.page_shift) - 1;
    auto place = [&](const char* base, int64_t d0, int64_t d2, int slot) {
        if (PAGED) return base + ((slot >> a.page_shift) * d0 + (slot & mask) * d2) * 2;
        return base + slot * d2 * 2;
    };
    const uint4 zero = make_uint4(0, 0, 0, 0);
    for (int begin = warp * 16; begin < length; begin += WARPS * 16) {
        uint4 key[2][CHUNKS], value[4][HALVES];
#pragma unroll
        for (int t = 0; t < 2; t++) {
            int slot = begin + t * 8 + g;
            bool inside = slot < length;
            const char* from = place(k, a.k0, a.k2, inside ? s.list[slot] : 0) + c * 16;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) key[t][i] = inside ? load16(from + i * 64) : zero;
        }
#pragma unroll
        for (int t = 0; t < 4; t++) {
            int slot = begin + (t >> 1) * 8 + c * 2 + (t & 1);
            bool inside = slot < length;
            const char* from = place(v, a.v0, a.v2, inside ? s.list[slot] : 0) + g * 16;
#pragma unroll
            for (int h = 0; h < HALVES; h++) value[t][h] = inside ? load16(from + h * 128) : zero;
        }
        float logit[2][4] = {};
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                mma(logit[t], query[i].x, 0, query[i].y, 0, key[t][i].x, key[t][i].y);
                mma(logit[t], query[i].z, 0, query[i].w, 0, key[t][i].z, key[t][i].w);
            }
        }
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = logit[i >> 1][i & 1] * a.scale;
            if (a.softcap != 0) x = a.softcap * tanhf(x / a.softcap);
            p[i] = begin + (i >> 1) * 8 + c * 2 + (i & 1) < length ? x * LOG2E : -INFINITY;
        }
        float higher = fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]));
        higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
        higher = fmaxf(fmaxf(higher, __shfl_xor_sync(~0u, higher, 2)), top);
        if (__any_sync(~0u, higher > top)) {
            float fade = exp2f(top - higher);
            sum *= fade;
            float even = __shfl_sync(~0u, fade, c * 8), odd = __shfl_sync(~0u, fade, c * 8 + 4);
#pragma unroll
            for (int j = 0; j < HALVES * 4; j++) acc[j][0] *= even, acc[j][1] *= odd, acc[j][2] *= even, acc[j][3] *= odd;
            top = higher;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum += p[i] = exp2f(p[i] - top);
        uint32_t b0 = pack(p[0], p[1]), b1 = pack(p[2], p[3]);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const uint32_t *v0 = &value[0][h].x, *v1 = &value[1][h].x, *v2 = &value[2][h].x, *v3 = &value[3][h].x;
#pragma unroll
            for (int w = 0; w < 4; w++)
                mma(acc[h * 4 + w], __byte_perm(v0[w], v1[w], 0x5410), __byte_perm(v0[w], v1[w], 0x7632), __byte_perm(v2[w], v3[w], 0x5410),
                    __byte_perm(v2[w], v3[w], 0x7632), b0, b1);
        }
    }
    MARK(7);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);

    // The warps' parts, then the blocks'. The scores are no longer needed.
    float* parts = reinterpret_cast<float*>(s.scores);
    float* stats = parts + WARPS * ROWS * HEAD_DIM;
    if (c == 0) stats[warp * 16 + g] = top, stats[warp * 16 + 8 + g] = sum;
#pragma unroll
    for (int j = 0; j < HALVES * 4; j++) {
        int d = (j >> 2) * 64 + g * 8 + (j & 3) * 2;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int r = c * 2 + e;
            if (r < ROWS) *reinterpret_cast<float2*>(parts + (warp * ROWS + r) * HEAD_DIM + d) = make_float2(acc[j][e], acc[j][e + 2]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS) {
        int r = i / HEAD_DIM;
        float high = -INFINITY, value = 0, weight = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) high = fmaxf(high, stats[w * 16 + r]);
        float safe = high == -INFINITY ? 0 : high;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2f(stats[w * 16 + r] - safe);
            value += factor * parts[w * ROWS * HEAD_DIM + i];
            weight += factor * stats[w * 16 + 8 + r];
        }
        s.part[i] = value;
        if (i % HEAD_DIM == 0) s.stats[r] = high, s.stats[8 + r] = weight;
    }
    MARK(8);
    cluster.sync();
    MARK(9);
    int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    int share = ROWS * HEAD_DIM / blocks;
    // Few threads a block: each sums its output over the blocks, in order, so that every run gives the same bits.
    for (int i = rank * share + threadIdx.x; i < (rank + 1) * share; i += THREADS) {
        int r = i / HEAD_DIM;
        float high = -INFINITY, value = 0, weight = 0;
        float tops[16], sums[16], values[16];
#pragma unroll
        for (int j = 0; j < 16; j++) {
            tops[j] = -INFINITY;
            if (j < blocks) {
                const float* other = cluster.map_shared_rank(s.stats, j);
                tops[j] = other[r], sums[j] = other[8 + r], values[j] = cluster.map_shared_rank(s.part, j)[i];
            }
        }
#pragma unroll
        for (int j = 0; j < 16; j++) high = fmaxf(high, tops[j]);
        float safe = high == -INFINITY ? 0 : high;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            if (j >= blocks) continue;
            float factor = exp2f(tops[j] - safe);
            value += factor * values[j], weight += factor * sums[j];
        }
        float result = weight > 0 ? value / weight : 0;
        int64_t place = (row_id * ROWS) * HEAD_DIM + i;
#if HALF
        reinterpret_cast<__half*>(a.out)[place] = __float2half_rn(result);
#else
        reinterpret_cast<__nv_bfloat16*>(a.out)[place] = __float2bfloat16_rn(result);
#endif
        if (i % HEAD_DIM == 0) a.logsumexp[row_id * ROWS + r] = weight > 0 ? (high + log2f(weight)) * 0.6931471805599453f : -INFINITY;
    }
    MARK(10);
    cluster.sync();
    MARK(11);
}

template <int THREADS, int RESIDENT, int MODE>
__global__ void __launch_bounds__(THREADS, RESIDENT) step(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    cg::cluster_group cluster = cg::this_cluster();
    Shared s(memory, a);
    int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    int head = blockIdx.y, request = blockIdx.z;
    int64_t row_id = int64_t(request) * gridDim.y + head;
    int per, length;
    MARK(0);
    if (MODE == 2) {
        int count = min(a.counts[row_id], a.capacity);
        per = (count + blocks - 1) / blocks;
        length = max(0, min(per, count - rank * per));
        for (int i = threadIdx.x; i < length; i += THREADS) s.list[i] = a.indices[row_id * a.capacity + rank * per + i];
    } else {
        Row row = read_row(a, request, row_id);
        // Without local tokens the newest signature is a candidate, and the launch before this one may be writing it.
        bool early = a.waits && row.local_begin < row.stop;
        if (a.waits && !early) asm volatile("griddepcontrol.wait;" ::: "memory");
        for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0, s.slice[i] = 0;
        if (threadIdx.x < 16) s.facts[threadIdx.x] = 0;
        __syncthreads();
        int low = row.sink_stop & ~7;
        int segment = row.local_begin > low ? ((row.local_begin - low + blocks * 8 - 1) / (blocks * 8)) * 8 : 0;
        int first = low + rank * segment;
        MARK(1);
        score<THREADS>(a, s, row, first, segment, request, head, row_id, early);
        if (early && segment == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
        __syncthreads();
        MARK(2);
        suffix<THREADS>(s);
        MARK(3);
        Border border = find_border<THREADS>(cluster, s, row.heavy);
        MARK(4);
        int sink = row.sink_stop - row.begin, local = row.stop - row.local_begin, count = sink + border.heavy + local;
        per = (count + blocks - 1) / blocks;
        length = max(0, min(per, count - rank * per));
        if (MODE == 1) {
            int* indices = a.indices + row_id * a.capacity;
            compact<THREADS>(s, border, first, segment, [&](int heavy, int token) { indices[sink + heavy] = token; });
            for (int i = rank * THREADS + threadIdx.x; i < a.capacity; i += blocks * THREADS) {
                if (i < sink) indices[i] = row.begin + i;
                else if (i >= count) indices[i] = -1;
                else if (i >= sink + border.heavy) indices[i] = row.local_begin + i - sink - border.heavy;
            }
            if (rank == 0 && threadIdx.x == 0) a.counts[row_id] = count;
            cluster.sync();
            return;
        }
        compact<THREADS>(s, border, first, segment, [&](int heavy, int token) {
            int at = sink + heavy, block = at / per;
            cluster.map_shared_rank(s.list, block)[at - block * per] = token;
        });
        MARK(5);
        for (int i = threadIdx.x; i < length; i += THREADS) {
            int at = rank * per + i;
            if (at < sink) s.list[i] = row.begin + at;
            else if (at >= sink + border.heavy) s.list[i] = row.local_begin + at - sink - border.heavy;
        }
        cluster.sync();
    }
    if (PAGED) {
        if (MODE == 2) __syncthreads();
        const int* table = a.table + int64_t(request) * a.table_width;
        for (int i = threadIdx.x; i < length; i += THREADS) {
            int token = s.list[i];
            s.list[i] = table[token >> a.page_shift] << a.page_shift | (token & ((1 << a.page_shift) - 1));
        }
    }
    if (PAGED || MODE == 2) __syncthreads();
    MARK(6);
    attend<THREADS>(cluster, a, s, length, request, head, row_id);
}

// Internal linkage: function-local statics of a template would be one object for all libraries of a process.
template <int THREADS, int RESIDENT, int MODE>
static int launch(const Arguments& a, int blocks, int heads, int batch, int shared, bool waits, cudaStream_t stream) {
    auto kernel = step<THREADS, RESIDENT, MODE>;
    static int allowed = -1;
    if (allowed < shared) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
        allowed = shared;
    }
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(blocks), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {dim3(blocks, heads, batch), dim3(THREADS), size_t(shared), stream, attributes, waits ? 2u : 1u};
    return cudaLaunchKernelEx(&config, kernel, a);
}

template <int THREADS, int RESIDENT>
static int clusters(int blocks, int shared) {
    auto kernel = step<THREADS, RESIDENT, 0>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config = {dim3(blocks, 1, 1), dim3(THREADS), size_t(shared), nullptr, &attribute, 1};
    int count = 0;
    return cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess ? count : 0;
}

extern "C" int most_clusters(int threads, int blocks, int shared) {
    return threads == 512 ? clusters<512, 1>(blocks, shared) : clusters<256, 2>(blocks, shared);
}

// Shared bytes before the scores.
extern "C" int shared_bytes(int list, int segment, int threads) {
    int fixed = (3 * BINS + 8 + 64 + 16 + 16 + ROWS * HEAD_DIM + list) * 4;
    int parts = threads / 32 * (ROWS * HEAD_DIM + 16) * 4;
    return fixed + (segment * 2 > parts ? segment * 2 : parts);
}

extern "C" int run(const Arguments* a, int mode, int threads, int blocks, int heads, int batch, int shared, cudaStream_t stream) {
    bool waits = a->waits;
    if (threads == 512) {
        if (mode == 0) return launch<512, 1, 0>(*a, blocks, heads, batch, shared, waits, stream);
        if (mode == 1) return launch<512, 1, 1>(*a, blocks, heads, batch, shared, waits, stream);
        return launch<512, 1, 2>(*a, blocks, heads, batch, shared, waits, stream);
    }
    if (mode == 0) return launch<256, 2, 0>(*a, blocks, heads, batch, shared, waits, stream);
    if (mode == 1) return launch<256, 2, 1>(*a, blocks, heads, batch, shared, waits, stream);
    return launch<256, 2, 2>(*a, blocks, heads, batch, shared, waits, stream);
}
