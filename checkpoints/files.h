#pragma once
// Durable files: written whole, synced, renamed. Every failure is a CheckpointError with the file and the
// system's reason; a SystemFailure where that says nothing about what is in the file.
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/error.h"

namespace checkpoints {

using Path = std::filesystem::path;

// Access refused, a disk or a server that does not answer, too many open files: a checkpoint may be as good
// as ever behind it.
struct SystemFailure : kernels::CheckpointError {
  using CheckpointError::CheckpointError;
};
// The line is "<what>: <the system's reason>" and what to do about it.
[[noreturn]] void fail_system(const std::string& what, int error);
[[noreturn]] void fail_errno(const Path& path, const char* action);
void write_synced(const Path& path, const std::string& text);
void sync_path(const Path& path);  // a file or a directory
// A directory, with what it lies in where that is missing, each synced with its parent.
void create_synced(const Path& path);
void rename_over(const Path& from, const Path& to);
// Puts the directory `from` at `to`; a directory that stands there is removed, without a moment in which
// neither is there.
void replace_directory(const Path& from, const Path& to);
// Gives the space back even while a library still holds a file open; never throws.
void remove_tree(const Path& path) noexcept;
uint64_t free_bytes_at(const Path& directory);

// A regular file (never a link) of at most `limit` bytes.
std::string read_text(const Path& path, uint64_t limit);
uint64_t regular_file_size(const Path& path);
uint64_t hash_file(const Path& path);
uint64_t hash_bytes(std::span<const std::byte> bytes);
std::string to_hex(uint64_t hash);

// step_NNNNNNNN directories.
std::string step_name(int64_t step);
int64_t step_of(const Path& directory);  // -1 for any other name
// The steps below `directory`, newest first.
std::vector<int64_t> steps_in(const Path& directory);
inline constexpr const char* kTemporaryPrefix = ".tmp-";

}  // namespace checkpoints
