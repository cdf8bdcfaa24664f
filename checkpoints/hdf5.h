#pragma once
// HDF5 handles that close themselves, and the one check of its status codes.
#include <hdf5.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/core/error.h"
#include "kernels/core/tensor.h"

namespace checkpoints::hdf5 {

inline constexpr int64_t kSlabBytes = int64_t{1} << 20;

// Turns off the library's own error printing (a setting of the thread) and its clean-up at exit, which
// crashes after a write that failed. Before the first call in each function that enters from outside.
void prepare_thread();
bool is_thread_safe();

// Throws CheckpointError("<what>: <the library's innermost reason>") for a negative status; where that is a
// call of the system's, as fail_system does.
void check(int64_t status, const std::string& what);

class Id {
 public:
  using Close = herr_t (*)(hid_t);
  Id(hid_t id, Close close, const std::string& what) : id_(id), close_(close) { check(id, what); }
  Id(Id&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Id& operator=(Id&&) = delete;
  ~Id() {
    if (id_ >= 0) close_(id_);
  }
  operator hid_t() const { return id_; }
  // Closes and reports a failure: that of a file is the only sign of a disk that was full.
  void close(const std::string& what) { check(close_(std::exchange(id_, -1)), what); }

 private:
  hid_t id_;
  Close close_;
};

Id file_access();  // properties: earliest format, no lock files
// The element type in the file, the same on every machine.
hid_t type_of(kernels::DType dtype);
Id simple_space(const std::vector<hsize_t>& dims);
std::vector<hsize_t> dims_of(const kernels::Shape& shape);
// The parts in which a tensor is stored, written and read: neighbours, at most 1 MiB (kSlabBytes), of nearly
// equal size, so that the last of them, stored as large as the others, wastes little.
std::vector<hsize_t> slab_of(const kernels::Shape& shape, kernels::DType dtype);
// Selects rows [begin, begin + count) of the dataset's space.
void select_rows(hid_t space, const std::vector<hsize_t>& dims, int64_t begin, int64_t count);

}  // namespace checkpoints::hdf5
