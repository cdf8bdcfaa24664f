#pragma once
// The first bytes of a shard, shared by writer and reader.
#include <fmt/format.h>

#include <cstddef>
#include <string>

namespace data {

inline constexpr size_t kShardHeaderBytes = 512;

inline std::string shard_header(size_t file_bytes, const std::string& checksum) {
  std::string header = fmt::format("foretell shard 1 {} {}\n", file_bytes, checksum);
  header.resize(kShardHeaderBytes, '\0');
  return header;
}

}  // namespace data
