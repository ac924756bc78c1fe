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

constexpr int UNROLL = 16;
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
// Blocks of a cluster only ever write to each other's memory, between two barriers: no remote read waits on a round trip.
struct Shared {
    int* counts;    // BINS + 4: own histogram, then its suffix sums
    int* total;     // BINS + 4: suffix sums of the whole row
    int* before;    // BINS + 4: suffix sums of the blocks before this one
    int* slices;    // BINS: every block's suffix sums of the bins that this block reduces
    int* warps;     // 64
    int* facts;     // 16
    float* stats;   // 16 * 16: every block's maximum and sum of each row
    float* parts;   // ROWS * HEAD_DIM: every block's part of the outputs that this block merges
    int* list;      // list_capacity
    uint16_t* scores;

    __device__ Shared(char* base, const Arguments& a) {
        counts = reinterpret_cast<int*>(base);
        total = counts + BINS + 4;
        before = total + BINS + 4;
        slices = before + BINS + 4;
        warps = slices + BINS;
        facts = warps + 64;
        stats = reinterpret_cast<float*>(facts + 16);
        parts = stats + 256;
        list = reinterpret_cast<int*>(parts + ROWS * HEAD_DIM);
        scores = reinterpret_cast<uint16_t*>(list + a.list_capacity);
    }
};

// Tokens of one 128-bit row of the product, plane slots a token, products a row.
constexpr int TOKENS = 4 / WORDS, SLOTS = PLANES <= 4 ? 4 : 8, PRODUCTS = (TOKENS * SLOTS + 7) / 8;

// d[row, column] = population count of (16 rows of 128 key bits) and (8 columns of planes).
__device__ __forceinline__ void count_and(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a0), "r"(a1), "r"(b), "r"(0));
}

// A candidate's entry is its matches + 1, any other's 0. A warp takes 64 words of signatures at a time: 16 rows.
template <int THREADS>
__device__ void score(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head, int64_t row_id, bool wait) {
    constexpr int WARPS = THREADS / 32;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const uint32_t* base = a.signatures + head * a.s1 + (PAGED ? 0 : request * a.s0);
    const int* table = a.table + int64_t(request) * a.table_width;
    uint32_t sign = 0, columns[PRODUCTS];
    int words = max(0, min(segment, row.local_begin - first)) * WORDS, groups = (words + 63) / 64;
    for (int begin = warp; begin < groups || begin == warp; begin += WARPS * UNROLL) {
        uint32_t key[UNROLL][2];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int word = (begin + u * WARPS) * 64 + half * 32 + lane;
                key[u][half] = 0;
                if (word < words) {
                    int64_t offset = int64_t(first) * WORDS + word;
                    if (PAGED) {
                        int token = first + word / WORDS;
                        offset = table[token >> a.page_shift_s] * a.s0 + (token & ((1 << a.page_shift_s) - 1)) * WORDS + word % WORDS;
                    }
                    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(key[u][half]) : "l"(base + offset));
                }
            }
        }
        if (begin == warp) {
            if (wait) asm volatile("griddepcontrol.wait;" ::: "memory");
            const uint32_t* planes = a.planes + row_id * (PLANES + 1) * WORDS;
            sign = __ldcg(planes + c % WORDS);
#pragma unroll
            for (int m = 0; m < PRODUCTS; m++) {
                int token = (m * 8 + g) / SLOTS, plane = (m * 8 + g) % SLOTS;
                columns[m] = token == c / WORDS && plane < PLANES ? __ldcg(planes + (plane + 1) * WORDS + c % WORDS) : 0;
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int group = begin + u * WARPS;
            if (group >= groups) break;
#pragma unroll
            for (int m = 0; m < PRODUCTS; m++) {
                int d[4];
                count_and(d, key[u][0] ^ sign, key[u][1] ^ sign, columns[m]);
                int shift = c * 2 % SLOTS;
                // Both rows' sums in one word, so that one exchange adds both.
                uint32_t sums = ((d[0] + 2 * d[1]) + ((d[2] + 2 * d[3]) << 16)) << shift;
                sums += __shfl_xor_sync(~0u, sums, 1);
                if (SLOTS == 8) sums += __shfl_xor_sync(~0u, sums, 2);
                int in_row = (m * 8 + c * 2) / SLOTS;
                int offset = (group * 16 + g + (c & 1) * 8) * TOKENS + in_row, token = first + offset;
                bool mine = (SLOTS == 8 ? c < 2 : in_row < TOKENS) && offset < segment;
                bool candidate = mine && token >= row.sink_stop && token < row.local_begin;
                int entry = candidate ? ((c & 1 ? sums >> 16 : sums) & 0xffff) + 1 : 0;
                if (candidate) atomicAdd(s.counts + entry, 1);
                if (mine) s.scores[offset] = entry;
            }
        }
    }
    // The rest of the segment holds no candidate.
    for (int i = groups * 16 * TOKENS + threadIdx.x; i < segment; i += THREADS) s.scores[i] = 0;
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
    if (threadIdx.x == 0) s.counts[BINS] = s.total[BINS] = s.before[BINS] = 0;
}

struct Border {
    int entry, skip, heavy, above, equal;   // above, equal: entries of the blocks before this one
};

template <int THREADS>
__device__ Border find_border(cg::cluster_group& cluster, Shared& s, int heavy) {
    int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    int share = BINS / blocks, shift = __ffs(share) - 1;
    __syncthreads();
    cluster.barrier_wait();
    for (int i = threadIdx.x; i < BINS; i += THREADS) cluster.map_shared_rank(s.slices, i >> shift)[rank * share + (i & (share - 1))] = s.counts[i];
    cluster.sync();
    MARK(12);
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        int to = i >> shift, bin = i & (share - 1), sum = 0, before = 0;
#pragma unroll 16
        for (int j = 0; j < blocks; j++) {
            if (j == to) before = sum;
            sum += s.slices[j * share + bin];
        }
        cluster.map_shared_rank(s.total, to)[rank * share + bin] = sum;
        cluster.map_shared_rank(s.before, to)[rank * share + bin] = before;
    }
    MARK(13);
    cluster.sync();
    MARK(14);
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (heavy > 0 ? i > 0 && s.total[i] >= heavy && s.total[i + 1] < heavy : i == BINS - 1) s.facts[0] = i;
    }
    __syncthreads();
    Border b;
    b.entry = s.facts[0];
    b.above = s.before[b.entry + 1];
    b.equal = s.before[b.entry] - b.above;
    b.heavy = min(heavy, s.total[1]);
    int ties = b.heavy - s.total[b.entry + 1];
    b.skip = b.entry > 0 ? s.total[b.entry] - s.total[b.entry + 1] - ties : 0x7fffffff;
    return b;
}

// Bits 0..7: which of a lane's eight entries lie above the border; bits 8..15: which at it. Entries are below 2^15, so a
// subtraction from each half of a word with its top bit set borrows nothing and leaves that bit where the half is as large.
__device__ __forceinline__ uint32_t classify(const uint16_t* scores, int offset, int segment, uint32_t border) {
    if (offset >= segment) return 0;
    uint4 x = *reinterpret_cast<const uint4*>(scores + offset);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    uint32_t least = 0, above = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t raised = (words[i] | 0x80008000u) - border;
        least |= (raised & 0x80008000u) >> (15 - i * 2);
        above |= ((raised - 0x00010001u) & 0x80008000u) >> (15 - i * 2);
    }
    // The first of a word's two entries is now at bit 2 i, the second at bit 16 + 2 i.
    least |= least >> 15, above |= above >> 15;
    return (above & 0xff) | ((least ^ above) & 0xff) << 8;
}

__device__ __forceinline__ int tally(uint32_t found) { return __popc(found & 0xff) | __popc(found & 0xff00) << 16; }

// Each warp first packs what is taken of its entries to their front, as offsets, then hands them to `emit` with their ranks.
template <int THREADS, typename Emit>
__device__ void compact(Shared& s, Border& b, int first, int segment, Emit emit) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int each = ((segment + 255) / 256 + THREADS / 32 - 1) / (THREADS / 32), start = warp * each * 256;
    uint32_t border = b.entry * 0x00010001u;
    int own = 0;
    for (int i = lane * 8; i < each * 256; i += 256) own += tally(classify(s.scores, start + i, segment, border));
    own = __reduce_add_sync(~0u, own);
    if (lane == 0) s.warps[warp] = own;
    __syncthreads();
    int above = b.above, equal = b.equal;
    for (int w = 0; w < warp; w++) above += s.warps[w] & 0xffff, equal += s.warps[w] >> 16;
    int rank = above + max(0, equal - b.skip), taken = 0;
    for (int i = lane * 8; i < each * 256; i += 256) {
        uint32_t found = classify(s.scores, start + i, segment, border);
        uint32_t chosen = found & 0xff;
        if (__any_sync(~0u, found >> 8)) {
            int ties = __popc(found >> 8), scan = ties;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                int other = __shfl_up_sync(~0u, scan, step);
                if (lane >= step) scan += other;
            }
            int left_out = b.skip - equal - (scan - ties);
            uint32_t tied = found >> 8;
            for (; left_out > 0 && tied; left_out--) tied &= tied - 1;
            chosen |= tied;
            equal += __shfl_sync(~0u, scan, 31);
        }
        int count = __popc(chosen), scan = count;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(~0u, scan, step);
            if (lane >= step) scan += other;
        }
        // Every lane has read its entries (the shuffles order that), and what is written lies before what is still to read.
        uint16_t* to = s.scores + start + taken + scan - count;
        for (; chosen; chosen &= chosen - 1) *to++ = i + __ffs(chosen) - 1;
        taken += __shfl_sync(~0u, scan, 31);
        __syncwarp();
    }
    for (int i = lane; i < taken; i += 32) emit(rank + i, first + start + s.scores[start + i]);
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
    int blocks = cluster.num_blocks(), rank = cluster.block_rank(), share = ROWS * HEAD_DIM / blocks;
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
        cluster.map_shared_rank(s.parts, i / share)[rank * share + i % share] = value;
        if (i % HEAD_DIM < blocks) {
            float* to = cluster.map_shared_rank(s.stats, i % HEAD_DIM) + rank * 16 + r;
            to[0] = high, to[8] = weight;
        }
    }
    MARK(8);
    cluster.sync();
    MARK(9);
    // Few threads a block: each sums its output over the blocks, in order, so that every run gives the same bits.
    for (int i = threadIdx.x; i < share; i += THREADS) {
        int r = (rank * share + i) / HEAD_DIM;
        float high = -INFINITY, value = 0, weight = 0;
        for (int j = 0; j < blocks; j++) high = fmaxf(high, s.stats[j * 16 + r]);
        float safe = high == -INFINITY ? 0 : high;
#pragma unroll 4
        for (int j = 0; j < blocks; j++) {
            float factor = exp2f(s.stats[j * 16 + r] - safe);
            value += factor * s.parts[j * share + i], weight += factor * s.stats[j * 16 + 8 + r];
        }
        float result = weight > 0 ? value / weight : 0;
        int64_t place = row_id * ROWS * HEAD_DIM + rank * share + i;
#if HALF
        reinterpret_cast<__half*>(a.out)[place] = __float2half_rn(result);
#else
        reinterpret_cast<__nv_bfloat16*>(a.out)[place] = __float2bfloat16_rn(result);
#endif
        if ((rank * share + i) % HEAD_DIM == 0) a.logsumexp[row_id * ROWS + r] = weight > 0 ? (high + log2f(weight)) * 0.6931471805599453f : -INFINITY;
    }
    MARK(10);
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
    // Waited for before the first write to another block's memory: by then every block has started.
    cluster.barrier_arrive();
    if (MODE == 2) {
        int count = min(a.counts[row_id], a.capacity);
        per = (count + blocks - 1) / blocks;
        length = max(0, min(per, count - rank * per));
        for (int i = threadIdx.x; i < length; i += THREADS) s.list[i] = a.indices[row_id * a.capacity + rank * per + i];
        cluster.barrier_wait();
    } else {
        Row row = read_row(a, request, row_id);
        // Without local tokens the newest signature is a candidate, and the launch before this one may be writing it.
        bool early = a.waits && row.local_begin < row.stop;
        if (a.waits && !early) asm volatile("griddepcontrol.wait;" ::: "memory");
        for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0;
        if (threadIdx.x < 16) s.facts[threadIdx.x] = 0;
        __syncthreads();
        int low = row.sink_stop & ~7;
        int segment = row.local_begin > low ? ((row.local_begin - low + blocks * 8 - 1) / (blocks * 8)) * 8 : 0;
        int first = low + rank * segment;
        MARK(1);
        score<THREADS>(a, s, row, first, segment, request, head, row_id, early);
        __syncthreads();
        MARK(2);
        suffix<THREADS>(s);
        MARK(3);
        Border border = find_border<THREADS>(cluster, s, row.heavy);
        MARK(4);
        int sink = row.sink_stop - row.begin, local = row.stop - row.local_begin, count = sink + border.heavy + local;
        per = (count + blocks - 1) / blocks;
        length = max(0, min(per, count - rank * per));
        float inverse = 1.0f / max(per, 1);
        if (MODE == 1) {
            int* indices = a.indices + row_id * a.capacity;
            compact<THREADS>(s, border, first, segment, [&](int heavy, int token) { indices[sink + heavy] = token; });
            for (int i = rank * THREADS + threadIdx.x; i < a.capacity; i += blocks * THREADS) {
                if (i < sink) indices[i] = row.begin + i;
                else if (i >= count) indices[i] = -1;
                else if (i >= sink + border.heavy) indices[i] = row.local_begin + i - sink - border.heavy;
            }
            if (rank == 0 && threadIdx.x == 0) a.counts[row_id] = count;
            return;
        }
        compact<THREADS>(s, border, first, segment, [&](int heavy, int token) {
            // A float's quotient may be one off; a division would take ten times as long.
            int at = sink + heavy, block = int(at * inverse);
            block += (block + 1) * per <= at;
            block -= block * per > at;
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
// Lets the kernel have clusters of 16 and this much shared memory; never takes back what was allowed before.
template <int THREADS, int RESIDENT, int MODE>
static cudaError_t allow(int shared) {
    static int most = -1;
    if (shared <= most) return cudaSuccess;
    auto kernel = step<THREADS, RESIDENT, MODE>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) most = shared;
    return error;
}

template <int THREADS, int RESIDENT, int MODE>
static int launch(const Arguments& a, int blocks, int heads, int batch, int shared, bool waits, cudaStream_t stream) {
    cudaError_t error = allow<THREADS, RESIDENT, MODE>(shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(blocks), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {dim3(blocks, heads, batch), dim3(THREADS), size_t(shared), stream, attributes, waits ? 2u : 1u};
    return cudaLaunchKernelEx(&config, step<THREADS, RESIDENT, MODE>, a);
}

template <int THREADS, int RESIDENT>
static int clusters(int blocks, int shared) {
    if (allow<THREADS, RESIDENT, 0>(shared) != cudaSuccess) return 0;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config = {dim3(blocks, 1, 1), dim3(THREADS), size_t(shared), nullptr, &attribute, 1};
    int count = 0;
    return cudaOccupancyMaxActiveClusters(&count, step<THREADS, RESIDENT, 0>, &config) == cudaSuccess ? count : 0;
}

extern "C" int most_clusters(int threads, int blocks, int shared) {
    if (threads == 128) return clusters<128, 4>(blocks, shared);
    return threads == 512 ? clusters<512, 1>(blocks, shared) : clusters<256, 2>(blocks, shared);
}

// Shared bytes before the scores.
extern "C" int shared_bytes(int list, int segment, int threads) {
    int fixed = (4 * BINS + 12 + 64 + 16 + 256 + ROWS * HEAD_DIM + list) * 4;
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
    if (threads == 128) {
        if (mode == 0) return launch<128, 4, 0>(*a, blocks, heads, batch, shared, waits, stream);
        if (mode == 1) return launch<128, 4, 1>(*a, blocks, heads, batch, shared, waits, stream);
        return launch<128, 4, 2>(*a, blocks, heads, batch, shared, waits, stream);
    }
    if (mode == 0) return launch<256, 2, 0>(*a, blocks, heads, batch, shared, waits, stream);
    if (mode == 1) return launch<256, 2, 1>(*a, blocks, heads, batch, shared, waits, stream);
    return launch<256, 2, 2>(*a, blocks, heads, batch, shared, waits, stream);
}
