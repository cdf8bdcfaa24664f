#include <fmt/format.h>

#include <cstring>
#include <map>

#include "checkpoints/hdf5.h"
#include "checkpoints/verify.h"

namespace checkpoints {

using kernels::CheckpointError;

namespace {

constexpr uint64_t kLongestManifest = uint64_t{256} << 20;

}  // namespace

bool reads_beside_writes() { return hdf5::is_thread_safe(); }

struct Reader::Impl {
  Path directory;
  Manifest manifest;
  std::vector<std::unique_ptr<ShardReader>> shards;
  Attributes attributes;
  std::map<std::string, const TensorEntry*> tensors;

  const TensorEntry& at(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end())
      throw CheckpointError(fmt::format("checkpoint {} has no tensor {}; it belongs to another architecture",
                                        directory.string(), name));
    return *found->second;
  }
};

Reader::Reader(const Path& checkpoint) : impl_(std::make_unique<Impl>()) {
  impl_->directory = checkpoint;
  const Path path = checkpoint / kManifestName;
  try {
    const std::string manifest = read_text(path, kLongestManifest);
    try {
      impl_->manifest = parse_manifest(manifest);
    } catch (const CheckpointError& error) {
      throw CheckpointError(fmt::format("{}: {}", kManifestName, error.what()));
    }
    if (step_of(checkpoint) >= 0 && step_of(checkpoint) != impl_->manifest.step)
      throw CheckpointError(fmt::format("its manifest is of step {}", impl_->manifest.step));
    verify_shards(checkpoint, impl_->manifest);
    for (size_t i = 0; i < impl_->manifest.files.size(); ++i)
      impl_->shards.push_back(std::make_unique<ShardReader>(checkpoint / shard_name(static_cast<int>(i))));
    impl_->attributes = impl_->shards[0]->read_attributes();
  } catch (const SystemFailure&) {
    throw;
  } catch (const CheckpointError& error) {
    throw CheckpointError(
        fmt::format("checkpoint {} does not verify ({}); use an older checkpoint or a copy of this one",
                    checkpoint.string(), error.what()));
  }
  for (const TensorEntry& tensor : impl_->manifest.tensors) impl_->tensors[tensor.name] = &tensor;
  remember_verified(checkpoint);
}

Reader::~Reader() = default;
int64_t Reader::step() const { return impl_->manifest.step; }
const Attributes& Reader::attributes() const { return impl_->attributes; }
bool Reader::contains(const std::string& name) const { return impl_->tensors.count(name) > 0; }
kernels::Shape Reader::shape(const std::string& name) const { return impl_->at(name).shape; }
kernels::DType Reader::dtype(const std::string& name) const { return impl_->at(name).dtype; }

std::vector<std::string> Reader::names() const {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : impl_->tensors) names.push_back(name);
  return names;
}

void Reader::read(const std::string& name, Tensor into) const {
  const TensorEntry& tensor = impl_->at(name);
  if (into.device.is_cuda() || into.dtype != tensor.dtype || !(into.shape == tensor.shape))
    throw CheckpointError(fmt::format(
        "checkpoint {} holds tensor {} as {} {}, but the model has {}; it belongs to another architecture",
        impl_->directory.string(), name, name_of(tensor.dtype), to_string(tensor.shape), to_string(into)));
  const auto row_bytes = static_cast<size_t>(tensor.row_bytes());
  const auto stride = static_cast<size_t>(into.row_stride) * kernels::size_of(into.dtype);
  for (const Piece& piece : tensor.pieces) {
    const ShardReader& shard = *impl_->shards[static_cast<size_t>(piece.file)];
    read_piece(shard, tensor, piece, [&](int64_t row, std::span<const std::byte> bytes) {
      char* target = static_cast<char*>(into.data) + static_cast<size_t>(piece.begin + row) * stride;
      for (size_t at = 0; at < bytes.size(); at += row_bytes, target += stride)
        std::memcpy(target, bytes.data() + at, row_bytes);
    });
  }
}

}  // namespace checkpoints
