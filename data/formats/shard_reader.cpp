#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "data/checksum.h"
#include "data/formats/hdf5.h"
#include "data/formats/shard.h"
#include "data/formats/shard_layout.h"

namespace data {

namespace {

using kernels::DataError;

struct Region {
  int64_t offset = 0, count = 0, width = 0;
};

// The longest text attribute a shard has is a hash of 32 digits.
constexpr size_t kLongestAttribute = 256;

}  // namespace

struct ShardReader::Impl {
  std::filesystem::path path;
  int fd = -1;
  int64_t file_bytes = 0;
  ShardInfo info;
  Region tokens, weights;
  std::vector<int64_t> documents, name_ends;
  std::string names;

  ~Impl() {
    if (fd >= 0) ::close(fd);
  }

  [[noreturn]] void damaged(std::string_view what) const {
    throw DataError(fmt::format("{}: {}; run foretell prepare again", path.string(), what));
  }

  void read_at(void* to, int64_t bytes, int64_t offset) const {
    for (char* p = static_cast<char*>(to); bytes > 0;) {
      const ssize_t n = ::pread(fd, p, static_cast<size_t>(bytes), offset);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) damaged(fmt::format("cannot read: {}", std::strerror(errno)));
      if (n == 0) damaged("truncated");
      p += n, bytes -= n, offset += n;
    }
  }

  void verify_bytes() {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat status {};
    if (fd < 0 || ::fstat(fd, &status) != 0) damaged(fmt::format("cannot open: {}", std::strerror(errno)));
    if (!S_ISREG(status.st_mode)) damaged("not a regular file");
    file_bytes = status.st_size;
    std::string header(kShardHeaderBytes, '\0');
    if (file_bytes < static_cast<int64_t>(header.size())) damaged("not a token shard, or truncated");
    read_at(header.data(), static_cast<int64_t>(header.size()), 0);
    if (!header.starts_with("foretell shard ")) damaged("not a token shard");
    if (!header.starts_with("foretell shard 1 ")) damaged("a token shard of another version");
    ChecksumStream sum;
    std::string buffer(size_t{1} << 20, '\0');
    for (int64_t at = kShardHeaderBytes; at < file_bytes;) {
      const int64_t n = std::min(static_cast<int64_t>(buffer.size()), file_bytes - at);
      read_at(buffer.data(), n, at);
      sum.add({buffer.data(), static_cast<size_t>(n)});
      at += n;
    }
    if (header != shard_header(static_cast<size_t>(file_bytes), sum.result().hex()))
      damaged("truncated or damaged (its checksum differs)");
  }

  // Only plain local datasets with their bytes inside this file: no links elsewhere, no external or virtual
  // storage, no filters.
  Region open_dataset(hid_t file, const char* name, std::initializer_list<hid_t> types) {
    const std::string error = fmt::format(
        "{}: /{} is not as a token shard has it; run foretell prepare again", path.string(), name);
    H5L_info_t link{};
    hdf5_check(H5Lget_info(file, name, &link, H5P_DEFAULT), error);
    if (link.type != H5L_TYPE_HARD) throw DataError(error);
    const Hdf5Handle dataset(H5Dopen2(file, name, H5P_DEFAULT), H5Dclose, error);
    const Hdf5Handle properties(H5Dget_create_plist(dataset.get()), H5Pclose, error);
    if (H5Pget_layout(properties.get()) != H5D_CONTIGUOUS || H5Pget_external_count(properties.get()) != 0 ||
        H5Pget_nfilters(properties.get()) != 0)
      throw DataError(error);
    const Hdf5Handle type(H5Dget_type(dataset.get()), H5Tclose, error);
    Region region;
    for (hid_t expected : types)
      if (H5Tequal(type.get(), expected) > 0) region.width = static_cast<int64_t>(H5Tget_size(expected));
    const Hdf5Handle space(H5Dget_space(dataset.get()), H5Sclose, error);
    region.count = H5Sget_simple_extent_npoints(space.get());
    if (region.width == 0 || H5Sget_simple_extent_ndims(space.get()) != 1 || region.count < 0 ||
        region.count > file_bytes / region.width)
      throw DataError(error);
    if (region.count == 0) return region;
    const haddr_t offset = H5Dget_offset(dataset.get());
    if (offset == HADDR_UNDEF || offset > static_cast<haddr_t>(file_bytes - region.count * region.width))
      throw DataError(error);
    region.offset = static_cast<int64_t>(offset);
    return region;
  }

  void read_attribute(hid_t file, const char* name, H5T_class_t kind, size_t limit,
                      std::string& bytes) const {
    const std::string error =
        fmt::format("{}: attribute {} is missing or not as a token shard has it; run foretell prepare again",
                    path.string(), name);
    const Hdf5Handle attribute(H5Aopen(file, name, H5P_DEFAULT), H5Aclose, error);
    const Hdf5Handle type(H5Aget_type(attribute.get()), H5Tclose, error);
    const Hdf5Handle space(H5Aget_space(attribute.get()), H5Sclose, error);
    const size_t size = H5Tget_size(type.get());
    if (H5Tget_class(type.get()) != kind || H5Tis_variable_str(type.get()) > 0 ||
        H5Sget_simple_extent_npoints(space.get()) != 1 || size == 0 || size > limit)
      throw DataError(error);
    bytes.assign(size, '\0');
    hdf5_check(H5Aread(attribute.get(), type.get(), bytes.data()), error);
  }
  int64_t integer(hid_t file, const char* name) const {
    std::string bytes;
    read_attribute(file, name, H5T_INTEGER, sizeof(int64_t), bytes);
    int64_t value = 0;
    if (bytes.size() != sizeof(value)) damaged(fmt::format("attribute {} is not a 64-bit integer", name));
    std::memcpy(&value, bytes.data(), sizeof(value));
    return value;
  }

  template <typename T>
  std::vector<T> read_all(const Region& region) const {
    std::vector<T> values(static_cast<size_t>(region.count));
    read_at(values.data(), region.count * region.width, region.offset);
    return values;
  }

  void open_datasets() {
    quiet_hdf5();
    // Shards never change once they have their name, and some network file systems have no locks.
    const Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "HDF5 file properties");
    hdf5_check(H5Pset_file_locking(access.get(), false, true), "HDF5 file locking");
    const Hdf5Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose,
                          path.string() + ": HDF5 cannot open it; run foretell prepare again");
    tokens = open_dataset(file.get(), "tokens", {H5T_STD_U16LE, H5T_STD_I32LE});
    documents = read_all<int64_t>(open_dataset(file.get(), "documents", {H5T_STD_I64LE}));
    name_ends = read_all<int64_t>(open_dataset(file.get(), "name_ends", {H5T_STD_I64LE}));
    const Region region = open_dataset(file.get(), "names", {H5T_STD_U8LE});
    names.resize(static_cast<size_t>(region.count));
    read_at(names.data(), region.count, region.offset);
    info.weighted = H5Lexists(file.get(), "weights", H5P_DEFAULT) > 0;
    if (info.weighted) weights = open_dataset(file.get(), "weights", {H5T_IEEE_F32LE});
    info.vocabulary = integer(file.get(), "vocabulary");
    info.bytes = integer(file.get(), "bytes");
    info.predicted_bytes = integer(file.get(), "predicted_bytes");
    read_attribute(file.get(), "tokenizer", H5T_STRING, kLongestAttribute, info.tokenizer_hash);
  }

  void check_consistency() {
    if (documents.empty() || documents.front() != 0 || documents.back() != tokens.count ||
        name_ends.size() + 1 != documents.size() || (info.weighted && weights.count != tokens.count))
      damaged("its datasets do not fit together");
    for (size_t d = 0; d + 1 < documents.size(); ++d)
      if (documents[d + 1] <= documents[d]) damaged("its document offsets do not ascend");
    int64_t last = 0;
    for (int64_t end : name_ends) {
      if (end < last || end > static_cast<int64_t>(names.size())) damaged("its names do not fit together");
      last = end;
    }
    if (info.vocabulary < 1 || info.bytes < 0 || info.predicted_bytes < 0 ||
        info.predicted_bytes > info.bytes)
      damaged("its attributes are out of range");
    info.tokens = tokens.count;
    info.documents = static_cast<int64_t>(name_ends.size());
  }
};

ShardReader::ShardReader(const std::filesystem::path& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->verify_bytes();
  impl_->open_datasets();
  impl_->check_consistency();
}
ShardReader::~ShardReader() = default;

const ShardInfo& ShardReader::info() const { return impl_->info; }
const std::vector<int64_t>& ShardReader::documents() const { return impl_->documents; }

std::string ShardReader::name(int64_t document) const {
  const int64_t begin = document == 0 ? 0 : impl_->name_ends[document - 1];
  return impl_->names.substr(begin, impl_->name_ends[document] - begin);
}

std::vector<int32_t> ShardReader::tokens(int64_t begin, int64_t end) const {
  const Region region = {impl_->tokens.offset + begin * impl_->tokens.width, end - begin,
                         impl_->tokens.width};
  std::vector<int32_t> result;
  if (region.width == 2) {
    const auto narrow = impl_->read_all<uint16_t>(region);
    result.assign(narrow.begin(), narrow.end());
  } else {
    result = impl_->read_all<int32_t>(region);
  }
  for (int32_t token : result)
    if (token < 0 || token >= impl_->info.vocabulary)
      impl_->damaged("it holds a token beyond its vocabulary");
  return result;
}

std::vector<float> ShardReader::weights(int64_t begin, int64_t end) const {
  if (!impl_->info.weighted) return {};
  return impl_->read_all<float>(
      {impl_->weights.offset + begin * impl_->weights.width, end - begin, impl_->weights.width});
}

}  // namespace data
