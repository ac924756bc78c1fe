// Select: count the entries of a row over its cluster, find the border, hand out what lies above it.
#pragma once
#include "common.cuh"

// How many of this block's entries are >= each bin: a lane's four bins, 124 - 4 lane and up, in 16 bits each. Every warp sums for itself.
__device__ __forceinline__ uint2 sum_counts(const Shared& s) {
    int lane = threadIdx.x & 31;
    int4 bins = *reinterpret_cast<const int4*>(s.counts + BINS - 4 * (lane + 1));
    int own[4] = {bins.x, bins.y, bins.z, bins.w};
#pragma unroll
    for (int i = 2; i >= 0; i--) own[i] += own[i + 1];
    int scan = own[0];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, scan, step);
        if (lane >= step) scan += other;
    }
    int before = scan - own[0];
    // 65536 equal entries are one too many for 16 bits: bin 0, which counts nothing, says how many bins have so many.
    int full = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] += before, full += own[i] > 0xffff && (lane < 31 || i > 0);
    full = __reduce_add_sync(~0u, full);
    if (lane == 31) own[0] = full;
    return make_uint2((own[0] & 0xffff) | own[1] << 16, (own[2] & 0xffff) | own[3] << 16);
}

__device__ __forceinline__ void store_counts(uint16_t* slices, int block, int lane, uint2 all) {
    *reinterpret_cast<uint2*>(slices + block * BINS + BINS - 4 * (lane + 1)) = all;
}

// Every block's sums go to every block of the cluster.
__device__ void share_counts(cg::cluster_group& cluster, Shared& s) {
    uint2 all = sum_counts(s);
#pragma unroll
    for (int to = threadIdx.x >> 5; to < BLOCKS; to += WARPS) store_counts(cluster.map_shared_rank(s.slices, to), cluster.block_rank(), threadIdx.x & 31, all);
}

// How many entries of a block are >= bin, 0 < bin < BINS; `large`: a block may hold 65536.
__device__ __forceinline__ int read_count(const Shared& s, int block, int bin, bool large) {
    int count = s.slices[block * BINS + bin];
    return large && bin <= s.slices[block * BINS] ? 0x10000 : count;
}

struct Border {
    int entry;          // heavy tokens have this entry at least; 0: too few candidates have an entry at all
    int skip;           // so many of those at the border are left out, the oldest first
    int heavy;          // tokens taken
    int above, equal;   // entries of the blocks before this one, above and at the border
    int own, most;      // tokens taken of this block, and the most of any (wide.cu)
};

__device__ __forceinline__ Border find_border(const Shared& s, int rank, int heavy, bool last, bool large) {
    int lane = threadIdx.x & 31;
    Border b;
    b.entry = 0;
#pragma unroll
    for (int begin = 0; begin < BINS; begin += THREADS) {
        int i = begin + threadIdx.x, total = 0;
        if (i > 0 && i < BINS) {
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) total += read_count(s, j, i, large);
        }
        // Suffix sums fall, so the border is the number of bins that hold enough.
        b.entry += __syncthreads_count(total >= heavy);
    }
    if (last) b.entry = max(b.entry, 1);
    int least = lane < BLOCKS && b.entry ? read_count(s, lane, b.entry, large) : 0;
    int above = lane < BLOCKS && b.entry + 1 < BINS ? read_count(s, lane, b.entry + 1, large) : 0;
    int all = __reduce_add_sync(~0u, least);
    b.heavy = min(heavy, all);
    b.skip = all - b.heavy;
    b.above = __reduce_add_sync(~0u, lane < rank ? above : 0);
    b.equal = __reduce_add_sync(~0u, lane < rank ? least : 0) - b.above;
    if (WIDE) {
        int equal = least - above, scan = equal;
#pragma unroll
        for (int step = 1; step < BLOCKS; step *= 2) {
            int other = __shfl_up_sync(~0u, scan, step);
            if (lane >= step) scan += other;
        }
        int taken = least - min(max(b.skip - (scan - equal), 0), equal);
        b.own = __shfl_sync(~0u, taken, rank), b.most = __reduce_max_sync(~0u, taken);
    }
    return b;
}

// Of four entries, those that are at least a border, each as 128; raise: 128 - border in every byte.
__device__ __forceinline__ uint32_t reach(uint32_t entries, uint32_t raise) { return (entries + raise) & 0x80808080u; }

// Which of 16 entries are at least a border, by bit.
__device__ __forceinline__ uint32_t at_least(const uint4& x, uint32_t raise) {
    uint32_t low = __dp4a(reach(x.y, raise), 0x80402010u, __dp4a(reach(x.x, raise), 0x08040201u, 0u));
    uint32_t high = __dp4a(reach(x.w, raise), 0x80402010u, __dp4a(reach(x.z, raise), 0x08040201u, 0u));
    return low >> 7 | high << 1;
}

// Hand every taken token of this block to `emit` with its rank among the row's heavy tokens.
template <int STEPS, typename Emit>
__device__ __forceinline__ void compact(Shared& s, const Border& b, int first, int segment, Emit emit) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int each = (segment + 512 * WARPS - 1) / (512 * WARPS) * 512, start = warp * each, stop = min(segment, start + each);
    uint32_t raise = (128 - b.entry) * 0x01010101u, raise_above = raise - 0x01010101u;
    const uint8_t* scores = s.scores();
    uint32_t least = 0, above = 0;
    for (int i = start + lane * 16; i < stop; i += 512) {
        uint4 x = *reinterpret_cast<const uint4*>(scores + i);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            least = __dp4a(reach((&x.x)[w], raise), 0x01010101u, least);
            above = __dp4a(reach((&x.x)[w], raise_above), 0x01010101u, above);
        }
    }
    uint32_t own = __reduce_add_sync(~0u, above >> 7 | (least - above) >> 7 << 16);
    if (lane == 0) s.warps[warp] = own;
    __syncthreads();
    int above_before = b.above, equal_before = b.equal;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        uint32_t other = w < warp ? s.warps[w] : 0;
        above_before += other & 0xffff, equal_before += other >> 16;
    }
    // Several steps at once, because each is a chain of a dozen dependent instructions.
    for (int begin = start; begin < stop; begin += 512 * STEPS) {
        uint32_t least[STEPS], above[STEPS], scan[STEPS];
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            int i = begin + u * 512 + lane * 16;
            uint4 x = i < stop ? *reinterpret_cast<const uint4*>(scores + i) : make_uint4(0, 0, 0, 0);
            least[u] = at_least(x, raise), above[u] = at_least(x, raise_above);
            scan[u] = __popc(above[u]) + (__popc(least[u] ^ above[u]) << 16);
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
#pragma unroll
            for (int u = 0; u < STEPS; u++) {
                uint32_t other = __shfl_up_sync(~0u, scan[u], step);
                if (lane >= step) scan[u] += other;
            }
        }
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            uint32_t all = __shfl_sync(~0u, scan[u], 31), equal = least[u] ^ above[u];
            uint32_t before = scan[u] - __popc(above[u]) - (__popc(equal) << 16);
            int ties = equal_before + int(before >> 16), i = begin + u * 512 + lane * 16;
            for (int left_out = b.skip - ties; left_out > 0 && equal; left_out--) equal &= equal - 1;
            int rank = above_before + int(before & 0xffff) + max(0, ties - b.skip);
            for (uint32_t chosen = above[u] | equal; chosen; chosen &= chosen - 1) emit(rank++, first + i + __ffs(chosen) - 1);
            above_before += all & 0xffff, equal_before += all >> 16;
        }
    }
}

// Where a warp has one step's tokens at most, several steps would be code that does nothing.
template <typename Emit>
__device__ __forceinline__ void compact_row(Shared& s, const Border& b, int first, int segment, Emit emit) {
    if (segment <= 512 * WARPS) compact<1>(s, b, first, segment, emit);
    else if (WIDE && segment <= 1024 * WARPS) compact<2>(s, b, first, segment, emit);
    else compact<4>(s, b, first, segment, emit);
}
