#pragma once
// Files as the data room reads and writes them. Every error is a DataError with the path and the reason.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace data {

// Files behind paths, folders (recursive, without hidden entries) and globs, each list sorted, every file
// once; and folders that cannot be read, as read_file() will say. A path that does not exist or a glob
// without a match is a DataError.
std::vector<std::filesystem::path> expand_inputs(const std::vector<std::string>& inputs);

// The whole content of a regular file.
std::string read_file(const std::filesystem::path& path);

// Writes a new file and has it on disk when it returns.
void write_file(const std::filesystem::path& path, const std::vector<std::string_view>& pieces);

// The same in place of what has that name, in one moment: the file is the old one, or the new one whole.
// Makes the folders above it.
void write_whole(const std::filesystem::path& file, const std::string& contents);

// DataError if the file system of `folder` has less than `bytes` left.
void check_free_space(const std::filesystem::path& folder, int64_t bytes);

// A folder that appears under its name complete or not at all: filled under a temporary name beside it, then
// renamed by commit(). Without commit() nothing is left behind. What an interrupted program left is removed.
class NewFolder {
 public:
  // DataError, here and in commit(), if `target` exists and holds something, unless `replaceable` says that
  // it may be replaced.
  NewFolder(const std::filesystem::path& target,
            const std::function<bool(const std::filesystem::path&)>& replaceable);
  ~NewFolder();
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;
  const std::filesystem::path& path() const { return temporary_; }
  void commit();

 private:
  void check_target() const;
  std::filesystem::path target_, temporary_;
  std::function<bool(const std::filesystem::path&)> replaceable_;
  bool committed_ = false;
};

}  // namespace data
