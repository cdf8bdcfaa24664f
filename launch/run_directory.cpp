#include "launch/run_directory.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "trainer/train/metrics.h"

namespace launch {

namespace fs = std::filesystem;

void write_status(const fs::path& run, const RunStatus& status) {
  const nlohmann::ordered_json json = {{"state", status.state},
                                       {"step", status.step},
                                       {"exit_code", status.exit_code},
                                       {"reason", status.reason}};
  const fs::path file = run / "status.json", fresh = run / ".status.json.new";
  std::ofstream stream(fresh);
  stream << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  stream.close();
  std::error_code error;
  if (stream) fs::rename(fresh, file, error);
  if (!stream || error) fmt::print(stderr, "warning: cannot write {}\n", file.string());
}

int64_t last_logged_step(const fs::path& run) {
  std::ifstream stream(run / "metrics.jsonl");
  int64_t step = 0;
  for (std::string line; std::getline(stream, line);) step = std::max(step, trainer::step_of_line(line));
  return step;
}

fs::path run_of(const fs::path& checkpoint) {
  // Also of "step_00000100/", as shells complete it.
  const fs::path folder = (fs::absolute(checkpoint) / "").lexically_normal().parent_path().parent_path();
  return folder.filename() == "checkpoints" ? folder.parent_path() : folder;
}

}  // namespace launch
