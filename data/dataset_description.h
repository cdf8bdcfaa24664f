#pragma once
// dataset.json of a prepared folder, with a checksum of its own.
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace data {

inline constexpr const char* kDescriptionFile = "dataset.json";

struct DatasetDescription {
  struct Split {
    std::vector<std::string> shards;  // file names
    int64_t documents = 0, tokens = 0, bytes = 0;
  };
  std::string tokenizer_hash;
  int64_t vocabulary = 0;
  std::map<std::string, Split> splits;
};

std::string write_description(const DatasetDescription& description);  // the file's content
// Also verifies that the folder's tokenizer is the described one. DataError names the file.
DatasetDescription read_description(const std::filesystem::path& prepared);

}  // namespace data
