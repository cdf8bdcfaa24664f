#pragma once
// A token shard: one HDF5 file behind a line of its own.
//
//   bytes 0..511   "foretell shard 1 <bytes of the file> <XXH3-128 of all bytes from 512>\n", then zeros;
//   HDF5
//                  looks for its file at 0, 512, 1024, ..., so that h5ls and h5py open it as it is
//   /tokens        (N) uint16 where the vocabulary fits, else int32; contiguous
//   /documents     (D + 1) int64: document d is tokens [documents[d], documents[d + 1])
//   /names         (bytes) uint8 and /name_ends (D) int64: the names end to end
//   /weights       (N) float32, only where some token's loss weight is not 1
//   attributes     vocabulary, bytes, predicted_bytes (int64), tokenizer (its XXH3-128)
//
// The checksum is compared before HDF5 sees the file, so that a damaged one never reaches its parser; all
// sizes are checked again when the datasets are opened. Tokens are then read with pread at the dataset's
// offset.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace data {

struct ShardInfo {
  std::string tokenizer_hash;
  int64_t vocabulary = 0;
  int64_t bytes = 0;            // of text
  int64_t predicted_bytes = 0;  // of text, without each document's first token
  int64_t tokens = 0, documents = 0;
  bool weighted = false;
};

struct ShardContent {
  ShardInfo info;  // tokens, documents and weighted follow from the vectors
  std::vector<int32_t> tokens;
  std::vector<int64_t> documents = {0};
  std::vector<std::string> names;
  std::vector<float> weights;  // empty: all 1
};

int64_t shard_token_bytes(int64_t vocabulary);  // stored bytes of one token
void write_shard(const std::filesystem::path& path, const ShardContent& content);

class ShardReader {
 public:
  // Verifies the whole file. DataError names the file, what is wrong and what to do.
  explicit ShardReader(const std::filesystem::path& path);
  ~ShardReader();
  ShardReader(const ShardReader&) = delete;
  ShardReader& operator=(const ShardReader&) = delete;

  const ShardInfo& info() const;
  const std::vector<int64_t>& documents() const;  // (D + 1)
  std::string name(int64_t document) const;
  std::vector<int32_t> tokens(int64_t begin, int64_t end) const;
  std::vector<float> weights(int64_t begin, int64_t end) const;  // empty if the shard has none

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace data
