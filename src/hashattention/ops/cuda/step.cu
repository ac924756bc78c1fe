// One selection head of one request a cluster: score all signatures, select, attend to the selected rows, in one launch.
// MODE 0: the whole step; 1: select only, indices out; 2: attend to given indices; 3: the whole step, encoding included.
#include "attend.cuh"
#include "encode_one.cuh"
#include "score.cuh"
#include "select.cuh"

#if MODE == 3
// The code of this row to s.planes in every block. `early` runs while the weights are on their way.
template <typename Early>
__device__ __forceinline__ void encode_query(cg::cluster_group& cluster, const Arguments& a, Shared& s, int request, int head, Early early) {
    Workspace work(s.scratch());
    Encoder<ROWS * HEAD_DIM, COLUMNS> query;
    query.load(a.query, request * a.q0 + int64_t(head) * ROWS * HEAD_DIM, head, cluster.block_rank());
    early();
    MARK(1);
    query.first_sums(work);
    __syncthreads();
    query.finish_first(work);
    __syncthreads();
    // From here on blocks write to each other.
    cluster.barrier_wait();
    MARK(2);
    if constexpr (HIDDEN1 > 0) {
        query.second_sums(work);
        __syncthreads();
        query.share_second(cluster, work);
        cluster.sync();
        query.finish_second(work);
        __syncthreads();
    }
    MARK(3);
    query.last_sums(work);
    __syncthreads();
    query.share_last(cluster, work);
    cluster.sync();
    MARK(4);
    query.finish_last(work);
    __syncthreads();
    if (threadIdx.x < 32) quantise(work.logits, s.planes);
    __syncthreads();
    MARK(5);
}
#endif

__device__ __forceinline__ Border select_row(cg::cluster_group& cluster, const Arguments& a, Shared& s, const Row& row, const Row& older, int first, int segment, int request, int head, Keys& key) {
    int rank = cluster.block_rank();
    // Entries tell 126 scores above the base apart: the best, or those from the middle up where there are many. The border may lie
    // below them or among the ones that are all 127: then the base moves there.
    int largest = largest_score(s.planes), base = max(-1, min(largest - 127, largest / 2));
    bool newest = older.local_begin < row.local_begin && row.stop - 1 >= first && row.stop - 1 < first + segment;
#if MODE == 3
    if (newest) write_signature(a, s, request, head, true);
#endif
    for (bool again = false;; again = true) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0;
        __syncthreads();
        score(a, s, older, first, segment, request, head, base, key, !again);
        __syncthreads();
#if MODE == 3
        if (newest) {
            score_newest(s, row.stop - 1 - first, base);
            __syncthreads();
        }
#endif
        MARK(7);
        if (again) cluster.sync();
        else if (MODE != 3) cluster.barrier_wait();
        share_counts(cluster, s);
        cluster.sync();
        MARK(8);
        Border border = find_border(s, rank, row.heavy, base < 0, segment > 0xffff);
        bool too_low = border.entry == BINS - 1 && base + BINS - 1 < largest;
        if (border.entry && !too_low) return border;
        base = too_low ? base + 126 : max(-1, base - 126);
    }
}

__global__ void __launch_bounds__(THREADS, RESIDENT) step(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    cg::cluster_group cluster = cg::this_cluster();
    Shared s(memory, a);
    int rank = cluster.block_rank();
    int head = blockIdx.y, request = blockIdx.z;
#if MODE == 3
    // The clusters after those of the rows sign the newest keys, a head a block.
    if (head >= a.query.heads) {
        head = (head - a.query.heads) * BLOCKS + rank;
        if (head < a.query.heads) write_signature(a, s, request, head, false);
        return;
    }
#endif
    int64_t row_id = int64_t(request) * (MODE == 3 ? a.query.heads : gridDim.y) + head;
    int per, length;
    MARK(0);
    // Waited for before the first write to another block's memory: by then every block has started.
    cluster.barrier_arrive();
    if (MODE == 2) {
        int count = min(a.counts[row_id], a.capacity);
        per = (count + BLOCKS - 1) / BLOCKS;
        length = max(0, min(per, count - rank * per));
        for (int i = threadIdx.x; i < length; i += THREADS) s.list[i] = a.indices[row_id * a.capacity + rank * per + i];
        cluster.barrier_wait();
    } else {
        Row row = read_row(a, request, row_id);
        int low = row.sink_stop & ~7, candidates = max(0, row.local_begin - low);
        int segment = (candidates + BLOCKS * CHUNK - 1) / (BLOCKS * CHUNK) * CHUNK, first = low + rank * segment;
        bool selects = row.heavy > 0 && candidates > 0;
        // The newest token's signature, where it is a candidate, is made by this very launch: no load may look for it.
        Row older = row;
        if (MODE == 3 && a.key.x != nullptr && row.local_begin == row.stop && row.stop > row.sink_stop) older.local_begin--;
        Keys key;
        auto early = [&] {
            if (selects) {
                prefetch(a, row, first, segment, request, head);
                if (AHEAD) load_keys(a, older, first, segment, request, head, threadIdx.x >> 5, key);
            }
#if REMAINDER
            if (ASK_FIRST) ask_remainder(a, s, request, head);
#endif
        };
#if MODE == 3
        encode_query(cluster, a, s, request, head, early);
#endif
        if constexpr (MODE != 3) {
            early();
            // The code comes from a launch that may still run.
            if (MODE == 0) cudaGridDependencySynchronize();
            if (MODE == 1 && threadIdx.x < 32) read_code(a.planes, row_id, s.planes);
            if (MODE == 0 && threadIdx.x < MIXED * CODE) s.planes[threadIdx.x] = __ldcg(a.planes + row_id * MIXED * CODE + threadIdx.x);
            __syncthreads();
        }
        MARK(6);
        Border border = {BINS, 0, 0, 0, 0};
        if (selects) border = select_row(cluster, a, s, row, older, first, segment, request, head, key);
        else if (MODE != 3) cluster.barrier_wait();
        MARK(9);
#if REMAINDER
        if (!ASK_FIRST) ask_remainder(a, s, request, head);
#endif
        int sink = row.sink_stop - row.begin, local = row.stop - row.local_begin, count = sink + border.heavy + local;
        per = (count + BLOCKS - 1) / BLOCKS;
        length = max(0, min(per, count - rank * per));
        if (MODE == 1) {
            int* indices = a.indices + row_id * a.capacity;
            if (selects) compact_row(s, border, first, segment, [&](int heavy, int token) { indices[sink + heavy] = token; });
            for (int i = rank * THREADS + threadIdx.x; i < a.capacity; i += BLOCKS * THREADS) {
                if (i < sink) indices[i] = row.begin + i;
                else if (i >= count) indices[i] = -1;
                else if (i >= sink + border.heavy) indices[i] = row.local_begin + i - sink - border.heavy;
            }
            if (rank == 0 && threadIdx.x == 0) a.counts[row_id] = count;
            return;
        }
        float inverse = 1.0f / max(per, 1);
        if (selects) compact_row(s, border, first, segment, [&](int heavy, int token) {
            // A float's quotient may be one off; a division would take ten times as long.
            int at = sink + heavy, block = int(at * inverse);
            block += (block + 1) * per <= at;
            block -= block * per > at;
            cluster.map_shared_rank(s.list, block)[at - block * per] = token;
        });
        for (int i = threadIdx.x; i < length; i += THREADS) {
            int at = rank * per + i;
            if (at < sink) s.list[i] = row.begin + at;
            else if (at >= sink + border.heavy) s.list[i] = row.local_begin + at - sink - border.heavy;
        }
        MARK(10);
#if REMAINDER
        await_remainder();
        __syncthreads();
        cluster.barrier_arrive();
        estimate_own(a, s, rank, count);
        cluster.barrier_wait();
#else
        cluster.sync();
#endif
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
    MARK(11);
    attend(cluster, a, s, length, request, head, row_id);
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
