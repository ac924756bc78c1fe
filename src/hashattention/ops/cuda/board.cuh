// Blocks of a row that are no cluster tell each other what they found through the second-level cache. A message is 8 bytes and the
// tag of its launch, written and read as one: who waits for the tag has the contents with it, without a fence or a flag.
#pragma once
#include "common.cuh"

struct Board {
    // A block's messages of logits: two columns each, 32 apart.
    static constexpr int LOGITS = WORDS > 2 ? 64 : 32, RESULTS = ROWS * HEAD_DIM / BLOCKS / 2;
    static constexpr int QUERY = 128, KEY = QUERY + BLOCKS * LOGITS * 16, COUNTS = KEY + BLOCKS * LOGITS * 16;
    static constexpr int STATS = COUNTS + 2 * BLOCKS * 32 * 16, PARTS = STATS + BLOCKS * 8 * 16, LIST = PARTS + BLOCKS * BLOCKS * RESULTS * 16;
    char* base;

    // The number of launches before this one, on the row's board.
    __device__ uint64_t* launches() const { return reinterpret_cast<uint64_t*>(base); }
    __device__ char* query(int block, int i) const { return base + QUERY + (block * LOGITS + i) * 16; }
    __device__ char* key(int block, int i) const { return base + KEY + (block * LOGITS + i) * 16; }
    // Rounds of counting alternate between two places: whoever writes the third has read everybody's second.
    __device__ char* counts(int round, int block, int i) const { return base + COUNTS + (((round & 1) * BLOCKS + block) * 32 + i) * 16; }
    __device__ char* stats(int block, int row) const { return base + STATS + (block * 8 + row) * 16; }
    __device__ char* part(int to, int from, int i) const { return base + PARTS + ((to * BLOCKS + from) * RESULTS + i) * 16; }
    // Tokens of 24 bits under 40 bits of the tag.
    __device__ uint64_t* list(int slot) const { return reinterpret_cast<uint64_t*>(base + LIST) + slot; }
};

__device__ __forceinline__ uint64_t join(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }
__device__ __forceinline__ uint64_t join(float low, float high) { return join(__float_as_uint(low), __float_as_uint(high)); }
__device__ __forceinline__ float2 split(uint64_t body) { return make_float2(__uint_as_float(uint32_t(body)), __uint_as_float(uint32_t(body >> 32))); }

__device__ __forceinline__ void post(char* to, uint64_t body, uint64_t tag) {
    asm volatile("{ .reg .b128 m; mov.b128 m, {%1, %2}; st.relaxed.gpu.global.b128 [%0], m; }" :: "l"(to), "l"(body), "l"(tag) : "memory");
}

__device__ __forceinline__ void look(const char* from, uint64_t& body, uint64_t& tag) {
    asm volatile("{ .reg .b128 m; ld.relaxed.gpu.global.b128 m, [%2]; mov.b128 {%0, %1}, m; }" : "=l"(body), "=l"(tag) : "l"(from) : "memory");
}

// Wait for COUNT messages at once, the i-th from where `at(i)` is.
template <int COUNT, typename At>
__device__ __forceinline__ void await(uint64_t (&body)[COUNT], uint64_t tag, At at) {
#pragma unroll 1
    for (int turn = 0;; turn++) {
        uint64_t seen[COUNT];
        bool all = true;
#pragma unroll
        for (int i = 0; i < COUNT; i++) look(at(i), body[i], seen[i]);
#pragma unroll
        for (int i = 0; i < COUNT; i++) all = all && seen[i] == tag;
        if (all) return;
        // A second at least: the blocks of a row are not all there.
        if (turn > 1 << 21) __trap();
    }
}

// COUNT entries of the list; `wanted(i)`: its slot, or -1.
template <int COUNT, typename Wanted>
__device__ __forceinline__ void await_list(const Board& board, int (&token)[COUNT], uint64_t tag, Wanted wanted) {
#pragma unroll 1
    for (int turn = 0;; turn++) {
        uint64_t entry[COUNT];
        bool all = true;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int slot = wanted(i);
            entry[i] = tag << 24;
            if (slot >= 0) asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(entry[i]) : "l"(board.list(slot)) : "memory");
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) all = all && entry[i] >> 24 == (tag & 0xffffffffffull), token[i] = int(entry[i] & 0xffffff);
        if (all) return;
        if (turn > 1 << 21) __trap();
    }
}

__device__ __forceinline__ void post_token(const Board& board, int slot, int token, uint64_t tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(board.list(slot)), "l"(tag << 24 | uint32_t(token)) : "memory");
}
