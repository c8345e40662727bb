#include "kernels/memory.h"

#include <cstdlib>
#include <new>

namespace chatglm {

Scratch::~Scratch() {
    std::free(buffer_);
}

void* Scratch::at_least(size_t bytes) {
    if (bytes > size_) {
        constexpr size_t kAlignment = 64;
        const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        std::free(buffer_);
        size_ = 0;
        buffer_ = std::aligned_alloc(kAlignment, rounded);
        if (buffer_ == nullptr) throw std::bad_alloc();
        size_ = rounded;
    }
    return buffer_;
}

}  // namespace chatglm
