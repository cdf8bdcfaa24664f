#include <fmt/format.h>

#include <algorithm>

#include "checkpoints/hdf5.h"
#include "checkpoints/shard.h"

namespace checkpoints {

using hdf5::check;
using hdf5::Id;
using kernels::DType;

struct ShardWriter::Impl {
  Path path;
  Id file;
};

namespace {

// The format allows 64 KiB for an attribute; longer text and text with zero bytes becomes a dataset.
constexpr size_t kLongestAttribute = 32 << 10;

bool fits_attribute(const std::string& text) {
  return !text.empty() && text.size() <= kLongestAttribute && text.find('\0') == std::string::npos;
}

void write_attribute(hid_t object, const std::string& name, hid_t type, hid_t space, const void* value) {
  const Id attribute(H5Acreate2(object, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose,
                     "attribute " + name);
  check(H5Awrite(attribute, type, value), "attribute " + name);
}

void write_integers(hid_t object, const std::string& name, const std::vector<int64_t>& values) {
  const Id space = hdf5::simple_space({values.size()});
  write_attribute(object, name, H5T_STD_I64LE, space, values.data());
}

Id create_properties(const Dataset& dataset) {
  Id properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "HDF5 dataset properties");
  check(H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER), "HDF5 fill time");
  check(H5Pset_obj_track_times(properties, false), "HDF5 times");
  const int64_t element = static_cast<int64_t>(kernels::size_of(dataset.dtype));
  if (dataset.shape.numel() * element <= hdf5::kSlabBytes) return properties;
  const std::vector<hsize_t> chunk = hdf5::slab_of(dataset.shape, dataset.dtype);
  check(H5Pset_chunk(properties, static_cast<int>(chunk.size()), chunk.data()), "HDF5 chunks");
  return properties;
}

Id link_properties() {
  Id properties(H5Pcreate(H5P_LINK_CREATE), H5Pclose, "HDF5 link properties");
  check(H5Pset_create_intermediate_group(properties, 1), "HDF5 groups");
  return properties;
}

Id create_file(const Path& path) {
  hdf5::prepare_thread();
  const Id access = hdf5::file_access();
  return Id(H5Fcreate(path.c_str(), H5F_ACC_EXCL, H5P_DEFAULT, access), H5Fclose,
            "cannot create " + path.string());
}

}  // namespace

ShardWriter::ShardWriter(const Path& path) : impl_(new Impl{path, create_file(path)}) {}
ShardWriter::~ShardWriter() = default;

void ShardWriter::write(const Attributes& attributes) {
  const Id scalar(H5Screate(H5S_SCALAR), H5Sclose, "HDF5 space");
  for (const auto& [name, value] : attributes.integers)
    write_attribute(impl_->file, name, H5T_STD_I64LE, scalar, &value);
  for (const auto& [name, text] : attributes.text) {
    const auto length = static_cast<int64_t>(text.size());
    if (!fits_attribute(text)) {
      write({fmt::format("{}/{}", kAttributeGroup, name), DType::u8, {length}, {length}},
            reinterpret_cast<const std::byte*>(text.data()));
      continue;
    }
    const Id type(H5Tcopy(H5T_C_S1), H5Tclose, "HDF5 text");
    check(H5Tset_size(type, text.size()), "HDF5 text");
    check(H5Tset_strpad(type, H5T_STR_NULLPAD), "HDF5 text");
    check(H5Tset_cset(type, H5T_CSET_UTF8), "HDF5 text");
    write_attribute(impl_->file, name, type, scalar, text.data());
  }
}

void ShardWriter::write(const Dataset& dataset, const std::byte* data) {
  const std::string what = fmt::format("{}: cannot write {}", impl_->path.string(), dataset.name);
  const std::vector<hsize_t> dims = hdf5::dims_of(dataset.shape);
  const hid_t type = hdf5::type_of(dataset.dtype);
  const Id space = hdf5::simple_space(dims), properties = create_properties(dataset),
           links = link_properties();
  Id set(H5Dcreate2(impl_->file, dataset.name.c_str(), type, space, links, properties, H5P_DEFAULT), H5Dclose,
         what);
  if (!dataset.name.starts_with(kAttributeGroup)) {
    std::vector<int64_t> global;
    for (int i = 0; i < dataset.global_shape.rank(); ++i) global.push_back(dataset.global_shape[i]);
    write_integers(set, "global_shape", global);
    write_integers(set, "rows", {dataset.begin, dataset.begin + dataset.shape[0]});
  }
  const int64_t rows = dataset.shape[0],
                band = static_cast<int64_t>(hdf5::slab_of(dataset.shape, dataset.dtype)[0]);
  const int64_t row_bytes =
      dataset.shape.numel() == 0 ? 0 : checked_bytes(dataset.name, dataset.dtype, dataset.shape) / rows;
  for (int64_t row = 0; row_bytes > 0 && row < rows; row += band) {
    const int64_t count = std::min(band, rows - row);
    hdf5::select_rows(space, dims, row, count);
    std::vector<hsize_t> memory_dims = dims;
    memory_dims[0] = static_cast<hsize_t>(count);
    const Id memory = hdf5::simple_space(memory_dims);
    check(H5Dwrite(set, type, memory, space, H5P_DEFAULT, data + row * row_bytes), what);
  }
  set.close(what);
}

void ShardWriter::close() {
  impl_->file.close(fmt::format("{}: cannot finish writing", impl_->path.string()));
}

}  // namespace checkpoints
