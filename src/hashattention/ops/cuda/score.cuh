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
constexpr int PRODUCTS = WORDS == 1 ? SLOTS : (SLOTS + 1) / 2;

// The words of all codes of a row, the same in every lane.
struct Words {
    static constexpr int COUNT = MIXED * CODE;
    uint32_t of[(COUNT + 3) / 4 * 4];

    __device__ __forceinline__ void load(const uint32_t* planes) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) *reinterpret_cast<uint4*>(of + i) = *reinterpret_cast<const uint4*>(planes + i);
    }
    __device__ __forceinline__ uint32_t sign(int c, int w) const { return of[c * CODE + w]; }
    __device__ __forceinline__ uint32_t slot(int c, int p, int w) const { return p < SLOTS ? of[c * CODE + (p + 1) * WORDS + w] : 0; }
};

// The part of a row's candidates that a block scores, in whole chunks.
struct Segment {
    int first, tokens;
    bool any;       // whether there is anything to select in the row

    __device__ __forceinline__ Segment(const Row& row, int rank) {
        int low = row.sink_stop & ~7, candidates = max(0, row.local_begin - low);
        tokens = (candidates + BLOCKS * CHUNK - 1) / (BLOCKS * CHUNK) * CHUNK;
        first = low + rank * tokens;
        any = row.heavy > 0 && candidates > 0;
    }
};

// The row as far as its signatures are there: that of the newest token, where it is a candidate, is made by this very launch.
__device__ __forceinline__ Row signed_part(const Arguments& a, Row row) {
    if (MODE == 3 && a.key.x != nullptr && row.local_begin == row.stop && row.stop > row.sink_stop) row.local_begin--;
    return row;
}

struct Code {
    uint32_t sign[WORDS];
    uint32_t columns[PRODUCTS][LOADS][2];

    __device__ __forceinline__ void load(const Words& words, int c) {
        int lane = threadIdx.x & 31, column = lane >> 2;
        bool mine = column / 2 == (lane & 3), odd = column & 1;
#pragma unroll
        for (int w = 0; w < WORDS; w++) sign[w] = words.sign(c, w);
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
#pragma unroll
            for (int i = 0; i < LOADS * 2; i++) {
                uint32_t even = WORDS == 1 ? (i ? 0 : words.slot(c, m, 0)) : words.slot(c, 2 * m, i);
                uint32_t other = WORDS == 1 ? (i ? words.slot(c, m, 0) : 0) : words.slot(c, 2 * m + 1, i);
                columns[m][i / 2][i % 2] = mine ? odd ? other : even : 0;
                // Here, not again for every product.
                asm volatile("" : "+r"(columns[m][i / 2][i % 2]));
            }
        }
    }

    // Weights that match a lane's tokens.
    __device__ __forceinline__ void match(const uint4 (&key)[LOADS], int (&score)[TOKENS]) const {
        int d[4] = {};
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
            if constexpr (WORDS == 1) {
                count_and(d, key[0].x ^ sign[0], key[0].z ^ sign[0], key[0].y ^ sign[0], key[0].w ^ sign[0], columns[m][0][0], columns[m][0][1]);
            } else if constexpr (WORDS == 2) {
                count_and(d, key[0].x ^ sign[0], key[0].z ^ sign[0], key[0].y ^ sign[1], key[0].w ^ sign[1], columns[m][0][0], columns[m][0][1]);
            } else {
                count_and(d, key[0].x ^ sign[0], key[1].x ^ sign[0], key[0].y ^ sign[1], key[1].y ^ sign[1], columns[m][0][0], columns[m][0][1]);
                count_and(d, key[0].z ^ sign[2], key[1].z ^ sign[2], key[0].w ^ sign[3], key[1].w ^ sign[3], columns[m][1][0], columns[m][1][1]);
            }
            // Slots of one weight are in one column: their products add up.
            if (THREES && m + 1 < PRODUCTS) continue;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                int sum = WORDS == 1 ? d[t] : d[t * 2] + weight_of(1) * d[t * 2 + 1];
                score[t] = m && !THREES ? score[t] + sum * weight_of(WORDS == 1 ? m : 2 * m) : sum;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) d[i] = 0;
        }
    }
};

// The sum of a code's magnitudes.
__device__ __forceinline__ int sum_weights(const Words& words, int c) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < SLOTS * WORDS; i++) sum += __popc(words.slot(c, i / WORDS, i % WORDS)) * weight_of(i / WORDS);
    return sum;
}

// The largest of a row's codes.
__device__ __forceinline__ int largest_sum(const Words& words) {
    int largest = sum_weights(words, 0);
#pragma unroll
    for (int c = 1; c < MIXED; c++) largest = max(largest, sum_weights(words, c));
    return largest;
}

// Scores are counted from 0: of one code the weights that match; of a mixture, where codes differ in their sums, twice these and
// what the code's sum lacks of the largest, which is the product of code and signs + that largest sum.
constexpr int SCALE = MIXED > 1 ? 2 : 1;

// The largest score a row's codes can give.
__device__ __forceinline__ int largest_score(const Words& words) { return SCALE * largest_sum(words); }

// What is added to a code's weights that match, times SCALE.
__device__ __forceinline__ int raise_of(const Words& words, int c) { return MIXED > 1 ? largest_sum(words) - sum_weights(words, c) : 0; }

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

__device__ __forceinline__ void store_entries(uint8_t* to, const int (&entry)[TOKENS]) {
    int lane = threadIdx.x & 31;
    uint32_t pair = __byte_perm(entry[0], entry[1], 0x0040);
    if constexpr (WORDS == 1) reinterpret_cast<uint32_t*>(to)[lane] = __byte_perm(pair, __byte_perm(entry[TOKENS - 2], entry[TOKENS - 1], 0x0040), 0x5410);
    else if constexpr (WORDS == 2) reinterpret_cast<uint16_t*>(to)[lane] = pair;
    else to[lane] = entry[0], to[lane + 32] = entry[1];
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

// Chunks that a warp scores at once: more where signatures come from shared memory and registers are left. `spare_scores` of layout.py
// follows from it.
constexpr int TOGETHER = HELD && RESIDENT == 1 && THREADS <= 256 ? 8 / LOADS : 4;
// Chunks of a piece: whole turns of all warps.
__device__ __forceinline__ int piece_of(int chunks) {
    constexpr int TURN = WARPS * TOGETHER;
    return (chunks + TURN * PIECES - 1) / (TURN * PIECES) * TURN;
}

constexpr int ROUND = 4 / WORDS;    // tokens of 16 bytes

// How many of a block's tokens are candidates.
__device__ __forceinline__ int count_candidates(const Row& row, int first, int segment) { return max(0, min(segment, row.local_begin - first)); }

// Ask for all of this block's signatures, to shared memory: the warp that opened the inbox, a lane a piece.
__device__ __forceinline__ void ask_keys(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head) {
    int tokens = count_candidates(row, first, segment), all = (tokens + ROUND - 1) / ROUND * ROUND;
    int number = threadIdx.x & 31, piece = piece_of((tokens + CHUNK - 1) / CHUNK) * CHUNK, from = number * piece, bytes = min(piece, all - from) * WORDS * 4;
    if (number >= PIECES || bytes <= 0) return;
    Inbox inbox(s);
    inbox.expect(KEYS + number, bytes);
    inbox.copy(KEYS + number, s.keys + from * WORDS * 4, a.signatures + place_signature(a, request, head, first) + int64_t(from) * WORDS, bytes);
}

// The same from pages, which are short: every thread, 16 bytes at a time, so many that the page numbers of all are on their way at once.
__device__ __forceinline__ void ask_pages(const Arguments& a, Shared& s, const Row& row, int first, int segment, int request, int head) {
    constexpr int EACH = 8;
    int all = (count_candidates(row, first, segment) + ROUND - 1) / ROUND * ROUND;
    for (int begin = threadIdx.x * ROUND; begin < all; begin += THREADS * ROUND * EACH) {
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            int at = begin + u * THREADS * ROUND;
            const uint32_t* from = a.signatures + place_signature(a, request, head, first + min(at, all - ROUND));
            if (at < all) copy_async(s.keys + at * WORDS * 4, from);
        }
    }
}

// How a row's codes turn signatures into entries: an entry is a candidate's score - `base`, kept within 0..127, and any other token's 0.
struct Scorer {
    int lift[MIXED];
    Code code[MIXED];

    __device__ __forceinline__ Scorer(const Words& words, int base) {
#pragma unroll
        for (int c = 0; c < MIXED; c++) lift[c] = raise_of(words, c) - base, code[c].load(words, c);
    }

    __device__ __forceinline__ void find(const uint4 (&key)[LOADS], int (&entry)[TOKENS]) const {
#pragma unroll
        for (int c = 0; c < MIXED; c++) {
            int found[TOKENS];
            code[c].match(key, found);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                if (MIXED == 1) entry[t] = __viaddmin_s32_relu(found[t], lift[c], BINS - 1);
                else entry[t] = c ? __viaddmax_s32(found[t] * SCALE, lift[c], entry[t]) : found[t] * SCALE + lift[c];
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS && MIXED > 1; t++) entry[t] = __vimin_s32_relu(entry[t], BINS - 1);
    }

    // COUNT chunks from `begin` on, WARPS apart, so that one's products run under another's. Where shared memory is to spare,
    // those after the last leave zeros: a condition a store would take longer.
    template <int COUNT>
    __device__ __forceinline__ void enter(Shared& s, const Row& row, const uint4 (*key)[LOADS], int first, int limit, int begin, int chunks) const {
        int lane = threadIdx.x & 31;
        int entry[COUNT][TOKENS];
#pragma unroll
        for (int u = 0; u < COUNT; u++) find(key[u], entry[u]);
        int token = first + begin * CHUNK;
        if (token < row.sink_stop || token + ((COUNT - 1) * WARPS + 1) * CHUNK > limit) {
#pragma unroll
            for (int u = 0; u < COUNT; u++) {
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    int at = token + u * WARPS * CHUNK + (WORDS == 4 ? lane + t * 32 : lane * TOKENS + t);
                    if (at < row.sink_stop || at >= limit) entry[u][t] = 0;
                }
            }
        }
        uint8_t* to = s.scores() + begin * CHUNK;
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
            // Without a branch: what is no candidate counts in bin 0, which nobody reads.
#pragma unroll
            for (int t = 0; t < TOKENS; t++) atomicAdd(s.counts + entry[u][t], 1);
            if (HELD || COUNT == 1 || begin + u * WARPS < chunks) store_entries(to + u * WARPS * CHUNK, entry[u]);
        }
    }
};

// Entries of this block's tokens, and their counts. `loaded`: the first signatures are in `key`.
__device__ __forceinline__ void score(const Arguments& a, Shared& s, const Words& words, const Row& row, int first, int segment, int request, int head, int base, Keys& key, bool loaded) {
    int limit = min(row.local_begin, first + segment), chunks = (max(0, limit - first) + CHUNK - 1) / CHUNK, begin = threadIdx.x >> 5;
    Scorer scorer(words, base);
    if constexpr (HELD) {
        if (PAGED) {
            await_copies();
            __syncthreads();
        }
        // What comes after the last chunk is read as the last.
        int last = ((chunks - 1) * LOADS * 32 + (threadIdx.x & 31)) * 16;
        auto load = [&](int u, uint4 (&key)[LOADS]) {
            const char* from = s.keys + min(((begin + u * WARPS) * LOADS * 32 + int(threadIdx.x & 31)) * 16, last);
#pragma unroll
            for (int l = 0; l < LOADS; l++) key[l] = *reinterpret_cast<const uint4*>(from + l * 512);
        };
        int piece = piece_of(chunks), arrived = 0, number = 0;
#pragma unroll 1
        while (begin < chunks) {
            if (!PAGED && begin >= arrived) Inbox(s).await(KEYS + number++), arrived += piece;
            if (begin + WARPS < chunks) {
                uint4 some[TOGETHER][LOADS];
#pragma unroll
                for (int u = 0; u < TOGETHER; u++) load(u, some[u]);
                scorer.enter<TOGETHER>(s, row, some, first, limit, begin, chunks);
            } else {
                uint4 one[1][LOADS];
                load(0, one[0]);
                scorer.enter<1>(s, row, one, first, limit, begin, chunks);
            }
            begin += TOGETHER * WARPS;
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
__device__ void score_newest(Shared& s, const Words& words, int offset, int base) {
    if (threadIdx.x) return;
    int entry = 0;
#pragma unroll
    for (int c = 0; c < MIXED; c++) {
        int sum = raise_of(words, c) - base;
#pragma unroll
        for (int i = 0; i < SLOTS * WORDS; i++) {
            sum += SCALE * weight_of(i / WORDS) * __popc(words.slot(c, i / WORDS, i % WORDS) & (s.newest()[i % WORDS] ^ words.sign(c, i % WORDS)));
        }
        entry = max(entry, min(BINS - 1, sum));
    }
    s.scores()[offset] = entry;
    if (entry) s.counts[entry]++;
}
#endif
