#include "checkpoints/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>

namespace checkpoints {
namespace {

using kernels::CheckpointError;

class Descriptor {
 public:
  Descriptor(const Path& path, int flags) : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail_errno(path, "cannot open");
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  void close() {
    const int fd = fd_;
    fd_ = -1;
    if (::close(fd) != 0) fail_errno(path_, "cannot close");
  }

 private:
  Path path_;
  int fd_;
};

size_t read_some(const Path& path, const Descriptor& file, void* data, size_t bytes) {
  ssize_t n;
  do {
    n = ::read(file.get(), data, bytes);
  } while (n < 0 && errno == EINTR);
  if (n < 0) fail_errno(path, "cannot read");
  return static_cast<size_t>(n);
}

}  // namespace

void fail_system(const std::string& what, int error) {
  const std::string line = fmt::format("{}: {}{}", what, std::strerror(error), kernels::remedy_of(error));
  if (error == ENOENT || error == ENOTDIR || error == EISDIR || error == ELOOP) throw CheckpointError(line);
  throw SystemFailure(line);
}

void fail_errno(const Path& path, const char* action) {
  fail_system(fmt::format("{} {}", action, path.string()), errno);
}

void write_synced(const Path& path, const std::string& text) {
  Descriptor file(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW);
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = ::write(file.get(), text.data() + at, text.size() - at);
    if (n < 0 && errno != EINTR) fail_errno(path, "cannot write");
    if (n > 0) at += static_cast<size_t>(n);
  }
  if (::fsync(file.get()) != 0) fail_errno(path, "cannot sync");
  file.close();
}

void sync_path(const Path& path) {
  Descriptor file(path, O_RDONLY);
  if (::fsync(file.get()) != 0) fail_errno(path, "cannot sync");
}

void create_synced(const Path& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return;
  const Path parent = path.has_parent_path() ? path.parent_path() : Path(".");
  create_synced(parent);
  if (::mkdir(path.c_str(), 0777) == 0) return sync_path(parent);
  if (errno != EEXIST || !std::filesystem::is_directory(path, error)) fail_errno(path, "cannot create");
}

void rename_over(const Path& from, const Path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_errno(to, "cannot move a file to");
}

void replace_directory(const Path& from, const Path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return;
  if (errno == EINVAL || errno == ENOSYS) {
    if (::rename(from.c_str(), to.c_str()) != 0) fail_errno(to, "cannot move a checkpoint to");
    return;
  }
  if (errno != EEXIST || ::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) != 0)
    fail_errno(to, "cannot move a checkpoint to");
  sync_path(to.has_parent_path() ? to.parent_path() : Path("."));
  remove_tree(from);
}

void remove_tree(const Path& path) noexcept {
  try {
    std::error_code ignored;
    if (std::filesystem::is_directory(std::filesystem::symlink_status(path, ignored)))
      for (const auto& entry : std::filesystem::recursive_directory_iterator(path, ignored))
        if (entry.is_regular_file(ignored) && !entry.is_symlink(ignored))
          std::filesystem::resize_file(entry.path(), 0, ignored);
    std::filesystem::remove_all(path, ignored);
  } catch (...) {
  }
}

uint64_t free_bytes_at(const Path& directory) {
  struct statvfs info;
  if (::statvfs(directory.c_str(), &info) != 0) fail_errno(directory, "cannot ask for the free space of");
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

uint64_t regular_file_size(const Path& path) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) fail_errno(path, "cannot read");
  if (!S_ISREG(info.st_mode)) throw CheckpointError(fmt::format("{} is not a regular file", path.string()));
  return static_cast<uint64_t>(info.st_size);
}

std::string read_text(const Path& path, uint64_t limit) {
  const uint64_t size = regular_file_size(path);
  if (size > limit)
    throw CheckpointError(
        fmt::format("{} has {} bytes, more than the {} allowed", path.string(), size, limit));
  Descriptor file(path, O_RDONLY | O_NOFOLLOW);
  std::string text(size, '\0');
  size_t at = 0;
  while (at < text.size()) {
    const size_t n = read_some(path, file, text.data() + at, text.size() - at);
    if (n == 0) break;
    at += n;
  }
  text.resize(at);
  return text;
}

uint64_t hash_file(const Path& path) {
  constexpr size_t kBuffer = size_t{1} << 20;
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), XXH3_freeState);
  XXH3_64bits_reset(state.get());
  Descriptor file(path, O_RDONLY | O_NOFOLLOW);
  std::vector<char> buffer(kBuffer);
  while (const size_t n = read_some(path, file, buffer.data(), buffer.size()))
    XXH3_64bits_update(state.get(), buffer.data(), n);
  return XXH3_64bits_digest(state.get());
}

uint64_t hash_bytes(std::span<const std::byte> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string to_hex(uint64_t hash) { return fmt::format("{:016x}", hash); }

std::string step_name(int64_t step) { return fmt::format("step_{:08}", step); }

int64_t step_of(const Path& directory) {
  const std::string name = directory.filename().string();
  if (!name.starts_with("step_")) return -1;
  int64_t step = -1;
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + 5, end, step);
  return error == std::errc() && stop == end && step >= 0 && step_name(step) == name ? step : -1;
}

std::vector<int64_t> steps_in(const Path& directory) {
  std::vector<int64_t> steps;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error))
    if (step_of(entry.path()) >= 0) steps.push_back(step_of(entry.path()));
  if (error && error != std::errc::no_such_file_or_directory && error != std::errc::not_a_directory)
    throw CheckpointError(
        fmt::format("cannot list {}: {}; check its permissions", directory.string(), error.message()));
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

}  // namespace checkpoints
