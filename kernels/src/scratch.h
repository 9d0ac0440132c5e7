// Memory that the layers of a session share: they run one after the other.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace kernels {

// Grows as needed and keeps what it has. Aligned to cache lines; what it holds is lost when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Begins a new call: what was taken before is taken back.
  void Reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = static_cast<char*>(std::aligned_alloc(kLine, Rounded(bytes)));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = Rounded(bytes);
  }

  template <class T>
  T* Take(size_t count) {
    char* taken = memory_ + used_;
    used_ += Rounded(count * sizeof(T));
    return reinterpret_cast<T*>(taken);
  }

  // What `Take` of so many things needs.
  template <class T>
  static size_t Need(size_t count) {
    return Rounded(count * sizeof(T));
  }

 private:
  static constexpr size_t kLine = 64;
  static size_t Rounded(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  char* memory_ = nullptr;
  size_t size_ = 0;
  size_t used_ = 0;
};

}  // namespace kernels
