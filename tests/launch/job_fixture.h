#pragma once
// A tiny training job of the command line in a folder of its own.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "configs/config.h"
#include "tests/launch/program.h"

namespace launch {

namespace fs = std::filesystem;

class Job : public testing::Test {
 protected:
  Job() {
    config_.train.steps = 6;
    config_.optim.warmup = 1;
    config_.checkpoint.every = 3;
    save();
  }

  // Prepared data is only needed by some tests.
  void prepare() { support::prepare_tiny_data(folder_.path()); }
  void save() { file_ = write_text(folder_.path() / "a.cfg", configs::to_ini(config_)); }
  std::string train(const std::string& more = "") const { return "train " + file_ + " " + more; }
  fs::path run() const { return config_.log.run; }
  nlohmann::json status() const { return nlohmann::json::parse(read_text(run() / "status.json")); }
  fs::path any_file(const fs::path& below, const std::string& extension) const {
    for (const auto& entry : fs::recursive_directory_iterator(below))
      if (entry.path().extension() == extension &&
          entry.path().filename().string().find("validation") == std::string::npos)
        return entry.path();
    return "";
  }

  TemporaryFolder folder_;
  configs::Config config_ = support::tiny_config(folder_.path());
  std::string file_;
};

}  // namespace launch
