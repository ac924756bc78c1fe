// Every head's three-stage MLP in one launch: a cluster a head, each block a slice of every stage's columns, exchanged through
// distributed shared memory. All weights of a block are asked for before the first product.
// Built with: QUERY_IN, KEY_IN (0: no keys), HIDDEN0, HIDDEN1, BITS, LEVELS (0: bit code), PLANES, HALF.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>

namespace cg = cooperative_groups;

#ifdef PROFILE
__device__ long long profile[64];
#define MARK(i) if (threadIdx.x == 0 && blockIdx.x + blockIdx.y + blockIdx.z == 0) { long long t; asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)); profile[i] = t; }
extern "C" int read_profile(long long* to) { return cudaMemcpyFromSymbol(to, profile, sizeof(profile)); }
#else
#define MARK(i)
#endif

struct Map {
    const void* x;                // [B, H, in], strides in entries
    const void* weights[3];       // [H, in, out]
    const void* biases[3];        // float32 [H, out]
    int64_t x0, x1;
    int heads;
};

struct Arguments {
    Map query, key;
    uint32_t* planes;             // [B, H, PLANES + 1, WORDS]
    uint32_t* signatures;         // cache, dense [B, H, T, WORDS] or pages [P, H, N, WORDS]
    const int* position;          // [B]: one past the token whose signature is written
    const int* table;             // [B, M] or null
    int64_t s0, s1;
    int batch, tokens, table_width, page;
};

#if HALF
typedef __half Short;
__device__ __forceinline__ float2 widen(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
#else
typedef __nv_bfloat16 Short;
__device__ __forceinline__ float2 widen(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
#endif

constexpr int THREADS = 256, BLOCKS = 8, TILE = 8, WORDS = BITS / 32;
constexpr int WIDEST = (QUERY_IN > KEY_IN ? QUERY_IN : KEY_IN);
constexpr int LARGEST = HIDDEN0 > HIDDEN1 ? HIDDEN0 : HIDDEN1;

// This thread's share of COLUMNS columns of a stage: IN rows, 16 bytes (or the block's whole slice, if narrower) at a time.
template <int IN, int OUT>
struct Slice {
    static constexpr int COLUMNS = OUT / BLOCKS;
    static constexpr int WIDTH = COLUMNS < 8 ? COLUMNS : 8;      // columns a thread
    static constexpr int SEGMENTS = COLUMNS / WIDTH;
    static constexpr int ROWS = THREADS / SEGMENTS;              // rows at once
    static constexpr int EACH = (IN + ROWS - 1) / ROWS;
    uint32_t words[EACH][WIDTH / 2];

    __device__ __forceinline__ void load(const void* weights, int head, int rank) {
        const Short* from = static_cast<const Short*>(weights) + int64_t(head) * IN * OUT + rank * COLUMNS + threadIdx.x % SEGMENTS * WIDTH;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int row = threadIdx.x / SEGMENTS + i * ROWS;
#pragma unroll
            for (int w = 0; w < WIDTH / 2; w++) words[i][w] = 0;
            if (row < IN) {
                const uint32_t* p = reinterpret_cast<const uint32_t*>(from + int64_t(row) * OUT);
                if constexpr (WIDTH == 8) {
                    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(words[i][0]), "=r"(words[i][1]), "=r"(words[i][2]), "=r"(words[i][3]) : "l"(p));
                } else if constexpr (WIDTH == 4) {
                    asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(words[i][0]), "=r"(words[i][1]) : "l"(p));
                } else {
                    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(words[i][0]) : "l"(p));
                }
            }
        }
    }

    // Every warp's sums of its rows' products, for each of the tile's inputs: sums[tile][warp][COLUMNS].
    __device__ __forceinline__ void multiply(const float* x, int stride, int inputs, float* sums) {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        for (int t = 0; t < inputs; t++) {
            float total[WIDTH] = {};
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int row = threadIdx.x / SEGMENTS + i * ROWS;
                float value = IN % ROWS == 0 || row < IN ? x[t * stride + row] : 0;
#pragma unroll
                for (int w = 0; w < WIDTH / 2; w++) {
                    float2 weight = widen(words[i][w]);
                    total[w * 2] += value * weight.x, total[w * 2 + 1] += value * weight.y;
                }
            }
            // Halve the columns a lane holds at each step: 8 shuffles where a butterfly of every column takes 32.
            int column = 0;
#pragma unroll
            for (int half = WIDTH / 2, step = 16; half; half /= 2, step /= 2) {
                bool upper = lane & step;
                column = column * 2 + upper;
#pragma unroll
                for (int w = 0; w < half; w++) {
                    float kept = upper ? total[w + half] : total[w], sent = upper ? total[w] : total[w + half];
                    total[w] = kept + __shfl_xor_sync(~0u, sent, step);
                }
            }
#pragma unroll
            for (int step = 16 / WIDTH; step >= SEGMENTS; step /= 2) total[0] += __shfl_xor_sync(~0u, total[0], step);
            if ((lane & (32 / WIDTH - 1)) < SEGMENTS) sums[(t * (THREADS / 32) + warp) * COLUMNS + lane % SEGMENTS * WIDTH + column] = total[0];
        }
    }
};

// Add the warps' sums and the bias, and give the result to every block of the cluster.
template <int OUT, bool SILU>
__device__ __forceinline__ void share(cg::cluster_group& cluster, const float* sums, const void* bias, int head, int inputs, float* to) {
    constexpr int COLUMNS = OUT / BLOCKS;
    int rank = cluster.block_rank();
    for (int i = threadIdx.x; i < inputs * COLUMNS * BLOCKS; i += THREADS) {
        int column = i % COLUMNS, block = i / COLUMNS % BLOCKS, t = i / COLUMNS / BLOCKS;
        float total = static_cast<const float*>(bias)[int64_t(head) * OUT + rank * COLUMNS + column];
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) total += sums[(t * (THREADS / 32) + w) * COLUMNS + column];
        if (SILU) total = total / (1 + __expf(-total));
        cluster.map_shared_rank(to, block)[t * OUT + rank * COLUMNS + column] = total;
    }
    cluster.sync();
}

__device__ void write_planes(const Arguments& a, const float* logits, int request, int head) {
    int lane = threadIdx.x & 31;
    uint32_t* to = a.planes + (int64_t(request) * a.query.heads + head) * (PLANES + 1) * WORDS;
    float top = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) top = fmaxf(top, fabsf(logits[w * 32 + lane]));
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    float scale = fmaxf(__fdiv_rn(top, LEVELS ? LEVELS : 1), 1.1754943508222875e-38f);
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        float logit = logits[w * 32 + lane];
        int code = LEVELS ? max(-LEVELS, min(LEVELS, __float2int_rn(__fdiv_rn(logit, scale)))) : (logit > 0 ? 1 : -1);
        uint32_t sign = __ballot_sync(~0u, code < 0);
        if (lane == 0) to[w] = sign;
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            uint32_t plane = __ballot_sync(~0u, abs(code) >> p & 1);
            if (lane == 0) to[(p + 1) * WORDS + w] = plane;
        }
    }
}

__device__ void write_signature(const Arguments& a, const float* logits, int request, int head) {
    int lane = threadIdx.x & 31, token = a.position[request] - 1;
    int64_t place = 0;
    if (token < 0 || token >= a.tokens) return;
    if (a.table) place = a.table[int64_t(request) * a.table_width + token / a.page] * a.s0 + (token % a.page) * WORDS;
    else place = request * a.s0 + int64_t(token) * WORDS;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        uint32_t word = __ballot_sync(~0u, logits[w * 32 + lane] > 0);
        if (lane == 0) a.signatures[place + head * a.s1 + w] = word;
    }
}

template <int IN, bool KEY>
__device__ __forceinline__ void encode(const Arguments& a, const Map& map, int head, float* x, float* sums, float* hidden0, float* hidden1, float* logits) {
    cg::cluster_group cluster = cg::this_cluster();
    int rank = cluster.block_rank(), warp = threadIdx.x >> 5;
    Slice<IN, HIDDEN0> slice0;
    Slice<HIDDEN0, HIDDEN1> slice1;
    Slice<HIDDEN1, BITS> slice2;
    slice0.load(map.weights[0], head, rank);
    slice1.load(map.weights[1], head, rank);
    slice2.load(map.weights[2], head, rank);
    MARK(1);
    for (int first = blockIdx.z * TILE; first < a.batch; first += gridDim.z * TILE) {
        int inputs = min(TILE, a.batch - first);
#pragma unroll
        for (int i = threadIdx.x; i < TILE * IN / 8; i += THREADS) {
            if (i * 8 >= inputs * IN) break;
            uint4 from = *reinterpret_cast<const uint4*>(static_cast<const Short*>(map.x) + (first + i * 8 / IN) * map.x0 + head * map.x1 + i * 8 % IN);
            float2* to = reinterpret_cast<float2*>(x + i * 8);
            to[0] = widen(from.x), to[1] = widen(from.y), to[2] = widen(from.z), to[3] = widen(from.w);
        }
        __syncthreads();
        MARK(2);
        slice0.multiply(x, IN, inputs, sums);
        MARK(3);
        // Every block must have started, and be done with the tile before, when another writes to its memory.
        cluster.sync();
        MARK(4);
        share<HIDDEN0, true>(cluster, sums, map.biases[0], head, inputs, hidden0);
        MARK(5);
        slice1.multiply(hidden0, HIDDEN0, inputs, sums);
        __syncthreads();
        share<HIDDEN1, true>(cluster, sums, map.biases[1], head, inputs, hidden1);
        MARK(6);
        slice2.multiply(hidden1, HIDDEN1, inputs, sums);
        __syncthreads();
        share<BITS, false>(cluster, sums, map.biases[2], head, inputs, logits);
        MARK(7);
        if (rank == warp && warp < inputs) {
            if (KEY) write_signature(a, logits + warp * BITS, first + warp, head);
            else write_planes(a, logits + warp * BITS, first + warp, head);
        }
    }
    MARK(8);
}

__global__ void __launch_bounds__(THREADS, 2) encode_all(const __grid_constant__ Arguments a) {
    __shared__ __align__(16) float x[TILE * WIDEST], sums[TILE * (THREADS / 32) * LARGEST / BLOCKS], hidden0[TILE * HIDDEN0], hidden1[TILE * HIDDEN1], logits[TILE * BITS];
    asm volatile("griddepcontrol.launch_dependents;");
    MARK(0);
#if KEY_IN
    if (blockIdx.y >= a.query.heads) return encode<KEY_IN, true>(a, a.key, blockIdx.y - a.query.heads, x, sums, hidden0, hidden1, logits);
#endif
    encode<QUERY_IN, false>(a, a.query, blockIdx.y, x, sums, hidden0, hidden1, logits);
}

extern "C" int run(const Arguments* a, int keys, cudaStream_t stream) {
    static bool allowed = false;
    if (!allowed) {
        cudaError_t error = cudaFuncSetAttribute(encode_all, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error != cudaSuccess) return error;
        allowed = true;
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {BLOCKS, 1, 1};
    dim3 grid(BLOCKS, a->query.heads + (keys ? a->key.heads : 0), std::min((a->batch + TILE - 1) / TILE, 16));
    cudaLaunchConfig_t config = {grid, dim3(THREADS), 0, stream, &attribute, 1};
    return cudaLaunchKernelEx(&config, encode_all, *a);
}
