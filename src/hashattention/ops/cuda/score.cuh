// Score: the matches of every signature with the query code, weighted by its magnitudes, on the tensor cores' 1-bit products.
#pragma once
#include "messages.cuh"

// d[row, column] += population count of (16 rows of 256 key bits) and (8 columns of planes).
__device__ __forceinline__ void count_and(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A lane loads 16 bytes of signatures (two such for 128 bits) and gets the scores of just these tokens: its words are one
// column block of the product's left side, and the columns that come back to it hold planes in that block alone.
constexpr int TOKENS = WORDS == 1 ? 4 : 2;           // tokens a lane scores at once
constexpr int CHUNK = TOKENS * 32;                   // tokens a warp scores at once
constexpr int LOADS = WORDS == 4 ? 2 : 1;           // 16-byte loads of a lane for them; each holds as much of a signature
constexpr int PRODUCTS = WORDS == 1 ? PLANES : (PLANES + 1) / 2;

struct Code {
    uint32_t sign[WORDS];
    uint32_t columns[PRODUCTS][LOADS][2];

    __device__ __forceinline__ void load(const uint32_t* planes) {
        int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
#pragma unroll
        for (int w = 0; w < WORDS; w++) sign[w] = planes[w];
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
            int plane = WORDS == 1 ? m : 2 * m + (g & 1);
#pragma unroll
            for (int i = 0; i < LOADS * 2; i++) {
                bool mine = g / 2 == c && plane < PLANES && (WORDS > 1 || (g & 1) == i);
                columns[m][i / 2][i % 2] = mine ? planes[(plane + 1) * WORDS + (WORDS == 1 ? 0 : i)] : 0;
            }
        }
    }

    // Weights that match a lane's tokens.
    __device__ __forceinline__ void match(const uint4 (&key)[LOADS], int (&score)[TOKENS]) const {
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
            int d[4] = {};
            if constexpr (WORDS == 1) {
                count_and(d, key[0].x ^ sign[0], key[0].z ^ sign[0], key[0].y ^ sign[0], key[0].w ^ sign[0], columns[m][0][0], columns[m][0][1]);
#pragma unroll
                for (int t = 0; t < 4; t++) score[t] = m ? score[t] + (d[t] << m) : d[t];
                continue;
            } else if constexpr (WORDS == 2) {
                count_and(d, key[0].x ^ sign[0], key[0].z ^ sign[0], key[0].y ^ sign[1], key[0].w ^ sign[1], columns[m][0][0], columns[m][0][1]);
            } else {
                count_and(d, key[0].x ^ sign[0], key[1].x ^ sign[0], key[0].y ^ sign[1], key[1].y ^ sign[1], columns[m][0][0], columns[m][0][1]);
                count_and(d, key[0].z ^ sign[2], key[1].z ^ sign[2], key[0].w ^ sign[3], key[1].w ^ sign[3], columns[m][1][0], columns[m][1][1]);
            }
            if constexpr (WORDS > 1) {
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    int sum = d[t * 2] + 2 * d[t * 2 + 1];
                    score[t] = m ? score[t] + (sum << 2 * m) : sum;
                }
            }
        }
    }
};

// The sum of a code's magnitudes.
__device__ __forceinline__ int sum_weights(const uint32_t* planes) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < PLANES * WORDS; i++) sum += __popc(planes[WORDS + i]) << i / WORDS;
    return sum;
}

// The largest of a row's codes.
__device__ __forceinline__ int largest_sum(const uint32_t* planes) {
    int largest = sum_weights(planes);
#pragma unroll
    for (int c = 1; c < MIXED; c++) largest = max(largest, sum_weights(planes + c * CODE));
    return largest;
}

// Scores are counted from 0: of one code the weights that match; of a mixture, where codes differ in their sums, twice these and
// what the code's sum lacks of the largest, which is the product of code and signs + that largest sum.
constexpr int SCALE = MIXED > 1 ? 2 : 1;

// The largest score a row's codes can give.
__device__ __forceinline__ int largest_score(const uint32_t* planes) { return SCALE * largest_sum(planes); }

// What is added to a code's weights that match, times SCALE.
__device__ __forceinline__ int raise_of(const uint32_t* planes, int c) { return MIXED > 1 ? largest_sum(planes) - sum_weights(planes + c * CODE) : 0; }

// Ask the L2 for the first of this block's signatures: as many as it can keep for all blocks at once.
__device__ __forceinline__ void prefetch(const Arguments& a, const Row& row, int first, int segment, int request, int head) {
    int stop = min(first + min(segment, a.prefetch), row.local_begin);
    int each = PAGED ? 1 << a.page_shift : 1 << 14;
    for (int token = first + threadIdx.x * each; token < stop; token += blockDim.x * each) {
        // Sizes are multiples of 16 bytes: rows are aligned so, and pages hold 8 tokens at least.
        int count = min(PAGED ? each - (token & (each - 1)) : each, stop - token) & ~3;
        const uint32_t* from = a.signatures + place_signature(a, request, head, token);
        if (count > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(count * WORDS * 4) : "memory");
    }
}

// Two tokens' entries in the halves of a word.
constexpr int PAIRS = TOKENS / 2;

__device__ __forceinline__ void store_entries(uint8_t* to, const uint32_t (&entry)[PAIRS]) {
    int lane = threadIdx.x & 31;
    if constexpr (WORDS == 1) reinterpret_cast<uint32_t*>(to)[lane] = __byte_perm(entry[0], entry[PAIRS - 1], 0x6420);
    else if constexpr (WORDS == 2) reinterpret_cast<uint16_t*>(to)[lane] = __byte_perm(entry[0], 0, 0x4420);
    else to[lane] = entry[0], to[lane + 32] = entry[0] >> 16;
}

__device__ __forceinline__ void count_entries(int* counts, uint32_t entry) {
    // Without a branch: what is no candidate counts in bin 0, which nobody reads.
    char* base = reinterpret_cast<char*>(counts);
    atomicAdd(reinterpret_cast<int*>(base + (entry & 0xffff) * 4), 1);
    atomicAdd(reinterpret_cast<int*>(base + (entry >> 14)), 1);
}

__device__ __forceinline__ uint4 load_key(const uint32_t* from) {
    uint4 key;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(key.x), "=r"(key.y), "=r"(key.z), "=r"(key.w) : "l"(from));
    return key;
}

// Selection alone, and short signatures, leave registers for more blocks a multiprocessor; 384 threads have fewer each than 256.
constexpr int UNROLL = (MODE == 1 || WORDS == 1 || THREADS == 384 ? 8 : 16) / LOADS;
// wide.cu loads the first signatures to registers before the code is known.
constexpr bool AHEAD = WIDE;

typedef uint4 Keys[UNROLL][LOADS];

// A warp's signatures from chunk `begin` on.
__device__ __forceinline__ void load_keys(const Arguments& a, const Row& row, int first, int segment, int request, int head, int begin, Keys& key) {
    int lane = threadIdx.x & 31, limit = min(row.local_begin, first + segment);
    const uint32_t* dense = a.signatures + place_signature(a, request, head, PAGED ? 0 : first);
    bool whole = (begin + (UNROLL - 1) * WARPS + 1) * CHUNK <= limit - first;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            int offset = (begin + u * WARPS) * CHUNK + lane * (4 / WORDS) + l * 32;
            if (whole || first + offset < limit) {
                const uint32_t* from = PAGED ? a.signatures + place_signature(a, request, head, first + offset) : dense + int64_t(offset) * WORDS;
                key[u][l] = load_key(from);
            }
        }
    }
}

constexpr int TOGETHER = 4;
// Chunks of a piece: whole turns of all warps.
__device__ __forceinline__ int piece_of(int chunks) {
    constexpr int TURN = WARPS * TOGETHER;
    return (chunks + TURN * PIECES - 1) / (TURN * PIECES) * TURN;
}

// Ask for all of this block's signatures, to shared memory.
__device__ __forceinline__ void ask_keys(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head) {
    constexpr int ROUND = 4 / WORDS;    // tokens of 16 bytes
    int tokens = max(0, min(segment, row.local_begin - first)), all = (tokens + ROUND - 1) / ROUND * ROUND;
    if (PAGED) {
        // Pages are short: 16 bytes a thread at a time, so many that the page numbers of all are on their way at once.
        constexpr int EACH = 8;
        for (int begin = threadIdx.x * ROUND; begin < all; begin += THREADS * ROUND * EACH) {
#pragma unroll
            for (int u = 0; u < EACH; u++) {
                int at = begin + u * THREADS * ROUND;
                const uint32_t* from = a.signatures + place_signature(a, request, head, first + min(at, all - ROUND));
                if (at < all) copy_async(s.keys + at * WORDS * 4, from);
            }
        }
        return;
    }
    // A lane a piece, of a warp that has nothing else to do; before the first barrier of the block, of the one that opened the inbox.
    int number = THREADS > 256 || MODE != 3 ? threadIdx.x : threadIdx.x - (THREADS - 32);
    int piece = piece_of((tokens + CHUNK - 1) / CHUNK) * CHUNK, from = number * piece, bytes = min(piece, all - from) * WORDS * 4;
    if (number < 0 || number >= PIECES || bytes <= 0) return;
    Inbox inbox(s);
    inbox.expect(KEYS + number, bytes);
    inbox.copy(KEYS + number, s.keys + from * WORDS * 4, a.signatures + place_signature(a, request, head, first) + int64_t(from) * WORDS, bytes);
}

// How a row's codes turn signatures into entries: an entry is a candidate's score - `base`, kept within 0..127, and any other token's 0.
struct Scorer {
    uint32_t lift[MIXED];
    Code code[MIXED];

    __device__ __forceinline__ Scorer(const Shared& s, int base) {
#pragma unroll
        for (int c = 0; c < MIXED; c++) {
            int by = raise_of(s.planes, c) - base;
            lift[c] = __byte_perm(by, by, 0x5410);
            code[c].load(s.planes + c * CODE);
        }
    }

    // COUNT chunks from `begin` on, WARPS apart, so that one's products run under another's.
    template <int COUNT>
    __device__ __forceinline__ void enter(Shared& s, const Row& row, const uint4 (*key)[LOADS], int first, int limit, int begin, int chunks) const {
        int lane = threadIdx.x & 31;
        uint32_t entry[COUNT][PAIRS];
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
#pragma unroll
            for (int c = 0; c < MIXED; c++) {
                int found[TOKENS];
                code[c].match(key[u], found);
#pragma unroll
                for (int t = 0; t < PAIRS; t++) {
                    // At most 2045 each.
                    uint32_t both = __byte_perm(found[2 * t], found[2 * t + 1], 0x5410) * SCALE;
                    uint32_t one = __viaddmin_s16x2_relu(both, lift[c], 0x007f007f);
                    entry[u][t] = c ? __vmaxs2(entry[u][t], one) : one;
                }
            }
        }
        int token = first + begin * CHUNK;
        if (token < row.sink_stop || token + ((COUNT - 1) * WARPS + 1) * CHUNK > limit) {
#pragma unroll
            for (int u = 0; u < COUNT; u++) {
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    int at = token + u * WARPS * CHUNK + (WORDS == 4 ? lane + t * 32 : lane * TOKENS + t);
                    if (at < row.sink_stop || at >= limit) entry[u][t / 2] &= t & 1 ? 0xffffu : 0xffff0000u;
                }
            }
        }
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
            int chunk = begin + u * WARPS;
#pragma unroll
            for (int t = 0; t < PAIRS; t++) count_entries(s.counts, entry[u][t]);
            if (COUNT == 1 || chunk < chunks) store_entries(s.scores() + chunk * CHUNK, entry[u]);
        }
    }
};

// Entries of this block's tokens, and their counts. `loaded`: the first signatures are in `key`.
__device__ __forceinline__ void score(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head, int base, Keys& key, bool loaded) {
    int limit = min(row.local_begin, first + segment), chunks = (max(0, limit - first) + CHUNK - 1) / CHUNK, begin = threadIdx.x >> 5;
    Scorer scorer(s, base);
    if constexpr (HELD) {
        if (PAGED) {
            await_copies();
            __syncthreads();
        }
        auto load = [&](int chunk, uint4 (&key)[LOADS]) {
#pragma unroll
            for (int l = 0; l < LOADS; l++) key[l] = reinterpret_cast<const uint4*>(s.keys)[(chunk * LOADS + l) * 32 + (threadIdx.x & 31)];
        };
        int piece = piece_of(chunks);
#pragma unroll 1
        for (int number = 0; begin < chunks; number++) {
            if (!PAGED) Inbox(s).await(KEYS + number);
            int stop = min(chunks, (number + 1) * piece);
#pragma unroll 1
            for (; begin + (TOGETHER - 1) * WARPS < stop; begin += TOGETHER * WARPS) {
                uint4 some[TOGETHER][LOADS];
#pragma unroll
                for (int u = 0; u < TOGETHER; u++) load(begin + u * WARPS, some[u]);
                scorer.enter<TOGETHER>(s, row, some, first, limit, begin, chunks);
            }
#pragma unroll 1
            for (; begin < stop; begin += WARPS) {
                uint4 one[1][LOADS];
                load(begin, one[0]);
                scorer.enter<1>(s, row, one, first, limit, begin, chunks);
            }
        }
    } else {
        for (; begin < chunks; begin += WARPS * UNROLL) {
            if (!AHEAD || !loaded) load_keys(a, row, first, segment, request, head, begin, key);
            loaded = false;
#pragma unroll
            for (int v = 0; v < UNROLL; v += TOGETHER) {
                if (begin + v * WARPS >= chunks) break;
                scorer.enter<TOGETHER>(s, row, key + v, first, limit, begin + v * WARPS, chunks);
            }
        }
    }
    // The rest of the segment holds no candidate.
#pragma unroll 1
    for (int i = chunks * CHUNK + threadIdx.x * 16; i < segment; i += THREADS * 16) *reinterpret_cast<uint4*>(s.scores() + i) = make_uint4(0, 0, 0, 0);
}

#if MODE == 3
// The newest token's entry, where it is a candidate: its signature is made by this very launch, so no load may look for it.
__device__ void score_newest(Shared& s, int offset, int base) {
    if (threadIdx.x) return;
    int entry = 0;
    for (int c = 0; c < MIXED; c++) {
        const uint32_t* planes = s.planes + c * CODE;
        int sum = raise_of(s.planes, c) - base;
        for (int i = 0; i < PLANES * WORDS; i++) sum += SCALE * __popc(planes[WORDS + i] & (s.newest()[i % WORDS] ^ planes[i % WORDS])) << i / WORDS;
        entry = max(entry, min(BINS - 1, sum));
    }
    s.scores()[offset] = entry;
    if (entry) s.counts[entry]++;
}
#endif
