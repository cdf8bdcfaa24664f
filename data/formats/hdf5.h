#pragma once
// Handles of the HDF5 C API that close themselves, and one check for its status codes.
#include <fmt/format.h>
#include <hdf5.h>

#include <string>
#include <utility>

#include "kernels/core/error.h"

namespace data {

// The library's own messages are silenced, and it does not clean up at exit: after a failed write that
// crashes.
inline void quiet_hdf5() {
  static const bool once = [] {
    H5dont_atexit();
    H5open();
    return true;
  }();
  (void)once;
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // the error stack is one per thread
}

class Hdf5Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Hdf5Handle(hid_t id, Close close, const std::string& what) : id_(id), close_(close) {
    if (id < 0) throw kernels::DataError(what);
  }
  ~Hdf5Handle() {
    if (id_ >= 0) close_(id_);
  }
  Hdf5Handle(Hdf5Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Hdf5Handle& operator=(Hdf5Handle&&) = delete;
  hid_t get() const { return id_; }

 private:
  hid_t id_;
  Close close_;
};

inline void hdf5_check(herr_t status, const std::string& what) {
  if (status < 0) throw kernels::DataError(what);
}

}  // namespace data
