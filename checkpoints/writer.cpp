#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <thread>

#include "checkpoints/shard.h"
#include "checkpoints/verify.h"

namespace checkpoints {

using kernels::CheckpointError;

namespace {

// A tensor of the snapshot: dense rows at `offset` of the snapshot buffer.
struct Snapshot {
  TensorEntry entry;
  size_t offset = 0;
};

constexpr int64_t kWhole = 1 << 20;
constexpr uint64_t kBytesPerDataset = 16 << 10;  // headers, groups, chunk index; generous

void check_names(const Attributes& attributes, const std::vector<NamedTensor>& tensors) {
  std::set<std::string> seen;
  const auto check = [&](const std::string& name, bool plain) {
    if (!plain || !seen.insert(name).second)
      throw CheckpointError(
          fmt::format("\"{}\" cannot be stored: it is not a plain name, or given twice", name));
  };
  const auto check_key = [&](const std::string& key) {
    check(key, plain_name(key) && key.size() < 200 && key.find('/') == std::string::npos);
  };
  for (const auto& [key, value] : attributes.text) check_key(key);
  for (const auto& [key, value] : attributes.integers) check_key(key);
  seen.clear();
  for (const NamedTensor& named : tensors) check(named.name, plain_name(named.name));
}

// Cuts the tensors, laid end to end, into `shards` files of about equal size, between rows. Only tensors
// above kWhole are cut, so that a script finds the others in one piece.
void assign_pieces(std::vector<Snapshot>& tensors, int shards) {
  int64_t total = 0, written = 0;
  for (const Snapshot& t : tensors) total += t.entry.row_bytes() * t.entry.shape[0];
  const int64_t share = std::max<int64_t>(1, (total + shards - 1) / shards);
  for (Snapshot& t : tensors) {
    const int64_t rows = t.entry.shape[0], row_bytes = std::max<int64_t>(1, t.entry.row_bytes());
    int64_t row = 0;
    do {
      const int file = static_cast<int>(std::min<int64_t>(written / share, shards - 1));
      const bool last = file == shards - 1 || rows * row_bytes <= kWhole;
      const int64_t room = last ? rows : (share * (file + 1) - written + row_bytes - 1) / row_bytes;
      const int64_t end = std::min(rows, row + room);
      t.entry.pieces.push_back({file, row, end, 0});
      written += (end - row) * t.entry.row_bytes();
      row = end;
    } while (row < rows);
  }
}

// Host memory, dense or with longer rows, into dense memory.
void copy_rows(const Tensor& from, const Tensor& to) {
  if (from.device.is_cuda())
    throw CheckpointError(fmt::format("tensor {} is on a GPU; copy it to host memory", to_string(from)));
  const size_t element = kernels::size_of(from.dtype), row = static_cast<size_t>(from.cols()) * element;
  const size_t stride = static_cast<size_t>(from.row_stride) * element;
  for (int64_t r = 0; r < from.rows() && row > 0; ++r)
    std::memcpy(static_cast<char*>(to.data) + static_cast<size_t>(r) * row,
                static_cast<const char*>(from.data) + static_cast<size_t>(r) * stride, row);
}

}  // namespace

struct Writer::Impl {
  enum class State { idle, writing, written, failed };

  Path directory;
  int shards;
  std::atomic<State> state{State::idle};
  std::thread thread;
  std::string reason;
  Attributes attributes;
  std::vector<Snapshot> tensors;
  std::vector<std::byte> snapshot;  // kept from save to save
  Manifest manifest;

  Path temporary() const {
    return directory / fmt::format("{}{}", kTemporaryPrefix, step_name(manifest.step));
  }
  void prepare_directory();
  void reserve(const std::vector<NamedTensor>& given);
  void run() noexcept;
  void point_at(const Path& target) const;
  void write_shard(int index);
  void join() {
    if (thread.joinable()) thread.join();
  }
  void clear() {
    join();
    if (state != State::idle) remove_tree(temporary());
    state = State::idle;
  }
};

// `latest` is for people, and scripts of theirs: where it cannot be written the checkpoint is as good.
void Writer::Impl::point_at(const Path& target) const {
  const Path hint = directory / fmt::format("{}latest", kTemporaryPrefix);
  try {
    write_synced(hint, target.filename().string() + "\n");
    rename_over(hint, directory / "latest");
    sync_path(directory);
  } catch (const CheckpointError&) {
    std::error_code ignored;
    std::filesystem::remove(hint, ignored);
  }
}

// Takes memory for a snapshot of the given tensors.
void Writer::Impl::reserve(const std::vector<NamedTensor>& given) {
  tensors.clear();
  size_t total = 0;
  for (const NamedTensor& named : given) {
    const kernels::Tensor& t = named.tensor;
    const bool storable = t.dtype != kernels::DType::f16 && t.dtype != kernels::DType::bf16;
    if (!storable || t.shape.rank() == 0)
      throw CheckpointError(
          fmt::format("tensor {} ({}) cannot be stored; save its fp32 master", named.name, to_string(t)));
    tensors.push_back({{named.name, t.dtype, t.shape, {}}, total});
    total += static_cast<size_t>(checked_bytes(named.name, t.dtype, t.shape));
  }
  uint64_t needed = total + kBytesPerDataset * (given.size() + static_cast<uint64_t>(shards));
  for (const auto& [name, text] : attributes.text) needed += text.size() + kBytesPerDataset;
  const uint64_t free = free_bytes_at(directory);
  if (needed > free)
    throw CheckpointError(fmt::format("a checkpoint needs {} MiB, but {} has {} MiB free; free some space",
                                      (needed >> 20) + 1, directory.string(), free >> 20));
  if (snapshot.size() < total) snapshot.resize(total);
}

// Creates the folder and removes what a killed save left behind.
void Writer::Impl::prepare_directory() {
  create_synced(directory);
  std::error_code error;
  std::vector<Path> left;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error))
    if (entry.path().filename().string().starts_with(kTemporaryPrefix)) left.push_back(entry.path());
  for (const Path& path : left) remove_tree(path);
}

void Writer::Impl::write_shard(int index) {
  const Path path = temporary() / shard_name(index);
  ShardWriter shard(path);
  if (index == 0) shard.write(attributes);
  for (Snapshot& t : tensors)
    for (Piece& piece : t.entry.pieces) {
      if (piece.file != index) continue;
      const auto row_bytes = static_cast<size_t>(t.entry.row_bytes());
      const std::byte* data = snapshot.data() + t.offset + static_cast<size_t>(piece.begin) * row_bytes;
      const size_t bytes = static_cast<size_t>(piece.end - piece.begin) * row_bytes;
      shard.write(dataset_of(t.entry, piece), data);
      piece.hash = hash_bytes({data, bytes});
    }
  shard.close();
  sync_path(path);
  manifest.files[static_cast<size_t>(index)] = {regular_file_size(path), hash_file(path)};
}

void Writer::Impl::run() noexcept {
  try {
    assign_pieces(tensors, shards);
    manifest.files.assign(static_cast<size_t>(shards), {});
    for (int i = 0; i < shards; ++i) write_shard(i);
    manifest.tensors.clear();
    for (const Snapshot& t : tensors) manifest.tensors.push_back(t.entry);
    verify_shards(temporary(), manifest);
    state = State::written;
  } catch (const std::exception& error) {
    reason = error.what();
    remove_tree(temporary());
    state = State::failed;
  }
}

Writer::Writer(Path directory, int shards) : impl_(std::make_unique<Impl>()) {
  if (shards < 1) throw CheckpointError("a checkpoint needs at least one shard");
  impl_->directory = std::move(directory);
  impl_->shards = shards;
}

Writer::~Writer() { impl_->clear(); }

void Writer::start(int64_t step, const Attributes& attributes, const std::vector<NamedTensor>& tensors) {
  const std::vector<Tensor> places = prepare(step, attributes, tensors);
  for (size_t i = 0; i < tensors.size(); ++i) copy_rows(tensors[i].tensor, places[i]);
  begin();
}

std::vector<Tensor> Writer::prepare(int64_t step, const Attributes& attributes,
                                    const std::vector<NamedTensor>& tensors) {
  if (impl_->state == Impl::State::writing || impl_->state == Impl::State::written)
    throw CheckpointError(
        fmt::format("the checkpoint of step {} is not committed yet", impl_->manifest.step));
  if (step < 0) throw CheckpointError("a step is never negative");
  impl_->clear();
  check_names(attributes, tensors);
  impl_->attributes = attributes;
  impl_->manifest.step = step;
  impl_->prepare_directory();
  impl_->reserve(tensors);
  std::vector<Tensor> places;
  for (const Snapshot& t : impl_->tensors)
    places.emplace_back(impl_->snapshot.data() + t.offset, t.entry.dtype, t.entry.shape);
  return places;
}

void Writer::begin() {
  if (::mkdir(impl_->temporary().c_str(), 0777) != 0) fail_errno(impl_->temporary(), "cannot create");
  impl_->reason.clear();
  impl_->state = Impl::State::writing;
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

bool Writer::busy() const { return impl_->state == Impl::State::writing; }
bool Writer::written() const { return impl_->state == Impl::State::written; }

bool Writer::wait(std::string& reason) {
  impl_->join();
  if (impl_->state == Impl::State::written) return true;
  reason = impl_->state == Impl::State::failed ? impl_->reason : "no save was started";
  return false;
}

Path Writer::commit() {
  std::string reason;
  if (!wait(reason)) throw CheckpointError(fmt::format("nothing to commit: {}", reason));
  const Path target = impl_->directory / step_name(impl_->manifest.step);
  try {
    write_synced(impl_->temporary() / kManifestName, to_text(impl_->manifest));
    sync_path(impl_->temporary());
    replace_directory(impl_->temporary(), target);
    sync_path(impl_->directory);
  } catch (...) {
    impl_->clear();
    throw;
  }
  impl_->point_at(target);
  impl_->state = Impl::State::idle;
  remember_verified(target);  // what was read back is what was renamed
  return target;
}

void Writer::discard() { impl_->clear(); }

}  // namespace checkpoints
