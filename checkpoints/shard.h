#pragma once
// One HDF5 file of a checkpoint: datasets named like tensors, the attributes on the root group. Files are
// written with the earliest format version and read as untrusted: only hard links to groups and to plain
// datasets of the expected type and size, nothing external, virtual or filtered.
#include <functional>
#include <map>
#include <span>

#include "checkpoints/manifest.h"

namespace checkpoints {

struct Dataset {
  std::string name;
  kernels::DType dtype;
  kernels::Shape shape;         // of this piece
  kernels::Shape global_shape;  // of the whole tensor
  int64_t begin = 0;            // first row
};

class ShardWriter {
 public:
  explicit ShardWriter(const Path& path);
  ~ShardWriter();
  void write(const Attributes& attributes);
  void write(const Dataset& dataset, const std::byte* data);
  // Everything is with the system afterwards, not yet on disk.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class ShardReader {
 public:
  explicit ShardReader(const Path& path);
  ~ShardReader();
  // Refuses the file when it holds anything but these datasets and attributes.
  void check_contents(const std::vector<std::string>& datasets) const;
  Attributes read_attributes() const;
  // Calls fn(first row, bytes) for consecutive bands of rows, about 1 MiB each.
  using Band = std::function<void(int64_t row, std::span<const std::byte> bytes)>;
  void read(const Dataset& expected, const Band& fn) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace checkpoints
