// Scratch memory that grows and is kept.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace chatglm {

// Bytes aligned to 64, not initialized. One object serves one purpose on one thread: declare it thread_local.
class Scratch {
public:
    template <typename T>
    T* get(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            buffer_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)));
            size_ = buffer_ ? bytes : 0;
            if (!buffer_) throw std::bad_alloc();
        }
        return reinterpret_cast<T*>(buffer_.get());
    }

private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> buffer_;
    size_t size_ = 0;
};

}  // namespace chatglm
