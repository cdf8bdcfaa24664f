#pragma once
// A buffer that grows to the largest size asked for and is then reused. Kept per thread by the kernels that
// convert blocks before they multiply them, so that nothing is allocated after the first step.
#include "kernels/core/device.h"

namespace kernels::cpu {

template <typename T>
class Staging {
 public:
  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging() { free_bytes({}, data_); }

  // 64-byte aligned, not initialised; what an earlier call returned is gone.
  T* get(size_t count) {
    if (count > count_) {
      free_bytes({}, data_);
      data_ = nullptr;
      count_ = 0;
      data_ = static_cast<T*>(allocate_bytes({}, count * sizeof(T)));
      count_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace kernels::cpu
