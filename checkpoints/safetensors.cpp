#include "checkpoints/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

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

// The header, in which a name stands once: of two, JSON's reader would keep the last.
nlohmann::json parse_header(const std::filesystem::path& file, const std::string& header) {
  std::set<std::string> names;
  return nlohmann::json::parse(header, [&](int depth, nlohmann::json::parse_event_t event, auto& value) {
    if (depth == 1 && event == nlohmann::json::parse_event_t::key &&
        !names.insert(value.template get<std::string>()).second)
      bad(file, fmt::format("two tensors are named '{}'", value.template get<std::string>()));
    return true;
  });
}

std::vector<uint64_t> whole_numbers(const std::filesystem::path& file, const std::string& tensor,
                                    const nlohmann::json& list) {
  for (const auto& number : list)
    if (!number.is_number_unsigned())
      bad(file,
          fmt::format("tensor '{}' has {} in its header, which is no size or place", tensor, number.dump()));
  return list.get<std::vector<uint64_t>>();
}

kernels::Shape shape_from(const std::vector<uint64_t>& sizes) {
  const std::vector<int64_t> dims(sizes.begin(), sizes.end());
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
    const auto json = parse_header(file, header);
    for (const auto& [name, value] : json.items())
      if (name != "__metadata__")
        add(name, value.at("dtype").get<std::string>(), whole_numbers(file, name, value.at("shape")),
            whole_numbers(file, name, value.at("data_offsets")), 8 + header.size(), file_bytes);
    check_layout(8 + header.size(), file_bytes);
  } catch (const nlohmann::json::exception&) {
    bad(file, "its header is damaged");
  }
}

void SafetensorsReader::add(const std::string& name, const std::string& dtype,
                            const std::vector<uint64_t>& dims, const std::vector<uint64_t>& offsets,
                            uint64_t data, uint64_t file_bytes) {
  if (dims.empty() || dims.size() > kernels::Shape::kMaxRank)
    bad(file_, fmt::format("tensor '{}' has {} dimensions", name, dims.size()));
  const DType type = dtype_named(file_, name, dtype);
  // Sizes beside a 0 take no place in the file, but have to multiply to a number.
  const bool empty = std::find(dims.begin(), dims.end(), 0u) != dims.end();
  const uint64_t most = empty ? std::numeric_limits<int64_t>::max() : file_bytes;
  uint64_t bytes = kernels::size_of(type);
  for (const uint64_t dim : dims) {
    if (dim > most / bytes)
      bad(file_, fmt::format("tensor '{}' is {}", name, empty ? "too large" : "larger than the file"));
    bytes *= std::max<uint64_t>(dim, 1);
  }
  if (empty) bytes = 0;
  if (offsets.size() != 2 || offsets[1] < offsets[0] || offsets[1] - offsets[0] != bytes ||
      offsets[1] > file_bytes - data)
    bad(file_, fmt::format("tensor '{}' lies outside of the file", name));
  entries_[name] = {type, shape_from(dims), data + offsets[0], bytes};
}

void SafetensorsReader::check_layout(uint64_t data, uint64_t file_bytes) const {
  std::vector<std::tuple<uint64_t, uint64_t, std::string>>
      places;  // an empty tensor ahead of what begins there
  for (const auto& [name, entry] : entries_) places.emplace_back(entry.begin, entry.bytes, name);
  std::sort(places.begin(), places.end());
  uint64_t end = data;
  for (const auto& [begin, bytes, name] : places) {
    if (begin != end)
      bad(file_,
          fmt::format("tensor '{}' {}", name, begin < end ? "overlaps another" : "has a gap ahead of it"));
    end += bytes;
  }
  if (end != file_bytes) bad(file_, fmt::format("{} bytes belong to no tensor", file_bytes - end));
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
