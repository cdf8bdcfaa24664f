#pragma once
// Weights handed over by other programs: the safetensors format.
//   bytes 0..7   length H of the header, little endian
//   H bytes      JSON: {"name": {"dtype": "F32", "shape": [3, 4], "data_offsets": [begin, end]}, ...,
//                "__metadata__": {...}}
//   the rest     the tensors, little endian, dense, at the offsets, one behind the other without gaps
// F32, F16 and BF16 tensors of one to four dimensions are read. Source: the format's description by Hugging
// Face.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"

namespace checkpoints {

class SafetensorsReader {
 public:
  // Reads and checks the header; CheckpointError names the file and what is wrong with it.
  explicit SafetensorsReader(const std::filesystem::path& file);
  std::vector<std::string> names() const;
  bool contains(const std::string& name) const { return entries_.contains(name); }
  kernels::Shape shape(const std::string& name) const;
  // The values, row by row, as fp32.
  std::vector<float> read(const std::string& name) const;

 private:
  struct Entry {
    kernels::DType dtype;
    kernels::Shape shape;
    uint64_t begin, bytes;  // in the file
  };
  void add(const std::string& name, const std::string& dtype, const std::vector<uint64_t>& dims,
           const std::vector<uint64_t>& offsets, uint64_t data, uint64_t file_bytes);
  // The tensors fill the file, each once.
  void check_layout(uint64_t data, uint64_t file_bytes) const;
  const Entry& entry(const std::string& name) const;

  std::filesystem::path file_;
  mutable std::ifstream stream_;
  std::map<std::string, Entry> entries_;
};

}  // namespace checkpoints
