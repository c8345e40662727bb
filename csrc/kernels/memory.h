// Scratch memory that grows and is kept.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chatglm {

// Bytes aligned to 64, not initialized. One object serves one purpose on one thread: declare it thread_local.
// Its functions live in memory.cpp: an inline copy from a file compiled for one level might be linked for all.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch();

    template <typename T>
    [[gnu::always_inline]] T* get(int64_t count) {
        return static_cast<T*>(at_least(static_cast<size_t>(count) * sizeof(T)));
    }

private:
    // Throws std::bad_alloc.
    void* at_least(size_t bytes);

    void* buffer_ = nullptr;
    size_t size_ = 0;
};

}  // namespace chatglm
