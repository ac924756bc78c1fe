// Runs the kernels of one instruction set on exactly sized heap buffers and compares them with loops that follow the
// definitions. Built with address and undefined-behaviour sanitizers by test_sanitize.py.
#define HASHATTENTION_ISA hashattention_sanitized
#include "isa.hpp"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));

using namespace hashattention;
namespace kernels = hashattention_sanitized;

static std::mt19937 engine(7);
static int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
static long allocations = 0;
static int failures = 0;

template <class T>
static std::unique_ptr<T[]> fill(int64_t count, int64_t low, int64_t high) {
    std::unique_ptr<T[]> values(new T[count]);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(draw(low, high));
    return values;
}

static void expect(bool holds, const char* what) {
    if (!holds) ++failures, std::printf("wrong: %s\n", what);
}

static void check_score_select() {
    Codes codes;
    const int64_t share = draw(1, 3);
    codes.batch = draw(1, 2), codes.signature_heads = draw(1, 2), codes.heads = codes.signature_heads * share;
    codes.selection_heads = draw(0, 1) ? codes.heads : codes.signature_heads;
    codes.words = draw(1, 8);
    const int64_t size = draw(1, 40), per_row = draw(1, 40);
    codes.tokens = draw(0, 1) ? size * per_row : draw(1, 12000);
    const bool paged = codes.tokens == size * per_row;
    const int64_t pages = codes.batch * per_row + 1, bits = 32 * codes.words;
    const int64_t rows = codes.batch * codes.selection_heads, capacity = draw(1, codes.tokens + 3);
    const int64_t level = draw(0, 3) ? draw(1, 7) : 127;
    codes.packed = draw(0, 2) == 0;
    auto code = fill<int8_t>(codes.batch * codes.heads * bits, -level, level);
    auto packed = fill<int32_t>(codes.batch * codes.heads * codes.words, INT32_MIN, INT32_MAX);
    codes.code = codes.packed ? static_cast<void*>(packed.get()) : code.get();
    auto table = fill<int32_t>(codes.batch * per_row, 0, pages - 1);
    const int64_t count = (paged ? pages * size : codes.batch * codes.tokens) * codes.signature_heads * codes.words;
    auto signatures = fill<int32_t>(count, INT32_MIN, INT32_MAX);
    codes.signatures = signatures.get();
    codes.head_stride = (paged ? size : codes.tokens) * codes.words;
    codes.request_stride = codes.signature_heads * codes.head_stride;
    if (paged) codes.pages = {table.get(), per_row, size, pages};
    auto start = fill<int32_t>(codes.batch, 0, codes.tokens), end = fill<int32_t>(codes.batch, 0, codes.tokens);
    auto budgets = fill<int32_t>(rows * 3, 0, codes.tokens / 2 + 1);
    auto mask = fill<uint8_t>(codes.batch * codes.tokens, 0, 1);
    Bounds bounds{start.get(), end.get(), budgets.get(), draw(0, 1) ? mask.get() : nullptr, codes.tokens, capacity};
    std::unique_ptr<int32_t[]> indices(new int32_t[rows * capacity]), counts(new int32_t[rows]);
    std::unique_ptr<int32_t[]> scores(new int32_t[rows * codes.tokens]);
    kernels::score(codes, scores.get());
    const auto word_of = [&](int64_t b, int64_t head, int64_t t, int64_t w) {
        const int64_t at = paged ? (table[b * per_row + t / size] * codes.signature_heads + head) * size + t % size
                                 : (b * codes.signature_heads + head) * codes.tokens + t;
        return static_cast<uint32_t>(signatures[at * codes.words + w]);
    };
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t t = 0; t < codes.tokens; t += 97) {
            const int64_t b = row / codes.selection_heads, each = codes.heads / codes.selection_heads;
            int64_t sum = 0;
            for (int64_t h = row % codes.selection_heads * each, last = h + each; h < last; ++h)
                for (int64_t j = 0; j < bits; ++j) {
                    const int64_t at = b * codes.heads + h;
                    const bool sign = static_cast<uint32_t>(packed[at * codes.words + j / 32]) >> (j % 32) & 1;
                    const int64_t weight = codes.packed ? (sign ? 1 : -1) : code[at * bits + j];
                    const uint32_t word = word_of(b, h * codes.signature_heads / codes.heads, t, j / 32);
                    sum += (word >> (j % 32) & 1) != 0 ? weight : -weight;
                }
            expect(scores[row * codes.tokens + t] == sum, "score");
        }
    kernels::score_select(codes, bounds, {indices.get(), counts.get()});
    std::unique_ptr<int32_t[]> again(new int32_t[rows * capacity]), again_counts(new int32_t[rows]);
    const Scores given{scores.get(), false, codes.batch, codes.selection_heads, codes.tokens};
    kernels::select(given, bounds, {again.get(), again_counts.get()});
    expect(std::equal(indices.get(), indices.get() + rows * capacity, again.get()), "score_select = select of score");
    expect(std::equal(counts.get(), counts.get() + rows, again_counts.get()), "counts");
    const long before = allocations;
    kernels::score_select(codes, bounds, {indices.get(), counts.get()});
    expect(allocations == before, "score_select allocates nothing the second time");
}

template <class Value>
static void check_attend(Dtype dtype) {
    Attention a;
    const int64_t share = draw(1, 9);
    a.batch = draw(1, 2), a.kv_heads = draw(1, 2), a.query_heads = a.kv_heads * share;
    a.selection_heads = draw(0, 1) ? a.query_heads : a.kv_heads;
    a.tokens = draw(1, 400), a.slots = draw(1, 300);
    a.query_dtype = a.cache_dtype = dtype;
    a.key.dim = draw(1, 140), a.value.dim = draw(1, 140);
    const auto values = [](int64_t count) {
        std::unique_ptr<Value[]> made(new Value[count]);
        for (int64_t i = 0; i < count; ++i) kernels::narrow(static_cast<float>(draw(-100, 100)) / 64, &made[i]);
        return made;
    };
    const int64_t rows = a.batch * a.selection_heads;
    auto query = values(a.batch * a.query_heads * a.key.dim);
    auto key = values(a.batch * a.kv_heads * a.tokens * a.key.dim);
    auto value = values(a.batch * a.kv_heads * a.tokens * a.value.dim);
    a.query = query.get(), a.query_head_stride = a.key.dim, a.query_request_stride = a.key.dim * a.query_heads;
    for (Cache* cache : {&a.key, &a.value}) {
        cache->values = cache == &a.key ? key.get() : value.get();
        cache->token_stride = cache->dim;
        cache->head_stride = a.tokens * cache->dim, cache->request_stride = a.kv_heads * cache->head_stride;
    }
    auto indices = fill<int32_t>(rows * a.slots, 0, a.tokens - 1), counts = fill<int32_t>(rows, 0, a.slots);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = counts[row]; i < a.slots; ++i) indices[row * a.slots + i] = INT32_MIN;
    a.indices = indices.get(), a.counts = counts.get(), a.scale = 0.3f, a.softcap = draw(0, 1) ? 0.0f : 20.0f;
    std::unique_ptr<Value[]> out(new Value[a.batch * a.query_heads * a.value.dim]);
    std::unique_ptr<float[]> logsumexp(new float[a.batch * a.query_heads]);
    a.out = out.get(), a.logsumexp = logsumexp.get();
    kernels::attend(a);
    for (int64_t head = 0; head < a.batch * a.query_heads; ++head) {
        const int64_t row = head * a.selection_heads / a.query_heads, kv = head * a.kv_heads / a.query_heads;
        std::vector<double> weight(counts[row]);
        for (int64_t i = 0; i < counts[row]; ++i) {
            const Value* k = key.get() + (kv * a.tokens + indices[row * a.slots + i]) * a.key.dim;
            double logit = 0;
            for (int64_t d = 0; d < a.key.dim; ++d)
                logit += static_cast<double>(kernels::widen(query[head * a.key.dim + d])) * kernels::widen(k[d]);
            logit *= a.scale;
            weight[i] = exp(a.softcap != 0 ? a.softcap * tanh(logit / a.softcap) : logit);
        }
        const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
        if (counts[row] > 0) expect(fabs(logsumexp[head] - log(total)) < 1e-4, "logsumexp");
        for (int64_t d = 0; d < a.value.dim; ++d) {
            double sum = 0;
            for (int64_t i = 0; i < counts[row]; ++i) {
                const Value* v = value.get() + (kv * a.tokens + indices[row * a.slots + i]) * a.value.dim;
                sum += weight[i] / total * kernels::widen(v[d]);
            }
            const double unit = dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float16 ? 2e-3 : 1.6e-2;
            expect(fabs(kernels::widen(out[head * a.value.dim + d]) - sum) < unit, "attend");
        }
    }
    const long before = allocations;
    kernels::attend(a);
    expect(allocations == before, "attend allocates nothing the second time");
}

static void check_encode() {
    Encoding e;
    e.batch = draw(1, 2), e.heads = draw(1, 3), e.tokens = draw(1, 2), e.stages = static_cast<int>(draw(1, 4));
    e.levels = static_cast<int>(draw(0, 1) * 7);
    std::vector<int64_t> widths;
    for (int s = 0; s < e.stages; ++s) widths.push_back(draw(1, 70));
    widths.push_back(32 * draw(1, 3));
    const auto real = [](int64_t count) {
        std::unique_ptr<float[]> values(new float[count]);
        for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(draw(-100, 100)) / 128;
        return values;
    };
    const int64_t rows = e.batch * e.heads * e.tokens, bits = widths.back();
    auto input = real(rows * widths[0]);
    std::vector<std::unique_ptr<float[]>> weights, biases;
    for (int s = 0; s < e.stages; ++s) {
        weights.push_back(real(e.heads * widths[s] * widths[s + 1])), biases.push_back(real(e.heads * widths[s + 1]));
        e.stage[s] = {weights[s].get(), widths[s] * widths[s + 1], widths[s], widths[s + 1], biases[s].get(), widths[s + 1]};
    }
    std::unique_ptr<int8_t[]> code(new int8_t[rows * bits]);
    std::unique_ptr<int32_t[]> words(new int32_t[rows * bits / 32]);
    std::unique_ptr<float[]> scales(new float[rows]);
    e.input = input.get(), e.request_stride = e.heads * e.tokens * widths[0];
    e.head_stride = e.tokens * widths[0], e.scales = scales.get();
    e.out = e.levels > 0 ? static_cast<void*>(code.get()) : words.get();
    kernels::encode(e);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = row / e.tokens % e.heads;
        std::vector<double> x(input.get() + row * widths[0], input.get() + (row + 1) * widths[0]);
        for (int s = 0; s < e.stages; ++s) {
            std::vector<double> next(widths[s + 1]);
            for (int64_t o = 0; o < widths[s + 1]; ++o) {
                next[o] = biases[s][head * widths[s + 1] + o];
                for (int64_t i = 0; i < widths[s]; ++i)
                    next[o] += x[i] * weights[s][(head * widths[s] + i) * widths[s + 1] + o];
                if (s + 1 < e.stages) next[o] /= 1 + exp(-next[o]);
            }
            x = next;
        }
        double largest = 0;
        for (double logit : x) largest = std::max(largest, fabs(logit));
        for (int64_t j = 0; j < bits; ++j) {
            const bool bit = static_cast<uint32_t>(words[row * bits / 32 + j / 32]) >> (j % 32) & 1;
            if (e.levels == 0)
                expect(bit == (x[j] > 0) || fabs(x[j]) < 1e-4 * largest, "sign");
            else
                expect(fabs(code[row * bits + j] - x[j] / largest * e.levels) < 0.501, "code");
        }
    }
    const long before = allocations;
    kernels::encode(e);
    expect(allocations == before, "encode allocates nothing the second time");
}

// The fused step against its parts, on rows long enough to be searched for their cut.
static void check_decode() {
    const int64_t words = draw(1, 3), tokens = draw(0, 2) ? draw(1, 9000) : draw(8192, 20000), capacity = draw(1, 300);
    Encoding e;
    e.batch = draw(1, 2), e.heads = draw(1, 3), e.tokens = 1, e.stages = 1, e.levels = static_cast<int>(draw(0, 1) * 7);
    const int64_t inputs = draw(1, 40), bits = 32 * words, rows = e.batch * e.heads;
    auto input = fill<float>(rows * inputs, -9, 9), weights = fill<float>(e.heads * inputs * bits, -9, 9);
    auto biases = fill<float>(e.heads * bits, -9, 9);
    e.input = input.get(), e.request_stride = e.heads * inputs, e.head_stride = inputs;
    e.stage[0] = {weights.get(), inputs * bits, inputs, bits, biases.get(), bits};
    Codes codes;
    codes.batch = e.batch, codes.heads = codes.signature_heads = codes.selection_heads = e.heads;
    codes.words = words, codes.tokens = tokens;
    auto signatures = fill<int32_t>(rows * tokens * words, INT32_MIN, INT32_MAX);
    codes.signatures = signatures.get(), codes.head_stride = tokens * words, codes.request_stride = e.heads * tokens * words;
    auto start = fill<int32_t>(e.batch, 0, tokens / 9), end = fill<int32_t>(e.batch, 0, tokens);
    auto budgets = fill<int32_t>(rows * 3, 0, capacity);
    const Bounds bounds{start.get(), end.get(), budgets.get(), nullptr, 0, capacity};
    Attention a;
    a.batch = e.batch, a.kv_heads = a.selection_heads = e.heads, a.query_heads = 2 * e.heads, a.tokens = tokens;
    a.key.dim = draw(1, 40), a.value.dim = draw(1, 40);
    auto query = fill<float>(2 * rows * a.key.dim, -2, 2);
    auto key = fill<float>(rows * tokens * a.key.dim, -2, 2), value = fill<float>(rows * tokens * a.value.dim, -2, 2);
    a.query = query.get(), a.query_head_stride = a.key.dim, a.query_request_stride = a.key.dim * a.query_heads;
    a.key = {key.get(), e.heads * tokens * a.key.dim, tokens * a.key.dim, a.key.dim, a.key.dim};
    a.value = {value.get(), e.heads * tokens * a.value.dim, tokens * a.value.dim, a.value.dim, a.value.dim};
    std::unique_ptr<float[]> out(new float[2 * rows * a.value.dim]), again(new float[2 * rows * a.value.dim]);
    std::unique_ptr<float[]> logsumexp(new float[2 * rows]), scales(new float[rows]);
    a.out = out.get(), a.logsumexp = logsumexp.get();
    Encoding key_map = e;
    key_map.levels = 0;
    kernels::decode(e, codes, bounds, a, &key_map);
    const long before = allocations;
    kernels::decode(e, codes, bounds, a, &key_map);
    expect(allocations == before, "decode allocates nothing the second time");
    std::unique_ptr<int32_t[]> code(new int32_t[rows * 8 * words]), indices(new int32_t[rows * capacity]);
    std::unique_ptr<int32_t[]> counts(new int32_t[rows]);
    key_map.out = code.get();
    kernels::encode(key_map);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t w = 0, last = end[row / e.heads] - 1; last >= 0 && w < words; ++w)
            expect(signatures[(row * tokens + last) * words + w] == code[row * words + w], "the newest key is signed");
    e.out = code.get(), e.scales = scales.get(), codes.code = code.get(), codes.packed = e.levels == 0;
    kernels::encode(e);
    kernels::score_select(codes, bounds, {indices.get(), counts.get()});
    a.indices = indices.get(), a.counts = counts.get(), a.slots = capacity, a.out = again.get();
    kernels::attend(a);
    expect(std::equal(out.get(), out.get() + 2 * rows * a.value.dim, again.get()), "decode = its parts");
}

int main() {
    __sanitizer_install_malloc_and_free_hooks([](const volatile void*, size_t) { ++allocations; },
                                              [](const volatile void*) {});
    for (int turn = 0; turn < 60; ++turn) check_score_select();
    for (int turn = 0; turn < 60; ++turn) check_encode();
    for (int turn = 0; turn < 40; ++turn) check_decode();
    for (int turn = 0; turn < 15; ++turn) {
        check_attend<float>(Dtype::float32);
        check_attend<kernels::bfloat16>(Dtype::bfloat16);
        check_attend<kernels::float16>(Dtype::float16);
    }
    std::printf("%d failures, %ld allocations seen\n", failures, allocations);
    return failures == 0 && allocations > 0 ? 0 : 1;
}
