#pragma once
// Writes a file in the safetensors format, as another program would hand over weights.
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/core/dtype.h"

namespace support {

struct SafetensorsEntry {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
  kernels::DType dtype = kernels::DType::f32;
};

inline void write_safetensors(const std::filesystem::path& file,
                              const std::vector<SafetensorsEntry>& entries) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const SafetensorsEntry& e : entries) {
    const size_t begin = data.size();
    kernels::visit_dtype(e.dtype, [&](auto tag) {
      for (const float value : e.values) {
        const auto rounded = decltype(tag)(value);
        data.append(reinterpret_cast<const char*>(&rounded), sizeof(rounded));
      }
    });
    const char* type = e.dtype == kernels::DType::f32   ? "F32"
                       : e.dtype == kernels::DType::f16 ? "F16"
                                                        : "BF16";
    header[e.name] = {{"dtype", type}, {"shape", e.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  const uint64_t bytes = text.size();
  std::ofstream out(file, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
  out << text << data;
}

}  // namespace support
