// The step for long and few rows, encoding included (MODE 3): a row over BLOCKS plain blocks, more than a cluster finds room for, all of
// them running at once, which exchange logits, counts, the list and their parts of the output over a board in global memory.
#define WIDE 1
#include "attend.cuh"
#include "board.cuh"
#include "capture.cuh"
#include "encode_one.cuh"
#include "score.cuh"
#include "select.cuh"

static_assert(MODE == 3 && HIDDEN1 == 0 && MIXED == 1, "the whole step, one hidden layer, one code");
constexpr int COVERED = UNROLL * WARPS * CHUNK;     // tokens whose signatures wait in registers

// Lane i's entries of a code: columns i, i + 32, ...
__device__ __forceinline__ void load_bias(const float* from, float (&bias)[WORDS]) {
#pragma unroll
    for (int w = 0; w < WORDS; w++) bias[w] = from[w * 32 + (threadIdx.x & 31)];
}

// One warp: this block's sums of all logits, to everybody.
template <int COUNT, typename Place>
__device__ __forceinline__ void post_logits(const float* sums, uint64_t tag, Place place) {
    int lane = threadIdx.x & 31;
    float total[WORDS > 1 ? WORDS : 2] = {};
#pragma unroll
    for (int from = 0; from < COUNT; from++) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) total[w] += sums[from * BITS + w * 32 + lane];
    }
#pragma unroll
    for (int i = 0; i < Board::LOGITS / 32; i++) post(place(i * 32 + lane), join(total[2 * i], total[2 * i + 1]), tag);
}

// One warp: the sums of all blocks, in order.
template <typename Place>
__device__ __forceinline__ void await_logits(float (&logits)[WORDS], uint64_t tag, Place place) {
#pragma unroll
    for (int i = 0; i < Board::LOGITS / 32; i++) {
        uint64_t body[BLOCKS];
        await(body, tag, [&](int j) { return place(j, i * 32 + (threadIdx.x & 31)); });
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            float2 two = split(body[j]);
            logits[2 * i] += two.x;
            if (WORDS > 1) logits[2 * i + (WORDS > 1)] += two.y;
        }
    }
}

// The code of this row to s.planes; the newest key's signature, split over the blocks like the code, to the cache by the block that `signs`
// and to s.newest() by the one that `keeps`. `early` runs while the weights are on their way. Returns the tag of this launch.
template <typename Early>
__device__ __forceinline__ uint64_t encode_wide(const Arguments& a, Shared& s, const Board& board, int request, int head, int rank, bool signs, bool keeps, Early early) {
    __shared__ uint64_t launch;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    bool has_key = a.key.x != nullptr;
    uint64_t launches = 0;
    Encoder<ROWS * HEAD_DIM, BITS> query;
    Encoder<HEAD_DIM, BITS> key;
    Workspace work(s.scratch()), key_work(s.scratch() + Workspace::ENTRIES);
    query.load(a.query, request * a.q0 + int64_t(head) * ROWS * HEAD_DIM, head, rank);
    // One thread reads it, before the first barrier: when its value is written again, nobody can still be about to read it.
    if (threadIdx.x == 0) asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(launches) : "l"(board.launches()) : "memory");
    if (has_key) key.load(a.key, request * a.key.x0 + head * a.key.x1, head, rank);
    float bias[WORDS] = {};
    // Loaded in one place: a second load to the same registers would wait for the first.
    if (warp == 0 || (warp == 1 && has_key)) load_bias(static_cast<const float*>(warp ? a.key.biases[1] : a.query.biases[1]) + head * BITS, bias);
    float key_bias = warp == 1 && has_key && lane < OWN0 ? static_cast<const float*>(a.key.biases[0])[int64_t(head) * HIDDEN0 + rank * OWN0 + lane] : 0;
    early();
    MARK(1);
    query.first_sums(work);
    if (has_key) key.first_sums(key_work);
    if (threadIdx.x == 0) launch = launches;
    __syncthreads();
    if (warp == 0) query.finish_first(work);
    if (warp == 1 && has_key && lane < OWN0) {
        float total = key_bias;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += key_work.sums[w * OWN0 + lane];
        key_work.hidden[lane] = silu(total);
    }
    __syncthreads();
    MARK(3);
    uint64_t tag = (launch + 1) << 6;
    query.last_sums(work);
    if (has_key) key.last_sums(key_work);
    __syncthreads();
    if (warp == 0) {
        post_logits<decltype(query)::PARTS2>(work.sums, tag, [&](int i) { return board.query(rank, i); });
        await_logits(bias, tag, [&](int block, int i) { return board.query(block, i); });
        MARK(4);
        quantise(bias, [&](int i, uint32_t word) {
            if (lane == 0) s.planes[i] = word;
        });
    } else if (warp == 1 && has_key) {
        post_logits<decltype(key)::PARTS2>(key_work.sums, tag, [&](int i) { return board.key(rank, i); });
        if (signs || keeps) {
            await_logits(bias, tag, [&](int block, int i) { return board.key(block, i); });
            int token = a.end[request] - 1;
            bool inside = signs && token >= 0 && token < a.tokens;
            int64_t place = inside ? place_signature(a, request, head, token) : 0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                uint32_t word = __ballot_sync(~0u, bias[w] > 0);
                if (lane == 0 && keeps) s.newest()[w] = word;
                if (lane == 0 && inside) a.signatures[place + w] = word;
            }
        }
    }
    __syncthreads();
    MARK(5);
    return tag;
}

// `older`: the row without its newest token, where that is a candidate; `newest`: where it is one of this block's.
__device__ __forceinline__ Border select_wide(const Arguments& a, Shared& s, const Board& board, uint64_t tag, const Row& row, const Row& older, bool newest, int first, int segment, int request, int head, int rank, Keys& key) {
    Words words;
    words.load(s.planes);
    int largest = largest_score(words), base = max(-1, min(largest - 127, largest / 2));
    for (int round = 0;; round++) {
        if (round) {
            for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0;
            __syncthreads();
        }
        score(a, s, words, older, first, segment, request, head, base, key, !round);
        __syncthreads();
        if (newest) {
            score_newest(s, words, row.stop - 1 - first, base);
            __syncthreads();
        }
        MARK(7);
        if (threadIdx.x < 32) {
            uint2 all = sum_counts(s);
            post(board.counts(round, rank, threadIdx.x), join(all.x, all.y), tag + round);
        }
        constexpr int EACH = (BLOCKS * 32 + THREADS - 1) / THREADS;
        uint64_t body[EACH];
        auto message = [&](int i) { return min(int(threadIdx.x) + i * THREADS, BLOCKS * 32 - 1); };
        await(body, tag + round, [&](int i) { return board.counts(round, 0, message(i)); });
#pragma unroll
        for (int i = 0; i < EACH; i++) *place_counts(s, message(i) / 32, message(i) % 32) = make_uint2(uint32_t(body[i]), uint32_t(body[i] >> 32));
        __syncthreads();
        MARK(8);
        Border border = find_border(s, rank, row.heavy, segment, base < 0);
        bool too_low = border.entry == BINS - 1 && base + BINS - 1 < largest;
        if (border.entry && !too_low) return border;
        base = too_low ? base + 126 : max(-1, base - 126);
    }
}

__global__ void __launch_bounds__(THREADS, RESIDENT) wide(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    Shared s(memory, a);
    int rank = blockIdx.x, head = blockIdx.y, request = blockIdx.z;
    int64_t row_id = int64_t(request) * gridDim.y + head;
    Board board = {a.board + row_id * a.board_row};
    MARK(0);
    // Messages to a line that is not in the cache would wait for it.
    if (threadIdx.x == 64) {
        int share = int(a.board_row / BLOCKS) & ~15;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(board.base + int64_t(rank) * share), "r"(share) : "memory");
    }
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0;
    Bounds bounds;
    bounds.ask(a, request, row_id);
    Row row = bounds.row(a), older = signed_part(a, row);
    Segment part(row, rank);
    int first = part.first, segment = part.tokens;
    bool newest = part.any && older.local_begin < row.local_begin && row.stop - 1 >= first && row.stop - 1 < first + segment;
    Keys key;
    auto early = [&] {
        if (part.any) {
            load_keys(a, older, first, segment, request, head, threadIdx.x >> 5, key);
            if (segment > COVERED) prefetch(a, row, first + COVERED, segment - COVERED, request, head);
        }
#if REMAINDER
        ask_remainder(a, s, request, head);
#endif
    };
    uint64_t tag = encode_wide(a, s, board, request, head, rank, rank == BLOCKS - 1, newest, early);
    MARK(6);
    Border border = {BINS, 0, 0, 0, 0, 0, 0};
    if (part.any) border = select_wide(a, s, board, tag, row, older, newest, first, segment, request, head, rank, key);
    MARK(9);
    // Every block of the row has sent something, so every block has read it.
    if (rank == 0 && threadIdx.x == 0) *board.launches() = tag >> 6;
    int sink = row.sink_stop - row.begin, local = row.stop - row.local_begin, count = sink + border.heavy + local;
    int per = (count + BLOCKS - 1) / BLOCKS, length = max(0, min(per, count - rank * per));
    auto slot_of = [&](int token) {
        if (!PAGED) return token;
        return a.table[int64_t(request) * a.table_width + (token >> a.page_shift)] << a.page_shift | (token & ((1 << a.page_shift) - 1));
    };
    // Where no block has more turns of the gather with its own tokens than with an even share, they stay with it: one exchange less.
    constexpr int TURN = WARPS * 16;
    int fixed = (sink + local + BLOCKS - 1) / BLOCKS, own_fixed = max(0, min(fixed, sink + local - rank * fixed));
    bool stay = (border.most + fixed + TURN - 1) / TURN <= (per + TURN - 1) / TURN;
    if (stay) length = own_fixed + border.own;
    Place at;
    at.prepare(a, request, head);
    int shift = own_fixed - border.above - max(0, border.equal - border.skip);
    if (part.any) compact_row(s, border, first, segment, [&](int heavy, int token) {
        if (stay) s.list[heavy + shift] = slot_of(token);
        else post_token(board, sink + heavy, token, tag >> 6);
    });
    MARK(10);
    if (stay) {
        for (int i = threadIdx.x; i < own_fixed; i += THREADS) {
            int nth = rank * fixed + i;
            s.list[i] = slot_of(nth < sink ? row.begin + nth : row.local_begin + nth - sink);
        }
    } else {
        constexpr int TOGETHER = 2;
        for (int begin = threadIdx.x; begin < length; begin += THREADS * TOGETHER) {
            int token[TOGETHER];
            await_list(board, token, tag >> 6, [&](int i) {
                int at = rank * per + begin + i * THREADS;
                return begin + i * THREADS < length && at >= sink && at < sink + border.heavy ? at : -1;
            });
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                int at = rank * per + begin + i * THREADS;
                if (begin + i * THREADS >= length) continue;
                if (at < sink) token[i] = row.begin + at;
                else if (at >= sink + border.heavy) token[i] = row.local_begin + at - sink - border.heavy;
                s.list[begin + i * THREADS] = slot_of(token[i]);
            }
        }
    }
#if REMAINDER
    await_copies();
#endif
    __syncthreads();
    MARK(11);
    attend_own(a, s, at, length, [&](int i, int r, float2 value, float high, float weight) {
        post(board.part(i / SHARE, rank, i % SHARE / 2), join(value.x, value.y), tag);
        if (i % HEAD_DIM == 0) post(board.stats(rank, r), join(high, weight), tag);
    });
#if REMAINDER
    estimate_own(a, s, rank, count);
#endif
    // The other blocks' parts of this block's outputs, and everybody's maxima and sums.
    constexpr int EACH = (ROWS * HEAD_DIM / 2 + THREADS - 1) / THREADS;
    static_assert(SHARE % 2 == 0 && BLOCKS * ROWS <= THREADS, "shares");
    uint64_t body[EACH + 1];
    await(body, tag, [&](int i) {
        int message = threadIdx.x + i * THREADS;
        if (i == EACH) return board.stats(threadIdx.x / ROWS % BLOCKS, threadIdx.x % ROWS);
        return board.part(rank, 0, message < ROWS * HEAD_DIM / 2 ? message : 0);
    });
    MARK(14);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int message = threadIdx.x + i * THREADS;
        if (message < ROWS * HEAD_DIM / 2) *reinterpret_cast<float2*>(s.parts + message * 2) = split(body[i]);
    }
    if (threadIdx.x < BLOCKS * ROWS) {
        *reinterpret_cast<float2*>(s.stats + threadIdx.x / ROWS * 16 + threadIdx.x % ROWS * 2) = split(body[EACH]);
    }
    __syncthreads();
    merge_blocks(a, s, rank, row_id);
}

// Bytes of a row's board before its list.
extern "C" int board_bytes() { return Board::LIST; }

extern "C" int run(const Arguments* a, int heads, int batch, int shared, cudaStream_t stream) {
    static int most = -1;
    if (shared > most) {
        cudaError_t error = cudaFuncSetAttribute(wide, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
        most = shared;
    }
    // Blocks wait for each other: the driver starts all of them or none.
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {dim3(BLOCKS, heads, batch), dim3(THREADS), size_t(shared), stream, &attribute, 1};
    return cudaLaunchKernelEx(&config, wide, *a);
}
