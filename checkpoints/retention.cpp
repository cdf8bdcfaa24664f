#include <fmt/format.h>

#include <algorithm>

#include "checkpoints/verify.h"

namespace checkpoints {

using kernels::CheckpointError;

namespace {

constexpr const char* kBadSuffix = ".bad";

bool is_set_aside(const Path& path) {
  const std::string name = path.filename().string();
  const size_t at = name.find(kBadSuffix);
  return at != std::string::npos && step_of(name.substr(0, at)) >= 0;
}

void set_aside(const Path& path) {
  Path target = path.string() + kBadSuffix;
  for (int i = 2; std::filesystem::exists(target); ++i)
    target = fmt::format("{}{}{}", path.string(), kBadSuffix, i);
  rename_over(path, target);
}

// Empty where it is good.
std::string why_bad(const Path& checkpoint) {
  try {
    Reader reader(checkpoint);
    return "";
  } catch (const SystemFailure& error) {
    throw SystemFailure(
        fmt::format("{}; {} may be good: make it readable, or move it away to go on from an older one",
                    error.what(), checkpoint.string()));
  } catch (const CheckpointError& error) {
    return error.what();
  }
}

}  // namespace

bool has_steps(const Path& directory) {
  if (!steps_in(directory).empty()) return true;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(directory, none))
    if (is_set_aside(entry.path())) return true;
  return false;
}

int64_t newest_step(const Path& directory) {
  const std::vector<int64_t> steps = steps_in(directory);
  return steps.empty() ? -1 : steps.front();
}

Path find_newest(const Path& directory, bool set_bad_aside,
                 const std::function<void(const std::string&)>& warn) {
  if (!has_steps(directory)) return {};
  const std::vector<int64_t> steps = steps_in(directory);
  for (size_t i = 0; i < steps.size(); ++i) {
    const Path checkpoint = directory / step_name(steps[i]);
    const std::string reason = why_bad(checkpoint);
    if (reason.empty()) return checkpoint;
    if (set_bad_aside) set_aside(checkpoint);
    if (warn)
      warn(fmt::format("{}; it {}{}", reason, set_bad_aside ? "was renamed to *.bad" : "is passed over",
                       i + 1 < steps.size() ? fmt::format(", {} is next", step_name(steps[i + 1])) : ""));
  }
  throw CheckpointError(fmt::format(
      "no checkpoint in {} verifies; put a good copy there, or move the folder away to start from step 0",
      directory.string()));
}

Path resolve(const Path& given, const std::function<void(const std::string&)>& warn) {
  std::error_code none;
  if (step_of(given) >= 0 || std::filesystem::exists(given / kManifestName, none)) return given;
  for (const Path& directory : {given / "checkpoints", given}) {
    const Path found = find_newest(directory, false, warn);
    if (!found.empty()) return found;
  }
  throw CheckpointError(
      fmt::format("{} holds no checkpoint; name a run directory, its checkpoints folder or a step_* folder",
                  given.string()));
}

void retain(const Path& directory, int64_t keep, int64_t keep_every, int64_t best) {
  const int64_t wanted = std::max<int64_t>(2, keep);
  int64_t verified = 0;
  for (int64_t step : steps_in(directory)) {
    const Path checkpoint = directory / step_name(step);
    if (verified < wanted) {
      if (known_verified(checkpoint) || why_bad(checkpoint).empty()) ++verified;
      continue;
    }
    if (step == best || (keep_every > 0 && step % keep_every == 0)) continue;
    // A directory that is being deleted must not look like a checkpoint, after a power failure either.
    const Path doomed = directory / fmt::format("{}{}", kTemporaryPrefix, step_name(step));
    rename_over(checkpoint, doomed);
    sync_path(directory);
    remove_tree(doomed);
  }
}

}  // namespace checkpoints
