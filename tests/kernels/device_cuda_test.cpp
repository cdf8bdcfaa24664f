#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/core/device.h"
#include "kernels/core/error.h"

namespace kernels {
namespace {

constexpr Device kGpu{Device::Kind::cuda, 0};

TEST(CudaDevice, MoreMemoryThanThereIsIsRefusedAndWorkGoesOn) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here: " << cuda_problem();
  std::string problem;
  try {
    free_bytes(kGpu, allocate_bytes(kGpu, 2 * memory_of(kGpu).total));
  } catch (const DeviceError& error) {
    problem = error.what();
  }
  EXPECT_EQ(problem.rfind("cuda:0 has ", 0), 0u) << problem;
  EXPECT_NE(problem.find("MiB are needed; use a smaller train.micro_batch"), std::string::npos) << problem;
  const std::vector<int> sent{3, 1, 4};
  std::vector<int> back(3);
  void* data = allocate_bytes(kGpu, 12);
  copy_bytes(data, kGpu, sent.data(), {}, 12);
  copy_bytes(back.data(), {}, data, kGpu, 12);
  free_bytes(kGpu, data);
  EXPECT_EQ(back, sent);
}

}  // namespace
}  // namespace kernels
