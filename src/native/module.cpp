// The Python module: raw addresses and sizes in, nothing allocated; the Python side has checked shapes and owns memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define HASHATTENTION_ISA hashattention_module
#include "kernels.hpp"
#include "remainder.hpp"

namespace nb = nanobind;
using namespace hashattention;

namespace {

// Best first.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) found.push_back(&avx512_kernels);
    if (avx2) found.push_back(&avx2_kernels);
#endif
    found.push_back(&plain_kernels);
    return found;
}

std::atomic<const Kernels*> active{runnable().front()};

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : runnable()) names.emplace_back(kernels->name);
    return names;
}

void use(const std::string& name) {
    for (const Kernels* kernels : runnable())
        if (name == kernels->name) {
            active = kernels;
            return;
        }
    throw std::invalid_argument("this processor has no " + name + " kernels");
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct Shape {
    int64_t batch, heads, signature_heads, selection_heads, words, tokens;
};

Codes make_codes(uintptr_t code, bool packed, const Shape& shape, uintptr_t signatures, int64_t request_stride,
                 int64_t head_stride, const Pages& pages) {
    Codes codes;
    codes.code = at<const void>(code);
    codes.packed = packed;
    codes.batch = shape.batch, codes.heads = shape.heads, codes.signature_heads = shape.signature_heads;
    codes.selection_heads = shape.selection_heads, codes.words = shape.words, codes.tokens = shape.tokens;
    codes.signatures = at<const int32_t>(signatures);
    codes.request_stride = request_stride, codes.head_stride = head_stride;
    codes.pages = pages;
    return codes;
}

Bounds make_bounds(uintptr_t start, uintptr_t end, uintptr_t budgets, uintptr_t mask, int64_t mask_stride,
                   int64_t capacity) {
    return {at<const int32_t>(start), at<const int32_t>(end), at<const int32_t>(budgets),
            at<const uint8_t>(mask),  mask_stride,            capacity};
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of hashattention.";
    nb::class_<Shape>(m, "Shape").def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>());
    nb::class_<Pages>(m, "Pages").def(
        "__init__", [](Pages* self, uintptr_t table, int64_t per_row, int64_t size, int64_t count) {
            new (self) Pages{at<const int32_t>(table), per_row, size, count};
        });
    nb::class_<Bounds>(m, "Bounds").def("__init__", [](Bounds* self, uintptr_t start, uintptr_t end, uintptr_t budgets,
                                                       uintptr_t mask, int64_t mask_stride, int64_t capacity) {
        new (self) Bounds(make_bounds(start, end, budgets, mask, mask_stride, capacity));
    });
    nb::class_<Cache>(m, "Cache").def("__init__", [](Cache* self, uintptr_t values, int64_t request_stride,
                                                     int64_t head_stride, int64_t token_stride, int64_t dim) {
        new (self) Cache{at<const void>(values), request_stride, head_stride, token_stride, dim};
    });
    nb::class_<Codes>(m, "Codes").def(
        "__init__", [](Codes* self, uintptr_t code, bool packed, const Shape& shape, uintptr_t signatures,
                       int64_t request_stride, int64_t head_stride, const Pages& pages) {
            new (self) Codes(make_codes(code, packed, shape, signatures, request_stride, head_stride, pages));
        });

    m.def("instruction_sets", &instruction_sets, "Instruction sets this processor can run, best first.");
    m.def("active", [] { return std::string(active.load()->name); }, "The instruction set in use.");
    m.def("use", &use, "Use the kernels of one instruction set (for tests).");
    nb::class_<Stage>(m, "Stage").def(
        "__init__", [](Stage* self, uintptr_t weights, int64_t weight_stride, int64_t inputs, int64_t outputs,
                       uintptr_t biases, int64_t bias_stride) {
            new (self) Stage{at<const void>(weights), weight_stride, inputs, outputs, at<const void>(biases), bias_stride};
        });
    nb::class_<Encoding>(m, "Encoding").def(
        "__init__", [](Encoding* self, uintptr_t input, int input_dtype, int64_t request_stride, int64_t head_stride,
                       int64_t batch, int64_t heads, int64_t tokens, const std::vector<Stage>& stages, int dtype,
                       int bias_dtype, int levels) {
            if (stages.empty() || stages.size() > Encoding::most_stages) throw std::invalid_argument("1 to 4 stages");
            Encoding* e = new (self) Encoding();
            e->input = at<const void>(input), e->input_dtype = static_cast<Dtype>(input_dtype);
            e->request_stride = request_stride, e->head_stride = head_stride, e->batch = batch, e->heads = heads, e->tokens = tokens;
            for (const Stage& stage : stages) e->stage[e->stages++] = stage;
            e->dtype = static_cast<Dtype>(dtype), e->bias_dtype = static_cast<Dtype>(bias_dtype), e->levels = levels;
        });
    nb::class_<Attention>(m, "Attention").def(
        "__init__",
        [](Attention* self, uintptr_t query, int query_dtype, int64_t query_request_stride, int64_t query_head_stride,
           int cache_dtype, int64_t batch, int64_t query_heads, int64_t kv_heads, int64_t selection_heads,
           int64_t tokens, const Cache& key, const Cache& value, const Pages& pages, float scale, float softcap,
           uintptr_t out, uintptr_t logsumexp) {
            Attention* a = new (self) Attention();
            a->query = at<const void>(query);
            a->query_dtype = static_cast<Dtype>(query_dtype), a->cache_dtype = static_cast<Dtype>(cache_dtype);
            a->query_request_stride = query_request_stride, a->query_head_stride = query_head_stride;
            a->batch = batch, a->query_heads = query_heads, a->kv_heads = kv_heads;
            a->selection_heads = selection_heads, a->tokens = tokens;
            a->key = key, a->value = value, a->pages = pages;
            a->scale = scale, a->softcap = softcap;
            a->out = at<void>(out), a->logsumexp = at<float>(logsumexp);
        });
    m.def(
        "encode",
        [](Encoding e, uintptr_t out, uintptr_t scales) {
            e.out = at<void>(out), e.scales = at<float>(scales);
            active.load()->encode(e);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "pack",
        [](uintptr_t logits, int64_t rows, int64_t bits, uintptr_t words) {
            active.load()->pack(at<const float>(logits), rows, bits, at<int32_t>(words));
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "score", [](const Codes& codes, uintptr_t out) { active.load()->score(codes, at<int32_t>(out)); },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "select",
        [](uintptr_t values, bool real, int64_t batch, int64_t heads, int64_t tokens, const Bounds& bounds,
           uintptr_t indices, uintptr_t counts) {
            const Scores scores{at<const void>(values), real, batch, heads, tokens};
            active.load()->select(scores, bounds, {at<int32_t>(indices), at<int32_t>(counts)});
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "score_select",
        [](const Codes& codes, const Bounds& bounds, uintptr_t indices, uintptr_t counts) {
            active.load()->score_select(codes, bounds, {at<int32_t>(indices), at<int32_t>(counts)});
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "attend",
        [](Attention a, uintptr_t indices, uintptr_t counts, int64_t slots) {
            a.indices = at<const int32_t>(indices), a.counts = at<const int32_t>(counts), a.slots = slots;
            active.load()->attend(a);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "add_remainder",
        [](uintptr_t out, int dtype, uintptr_t logsumexp, std::tuple<uintptr_t, int64_t, int64_t> query,
           std::tuple<uintptr_t, int64_t, int64_t> sums, uintptr_t taken, uintptr_t lengths, uintptr_t coefficients,
           std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, float scale, float softcap,
           uintptr_t mixed) {
            const auto [q, q_request, q_head] = query;
            const auto [s, s_request, s_head] = sums;
            const auto [batch, heads, kv_heads, selection_heads, dim, value_dim] = sizes;
            const hashattention_module::Remainder r{
                at<const void>(q),         q_request,    q_head,
                at<const float>(s),        at<const float>(logsumexp), at<const float>(coefficients),
                s_request,                 s_head,       at<const int32_t>(taken),
                at<const int32_t>(lengths), batch,       heads,
                kv_heads,                  selection_heads, dim,
                value_dim,                 scale,        softcap};
            hashattention_module::with_values(static_cast<Dtype>(dtype), at<const void>(out), [&](const auto* values) {
                using Value = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
                hashattention_module::add_remainder(r, values, at<Value>(mixed));
            });
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "decode",
        [](const Encoding& e, const Codes& codes, const Bounds& bounds, const Attention& a, const Encoding* key) {
            active.load()->decode(e, codes, bounds, a, key);
        },
        nb::arg("encoding"), nb::arg("codes"), nb::arg("bounds"), nb::arg("attention"), nb::arg("key").none(),
        nb::call_guard<nb::gil_scoped_release>());
}
