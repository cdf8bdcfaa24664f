// Checkpoints are ordinary HDF5 files: h5ls lists them and the lines of the README read them with h5py.
// launch/setup.sh installs both; where one is missing these tests fail.
#include <fmt/format.h>

#include <numeric>

#include "checkpoints/checkpoint.h"
#include "tests/launch/job_fixture.h"

namespace launch {
namespace {

class Hdf5Tools : public Job {
 protected:
  void SetUp() override {
    prepare();
    config_.train.steps = 2;
    save();
    ASSERT_EQ(foretell_ranks(2, train()).exit_code, 0);
    for (const auto& entry : fs::directory_iterator(run() / "checkpoints" / "step_00000002"))
      if (entry.path().extension() == ".h5") shards_.push_back(entry.path());
    ASSERT_FALSE(shards_.empty());
  }

  std::vector<fs::path> shards_;
};

TEST_F(Hdf5Tools, H5lsListsEveryTensorWithItsShape) {
  std::string listed;
  for (const fs::path& shard : shards_) {
    const Outcome outcome = run_shell("h5ls -r " + shard.string());
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_EQ(outcome.errors, "");
    listed += outcome.output;
  }
  const checkpoints::Reader reader(run() / "checkpoints" / "step_00000002");
  ASSERT_GT(reader.names().size(), 30u);
  for (const std::string& name : reader.names()) {
    const size_t at = listed.find("/" + name + " ");
    ASSERT_NE(at, std::string::npos) << name << " is not in\n" << listed;
    const kernels::Shape stored = reader.shape(name);
    std::string shape = fmt::format("{{{}", stored[0]);
    for (int i = 1; i < stored.rank(); ++i) shape += fmt::format(", {}", stored[i]);
    const std::string line = listed.substr(at, listed.find('\n', at) - at);
    EXPECT_NE(line.find("Dataset " + shape), std::string::npos) << line << " lacks " << shape;
  }
}

// The block of Python in the README.
std::string readme_script() {
  const std::string readme = read_text(FORETELL_SOURCE "/README.md");
  const size_t begin = readme.find("```python\n") + 10;
  return readme.substr(begin, readme.find("```", begin) - begin);
}

TEST_F(Hdf5Tools, TheLinesOfTheReadmeReadWithH5py) {
  std::string script = readme_script();
  const std::string quickstart = "runs/quickstart/";
  ASSERT_NE(script.find(quickstart), std::string::npos) << script;
  script.replace(script.find(quickstart), quickstart.size(), run().string() + "/");
  script += "print(embedding.dtype, embedding.shape, repr(float(embedding.astype('f8').sum())))\n";
  const std::string file = write_text(folder_.path() / "read.py", script);
  // Debian's h5py belongs to Debian's Python, whichever is first on the PATH.
  const Outcome outcome = run_shell("/usr/bin/python3 " + file);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_EQ(outcome.output.rfind("2\n", 0), 0u) << "the step: " << outcome.output;
  EXPECT_NE(outcome.output.find("blocks.0.attention.q.weight (32, 32)"), std::string::npos) << outcome.output;

  const checkpoints::Reader reader(run() / "checkpoints" / "step_00000002");
  const kernels::Shape shape = reader.shape("master/embedding.weight");
  std::vector<float> embedding(static_cast<size_t>(shape.numel()));
  reader.read("master/embedding.weight", {embedding.data(), kernels::DType::f32, shape});
  const std::string last = fmt::format("float32 ({}, {}) ", shape[0], shape[1]);
  const size_t at = outcome.output.find(last);
  ASSERT_NE(at, std::string::npos) << outcome.output;
  // Sums of the same numbers in double, in another order: off by less than n^2 eps max|x|, far below 1e-6
  // here.
  EXPECT_NEAR(std::stod(outcome.output.substr(at + last.size())),
              std::accumulate(embedding.begin(), embedding.end(), 0.0), 1e-6);
}

}  // namespace
}  // namespace launch
