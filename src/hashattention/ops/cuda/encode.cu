// Encode many rows: every head's MLP on the tensor cores, a cluster a head and TILE requests; each block holds a slice of every stage's
// columns, and the hidden layers go to every block through distributed shared memory as two 16-bit numbers, their value and what
// rounding leaves of it, so that they lose next to nothing. All weights are asked for before the first product.
// Built with: QUERY_IN, KEY_IN (0: no keys), HIDDEN0, HIDDEN1 (0: none), WORDS, LEVELS (0: bit code), PLANES, MIXED, BLOCKS, HALF, TILE (requests of a cluster: 8, 16 or 32),
// and what common.cuh asks for.
#include "capture.cuh"
#include "messages.cuh"

struct Batch {
    Map query, key;
    uint64_t* planes;             // [B, H, MIXED, SLOTS + 1, WORDS]: zeros; a word, and 1 above it once it is there, until the step has taken it
    uint32_t* signatures;         // cache, dense [B, H, T, WORDS] or pages [P, H, N, WORDS]
    const int* position;          // [B]: one past the token whose signature is written
    const int* table;             // [B, M] or null
    int64_t s0, s1;
    int batch, tokens, table_width, page;
    int carveout;                 // percent of a multiprocessor's memory to be shared
};

constexpr int STAGES = HIDDEN1 ? 3 : 2, LAST = HIDDEN1 ? HIDDEN1 : HIDDEN0, WIDEST_IN = QUERY_IN > KEY_IN ? QUERY_IN : KEY_IN;
constexpr int COLUMNS0 = HIDDEN0 / BLOCKS, COLUMNS1 = HIDDEN1 / BLOCKS, COLUMNS2 = COLUMNS / BLOCKS, SHARE = TILE / BLOCKS;
// Tiles of 16 requests, of which a TILE of 8 fills half of one.
constexpr int REQUEST_TILES = (TILE + 15) / 16;
// In 16-byte units: the weights, the inputs (later the second hidden layer), the first hidden layer.
constexpr int WEIGHTS = (WIDEST_IN * COLUMNS0 + HIDDEN0 * COLUMNS1 + LAST * COLUMNS2) / 8;
constexpr int INPUTS = TILE * (WIDEST_IN > 2 * HIDDEN1 ? WIDEST_IN : 2 * HIDDEN1) / 8, HIDDENS = 2 * TILE * HIDDEN0 / 8;
// Messages between the blocks of a cluster: the hidden layers and the logits.
enum { FIRST_HIDDEN, SECOND_HIDDEN, CODES, KINDS };
constexpr int SHARED = (WEIGHTS + INPUTS + HIDDENS) * 16 + SHARE * COLUMNS * 4 + INBOX;
static_assert(KINDS * 8 <= INBOX, "`Inbox`");
static_assert(COLUMNS0 % 8 == 0 && COLUMNS1 % 8 == 0 && BITS / BLOCKS % 8 == 0 && (MIXED & (MIXED - 1)) == 0 && QUERY_IN % 64 == 0 && KEY_IN % 64 == 0 && HIDDEN0 % 64 == 0, "widths");

// Where 16 bytes of a row lie, so that eight rows' same chunk falls into eight groups of banks.
template <int WIDTH>
__device__ __forceinline__ int place(int row, int chunk) {
    constexpr int CHUNKS = WIDTH / 8;
    if constexpr (CHUNKS >= 8) return row * CHUNKS + (chunk ^ (row & 7));
    else return row * CHUNKS + (chunk ^ (row / (8 / CHUNKS) & (CHUNKS - 1)));
}

// This block's columns of one stage's weights [IN, OUT].
template <int IN, int OUT>
__device__ __forceinline__ void load_slice(uint4* to, const void* weights, int head, int rank) {
    constexpr int OWN = OUT / BLOCKS, CHUNKS = OWN / 8;
    const Short* from = static_cast<const Short*>(weights) + int64_t(head) * IN * OUT + rank * OWN;
#pragma unroll 4
    for (int i = threadIdx.x; i < IN * CHUNKS; i += THREADS) copy_async(to + place<OWN>(i / CHUNKS, i % CHUNKS), from + (i / CHUNKS) * OUT + i % CHUNKS * 8);
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a warp does in a stage: tiles of 16 requests and 8 of this block's columns, with the biases of its lane's columns there. Where
// there are fewer tiles than warps, and ROOM for sums, several warps share the inputs of each, in whole steps: all of them, or two.
template <int IN, int OUT, bool ROOM>
struct Tasks {
    static constexpr int TILES = OUT / BLOCKS / 8, COUNT = TILES * REQUEST_TILES, EACH = (COUNT + WARPS - 1) / WARPS;
    static constexpr int SHARING = ROOM && COUNT && WARPS % COUNT == 0 ? WARPS / COUNT : 1;
    static constexpr int PARTS = IN % (32 * SHARING) == 0 ? SHARING : SHARING % 2 == 0 ? 2 : 1;
    static_assert(IN / PARTS % 32 == 0, "whole steps");
    float2 biases[EACH > 0 ? EACH : 1];

    // Loaded at the start: a load where it is needed would be a stage's longest wait.
    __device__ __forceinline__ Tasks(const void* bias, int head, int rank) {
#pragma unroll
        for (int n = 0; n < EACH; n++) biases[n] = *reinterpret_cast<const float2*>(static_cast<const float*>(bias) + int64_t(head) * OUT + column(n, rank));
    }
    __device__ __forceinline__ static int index(int n) { return (threadIdx.x >> 5) % (WARPS / SHARING) + n * WARPS; }
    __device__ __forceinline__ static int part() { return SHARING > 1 ? (threadIdx.x >> 5) / (WARPS / SHARING) : 0; }
    __device__ __forceinline__ static int column(int n, int rank) { return rank * (OUT / BLOCKS) + index(n) % TILES * 8 + (threadIdx.x & 3) * 2; }
};

// Rows of TERMS matrices [TILE, IN] times this block's columns of a stage; emit(row, column in the stage, two neighbours). `sums`: 16
// bytes a thread that nothing else is kept in.
template <int TERMS, int IN, int OUT, bool ROOM, typename Emit>
__device__ __forceinline__ void products(const uint4* rows, const uint4* slice, const Tasks<IN, OUT, ROOM>& tasks, int rank, float4* sums, Emit emit) {
    typedef Tasks<IN, OUT, ROOM> Mine;
    constexpr int OWN_IN = IN / Mine::PARTS;
    int lane = threadIdx.x & 31, part = tasks.part(), begin = part * OWN_IN, end = begin + (part < Mine::PARTS ? OWN_IN : 0);
#pragma unroll
    for (int n = 0; n < Mine::EACH; n++) {
        int task = tasks.index(n), tile = task % Mine::TILES, first = task / Mine::TILES * 16;
        if (task >= Mine::COUNT) break;
        // Two sums each, so that fewer products wait for one another.
        float sum[2][TERMS][4] = {};
#pragma unroll 4
        for (int k = begin; k < end; k += 32) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int in = k + half * 16;
                uint32_t b0, b1;
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                             : "=r"(b0), "=r"(b1) : "r"(shared_address(slice + place<OUT / BLOCKS>(in + (lane & 15), tile))));
#pragma unroll
                for (int t = 0; t < TERMS; t++) {
                    uint32_t a[4] = {};
                    auto from = [&](int row, int chunk) { return shared_address(rows + t * (TILE * IN / 8) + place<IN>(row, in / 8 + chunk)); };
                    if constexpr (TILE == 8) {
                        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(a[0]), "=r"(a[2]) : "r"(from(lane & 7, lane >> 3 & 1)));
                    } else {
                        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from(first + (lane & 15), lane >> 4)));
                    }
                    multiply(sum[half][t], a, b0, b1);
                }
            }
        }
        float4 total = {};
#pragma unroll
        for (int t = 0; t < TERMS; t++) {
            total.x += sum[0][t][0] + sum[1][t][0], total.y += sum[0][t][1] + sum[1][t][1];
            total.z += sum[0][t][2] + sum[1][t][2], total.w += sum[0][t][3] + sum[1][t][3];
        }
        if constexpr (Mine::PARTS > 1) {
            if (part) sums[threadIdx.x] = total;
            __syncthreads();
#pragma unroll
            for (int p = 1; p < Mine::PARTS && !part; p++) {
                float4 other = sums[threadIdx.x + p * (THREADS / Mine::SHARING)];
                total.x += other.x, total.y += other.y, total.z += other.z, total.w += other.w;
            }
        }
        if (part) return;
        float2 bias = tasks.biases[n];
        emit(first + (lane >> 2), tasks.column(n, rank), total.x + bias.x, total.y + bias.y);
        if (TILE > 8) emit(first + (lane >> 2) + 8, tasks.column(n, rank), total.z + bias.x, total.w + bias.y);
    }
}

// A hidden layer's two neighbours, as their value and its rest, to this block's copy of the layer.
template <int WIDTH>
__device__ __forceinline__ void keep_hidden(uint4* layer, int row, int column, float low, float high) {
    low = silu(low), high = silu(high);
    uint32_t value = pack(low, high);
    float2 kept = widen(value);
    uint32_t* to = reinterpret_cast<uint32_t*>(layer) + place<WIDTH>(row, column / 8) * 4 + (column & 7) / 2;
    to[0] = value, to[TILE * WIDTH / 2] = pack(low - kept.x, high - kept.y);
}

// This block's columns of a hidden layer to every other block, 16 bytes at a time.
template <int WIDTH>
__device__ __forceinline__ void share_hidden(const Inbox& inbox, int kind, uint4* layer, int rank) {
    constexpr int OWN = WIDTH / BLOCKS / 8, CHUNKS = 2 * TILE * OWN;
    __syncthreads();
    if (threadIdx.x == 0) inbox.expect(kind, (BLOCKS - 1) * CHUNKS * 16);
#pragma unroll 2
    for (int i = threadIdx.x; i < CHUNKS; i += THREADS) {
        int term = i / (TILE * OWN), at = term * (TILE * WIDTH / 8) + place<WIDTH>(i / OWN % TILE, rank * OWN + i % OWN);
        uint4 own = layer[at];
#pragma unroll
        for (int b = 1; b < BLOCKS; b++) inbox.send(kind, (rank + b) % BLOCKS, layer + at, own);
    }
    inbox.await(kind);
}

// Where a request's newest signature goes, in words before the head's; -1: nowhere.
__device__ int64_t place_newest(const Batch& a, int request) {
    int token = a.position[request] - 1;
    if (token < 0 || token >= a.tokens) return -1;
    if (a.table) return a.table[int64_t(request) * a.table_width + token / a.page] * a.s0 + (token % a.page) * WORDS;
    return request * a.s0 + int64_t(token) * WORDS;
}

__device__ void write_signature(const Batch& a, const float* logits, int64_t place, int head) {
    int lane = threadIdx.x & 31;
    if (place < 0) return;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        uint32_t word = __ballot_sync(~0u, logits[w * 32 + lane] > 0);
        if (lane == 0) a.signatures[place + head * a.s1 + w] = word;
    }
}

template <int IN, bool KEY>
__device__ __forceinline__ void encode(const Batch& a, const Map& map, int head, char* memory) {
    constexpr int OUT = KEY ? BITS : COLUMNS;
    int rank = blockIdx.x, first = blockIdx.z * TILE;
    uint4 *weights = reinterpret_cast<uint4*>(memory), *inputs = weights + WEIGHTS, *hidden = inputs + INPUTS;
    float* logits = reinterpret_cast<float*>(hidden + HIDDENS);
    // After the first stage its weights' place is free.
    constexpr bool ROOM = IN * COLUMNS0 / 8 >= THREADS;
    float4* sums = reinterpret_cast<float4*>(weights);
    MARK(0);
    Inbox inbox(reinterpret_cast<uint64_t*>(logits + SHARE * COLUMNS));
    if (threadIdx.x == 0) {
        inbox.open(KINDS);
        inbox.expect(CODES, SHARE * OUT * 4);
    }
    // Every block must run when another sends to it.
    arrive_first();
    auto code_of = [&](int request) { return a.planes + (int64_t(request) * a.query.heads + head) * MIXED * CODE; };
    // The step may start now, on what room there is: it waits for the codes where it needs them.
    if (threadIdx.x == 0) cudaTriggerProgrammaticLaunchCompletion();
    uint4 *slice1 = weights + IN * COLUMNS0 / 8, *slice2 = slice1 + HIDDEN0 * COLUMNS1 / 8;
    for (int i = threadIdx.x; i < TILE * IN / 8; i += THREADS) {
        int row = i / (IN / 8), chunk = i % (IN / 8);
        // Rows beyond the batch repeat the last one; nobody reads what they give.
        copy_async(inputs + place<IN>(row, chunk), static_cast<const Short*>(map.x) + min(first + row, a.batch - 1) * map.x0 + head * map.x1 + chunk * 8);
    }
    Tasks<IN, HIDDEN0, false> tasks0(map.biases[0], head, rank);
    Tasks<HIDDEN0, HIDDEN1, ROOM> tasks1(map.biases[1], head, rank);
    Tasks<LAST, OUT, ROOM> tasks2(map.biases[STAGES - 1], head, rank);
    // A warp a request, of those whose codes this block ends with.
    static_assert(SHARE <= WARPS, "a warp a request");
    int warp = threadIdx.x >> 5, request = first + rank * SHARE + warp;
    bool ends = warp < SHARE && request < a.batch;
    int64_t newest = KEY && ends ? place_newest(a, request) : -1;
    load_slice<IN, HIDDEN0>(weights, map.weights[0], head, rank);
    asm volatile("cp.async.commit_group;");
    if constexpr (HIDDEN1 > 0) load_slice<HIDDEN0, HIDDEN1>(slice1, map.weights[1], head, rank);
    load_slice<LAST, OUT>(slice2, map.weights[STAGES - 1], head, rank);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    MARK(1);
    __syncthreads();
    MARK(2);
    products<1, IN, HIDDEN0>(inputs, weights, tasks0, rank, nullptr,
                             [&](int row, int column, float low, float high) { keep_hidden<HIDDEN0>(hidden, row, column, low, high); });
    MARK(3);
    await_first();
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    share_hidden<HIDDEN0>(inbox, FIRST_HIDDEN, hidden, rank);
    MARK(4);
    if constexpr (HIDDEN1 > 0) {
        products<2, HIDDEN0, HIDDEN1>(hidden, slice1, tasks1, rank, sums,
                                      [&](int row, int column, float low, float high) { keep_hidden<HIDDEN1>(inputs, row, column, low, high); });
        share_hidden<HIDDEN1>(inbox, SECOND_HIDDEN, inputs, rank);
        MARK(6);
    }
    products<2, LAST, OUT>(HIDDEN1 ? inputs : hidden, slice2, tasks2, rank, sums, [&](int row, int column, float low, float high) {
        inbox.send(CODES, row / SHARE, logits + row % SHARE * OUT + column, make_float2(low, high));
    });
    MARK(7);
    inbox.await(CODES);
    MARK(8);
    if (KEY && ends) write_signature(a, logits + warp * OUT, newest, head);
    else if (ends) {
        // A word and its mark are one store, so that nothing has to be waited for between them.
        int lane = threadIdx.x & 31;
        float own[MIXED * WORDS];
#pragma unroll
        for (int w = 0; w < MIXED * WORDS; w++) own[w] = logits[warp * OUT + w * 32 + lane];
        quantise(own, [&](int i, uint32_t word) {
            if (lane == 0) asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(code_of(request) + i), "l"(1ull << 32 | word) : "memory");
        });
    }
    MARK(15);
}

__global__ void __launch_bounds__(THREADS) encode_all(const __grid_constant__ Batch a) {
    extern __shared__ __align__(16) char memory[];
#if KEY_IN
    if (blockIdx.y >= a.query.heads) return encode<KEY_IN, true>(a, a.key, blockIdx.y - a.query.heads, memory);
#endif
    encode<QUERY_IN, false>(a, a.query, blockIdx.y, memory);
}

extern "C" int run(const Batch* a, int keys, cudaStream_t stream) {
    static bool allowed = false;
    if (!allowed) {
        cudaError_t error = cudaFuncSetAttribute(encode_all, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
        if (error != cudaSuccess) return error;
        allowed = true;
    }
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {BLOCKS, 1, 1};
    int count = 1;
#if CUDART_VERSION >= 12050
    // A multiprocessor is divided anew only when nothing runs on it: it is given the division of the step that comes next.
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = a->carveout;
#endif
    dim3 grid(BLOCKS, a->query.heads + (keys ? a->key.heads : 0), (a->batch + TILE - 1) / TILE);
    cudaLaunchConfig_t config = {grid, dim3(THREADS), SHARED, stream, attributes, unsigned(count)};
    return cudaLaunchKernelEx(&config, encode_all, *a);
}
