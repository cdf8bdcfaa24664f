#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "checkpoints/hdf5.h"
#include "checkpoints/shard.h"

namespace checkpoints {

using hdf5::check;
using hdf5::Id;
using kernels::CheckpointError;
using kernels::DType;

struct ShardReader::Impl {
  Path path;
  uint64_t file_bytes;
  Id file;

  [[noreturn]] void refuse(const std::string& name, const std::string& reason) const {
    throw CheckpointError(fmt::format("{}: {} {}", path.string(), name, reason));
  }
  std::string what(const std::string& name) const { return fmt::format("{}: {}", path.string(), name); }
  // Names of the datasets below a group. `links` bounds how many links are followed: groups may form a ring.
  void list(hid_t group, const std::string& prefix, int depth, size_t& links,
            std::set<std::string>& names) const;
  Id open_dataset(const std::string& name, hid_t type) const;
  std::vector<hsize_t> dims(hid_t set, const std::string& name) const;
  std::string text_attribute(hid_t attribute, hid_t type, const std::string& name) const;
};

namespace {

constexpr size_t kDeepest = 64;  // groups within groups
constexpr size_t kMostAttributes = 4096;

struct Links {
  std::vector<std::pair<std::string, H5L_type_t>> found;
  size_t limit;
};

herr_t collect(hid_t, const char* name, const H5L_info_t* info, void* into) {
  auto& links = *static_cast<Links*>(into);
  if (links.found.size() >= links.limit) return 1;
  links.found.emplace_back(name, info->type);
  return 0;
}

Id open_file(const Path& path) {
  hdf5::prepare_thread();
  const Id access = hdf5::file_access();
  return Id(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose, "cannot open " + path.string());
}

}  // namespace

ShardReader::ShardReader(const Path& path)
    : impl_(new Impl{path, regular_file_size(path), open_file(path)}) {}
ShardReader::~ShardReader() = default;

void ShardReader::Impl::list(hid_t group, const std::string& prefix, int depth, size_t& links,
                             std::set<std::string>& names) const {
  if (depth > static_cast<int>(kDeepest)) refuse(prefix, "is nested too deeply");
  Links here{{}, links + 1};
  hsize_t index = 0;
  check(H5Literate(group, H5_INDEX_NAME, H5_ITER_INC, &index, collect, &here), what(prefix));
  if (here.found.size() > links) refuse(prefix, "holds more than the manifest says");
  links -= here.found.size();
  for (const auto& [name, type] : here.found) {
    const std::string full = prefix + name;
    if (type != H5L_TYPE_HARD) refuse(full, "is a soft or external link");
    const Id object(H5Oopen(group, name.c_str(), H5P_DEFAULT), H5Oclose, what(full));
    const H5I_type_t kind = H5Iget_type(object);
    if (kind == H5I_GROUP) {
      list(object, full + "/", depth + 1, links, names);
    } else if (kind == H5I_DATASET) {
      names.insert(full);
    } else {
      refuse(full, "is neither a group nor a dataset");
    }
  }
}

void ShardReader::check_contents(const std::vector<std::string>& datasets) const {
  size_t links = kMostAttributes + kDeepest * datasets.size();
  std::set<std::string> found;
  impl_->list(impl_->file, "", 0, links, found);
  const std::string attributes = fmt::format("{}/", kAttributeGroup);
  for (const std::string& name : datasets)
    if (!found.erase(name)) impl_->refuse(name, "is missing");
  for (const std::string& name : found)
    if (!name.starts_with(attributes) || name.find('/', attributes.size()) != std::string::npos)
      impl_->refuse(name, "is not in the manifest");
}

// A dataset of this type that lies in the file itself, unfiltered and whole.
Id ShardReader::Impl::open_dataset(const std::string& name, hid_t type) const {
  Id set(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose, what(name));
  const Id stored(H5Dget_type(set), H5Tclose, what(name));
  if (H5Tequal(stored, type) <= 0) refuse(name, "has another element type than the manifest says");
  const Id properties(H5Dget_create_plist(set), H5Pclose, what(name));
  const H5D_layout_t layout = H5Pget_layout(properties);
  if (layout != H5D_CHUNKED && layout != H5D_CONTIGUOUS) refuse(name, "is stored in an unknown way");
  if (H5Pget_nfilters(properties) != 0) refuse(name, "is compressed or filtered");
  if (H5Pget_external_count(properties) != 0) refuse(name, "is stored in another file");
  if (layout == H5D_CHUNKED) {
    std::array<hsize_t, kernels::Shape::kMaxRank> chunk{};
    const int rank = H5Pget_chunk(properties, kernels::Shape::kMaxRank, chunk.data());
    hsize_t bytes = H5Tget_size(stored);
    for (int i = 0; i < std::min(rank, kernels::Shape::kMaxRank); ++i)
      if (__builtin_mul_overflow(bytes, chunk[static_cast<size_t>(i)], &bytes)) bytes = file_bytes + 1;
    if (rank < 1 || rank > kernels::Shape::kMaxRank || bytes > file_bytes)
      refuse(name, "has impossible chunks");
  }
  return set;
}

std::vector<hsize_t> ShardReader::Impl::dims(hid_t set, const std::string& name) const {
  const Id space(H5Dget_space(set), H5Sclose, what(name));
  const int rank = H5Sget_simple_extent_ndims(space);
  if (rank < 1 || rank > kernels::Shape::kMaxRank) refuse(name, "has no plain shape");
  std::vector<hsize_t> dims(static_cast<size_t>(rank));
  check(H5Sget_simple_extent_dims(space, dims.data(), nullptr), what(name));
  return dims;
}

void ShardReader::read(const Dataset& expected, const Band& fn) const {
  const std::string what = impl_->what(expected.name);
  const hid_t type = hdf5::type_of(expected.dtype);
  const Id set = impl_->open_dataset(expected.name, type);
  const std::vector<hsize_t> dims = hdf5::dims_of(expected.shape);
  if (impl_->dims(set, expected.name) != dims)
    impl_->refuse(expected.name, "has another shape than the manifest says");
  const int64_t bytes = checked_bytes(expected.name, expected.dtype, expected.shape);
  const hsize_t stored = H5Dget_storage_size(set);
  if (stored < static_cast<hsize_t>(bytes) || stored > impl_->file_bytes)
    impl_->refuse(expected.name, "is not whole");
  if (bytes == 0) return fn(0, {});
  const Id space = hdf5::simple_space(dims);
  const int64_t rows = expected.shape[0],
                band = static_cast<int64_t>(hdf5::slab_of(expected.shape, expected.dtype)[0]);
  std::vector<std::byte> buffer(static_cast<size_t>(band * (bytes / rows)));
  for (int64_t row = 0; row < rows; row += band) {
    const int64_t count = std::min(band, rows - row);
    hdf5::select_rows(space, dims, row, count);
    std::vector<hsize_t> memory_dims = dims;
    memory_dims[0] = static_cast<hsize_t>(count);
    const Id memory = hdf5::simple_space(memory_dims);
    check(H5Dread(set, type, memory, space, H5P_DEFAULT, buffer.data()), what);
    fn(row, std::span(buffer).first(static_cast<size_t>(count * (bytes / rows))));
  }
}

std::string ShardReader::Impl::text_attribute(hid_t attribute, hid_t type, const std::string& name) const {
  constexpr size_t kLongest = 64 << 10;
  const size_t size = H5Tget_size(type);
  if (H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0 || size == 0 || size > kLongest)
    refuse("attribute " + name, "is neither plain text nor a 64-bit integer");
  std::string text(size, '\0');
  check(H5Aread(attribute, type, text.data()), what(name));
  return text;
}

Attributes ShardReader::read_attributes() const {
  Attributes attributes;
  const Id root(H5Gopen2(impl_->file, "/", H5P_DEFAULT), H5Gclose, impl_->what("/"));
  const int count = H5Aget_num_attrs(root);
  check(count, impl_->what("attributes"));
  for (int i = 0; i < count; ++i) {
    const Id attribute(H5Aopen_by_idx(root, ".", H5_INDEX_NAME, H5_ITER_INC, static_cast<hsize_t>(i),
                                      H5P_DEFAULT, H5P_DEFAULT),
                       H5Aclose, impl_->what("attributes"));
    std::array<char, 256> buffer{};
    check(H5Aget_name(attribute, buffer.size(), buffer.data()), impl_->what("attributes"));
    const std::string name = buffer.data();
    const Id type(H5Aget_type(attribute), H5Tclose, impl_->what(name));
    const Id space(H5Aget_space(attribute), H5Sclose, impl_->what(name));
    if (H5Sget_simple_extent_type(space) != H5S_SCALAR)
      impl_->refuse("attribute " + name, "is not one value");
    if (H5Tequal(type, H5T_STD_I64LE) > 0) {
      check(H5Aread(attribute, H5T_NATIVE_INT64, &attributes.integers[name]), impl_->what(name));
    } else {
      attributes.text[name] = impl_->text_attribute(attribute, type, name);
    }
  }
  if (H5Lexists(impl_->file, kAttributeGroup, H5P_DEFAULT) <= 0) return attributes;
  const Id group(H5Gopen2(impl_->file, kAttributeGroup, H5P_DEFAULT), H5Gclose, impl_->what(kAttributeGroup));
  std::set<std::string> names;
  size_t links = kMostAttributes;
  impl_->list(group, "", 0, links, names);
  for (const std::string& name : names) {
    const std::string full = fmt::format("{}/{}", kAttributeGroup, name);
    const std::vector<hsize_t> dims = impl_->dims(impl_->open_dataset(full, H5T_STD_U8LE), full);
    if (dims.size() != 1 || dims[0] > impl_->file_bytes) impl_->refuse(full, "is not text");
    std::string& text = attributes.text[name];
    read({full, DType::u8, {static_cast<int64_t>(dims[0])}, {}},
         [&](int64_t, std::span<const std::byte> bytes) {
           text.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
         });
  }
  return attributes;
}

}  // namespace checkpoints
