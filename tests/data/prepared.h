#pragma once
// A scratch folder, and prepared data in it.
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "data/files.h"
#include "data/prepare.h"
#include "tests/support/temporary_folder.h"

namespace data_test {

namespace fs = std::filesystem;

class Scratch {
 public:
  fs::path operator/(const std::string& name) const { return folder_.path() / name; }
  std::string write(const std::string& name, const std::string& content) const {
    fs::create_directories((folder_.path() / name).parent_path());
    std::ofstream(folder_.path() / name, std::ios::binary) << content;
    return (folder_.path() / name).string();
  }
  // Names in the folder, hidden ones too.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder_.path()))
      found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  }

 private:
  support::TemporaryFolder folder_;
};

// Text of `lines` lines that differ from those of another seed.
inline std::string sample_text(int seed, int lines) {
  std::string text;
  for (int i = 0; i < lines; ++i)
    text += "static int value_" + std::to_string(seed) + "_" + std::to_string(i * 7 % 13) + "(void);\n";
  return text;
}

// Byte-tokenized documents of different lengths under scratch/out.
inline data::PrepareSummary prepare_bytes(const Scratch& scratch, int documents,
                                          double validation_fraction = 0.2) {
  for (int i = 0; i < documents; ++i)
    scratch.write("in/" + std::to_string(i) + ".txt", sample_text(i, 1 + i * 5 % 11));
  data::PrepareParams params;
  params.inputs = {(scratch / "in").string()};
  params.output = scratch / "out";
  params.tokenizer = "bytes";
  params.validation_fraction = validation_fraction;
  return data::prepare(params, {});
}

// The message of the exception of type E that fn throws, "" if it throws none.
template <typename E, typename Fn>
std::string message_of(Fn&& fn) {
  try {
    fn();
  } catch (const E& error) {
    return error.what();
  }
  return {};
}

}  // namespace data_test
