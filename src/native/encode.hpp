// encode: the query or key map of a layer for a few rows, its weights read once, ending in integer codes or packed signs.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "floats.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace HASHATTENTION_ISA {

// out [rows][outputs] = bias + x [rows][inputs] times weights [inputs][outputs], four inputs a turn: the weights stream
// through once and stay in the first cache for all rows.
template <class Value, class Bias>
inline void multiply(const float* x, int64_t rows, int64_t inputs, int64_t outputs, const Value* weights,
                     const Bias* bias, float* out) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < outputs; ++o) out[r * outputs + o] = widen(bias[o]);
    int64_t i = 0;
    for (; i + 4 <= inputs; i += 4) {
        const Value* w = weights + i * outputs;
        // The processor's own prefetching stops at every page.
        const char* ahead = reinterpret_cast<const char*>(w + 8 * outputs);
        for (size_t line = 0; i + 12 <= inputs && line < 4 * sizeof(Value) * static_cast<size_t>(outputs); line += 64)
            __builtin_prefetch(ahead + line);
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = x + r * inputs + i;
            float* sum = out + r * outputs;
            int64_t o = 0;
            for (; o + lanes <= outputs; o += lanes) {
                Floats a = load(sum + o);
                for (int64_t n = 0; n < 4; ++n) a += load(w + n * outputs + o) * from[n];
                store(sum + o, a);
            }
            for (; o < outputs; ++o)
                for (int64_t n = 0; n < 4; ++n) sum[o] += widen(w[n * outputs + o]) * from[n];
        }
    }
    for (; i < inputs; ++i)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t o = 0; o < outputs; ++o) out[r * outputs + o] += widen(weights[i * outputs + o]) * x[r * inputs + i];
}

// x times its logistic function, without overflow on either side.
inline float silu(float x) {
    const float e = expf(x < 0 ? x : -x);
    return x < 0 ? x * e / (1 + e) : x / (1 + e);
}

inline void apply_silu(float* values, int64_t count) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        const Floats x = load(values + i);
        const Ints below = x < 0.0f;
        const Floats e = exp_nonpositive((Floats)((Ints)x | (int32_t)0x80000000));
        const Floats numerator = (Floats)(((Ints)(x * e) & below) | ((Ints)x & ~below));
        store(values + i, numerator / (e + 1.0f));
    }
    for (; i < count; ++i) values[i] = silu(values[i]);
}

inline void pack_signs(const float* logits, int64_t bits, int32_t* words) {
    for (int64_t w = 0; w < bits / 32; ++w) {
        uint32_t word = 0;
        for (int j = 0; j < 32; ++j) word |= static_cast<uint32_t>(logits[32 * w + j] > 0) << j;
        words[w] = static_cast<int32_t>(word);
    }
}

// Integer code with its largest weight at `levels`, rounded to even; NaN gives 0.
inline void round_code(const float* logits, int64_t bits, int levels, int8_t* code, float* scale) {
    float largest = 0;
    for (int64_t j = 0; j < bits; ++j) largest = fabsf(logits[j]) > largest ? fabsf(logits[j]) : largest;
    *scale = largest / static_cast<float>(levels);
    const float divisor = *scale > 1.17549435e-38f ? *scale : 1.17549435e-38f;
    for (int64_t j = 0; j < bits; ++j) {
        const float value = nearbyintf(logits[j] / divisor);
        const float most = static_cast<float>(levels);
        code[j] = static_cast<int8_t>(value >= most ? most : value <= -most ? -most : value == value ? value : 0);
    }
}

inline float* hidden_room(int64_t count) {
    static thread_local Scratch scratch;
    return scratch.room<float>(count);
}

// The logits [rows][bits] of one head; `x` and the two halves of `room` are [rows][widest].
inline float* run_stages(const hashattention::Encoding& e, int64_t head, float* x, float* next) {
    const int64_t rows = e.batch * e.tokens;
    for (int s = 0; s < e.stages; ++s) {
        const hashattention::Stage& stage = e.stage[s];
        with_values(e.dtype, stage.weights, [&](auto* weights) {
            with_values(e.bias_dtype, stage.biases, [&](auto* biases) {
                multiply(x, rows, stage.inputs, stage.outputs, weights + head * stage.weight_stride,
                         biases + head * stage.bias_stride, next);
            });
        });
        if (s + 1 < e.stages) apply_silu(next, rows * stage.outputs);
        float* swapped = x;
        x = next;
        next = swapped;
    }
    return x;
}

// Row r of one head in float32.
inline void read_row(const hashattention::Encoding& e, int64_t r, int64_t head, float* out) {
    const int64_t inputs = e.stage[0].inputs;
    const int64_t at = r / e.tokens * e.request_stride + head * e.head_stride + r % e.tokens * inputs;
    with_values(e.input_dtype, e.input, [&](auto* from) {
        for (int64_t i = 0; i < inputs; ++i) out[i] = widen(from[at + i]);
    });
}

inline void encode(const hashattention::Encoding& e) {
    const int64_t rows = e.batch * e.tokens, bits = e.stage[e.stages - 1].outputs;
    int64_t widest = e.stage[0].inputs, weights = 0;
    for (int s = 0; s < e.stages; ++s) {
        widest = e.stage[s].outputs > widest ? e.stage[s].outputs : widest;
        weights += e.stage[s].inputs * e.stage[s].outputs;
    }
    const int threads = threads_for(4 * e.heads * weights);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t head = 0; head < e.heads; ++head) {
        float* x = hidden_room(2 * rows * widest);
        for (int64_t r = 0; r < rows; ++r) read_row(e, r, head, x + r * e.stage[0].inputs);
        const float* logits = run_stages(e, head, x, x + rows * widest);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (r / e.tokens * e.heads + head) * e.tokens + r % e.tokens;
            if (e.levels > 0)
                round_code(logits + r * bits, bits, e.levels, static_cast<int8_t*>(e.out) + at * bits, e.scales + at);
            else
                pack_signs(logits + r * bits, bits, static_cast<int32_t*>(e.out) + at * (bits / 32));
        }
    }
}

// Signs of `rows` rows of logits.
inline void pack(const float* logits, int64_t rows, int64_t bits, int32_t* words) {
    const int threads = threads_for(4 * rows * bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) pack_signs(logits + r * bits, bits, words + r * (bits / 32));
}

}  // namespace HASHATTENTION_ISA
