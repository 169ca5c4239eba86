// Arithmetic and memory layout that ops, CPU and CUDA share: no torch header, usable in host and device code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

// Never a shared copy: the CPU's instruction levels are compiled with different flags, and the linker keeps one copy of
// an inline function for all of them.
#ifdef __CUDACC__
#define NVFP4_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define NVFP4_SHARED_INLINE inline __attribute__((always_inline))
#endif

namespace nvfp4 {

// Of non-negative numbers.
template <class I>
NVFP4_SHARED_INLINE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <class I>
NVFP4_SHARED_INLINE constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}

// What a workspace and each of its arrays are aligned to, in bytes.
constexpr size_t kWorkspaceAlignment = 256;

// Hands out consecutive arrays of a workspace. Over a null base it only counts, so that one function both sizes and
// lays out a workspace.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  // `count` elements, or bytes for T = void; null where only counted. Write sizes as counts of a type rather than as a
  // product with sizeof: a size beyond 64 bits is then noticed here and makes bytes() more than anybody can allocate.
  template <class T>
  T* take(int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    size_t bytes;
    if (__builtin_mul_overflow(count, int64_t{size_of<T>()}, &bytes) || bytes > kTooMany - used_) {
      used_ = kTooMany;
    } else {
      used_ += round_up(bytes, kWorkspaceAlignment);
    }
    return array;
  }

  size_t bytes() const { return used_; }

 private:
  static constexpr size_t kTooMany = size_t{1} << 62;

  template <class T>
  static constexpr size_t size_of() {
    if constexpr (std::is_void_v<T>) {
      return 1;
    } else {
      return sizeof(T);
    }
  }

  char* base_;
  size_t used_ = 0;
};

}  // namespace nvfp4
