#pragma once
// Token shards as training reads them. A sample is at most context + 1 consecutive tokens of one document; a
// document of L tokens gives ceil((L - 1) / context) samples that overlap in one token, so that every token
// but the first is predicted exactly once.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace data {

class TokenDataset {
 public:
  // Opens and verifies (header, sizes, checksums) the shards of one split of a prepared folder: "train" or
  // "validation". DataError names the file and what is wrong; `context` cuts the samples.
  TokenDataset(const std::filesystem::path& prepared, const std::string& split, int64_t context);
  ~TokenDataset();
  TokenDataset(const TokenDataset&) = delete;
  TokenDataset& operator=(const TokenDataset&) = delete;

  int64_t samples() const;
  int64_t tokens() const;
  // Bytes of text behind the predicted tokens (all but the first of each document), for bits per byte.
  int64_t bytes() const;
  int64_t documents() const;
  int64_t length(int64_t sample) const;               // tokens of a sample, 2 to context + 1
  std::vector<int32_t> sample(int64_t sample) const;  // its tokens, copied out of the shard
  // Loss weight of each token of the sample; empty means all 1.
  std::vector<float> weights(int64_t sample) const;
  std::vector<int32_t> document(int64_t document) const;  // ends with the end-of-text token
  std::string document_name(int64_t document) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// What `prepare` wrote about the whole folder (dataset.json).
struct DatasetInfo {
  std::string tokenizer_hash;  // XXH3-128 of the tokenizer, hexadecimal
  int64_t vocabulary = 0;
  int64_t train_tokens = 0, validation_tokens = 0, train_bytes = 0, validation_bytes = 0;
};
DatasetInfo read_dataset_info(const std::filesystem::path& prepared);

}  // namespace data
