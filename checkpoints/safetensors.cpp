#include "checkpoints/safetensors.h"

#include <fmt/format.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/core/error.h"

namespace checkpoints {

namespace {

using kernels::CheckpointError;
using kernels::DType;

constexpr uint64_t kLongestHeader = 100 << 20;

[[noreturn]] void bad(const std::filesystem::path& file, const std::string& what) {
  throw CheckpointError(
      fmt::format("{}: {}; write it again with the safetensors library", file.string(), what));
}

std::string read_header(const std::filesystem::path& file, std::ifstream& stream, uint64_t file_bytes) {
  unsigned char length[8] = {};
  stream.read(reinterpret_cast<char*>(length), sizeof(length));
  uint64_t bytes = 0;
  for (int i = 7; i >= 0; --i) bytes = bytes << 8 | length[i];
  if (!stream || bytes > kLongestHeader || bytes + 8 > file_bytes)
    bad(file, "not a safetensors file, or cut short");
  std::string header(bytes, '\0');
  stream.read(header.data(), static_cast<std::streamsize>(bytes));
  if (!stream) bad(file, "cannot be read");
  return header;
}

DType dtype_named(const std::filesystem::path& file, const std::string& tensor, const std::string& name) {
  if (name == "F32") return DType::f32;
  if (name == "F16") return DType::f16;
  if (name == "BF16") return DType::bf16;
  throw CheckpointError(
      fmt::format("{}: tensor '{}' is {}; save it as F32, F16 or BF16", file.string(), tensor, name));
}

kernels::Shape shape_from(const std::vector<int64_t>& dims) {
  switch (dims.size()) {
    case 1:
      return {dims[0]};
    case 2:
      return {dims[0], dims[1]};
    case 3:
      return {dims[0], dims[1], dims[2]};
    default:
      return {dims[0], dims[1], dims[2], dims[3]};
  }
}

}  // namespace

SafetensorsReader::SafetensorsReader(const std::filesystem::path& file)
    : file_(file), stream_(file, std::ios::binary) {
  std::error_code error;
  const uint64_t file_bytes = std::filesystem::file_size(file, error);
  if (!stream_ || error)
    throw CheckpointError(fmt::format("cannot read {}: check the path and its permissions", file.string()));
  const std::string header = read_header(file, stream_, file_bytes);
  try {
    const auto json = nlohmann::json::parse(header);
    for (const auto& [name, value] : json.items())
      if (name != "__metadata__")
        add(name, value.at("dtype").get<std::string>(), value.at("shape").get<std::vector<int64_t>>(),
            value.at("data_offsets").get<std::vector<uint64_t>>(), 8 + header.size(), file_bytes);
  } catch (const nlohmann::json::exception&) {
    bad(file, "its header is damaged");
  }
}

void SafetensorsReader::add(const std::string& name, const std::string& dtype,
                            const std::vector<int64_t>& dims, const std::vector<uint64_t>& offsets,
                            uint64_t data, uint64_t file_bytes) {
  if (dims.empty() || dims.size() > kernels::Shape::kMaxRank)
    bad(file_, fmt::format("tensor '{}' has {} dimensions", name, dims.size()));
  const DType type = dtype_named(file_, name, dtype);
  // A product that would overflow is larger than the file long before.
  uint64_t bytes = kernels::size_of(type);
  for (const int64_t dim : dims) {
    if (dim < 1 || static_cast<uint64_t>(dim) > file_bytes || bytes > file_bytes)
      bad(file_, fmt::format("tensor '{}' is larger than the file", name));
    bytes *= static_cast<uint64_t>(dim);
  }
  if (offsets.size() != 2 || offsets[1] < offsets[0] || offsets[1] - offsets[0] != bytes ||
      offsets[1] > file_bytes - data)
    bad(file_, fmt::format("tensor '{}' lies outside of the file", name));
  entries_[name] = {type, shape_from(dims), data + offsets[0], bytes};
}

std::vector<std::string> SafetensorsReader::names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : entries_) names.push_back(name);
  return names;
}

const SafetensorsReader::Entry& SafetensorsReader::entry(const std::string& name) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) bad(file_, fmt::format("there is no tensor '{}'", name));
  return it->second;
}

kernels::Shape SafetensorsReader::shape(const std::string& name) const { return entry(name).shape; }

std::vector<float> SafetensorsReader::read(const std::string& name) const {
  const Entry& e = entry(name);
  std::vector<char> bytes(e.bytes);
  stream_.clear();
  stream_.seekg(static_cast<std::streamoff>(e.begin));
  stream_.read(bytes.data(), static_cast<std::streamsize>(e.bytes));
  if (!stream_) bad(file_, fmt::format("tensor '{}' cannot be read", name));
  std::vector<float> values(static_cast<size_t>(e.shape.numel()));
  kernels::visit_dtype(e.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (size_t i = 0; i < values.size(); ++i) {
      T value;
      std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
      values[i] = static_cast<float>(value);
    }
  });
  return values;
}

}  // namespace checkpoints
