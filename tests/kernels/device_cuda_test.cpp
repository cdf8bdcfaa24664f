#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/core/device.h"
#include "kernels/core/error.h"
#include "kernels/core/stream.h"
#include "kernels/ops/cast.h"

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

// Streams of our own do not wait for a copy, so it must have ended: this one takes far longer than starting
// to read what it writes last.
TEST(CudaDevice, ACopyHasEndedWhenItReturns) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here: " << cuda_problem();
  constexpr size_t kBytes = size_t{1} << 29;
  const OwnedStream stream(kGpu);
  auto* from = static_cast<char*>(allocate_bytes(kGpu, kBytes));
  auto* to = static_cast<char*>(allocate_bytes(kGpu, kBytes));
  void* seen = allocate_bytes(kGpu, sizeof(int));
  Context ctx;
  ctx.device = kGpu;
  // All of what is copied was written, as initcheck asks.
  for (void* data : {from, to}) fill(ctx, Tensor(data, DType::f32, {kBytes / 4}, kGpu), 0);
  const int old = 1, sent = 7;
  copy_bytes(to + kBytes - sizeof(int), kGpu, &old, {}, sizeof(int));
  copy_bytes(from + kBytes - sizeof(int), kGpu, &sent, {}, sizeof(int));
  copy_bytes(to, kGpu, from, kGpu, kBytes);
  copy_async(seen, to + kBytes - sizeof(int), sizeof(int), kGpu, stream.get());
  int got = 0;
  copy_bytes(&got, {}, seen, kGpu, sizeof(int));
  EXPECT_EQ(got, sent);
  for (void* data : {static_cast<void*>(from), static_cast<void*>(to), seen}) free_bytes(kGpu, data);
}

}  // namespace
}  // namespace kernels
