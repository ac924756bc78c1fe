// One selection head of one request a cluster: score all signatures, select, attend to the selected rows, in one launch.
// MODE 0: the whole step; 1: select only, indices out; 2: attend to given indices; 3: the whole step, encoding included.
#include "attend.cuh"
#include "encode_one.cuh"
#include "score.cuh"
#include "select.cuh"

#if MODE == 3
typedef Encoder<ROWS * HEAD_DIM, COLUMNS> QueryEncoder;

// The code of this row, in every warp of every block. `ask` and `ask_more` run on the way.
template <typename Ask, typename AskMore>
__device__ __forceinline__ void encode_query(QueryEncoder& query, const Inbox& inbox, Shared& s, Words& words, int rank, Ask ask, AskMore ask_more) {
    Workspace work(s.scratch());
    MARK(1);
    query.first_sums(work);
    __syncthreads();
    query.finish_first(work);
    ask();
    __syncthreads();
    // From here on blocks send to each other.
    await_first();
    MARK(2);
    if constexpr (HIDDEN1 > 0) {
        query.second_sums(work);
        __syncthreads();
        query.share_second(inbox, work, rank);
        inbox.await(SECOND);
        query.finish_second(work);
        __syncthreads();
    }
    MARK(3);
    query.last_sums(work);
    __syncthreads();
    query.share_last(inbox, work, s.logits, rank);
    ask_more();
    // The workspace is the scores' from here on; what is waited for takes longer.
    __syncthreads();
    inbox.await(LOGITS);
    MARK(4);
    float logits[COLUMNS / 32];
    query.finish_last(s.logits, logits);
    quantise(logits, [&](int i, uint32_t word) { words.of[i] = word; });
    MARK(5);
}
#endif

__device__ __forceinline__ Border select_row(const Inbox& inbox, const Arguments& a, Shared& s, const Words& words, int rank, const Row& row, const Row& older, const Segment& part, int request, int head) {
    Keys key;
    int first = part.first, segment = part.tokens;
    // Entries tell 126 scores above the base apart: the best, or those from the middle up where there are many. The border may lie
    // below them or among the ones that are all 127: then the base moves there.
    int largest = largest_score(words), base = max(-1, min(largest - 127, largest / 2));
    bool newest = older.local_begin < row.local_begin && row.stop - 1 >= first && row.stop - 1 < first + segment;
#if MODE == 3
    if (newest) write_signature(a, s.scratch(), s.newest(), request, head);
#endif
    for (int round = 0;; round++) {
        if (round) {
            // Warps may still be at the counts of the round before.
            __syncthreads();
            if (threadIdx.x < BINS) s.counts[threadIdx.x] = 0;
            __syncthreads();
        }
        score(a, s, words, older, first, segment, request, head, base, key, false);
        __syncthreads();
#if MODE == 3
        if (newest) {
            score_newest(s, words, row.stop - 1 - first, base);
            __syncthreads();
        }
#endif
        MARK(7);
        // Nobody sends while another still reads what came before.
        if (round) cg::this_cluster().sync();
        if (threadIdx.x == 0) inbox.expect(COUNTS, BLOCKS * BINS * 2);
        share_counts(inbox, s, rank);
        inbox.await(COUNTS, round);
        MARK(8);
        Border border = find_border(s, rank, row.heavy, segment, base < 0);
        bool too_low = border.entry == BINS - 1 && base + BINS - 1 < largest;
        if (border.entry && !too_low) return border;
        base = too_low ? base + 126 : max(-1, base - 126);
    }
}

// How many of a row's first `count` tokens are this block's.
__device__ __forceinline__ int own_of(int count, int rank) { return (count + BLOCKS - 1 - rank) / BLOCKS; }

// A word of a code, and above it whether the launch before has written it: that it has ended is known a microsecond later.
__device__ __forceinline__ uint64_t load_word(const uint64_t* from) {
    uint64_t word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

// The thread that opens the inbox, in the warp that asks for signatures: where the step encodes, one whose weights may come last.
constexpr int OPENER = MODE == 3 ? THREADS - 32 : 0;

__global__ void __launch_bounds__(THREADS, RESIDENT) step(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    MARK(0);
    Shared s(memory, a);
    Inbox inbox(s);
    int rank = blockIdx.x, head = blockIdx.y, request = blockIdx.z;
#if MODE == 3
    // The clusters after those of the rows sign the newest keys, a head a block.
    if (__builtin_expect(head >= a.query.heads, 0)) {
        head = (head - a.query.heads) * BLOCKS + rank;
        if (head < a.query.heads) write_signature(a, s.scratch(), nullptr, request, head);
        MARK(16);
        return;
    }
#endif
    int64_t row_id = int64_t(request) * (MODE == 3 ? a.query.heads : gridDim.y) + head;
    // Before anything else: all that follows waits for these. A code comes behind all that is asked for before it, and in a whole step
    // from a launch that may still run.
    constexpr int CODE_WORDS = MODE == 0 ? MIXED * CODE : 0;
    uint64_t* code = static_cast<uint64_t*>(a.planes) + row_id * CODE_WORDS + threadIdx.x;
    uint64_t word = int(threadIdx.x) < CODE_WORDS ? load_word(code) : 0;
    Bounds bounds;
    if (MODE != 2) bounds.ask(a, request, row_id);
    if (MODE == 1 && threadIdx.x / 32 == WARPS - 1) read_code(a.planes, row_id, s.planes);
    if (threadIdx.x == OPENER) {
        inbox.open(HELD && !PAGED ? MESSAGES : int(KEYS));
        if (HIDDEN1 > 0) inbox.expect(SECOND, HIDDEN1 * 4);
        if (MODE == 3) inbox.expect(LOGITS, BLOCKS * COLUMNS * 4);
        if (MODE != 1) inbox.expect(PARTS, (ROWS * HEAD_DIM + BLOCKS * ROWS * 2) * 4);
    }
    __syncwarp();
    if (HELD && !PAGED && threadIdx.x / 32 == OPENER / 32) {
        Row row = bounds.row(a), older = signed_part(a, row);
        Segment part(row, rank);
        // Where the newest token is a candidate, the launch before may still be signing it.
        if (MODE == 0 && row.local_begin == row.stop) cudaGridDependencySynchronize();
        if (part.any) ask_keys(a, s, older, part.first, part.tokens, request, head);
    }
#if MODE == 3
    QueryEncoder query;
    query.load(a.query, request * a.query.x0 + int64_t(head) * a.query.x1, head, rank);
#endif
    int length;
    Place at;
    if (MODE != 1 && !REREAD) at.prepare(a, request, head);
    // Waited for before the first message: by then every block runs.
    arrive_first();
    static_assert(THREADS >= BINS, "a bin a thread");
    if (threadIdx.x < BINS) s.counts[threadIdx.x] = 0;
    if (MODE == 2) {
        int count = min(a.counts[row_id], a.capacity);
        length = own_of(count, rank);
#pragma unroll 1
        for (int i = threadIdx.x; i < length; i += THREADS) s.list[i] = a.indices[row_id * a.capacity + i * BLOCKS + rank];
        await_first();
    } else {
        Row row = bounds.row(a), older = signed_part(a, row);
        Segment part(row, rank);
        auto ask = [&] {
            if (!part.any || (HELD && !PAGED)) return;
            if (HELD) ask_pages(a, s, older, part.first, part.tokens, request, head);
            else prefetch(a, row, part.first, part.tokens, request, head);
        };
        auto ask_more = [&] {
#if REMAINDER
            if (ASK_FIRST) ask_remainder(a, s, request, head);
#endif
        };
        Words words;
#if MODE == 3
        encode_query(query, inbox, s, words, rank, ask, ask_more);
#else
        bool unsigned_yet = MODE == 0 && row.local_begin == row.stop;
        if (!unsigned_yet) ask();
        ask_more();
        await_first();
        if (int(threadIdx.x) < CODE_WORDS) {
            while (!(word >> 32)) word = load_word(code);
            s.planes[threadIdx.x] = uint32_t(word);
        }
        if (unsigned_yet) {
            cudaGridDependencySynchronize();
            ask();
        }
        __syncthreads();
        words.load(s.planes);
#endif
        MARK(6);
        Border border = {BINS, 0, 0, 0, 0};
        if (part.any) border = select_row(inbox, a, s, words, rank, row, older, part, request, head);
        MARK(9);
#if REMAINDER
        if (!ASK_FIRST) ask_remainder(a, s, request, head);
#endif
        int sink = row.sink_stop - row.begin, local = row.stop - row.local_begin, count = sink + border.heavy + local;
        length = own_of(count, rank);
        if (MODE == 1) {
            int* indices = a.indices + row_id * a.capacity;
            if (part.any) compact_row(s, border, part.first, part.tokens, [&](int heavy, int token) { indices[sink + heavy] = token; });
            for (int i = rank * THREADS + threadIdx.x; i < a.capacity - border.heavy; i += BLOCKS * THREADS) {
                indices[i < sink ? i : i + border.heavy] = i < sink ? row.begin + i : i < sink + local ? row.local_begin + i - sink : -1;
            }
            if (rank == 0 && threadIdx.x == 0) a.counts[row_id] = count;
            return;
        }
        // The row's tokens go round the blocks, the sink's first.
        int sinks = own_of(sink, rank), others = own_of(sink + border.heavy, rank) - sinks;
        if (threadIdx.x == 0) inbox.expect(LIST, 4 * others);
        if (part.any) compact_row(s, border, part.first, part.tokens, [&](int heavy, int token) {
            int nth = sink + heavy;
            inbox.send(LIST, nth % BLOCKS, s.list + nth / BLOCKS, token);
        });
#pragma unroll 1
        for (int i = threadIdx.x; i < length - others; i += THREADS) {
            int slot = i < sinks ? i : i + others, nth = slot * BLOCKS + rank;
            s.list[slot] = nth < sink ? row.begin + nth : row.local_begin + nth - sink - border.heavy;
        }
        MARK(10);
#if REMAINDER
        await_copies();
        __syncthreads();
        estimate_own(a, s, rank, count);
#else
        __syncthreads();
#endif
        inbox.await(LIST);
    }
    if (PAGED) {
        if (MODE == 2) __syncthreads();
        const int* table = a.table + int64_t(request) * a.table_width;
#pragma unroll 1
        for (int i = threadIdx.x; i < length; i += THREADS) {
            int token = s.list[i];
            s.list[i] = table[token >> a.page_shift] << a.page_shift | (token & ((1 << a.page_shift) - 1));
        }
    }
    if (PAGED || MODE == 2) __syncthreads();
    MARK(11);
    if (REREAD) at.prepare(a, request, head);
    attend(inbox, a, s, at, rank, length, row_id);
    // Every block of the row has sent its part, so every block has taken the code: the next launch finds zeros.
    if (rank == 0 && int(threadIdx.x) < CODE_WORDS) *code = 0;
    // What comes after this launch may read the signatures that the one before it writes.
    if (MODE == 0) cudaGridDependencySynchronize();
}

// Lets the kernel have clusters of 16 and this much shared memory; never takes back what was allowed before.
static cudaError_t allow(int shared) {
    static int most = -1;
    if (shared <= most) return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(step, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(step, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) most = shared;
    return error;
}

extern "C" int run(const Arguments* a, int heads, int batch, int shared, cudaStream_t stream) {
    cudaError_t error = allow(shared);
    if (error != cudaSuccess) return error;
    int signers = MODE == 3 && a->key.x ? (heads + BLOCKS - 1) / BLOCKS : 0;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {BLOCKS, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {dim3(BLOCKS, heads + signers, batch), dim3(THREADS), size_t(shared), stream, attributes, MODE == 0 ? 2u : 1u};
    return cudaLaunchKernelEx(&config, step, *a);
}
