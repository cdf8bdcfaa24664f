// Under mpirun: the same global batch on this many ranks gives the losses of one rank, in fp32 within 1e-5
// relative and in fp16 within 2e-3; overflow is skipped on every rank at the same step; a stop asked of one
// rank stops all.
//
// The bounds: sums over ranks are taken in another order, so fp32 gradients differ by a few units in the last
// place (2^-24 times the square root of a few hundred terms, about 1e-6), and Adam carries that into the next
// losses. In fp16 a weight that lands on the other side of a rounding boundary moves by 2^-11 relative; a
// loss averages hundreds of tokens over such weights, which leaves well under 2^-9 = 2e-3.
#include <fmt/format.h>

#include <cmath>
#include <filesystem>

#include "comm/communicator.h"
#include "tests/support/tiny_run.h"
#include "trainer/train/loop.h"

namespace {

namespace fs = std::filesystem;
int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  fmt::print(stderr, "FAILED: {}\n", what);
}

void compare(const configs::Config& one, const configs::Config& many, double tolerance,
             const std::string& what) {
  const auto a = support::metric(one.log.run, "loss"), b = support::metric(many.log.run, "loss");
  expect(a.size() == b.size() && !a.empty(), what + ": as many steps");
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    expect(std::abs(a[i] - b[i]) <= tolerance * std::abs(a[i]),
           fmt::format("{} step {}: {:.8f} on one rank, {:.8f} here", what, i, a[i], b[i]));
  expect(support::metric(one.log.run, "skipped") == support::metric(many.log.run, "skipped"),
         what + ": the same steps skipped");
}

void same_losses(comm::Communicator& world, const fs::path& folder, const std::string& compute, double scale,
                 double tolerance) {
  auto config = support::tiny_config(folder);
  config.precision.compute = compute;
  config.precision.loss_scale_initial = scale;
  config.train.steps = 20;
  auto alone = config;
  alone.log.run += "_alone_" + compute + std::to_string(scale);
  config.log.run += "_many_" + compute + std::to_string(scale);
  if (world.rank() == 0) trainer::train(alone, *comm::make_local_communicator(), {}, {});
  world.barrier();
  trainer::train(config, world, {}, {});
  if (world.rank() == 0) compare(alone, config, tolerance, fmt::format("{} scale {:g}", compute, scale));
  world.barrier();
}

void stop_and_resume(comm::Communicator& world, const fs::path& folder) {
  auto whole = support::tiny_config(folder), parts = whole;
  whole.log.run += "_whole";
  parts.log.run += "_parts";
  trainer::train(whole, world, {}, {});
  trainer::TrainOptions stop, resume;
  int calls = 0;
  const bool asks = world.rank() == world.size() - 1;
  stop.stop_requested = [&] { return asks && ++calls == 3; };
  const auto stopped = trainer::train(parts, world, {}, stop);
  expect(stopped.reason == trainer::StopReason::asked_to_stop && stopped.step == 3,
         "one rank's signal stops all");
  resume.resume = "auto";
  trainer::train(parts, world, {}, resume);
  if (world.rank() == 0)
    expect(support::metric(whole.log.run, "loss") == support::metric(parts.log.run, "loss"),
           "stopped and resumed equals uninterrupted, bit for bit");
  world.barrier();
}

}  // namespace

int main(int argc, char** argv) {
  comm::Session session(&argc, &argv);
  auto& world = session.world();
  try {
    std::unique_ptr<support::TemporaryFolder> folder;
    if (world.rank() == 0) {
      folder = std::make_unique<support::TemporaryFolder>();
      support::prepare_tiny_data(folder->path());
    }
    const fs::path path = world.broadcast(folder ? folder->path().string() : std::string(), 0);
    same_losses(world, path, "fp32", 65536, 1e-5);
    same_losses(world, path, "fp16", 65536, 2e-3);
    same_losses(world, path, "fp16", 4294967296.0, 2e-3);
    stop_and_resume(world, path);
    world.barrier();
    return static_cast<int>(world.all_reduce(static_cast<int64_t>(failures > 0), comm::Reduce::max));
  } catch (const std::exception& e) {
    fmt::print(stderr, "rank {}: {}\n", world.rank(), e.what());
    session.abort(1);
  }
}
