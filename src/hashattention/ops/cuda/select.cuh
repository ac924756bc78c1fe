// Select: count the entries of a row over its cluster, find the border, hand out what lies above it.
#pragma once
#include "common.cuh"

// counts[b] becomes the number of this block's entries >= b, and goes to every block of the cluster. Every warp sums for itself.
__device__ void share_counts(cg::cluster_group& cluster, Shared& s) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rank = cluster.block_rank();
    // Lane i holds bins 255 - 8 i down to 248 - 8 i.
    const int4* from = reinterpret_cast<const int4*>(s.counts + BINS - 8 * (lane + 1));
    int4 low = from[0], high = from[1];
    int own[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 6; i >= 0; i--) own[i] += own[i + 1];
    int scan = own[0];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, scan, step);
        if (lane >= step) scan += other;
    }
    int before = scan - own[0];
#pragma unroll
    for (int i = 0; i < 8; i++) own[i] += before;
    // 65536 equal entries are one too many for 16 bits: bin 0, which counts nothing, says how many bins have so many.
    int full = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) full += own[i] > 0xffff && (lane < 31 || i > 0);
    full = __reduce_add_sync(~0u, full);
    if (lane == 31) own[0] = full;
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) packed[i] = (own[2 * i] & 0xffff) | own[2 * i + 1] << 16;
    uint4 all = make_uint4(packed[0], packed[1], packed[2], packed[3]);
#pragma unroll
    for (int to = warp; to < BLOCKS; to += WARPS)
        *reinterpret_cast<uint4*>(cluster.map_shared_rank(s.slices, to) + rank * BINS + BINS - 8 * (lane + 1)) = all;
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
    return b;
}

// Which of 16 entries are at least a border, by bit; raise: 256 - border in both halves.
__device__ __forceinline__ uint32_t at_least(const uint4& x, uint32_t raise) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t even = ((words[i] & 0x00ff00ffu) + raise) & 0x01000100u, odd = (((words[i] >> 8) & 0x00ff00ffu) + raise) & 0x01000100u;
        uint32_t found = even >> 8 | odd >> 7;
        mask |= ((found | found >> 14) & 0xf) << 4 * i;
    }
    return mask;
}

// Hand every taken token of this block to `emit` with its rank among the row's heavy tokens.
template <typename Emit>
__device__ void compact(Shared& s, const Border& b, int first, int segment, Emit emit) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int each = (segment + 512 * WARPS - 1) / (512 * WARPS) * 512, start = warp * each, stop = min(segment, start + each);
    uint32_t raise = (256 - b.entry) * 0x00010001u, raise_above = raise - 0x00010001u;
    const uint8_t* scores = s.scores();
    int own = 0;
    for (int i = start + lane * 16; i < stop; i += 512) {
        uint4 x = *reinterpret_cast<const uint4*>(scores + i);
        uint32_t least = at_least(x, raise), above = at_least(x, raise_above);
        own += __popc(above) + (__popc(least ^ above) << 16);
    }
    own = __reduce_add_sync(~0u, own);
    if (lane == 0) s.warps[warp] = own;
    __syncthreads();
    int above_before = b.above, equal_before = b.equal;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        uint32_t other = w < warp ? s.warps[w] : 0;
        above_before += other & 0xffff, equal_before += other >> 16;
    }
    for (int begin = start; begin < stop; begin += 512) {
        int i = begin + lane * 16;
        uint4 x = i < stop ? *reinterpret_cast<const uint4*>(scores + i) : make_uint4(0, 0, 0, 0);
        uint32_t least = at_least(x, raise);
        if (!__any_sync(~0u, least)) continue;
        uint32_t above = at_least(x, raise_above), equal = least ^ above;
        uint32_t found = __popc(above) + (__popc(equal) << 16), scan = found;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            uint32_t other = __shfl_up_sync(~0u, scan, step);
            if (lane >= step) scan += other;
        }
        uint32_t before = scan - found, all = __shfl_sync(~0u, scan, 31);
        int ties = equal_before + int(before >> 16);
        for (int left_out = b.skip - ties; left_out > 0 && equal; left_out--) equal &= equal - 1;
        int rank = above_before + int(before & 0xffff) + max(0, ties - b.skip);
        for (uint32_t chosen = above | equal; chosen; chosen &= chosen - 1) emit(rank++, first + i + __ffs(chosen) - 1);
        above_before += all & 0xffff, equal_before += all >> 16;
    }
}
