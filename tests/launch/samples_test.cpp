// Text samples of checkpoints, made between steps and beside them.
#include "launch/samples.h"

#include <numeric>

#include "checkpoints/checkpoint.h"
#include "kernels/core/parallel.h"
#include "tests/launch/job_fixture.h"

namespace launch {
namespace {

class SampleTexts : public Job {
 protected:
  SampleTexts() {
    prepare();
    EXPECT_EQ(foretell(train()).exit_code, 0);
    made_between_steps_ = samples();
    fs::remove(run() / "samples.txt");
  }
  std::string samples() const { return read_text(run() / "samples.txt"); }
  fs::path checkpoint(int step) const {
    return run() / "checkpoints" / ("step_0000000" + std::to_string(step));
  }

  std::string made_between_steps_;
};

// What training does meanwhile: it computes with the team and saves.
void train_meanwhile(const fs::path& folder) {
  std::vector<float> numbers(100000, 1);
  const kernels::Tensor tensor(numbers.data(), kernels::DType::f32, {static_cast<int64_t>(numbers.size())});
  checkpoints::Writer writer(folder, 2);
  for (int step = 0; step < 20; ++step) {
    for (int region = 0; region < 100; ++region)
      kernels::parallel_for(tensor.numel(), 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) numbers[static_cast<size_t>(i)] += 1;
      });
    writer.start(step, {}, {{"numbers", tensor}});
    writer.commit();
  }
  EXPECT_EQ(numbers, std::vector<float>(numbers.size(), 2001));
}

TEST_F(SampleTexts, BesideTrainingTheyAreTheSame) {
  ASSERT_TRUE(checkpoints::reads_beside_writes());
  kernels::set_threads(3);
  Samples beside(config_, true);
  for (int step : {3, 6}) {
    beside.append(checkpoint(step));
    train_meanwhile(folder_.path() / ("meanwhile" + std::to_string(step)));
    beside.finish();
  }
  EXPECT_EQ(samples(), made_between_steps_);
  kernels::set_threads(0);
}

TEST_F(SampleTexts, OfThoseThatWaitTheNewestIsMade) {
  Samples beside(config_, true);
  for (int i = 0; i < 50; ++i) beside.append(checkpoint(3));
  beside.append(checkpoint(6));
  beside.finish();
  const std::string text = samples();
  EXPECT_NE(text.find("==== step 6:"), std::string::npos) << text;
  // The first may have been under way when the others came.
  EXPECT_LE(text.size(), made_between_steps_.size());
}

TEST_F(SampleTexts, OneUnderWayAtTheEndIsWholeOrGivenUp) {
  {
    Samples beside(config_, true);
    beside.append(checkpoint(6));
  }
  const std::string text = fs::exists(run() / "samples.txt") ? samples() : "";
  EXPECT_TRUE(made_between_steps_.ends_with(text)) << text;
}

}  // namespace
}  // namespace launch
