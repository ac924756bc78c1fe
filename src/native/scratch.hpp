// Memory a thread keeps between calls: it grows and is never given back, so that a decoding step allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace HASHATTENTION_ISA {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    // Room for `count` values of T, aligned to a cache line; what an earlier call wrote is lost.
    template <class T>
    T* room(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
        if (bytes > size_) {
            // A cache grows by a token a step: half as much again keeps the growths few.
            const size_t larger = (bytes + bytes / 2 + 4095) / 4096 * 4096;
            void* memory = std::aligned_alloc(64, larger);
            if (memory == nullptr) throw std::bad_alloc();
            std::free(memory_);
            memory_ = memory;
            size_ = larger;
        }
        return static_cast<T*>(memory_);
    }

private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace HASHATTENTION_ISA
