// What the Python side hands to a kernel, and the table of kernels one instruction set offers.
#pragma once

#include <cstdint>

namespace hashattention {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Token t of request b is row t % size of page table[b * per_row + t / size]; no table: requests are contiguous.
struct Pages {
    const int32_t* table = nullptr;
    int64_t per_row = 0;
    int64_t size = 1;
    int64_t count = 0;
};

// Query codes [B, Hc, 1, 32 W] int8 (or [B, Hc, 1, W] int32 when packed) and signatures [B, Hs, T, W]; the request
// stride is the page stride when paged. Strides count int32 words; the words of successive tokens are adjacent.
struct Codes {
    const void* code = nullptr;
    bool packed = false;
    int64_t batch = 0, heads = 0, signature_heads = 0, selection_heads = 0, words = 0, tokens = 0;
    const int32_t* signatures = nullptr;
    int64_t request_stride = 0, head_stride = 0;
    Pages pages;
};

// Which tokens a request may attend to (start <= t < end, where the mask is set) and its budgets [B, Hsel, 3].
struct Bounds {
    const int32_t* start = nullptr;
    const int32_t* end = nullptr;
    const int32_t* budgets = nullptr;
    const uint8_t* mask = nullptr;
    int64_t mask_stride = 0;
    int64_t capacity = 0;
};

// Indices [B, Hsel, capacity] and counts [B, Hsel], both written whole.
struct Chosen {
    int32_t* indices = nullptr;
    int32_t* counts = nullptr;
};

// Scores [B, Hsel, T] given as they are: int32, or float32 when real.
struct Scores {
    const void* values = nullptr;
    bool real = false;
    int64_t batch = 0, heads = 0, tokens = 0;
};

// A K or V cache [B, H, T, D]: strides in elements, the last dimension adjacent; the request stride is the page stride.
struct Cache {
    const void* values = nullptr;
    int64_t request_stride = 0, head_stride = 0, token_stride = 0, dim = 0;
};

struct Attention {
    const void* query = nullptr;
    Dtype query_dtype = Dtype::float32, cache_dtype = Dtype::float32;
    int64_t query_request_stride = 0, query_head_stride = 0;
    int64_t batch = 0, query_heads = 0, kv_heads = 0, selection_heads = 0, tokens = 0, slots = 0;
    Cache key, value;
    Pages pages;
    const int32_t* indices = nullptr;
    const int32_t* counts = nullptr;
    float scale = 1, softcap = 0;
    void* out = nullptr;
    float* logsumexp = nullptr;
};

// One stage of a map: weights [H, inputs, outputs] and biases [H, outputs], strides in elements between heads.
struct Stage {
    const void* weights = nullptr;
    int64_t weight_stride = 0, inputs = 0, outputs = 0;
    const void* biases = nullptr;
    int64_t bias_stride = 0;
};

// Rows [B, H, T, in] through a map: int8 codes and their scales, or packed signs where levels is 0. The input's strides
// count elements; the rows of successive tokens are adjacent.
struct Encoding {
    static constexpr int most_stages = 4;
    const void* input = nullptr;
    Dtype input_dtype = Dtype::float32;
    int64_t request_stride = 0, head_stride = 0, batch = 0, heads = 0, tokens = 0;
    Stage stage[most_stages];
    int stages = 0;
    Dtype dtype = Dtype::float32, bias_dtype = Dtype::float32;
    int levels = 0;
    void* out = nullptr;
    float* scales = nullptr;
};

struct Kernels {
    const char* name;
    void (*encode)(const Encoding&);
    void (*pack)(const float* logits, int64_t rows, int64_t bits, int32_t* words);
    void (*score)(const Codes&, int32_t* out);
    void (*select)(const Scores&, const Bounds&, const Chosen&);
    void (*score_select)(const Codes&, const Bounds&, const Chosen&);
    void (*attend)(const Attention&);
    void (*decode)(Encoding, Codes, const Bounds&, Attention, const Encoding* key);
};

extern const Kernels plain_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace hashattention
