#pragma once
// manifest.json: what a checkpoint consists of. Its own checksum covers everything but itself.
#include <cstdint>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.h"
#include "checkpoints/files.h"

namespace checkpoints {

inline constexpr const char* kManifestName = "manifest.json";
inline constexpr const char* kAttributeGroup = "attributes";

// Rows [begin, end) of a tensor, in one file under the tensor's name.
struct Piece {
  int file = 0;
  int64_t begin = 0, end = 0;
  uint64_t hash = 0;
};

struct TensorEntry {
  std::string name;
  kernels::DType dtype = kernels::DType::f32;
  kernels::Shape shape;
  std::vector<Piece> pieces;  // in row order, together all rows

  int64_t row_bytes() const;
};

struct FileEntry {
  uint64_t bytes = 0, hash = 0;
};

struct Manifest {
  int64_t step = 0;
  std::vector<FileEntry> files;
  std::vector<TensorEntry> tensors;
};

std::string shard_name(int index);
// Parts between '/' of letters, digits and ._-; never ".", "..", nor the group of the attributes.
bool plain_name(const std::string& name);
// Bytes of a tensor; CheckpointError for a negative size or one that does not fit 63 bits.
int64_t checked_bytes(const std::string& name, kernels::DType dtype, const kernels::Shape& shape);

std::string to_text(const Manifest& manifest);
// CheckpointError when the text is not, to the byte, what to_text gives for a sound manifest.
Manifest parse_manifest(const std::string& text);

}  // namespace checkpoints
