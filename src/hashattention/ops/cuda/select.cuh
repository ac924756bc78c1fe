// Select: count the entries of a row over its cluster, find the border, hand out what lies above it.
#pragma once
#include <type_traits>
#include "messages.cuh"

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

__device__ __forceinline__ uint2* place_counts(const Shared& s, int block, int lane) {
    return reinterpret_cast<uint2*>(s.slices + block * BINS + BINS - 4 * (lane + 1));
}

// Every block's sums go to every block of the cluster.
__device__ void share_counts(const Inbox& inbox, Shared& s, int rank) {
    if (threadIdx.x >> 5 >= BLOCKS) return;
    uint2 all = sum_counts(s);
#pragma unroll
    for (int to = threadIdx.x >> 5; to < BLOCKS; to += WARPS) inbox.send(COUNTS, to, place_counts(s, rank, threadIdx.x & 31), all);
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

// Every warp finds it for itself, a lane four bins: a barrier would take longer.
__device__ __forceinline__ Border find_border(const Shared& s, int rank, int heavy, int segment, bool last) {
    bool large = segment > 0xffff;
    int lane = threadIdx.x & 31, total[4] = {};
    auto counts = [&](int j) { return *reinterpret_cast<const uint2*>(s.slices + j * BINS + lane * 4); };
    if (BLOCKS * segment <= 0xffff) {
        uint2 both = counts(0);
#pragma unroll
        for (int j = 1; j < BLOCKS; j++) both.x += counts(j).x, both.y += counts(j).y;
        total[0] = both.x & 0xffff, total[1] = both.x >> 16, total[2] = both.y & 0xffff, total[3] = both.y >> 16;
    } else {
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            uint2 both = counts(j);
            total[0] += both.x & 0xffff, total[1] += both.x >> 16, total[2] += both.y & 0xffff, total[3] += both.y >> 16;
        }
    }
    if (large) {
        // Where a block has 65536, the 16 bits say 0.
#pragma unroll 1
        for (int j = 0; j < BLOCKS; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) total[i] += lane * 4 + i <= s.slices[j * BINS] ? 0x10000 : 0;
        }
    }
    int enough = lane > 0 && total[0] >= heavy;
#pragma unroll
    for (int i = 1; i < 4; i++) enough += total[i] >= heavy;
    Border b;
    // Suffix sums fall, so the border is the number of bins that hold enough; bin 0 holds no sum.
    b.entry = __reduce_add_sync(~0u, enough);
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

// Entries of a warp, `width` neighbours a lane, 16 STEPS at most: those at least at the border and those above it, by bit; how many
// lanes before this one have, and all, those above in the low half and those at it in the high half.
template <int STEPS>
struct Found {
    typedef std::conditional_t<(STEPS > 2), uint64_t, uint32_t> Mask;
    Mask least = 0, above = 0;
    uint32_t before, all;

    __device__ __forceinline__ void find(const uint8_t* scores, uint32_t raise, int begin, int width, int stop) {
        int lane = threadIdx.x & 31;
        begin += lane * width, stop = min(stop, begin + width);
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            // Where lanes begin 64 bytes apart, a pair of them each with another step: then no two meet in a bank.
            int step = STEPS == 4 ? (u + lane / 2) % 4 : u, i = begin + step * 16;
            uint4 x = i < stop ? *reinterpret_cast<const uint4*>(scores + i) : make_uint4(0, 0, 0, 0);
            least |= Mask(at_least(x, raise)) << step * 16, above |= Mask(at_least(x, raise - 0x01010101u)) << step * 16;
        }
        uint32_t own = __popcll(above) + (__popcll(least ^ above) << 16), scan = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            uint32_t other = __shfl_up_sync(~0u, scan, step);
            if (lane >= step) scan += other;
        }
        all = __shfl_sync(~0u, scan, 31), before = scan - own;
    }

    // `above_before` and `equal_before`: how many come before these.
    template <typename Emit>
    __device__ __forceinline__ void hand(const Border& b, int above_before, int equal_before, int first, int width, Emit emit) const {
        int ties = equal_before + int(before >> 16), left_out = b.skip - ties;
        int rank = above_before + int(before & 0xffff) + max(0, -left_out), at = first + int(threadIdx.x & 31) * width;
        Mask equal = least ^ above;
        for (; left_out > 0 && equal; left_out--) equal &= equal - 1;
        for (Mask chosen = above | equal; chosen; chosen &= chosen - 1) emit(rank++, at + __ffsll(chosen) - 1);
    }
};

// How many entries from `start` to `stop` are above the border, and at it in the high half.
__device__ __forceinline__ uint32_t count_found(const uint8_t* scores, uint32_t raise, int start, int stop) {
    uint32_t least = 0, above = 0;
    for (int i = start + (threadIdx.x & 31) * 16; i < stop; i += 512) {
        uint4 x = *reinterpret_cast<const uint4*>(scores + i);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            least = __dp4a(reach((&x.x)[w], raise), 0x01010101u, least);
            above = __dp4a(reach((&x.x)[w], raise - 0x01010101u), 0x01010101u, above);
        }
    }
    return __reduce_add_sync(~0u, above >> 7 | (least - above) >> 7 << 16);
}

// Tokens of the warps before this one, given its own: those above the border and those at it in the high half.
__device__ __forceinline__ uint32_t sum_before(Shared& s, uint32_t own) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) s.warps[warp] = own;
    __syncthreads();
    return __reduce_add_sync(~0u, lane < warp ? s.warps[lane] : 0);
}

// Hand every taken token of this block to `emit` with its rank among the row's heavy tokens: a warp's entries, which are STEPS steps
// at most, are found once.
template <int STEPS, typename Emit>
__device__ __forceinline__ void compact_once(Shared& s, const Border& b, int first, int segment, Emit emit) {
    int each = (segment + 512 * WARPS - 1) / (512 * WARPS) * 512, start = int(threadIdx.x >> 5) * each;
    Found<STEPS> found;
    found.find(s.scores(), (128 - b.entry) * 0x01010101u, start, each / 32, min(segment, start + each));
    uint32_t before = sum_before(s, found.all);
    found.hand(b, b.above + (before & 0xffff), b.equal + (before >> 16), first + start, each / 32, emit);
}

// The same for any length: counted first, then found.
template <int STEPS, typename Emit>
__device__ __forceinline__ void compact(Shared& s, const Border& b, int first, int segment, Emit emit) {
    int each = (segment + 512 * WARPS - 1) / (512 * WARPS) * 512, start = int(threadIdx.x >> 5) * each, stop = min(segment, start + each);
    uint32_t raise = (128 - b.entry) * 0x01010101u, before = sum_before(s, count_found(s.scores(), raise, start, stop));
    int above = b.above + (before & 0xffff), equal = b.equal + (before >> 16);
#pragma unroll 1
    for (int begin = start; begin < stop; begin += 512 * STEPS) {
        Found<STEPS> found;
        found.find(s.scores(), raise, begin, 16 * STEPS, stop);
        found.hand(b, above, equal, first + begin, 16 * STEPS, emit);
        above += found.all & 0xffff, equal += found.all >> 16;
    }
}

// Where blocks share a multiprocessor no registers are left for what was found, so long rows are counted first.
template <typename Emit>
__device__ __forceinline__ void compact_row(Shared& s, const Border& b, int first, int segment, Emit emit) {
    constexpr int MOST = 4;
    if (segment <= 512 * WARPS) compact_once<1>(s, b, first, segment, emit);
    else if (RESIDENT == 1 && segment <= 512 * WARPS * MOST) compact_once<MOST>(s, b, first, segment, emit);
    else compact<MOST>(s, b, first, segment, emit);
}
