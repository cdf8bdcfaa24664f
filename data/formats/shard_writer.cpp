#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "data/checksum.h"
#include "data/files.h"
#include "data/formats/hdf5.h"
#include "data/formats/shard.h"
#include "data/formats/shard_layout.h"

namespace data {

namespace {

// Builds the file in memory: the checksum is known before a byte is on disk, and a full disk is met by
// write(), which reports it, not by HDF5, which may not.
class Image {
 public:
  explicit Image(const std::string& where)
      : error_(where + ": cannot build the shard in memory"), file_(create()) {}

  template <typename T>
  void dataset(const char* name, hid_t type, const T* values, int64_t count) {
    const hsize_t size = static_cast<hsize_t>(count);
    const Hdf5Handle space(H5Screate_simple(1, &size, nullptr), H5Sclose, error_);
    const Hdf5Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, error_);
    hdf5_check(H5Pset_layout(properties.get(), H5D_CONTIGUOUS), error_);
    hdf5_check(H5Pset_obj_track_times(properties.get(), false), error_);  // same content, same bytes
    const Hdf5Handle dataset(
        H5Dcreate2(file_.get(), name, type, space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
        H5Dclose, error_);
    if (count > 0) hdf5_check(H5Dwrite(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values), error_);
  }

  void attribute(const char* name, hid_t type, const void* value) {
    const Hdf5Handle space(H5Screate(H5S_SCALAR), H5Sclose, error_);
    const Hdf5Handle attribute(H5Acreate2(file_.get(), name, type, space.get(), H5P_DEFAULT, H5P_DEFAULT),
                               H5Aclose, error_);
    hdf5_check(H5Awrite(attribute.get(), type, value), error_);
  }
  void attribute(const char* name, int64_t value) { attribute(name, H5T_STD_I64LE, &value); }
  void attribute(const char* name, const std::string& value) {
    const Hdf5Handle type(H5Tcopy(H5T_C_S1), H5Tclose, error_);
    hdf5_check(H5Tset_size(type.get(), value.size()), error_);
    hdf5_check(H5Tset_strpad(type.get(), H5T_STR_NULLPAD), error_);
    attribute(name, type.get(), value.data());
  }

  std::string bytes() {
    hdf5_check(H5Fflush(file_.get(), H5F_SCOPE_GLOBAL), error_);
    const ssize_t size = H5Fget_file_image(file_.get(), nullptr, 0);
    std::string image(size > 0 ? static_cast<size_t>(size) : 0, '\0');
    if (size <= 0 || H5Fget_file_image(file_.get(), image.data(), image.size()) != size)
      throw kernels::DataError(error_);
    return image;
  }

 private:
  Hdf5Handle create() const {
    quiet_hdf5();
    const Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, error_);
    hdf5_check(H5Pset_fapl_core(access.get(), size_t{1} << 20, false), error_);
    return Hdf5Handle(H5Fcreate("shard", H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), H5Fclose, error_);
  }
  std::string error_;
  Hdf5Handle file_;
};

std::string build_image(const std::string& where, const ShardContent& content) {
  Image image(where);
  const int64_t tokens = static_cast<int64_t>(content.tokens.size());
  if (shard_token_bytes(content.info.vocabulary) == 2) {
    const std::vector<uint16_t> narrow(content.tokens.begin(), content.tokens.end());
    image.dataset("tokens", H5T_STD_U16LE, narrow.data(), tokens);
  } else {
    image.dataset("tokens", H5T_STD_I32LE, content.tokens.data(), tokens);
  }
  image.dataset("documents", H5T_STD_I64LE, content.documents.data(),
                static_cast<int64_t>(content.documents.size()));
  std::string names;
  std::vector<int64_t> ends;
  for (const std::string& name : content.names) {
    names += name;
    ends.push_back(static_cast<int64_t>(names.size()));
  }
  image.dataset("names", H5T_STD_U8LE, names.data(), static_cast<int64_t>(names.size()));
  image.dataset("name_ends", H5T_STD_I64LE, ends.data(), static_cast<int64_t>(ends.size()));
  if (!content.weights.empty()) image.dataset("weights", H5T_IEEE_F32LE, content.weights.data(), tokens);
  image.attribute("vocabulary", content.info.vocabulary);
  image.attribute("bytes", content.info.bytes);
  image.attribute("predicted_bytes", content.info.predicted_bytes);
  image.attribute("tokenizer", content.info.tokenizer_hash);
  return image.bytes();
}

}  // namespace

int64_t shard_token_bytes(int64_t vocabulary) { return vocabulary <= 65536 ? 2 : 4; }

void write_shard(const std::filesystem::path& path, const ShardContent& content) {
  const std::string image = build_image(path.string(), content);
  write_file(path, {shard_header(kShardHeaderBytes + image.size(), checksum(image).hex()), image});
}

}  // namespace data
