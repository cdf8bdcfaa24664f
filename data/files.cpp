#include "data/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <glob.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

#include "kernels/core/error.h"

namespace data {

namespace fs = std::filesystem;
using kernels::DataError;

namespace {

[[noreturn]] void fail(const fs::path& path, const char* what, int error) {
  throw DataError(fmt::format("{}: cannot {}: {}{}", path.string(), what, std::strerror(error),
                              kernels::remedy_of(error)));
}

class Descriptor {
 public:
  Descriptor(const fs::path& path, int flags, const char* what)
      : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail(path, what, errno);
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  void close() {
    if (::close(std::exchange(fd_, -1)) != 0) fail(path_, "write", errno);
  }

 private:
  fs::path path_;
  int fd_;
};

void sync_folder(const fs::path& folder) {
  Descriptor fd(folder, O_RDONLY | O_DIRECTORY, "open");
  if (::fsync(fd.get()) != 0) fail(folder, "write", errno);
}

bool hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

// A folder that cannot be read stands for what is in it: whoever reads it is told.
std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, error), end;
  if (error) fail(folder, "read", error.value());
  while (it != end) {
    if (hidden(it->path())) {
      it.disable_recursion_pending();
    } else if (it->is_regular_file(error)) {
      found.push_back(it->path());
    } else if (it->is_directory(error) && ::access(it->path().c_str(), R_OK | X_OK) != 0) {
      found.push_back(it->path());
      it.disable_recursion_pending();
    }
    it.increment(error);
    if (error) fail(folder, "read", error.value());
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<fs::path> matches(const std::string& input) {
  if (fs::exists(fs::symlink_status(input))) return {input};
  if (input.find_first_of("*?[") == std::string::npos)
    throw DataError(fmt::format("{}: no such file or folder", input));
  glob_t found{};
  const int rc = ::glob(input.c_str(), 0, nullptr, &found);
  std::vector<fs::path> paths(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  ::globfree(&found);
  if (rc != 0 || paths.empty()) throw DataError(fmt::format("{}: no file matches", input));
  return paths;
}

// Beside a folder: the new one, and the old one where two names cannot be exchanged.
std::string temporary_prefix(const fs::path& target) {
  return fmt::format(".{}.new-", target.filename().string());
}
constexpr const char* kOldSuffix = ".old";

// Removes temporary folders of programs that no longer run. One that ended between two moves left only what
// it was to replace, which takes its name back.
void remove_left_overs(const fs::path& target) {
  const std::string prefix = temporary_prefix(target);
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(target.parent_path(), error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix)) continue;
    const long pid = std::strtol(name.c_str() + prefix.size(), nullptr, 10);
    if (pid <= 0) continue;
    // This program has made nothing yet: its number was another's, as containers give the same ones again.
    if (pid != ::getpid() && (::kill(static_cast<pid_t>(pid), 0) == 0 || errno != ESRCH)) continue;
    if (name.ends_with(kOldSuffix) && !fs::exists(fs::symlink_status(target)))
      fs::rename(entry.path(), target, error);
    else
      fs::remove_all(entry.path(), error);
  }
}

// In one moment, where the file system can.
void exchange(const fs::path& temporary, const fs::path& target) {
  if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) fail(target, "replace", errno);
  const fs::path old = temporary.string() + kOldSuffix;
  std::error_code error, ignored;
  fs::rename(target, old, error);
  if (error) fail(target, "replace", error.value());
  fs::rename(temporary, target, error);
  if (error) fs::rename(old, target, ignored);
  if (error) fail(target, "create", error.value());
  fs::rename(old, temporary, ignored);
}

}  // namespace

std::vector<fs::path> expand_inputs(const std::vector<std::string>& inputs) {
  std::vector<fs::path> files;
  std::set<std::string> seen;
  const auto add = [&](const fs::path& file) {
    if (seen.insert(fs::weakly_canonical(file).string()).second) files.push_back(file);
  };
  for (const std::string& input : inputs)
    for (const fs::path& path : matches(input)) {
      std::error_code error;
      if (fs::is_directory(path, error)) {
        for (const fs::path& file : files_below(path)) add(file);
      } else {
        add(path);
      }
    }
  return files;
}

std::string read_file(const fs::path& path) {
  Descriptor fd(path, O_RDONLY | O_NONBLOCK, "open");
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) fail(path, "read", errno);
  // A folder may be listed without the right to open what is in it.
  if (S_ISDIR(status.st_mode)) fail(path, "open", ::access(path.c_str(), X_OK) != 0 ? errno : EISDIR);
  if (!S_ISREG(status.st_mode)) throw DataError(fmt::format("{}: not a regular file", path.string()));
  std::string content(static_cast<size_t>(status.st_size), '\0');
  size_t done = 0;
  while (done < content.size()) {
    const ssize_t n = ::read(fd.get(), content.data() + done, content.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path, "read", errno);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  content.resize(done);
  return content;
}

void write_file(const fs::path& path, const std::vector<std::string_view>& pieces) {
  Descriptor fd(path, O_WRONLY | O_CREAT | O_EXCL, "write");
  for (std::string_view piece : pieces)
    while (!piece.empty()) {
      const ssize_t n = ::write(fd.get(), piece.data(), piece.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(path, "write", errno);
      piece.remove_prefix(static_cast<size_t>(n));
    }
  if (::fsync(fd.get()) != 0) fail(path, "write", errno);
  fd.close();
}

void write_whole(const fs::path& file, const std::string& contents) {
  fs::path temporary = file;
  temporary += ".tmp";
  std::error_code error;
  const auto check = [&](const fs::path& path) {
    if (error)
      throw DataError("cannot write " + path.string() + " (" + error.message() +
                      "): check permissions and free space");
  };
  if (!file.parent_path().empty()) fs::create_directories(file.parent_path(), error);
  check(file.parent_path());
  fs::remove(temporary, error);
  check(temporary);
  try {
    write_file(temporary, {contents});
  } catch (...) {
    fs::remove(temporary, error);
    throw;
  }
  fs::rename(temporary, file, error);
  check(file);
}

void check_free_space(const fs::path& folder, int64_t bytes) {
  struct statvfs status {};
  if (::statvfs(folder.c_str(), &status) != 0) fail(folder, "read", errno);
  const uint64_t left = uint64_t{status.f_bavail} * status.f_frsize;
  if (left < static_cast<uint64_t>(bytes))
    throw DataError(
        fmt::format("{}: {} MiB are needed and {} MiB are free; free some space or choose another place",
                    folder.string(), (bytes >> 20) + 1, left >> 20));
}

NewFolder::NewFolder(const fs::path& target, const std::function<bool(const fs::path&)>& replaceable)
    : target_(fs::absolute(target).lexically_normal()), replaceable_(replaceable) {
  if (target_.filename().empty()) target_ = target_.parent_path();
  std::error_code error;
  remove_left_overs(target_);
  check_target();
  const fs::path parent = target_.parent_path();
  fs::create_directories(parent, error);
  if (error) fail(parent, "create", error.value());
  temporary_ = parent / fmt::format("{}{}", temporary_prefix(target_), ::getpid());
  fs::remove_all(temporary_, error);
  if (::mkdir(temporary_.c_str(), 0777) != 0) fail(temporary_, "create", errno);
}

NewFolder::~NewFolder() {
  std::error_code error;
  if (!committed_) fs::remove_all(temporary_, error);
}

void NewFolder::check_target() const {
  std::error_code error;
  if (fs::exists(fs::symlink_status(target_)) &&
      !(fs::is_directory(target_) && fs::is_empty(target_, error)) && !replaceable_(target_))
    throw DataError(fmt::format(
        "{}: exists already; choose another folder (--overwrite replaces prepared data, nothing else)",
        target_.string()));
}

void NewFolder::commit() {
  sync_folder(temporary_);
  check_target();  // much may have come there while this folder was filled
  if (fs::exists(target_))
    exchange(temporary_, target_);
  else if (::rename(temporary_.c_str(), target_.c_str()) != 0)
    fail(target_, "create", errno);
  committed_ = true;
  sync_folder(target_.parent_path());
  std::error_code error;
  fs::remove_all(temporary_, error);  // what was replaced
}

}  // namespace data
