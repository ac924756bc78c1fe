// Messages between the blocks of a cluster: stores that count their own bytes at a barrier of the receiver's memory, which waits for
// these alone. A cluster's own barrier orders all memory of both sides, which takes longer than the message does.
#pragma once
#include "common.cuh"

// Each is sent once a launch, counts again where the border is looked for again, and the last is received by every block before it
// ends, so that no message finds its receiver gone. KEYS, and those after it, are pieces of a block's own copy of its signatures.
enum Message { SECOND, LOGITS, COUNTS, LIST, PARTS, KEYS };
static_assert(KEYS + PIECES == MESSAGES, "`Shared::inbox`");

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes of global memory to this block's, by a thread that waits for all it asked for.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

struct Inbox {
    uint64_t* barriers;

    __device__ explicit Inbox(uint64_t* barriers) : barriers(barriers) {}
    __device__ explicit Inbox(const Shared& s) : barriers(s.inbox) {}

    // One thread, before the cluster's first barrier: for so many kinds.
    __device__ __forceinline__ void open(int kinds) const {
#pragma unroll
        for (int m = 0; m < kinds; m++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barriers + m)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    // One thread: so many bytes of a message come from all blocks together. It may come before it is expected.
    __device__ __forceinline__ void expect(int m, int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barriers + m)), "r"(bytes) : "memory");
    }

    // Bytes of global memory, a multiple of 16 as both places are, to this block's.
    __device__ __forceinline__ void copy(int m, void* to, const void* from, int bytes) const {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barriers + m)) : "memory");
    }

    // Every thread that reads it; `round`: how often it was received before.
    __device__ __forceinline__ void await(int m, int round = 0) const {
        uint32_t there;
        do {
            asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                         : "=r"(there) : "r"(shared_address(barriers + m)), "r"(round & 1) : "memory");
        } while (!there);
    }

    // The barriers of another block, and the place of its memory that `own` has in this one's: all blocks' memory is laid out alike.
    __device__ __forceinline__ uint32_t inbox_of(int block) const {
        uint32_t inbox;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(inbox) : "r"(shared_address(barriers)), "r"(block));
        return inbox;
    }
    __device__ __forceinline__ uint32_t place_of(const void* own, uint32_t inbox) const { return inbox + (shared_address(own) - shared_address(barriers)); }

    __device__ __forceinline__ void send(int m, int block, const int* own, int x) const {
        uint32_t inbox = inbox_of(block);
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                     :: "r"(place_of(own, inbox)), "r"(x), "r"(inbox + 8 * m) : "memory");
    }
    __device__ __forceinline__ void send(int m, int block, const float* own, float x) const {
        send(m, block, reinterpret_cast<const int*>(own), __float_as_int(x));
    }
    __device__ __forceinline__ void send(int m, int block, const uint2* own, uint2 x) const {
        uint32_t inbox = inbox_of(block);
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
                     :: "r"(place_of(own, inbox)), "r"(x.x), "r"(x.y), "r"(inbox + 8 * m) : "memory");
    }
    __device__ __forceinline__ void send(int m, int block, const float* own, float2 x) const {
        send(m, block, reinterpret_cast<const uint2*>(own), make_uint2(__float_as_uint(x.x), __float_as_uint(x.y)));
    }
    __device__ __forceinline__ void send(int m, int block, const uint4* own, uint4 x) const {
        uint32_t inbox = inbox_of(block);
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                     :: "r"(place_of(own, inbox)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(inbox + 8 * m) : "memory");
    }
};

// A cluster's barrier that orders no memory: all blocks run and have opened their inboxes.
__device__ __forceinline__ void arrive_first() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void await_first() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
