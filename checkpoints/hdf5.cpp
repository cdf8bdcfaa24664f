#include "checkpoints/hdf5.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "checkpoints/files.h"

namespace checkpoints::hdf5 {

using kernels::DType;

void prepare_thread() {
  static std::once_flag once;
  std::call_once(once, [] { H5dont_atexit(); });
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

bool is_thread_safe() {
  hbool_t safe = false;
  return H5is_library_threadsafe(&safe) >= 0 && safe;
}

namespace {

// The system's error that the library's file driver ends its reason with; 0 without one.
int system_error_in(const std::string& reason) {
  constexpr std::string_view kLabel = "errno = ";
  const size_t at = reason.rfind(kLabel);  // a file's name stands before it
  return at == std::string::npos ? 0 : std::atoi(reason.c_str() + at + kLabel.size());
}

}  // namespace

void check(int64_t status, const std::string& what) {
  if (status >= 0) return;
  std::string reason = "HDF5 failed";
  const auto innermost = [](unsigned, const H5E_error2_t* error, void* into) -> herr_t {
    if (error->desc && *error->desc) *static_cast<std::string*>(into) = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, innermost, &reason);
  H5Eclear2(H5E_DEFAULT);
  if (const int error = system_error_in(reason)) fail_system(what, error);
  throw kernels::CheckpointError(fmt::format("{}: {}", what, reason));
}

Id file_access() {
  Id access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "HDF5 file properties");
  check(H5Pset_libver_bounds(access, H5F_LIBVER_EARLIEST, H5F_LIBVER_LATEST), "HDF5 format versions");
  check(H5Pset_file_locking(access, false, true), "HDF5 file locking");
  return access;
}

hid_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return H5T_IEEE_F32LE;
    case DType::f64:
      return H5T_IEEE_F64LE;
    case DType::i32:
      return H5T_STD_I32LE;
    case DType::i64:
      return H5T_STD_I64LE;
    case DType::u8:
      return H5T_STD_U8LE;
    default:
      throw kernels::CheckpointError(
          fmt::format("{} tensors are not stored; save their fp32 master", name_of(dtype)));
  }
}

Id simple_space(const std::vector<hsize_t>& dims) {
  return Id(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr), H5Sclose, "HDF5 space");
}

std::vector<hsize_t> dims_of(const kernels::Shape& shape) {
  std::vector<hsize_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(static_cast<hsize_t>(shape[i]));
  return dims;
}

std::vector<hsize_t> slab_of(const kernels::Shape& shape, DType dtype) {
  std::vector<hsize_t> slab = dims_of(shape);
  int64_t budget = kSlabBytes / static_cast<int64_t>(kernels::size_of(dtype));
  for (size_t i = slab.size(); i-- > 0;) {
    const auto length = std::max<int64_t>(static_cast<int64_t>(slab[i]), 1);
    const int64_t most = std::clamp<int64_t>(budget, 1, length), parts = (length + most - 1) / most;
    slab[i] = static_cast<hsize_t>((length + parts - 1) / parts);
    budget /= length;
  }
  return slab;
}

void select_rows(hid_t space, const std::vector<hsize_t>& dims, int64_t begin, int64_t count) {
  std::vector<hsize_t> start(dims.size(), 0), counts = dims;
  start[0] = static_cast<hsize_t>(begin);
  counts[0] = static_cast<hsize_t>(count);
  check(H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, counts.data(), nullptr),
        "HDF5 selection");
}

}  // namespace checkpoints::hdf5
