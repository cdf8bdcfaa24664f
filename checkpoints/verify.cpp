#include "checkpoints/verify.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "kernels/core/error.h"

namespace checkpoints {

using kernels::CheckpointError;

namespace {

void verify_file(const Path& path, const FileEntry& entry) {
  const uint64_t bytes = regular_file_size(path);
  if (bytes != entry.bytes)
    throw CheckpointError(fmt::format("{} has {} bytes instead of {}", path.string(), bytes, entry.bytes));
  if (hash_file(path) != entry.hash)
    throw CheckpointError(fmt::format("the checksum of {} differs", path.string()));
}

// Name, number, size and time of change of every file.
std::string fingerprint(const Path& checkpoint) {
  std::vector<std::string> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(checkpoint, error)) {
    struct stat info;
    if (::lstat(entry.path().c_str(), &info) != 0) return "";
    files.push_back(fmt::format("{} {} {} {}.{}", entry.path().filename().string(), info.st_ino, info.st_size,
                                info.st_mtim.tv_sec, info.st_mtim.tv_nsec));
  }
  std::sort(files.begin(), files.end());
  std::string all;
  for (const std::string& file : files) all += file + "\n";
  return all;
}

std::mutex verified_mutex;
std::map<Path, std::string> verified;

}  // namespace

Dataset dataset_of(const TensorEntry& tensor, const Piece& piece) {
  Dataset dataset{tensor.name, tensor.dtype, tensor.shape, tensor.shape, piece.begin};
  dataset.shape[0] = piece.end - piece.begin;
  return dataset;
}

void read_piece(const ShardReader& shard, const TensorEntry& tensor, const Piece& piece,
                const ShardReader::Band& fn) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash(XXH3_createState(), XXH3_freeState);
  XXH3_64bits_reset(hash.get());
  shard.read(dataset_of(tensor, piece), [&](int64_t row, std::span<const std::byte> bytes) {
    XXH3_64bits_update(hash.get(), bytes.data(), bytes.size());
    fn(row, bytes);
  });
  if (XXH3_64bits_digest(hash.get()) != piece.hash)
    throw CheckpointError(
        fmt::format("{}: the checksum of tensor {} differs", shard_name(piece.file), tensor.name));
}

void verify_shards(const Path& directory, const Manifest& manifest) {
  for (int i = 0; i < static_cast<int>(manifest.files.size()); ++i) {
    const Path path = directory / shard_name(i);
    verify_file(path, manifest.files[static_cast<size_t>(i)]);
    const ShardReader shard(path);
    std::vector<std::string> names;
    for (const TensorEntry& tensor : manifest.tensors)
      for (const Piece& piece : tensor.pieces)
        if (piece.file == i) names.push_back(tensor.name);
    shard.check_contents(names);
    for (const TensorEntry& tensor : manifest.tensors)
      for (const Piece& piece : tensor.pieces)
        if (piece.file == i) read_piece(shard, tensor, piece, [](int64_t, std::span<const std::byte>) {});
  }
}

void remember_verified(const Path& checkpoint) {
  const std::lock_guard lock(verified_mutex);
  verified[checkpoint] = fingerprint(checkpoint);
}

bool known_verified(const Path& checkpoint) {
  const std::lock_guard lock(verified_mutex);
  const auto found = verified.find(checkpoint);
  return found != verified.end() && found->second == fingerprint(checkpoint);
}

}  // namespace checkpoints
