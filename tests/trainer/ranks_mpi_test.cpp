// Under mpirun: the same global batch on this many ranks gives the losses of one rank, in fp32 within 1e-5
// relative and in fp16 within 2e-3; overflow is skipped on every rank at the same step; a stop asked of one
// rank stops all. Sharding the optimizer's state changes no bit of losses or checkpoints, and either kind of
// job goes on from the other's.
//
// The bounds: sums over ranks are taken in another order, so fp32 gradients differ by a few units in the last
// place (2^-24 times the square root of a few hundred terms, about 1e-6), and Adam carries that into the next
// losses. In fp16 a weight that lands on the other side of a rounding boundary moves by 2^-11 relative; a
// loss averages hundreds of tokens over such weights, which leaves well under 2^-9 = 2e-3.
#include <fmt/format.h>

#include <cmath>
#include <filesystem>

#include "checkpoints/checkpoint.h"
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

bool same_checkpoint(const fs::path& a, const fs::path& b) {
  const checkpoints::Reader first(a), second(b);
  const auto names = first.names();
  bool same = names == second.names() && !names.empty();
  for (const auto& name : names) {
    const auto bytes = [&](const checkpoints::Reader& reader) {
      std::vector<char> data(static_cast<size_t>(reader.shape(name).numel()) *
                             kernels::size_of(reader.dtype(name)));
      reader.read(name, kernels::Tensor(data.data(), reader.dtype(name), reader.shape(name)));
      return data;
    };
    same = same && first.shape(name) == second.shape(name) && bytes(first) == bytes(second);
  }
  return same;
}

// Trains to `steps` in a folder of its own, from `from` where given; returns the checkpoint.
fs::path train_to(configs::Config config, comm::Communicator& ranks, const std::string& name, int64_t zero,
                  int64_t steps, const fs::path& from = {}) {
  config.log.run += name;
  config.comm.zero = zero;
  config.train.steps = steps;
  trainer::TrainOptions options;
  if (!from.empty()) options.resume = from.string();
  trainer::train(config, ranks, {}, options);
  return fs::path(config.log.run) / "checkpoints" / fmt::format("step_{:08}", steps);
}

void sharded(comm::Communicator& world, const fs::path& folder) {
  auto config = support::tiny_config(folder);
  config.optim.clip = 0.1;                          // the norm matters
  config.precision.loss_scale_initial = 4194304.0;  // the first steps overflow
  config.comm.bucket_mb = 0.01;
  const fs::path plain = train_to(config, world, "_plain", 0, 14);
  const fs::path zero = train_to(config, world, "_zero", 1, 14);
  const fs::path plain_on = train_to(config, world, "_plain_on", 0, 18, zero);
  const fs::path zero_on = train_to(config, world, "_zero_on", 1, 18, plain);
  const auto alone = comm::make_local_communicator();
  const fs::path single = world.rank() == 0 ? train_to(config, *alone, "_single", 1, 18, zero) : "";
  if (world.rank() == 0) train_to(config, *alone, "_single_plain", 0, 18, plain);
  const fs::path back = train_to(config, world, "_back", 1, 20, world.broadcast(single.string(), 0));
  const fs::path plain_back =
      train_to(config, world, "_plain_back", 0, 20, world.broadcast(single.string(), 0));
  if (world.rank() == 0) {
    const auto metric = [&](const char* name, const char* key) {
      return support::metric(config.log.run + name, key);
    };
    for (const char* key : {"loss", "skipped"})
      expect(metric("_plain", key) == metric("_zero", key), fmt::format("{} with shards, bit for bit", key));
    const auto skipped = metric("_plain", "skipped");
    expect(skipped.front() == 1 && skipped.back() == 0, "some steps are skipped, some are not");
    expect(same_checkpoint(plain, zero), "the checkpoint does not tell of shards");
    expect(same_checkpoint(plain_on, zero_on), "either goes on from the other's checkpoint");
    expect(metric("_single", "loss") == metric("_single_plain", "loss"), "one rank goes on from it");
    expect(same_checkpoint(back, plain_back), "shards go on from one rank's checkpoint");
  }
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
    sharded(world, path);
    world.barrier();
    return static_cast<int>(world.all_reduce(static_cast<int64_t>(failures > 0), comm::Reduce::max));
  } catch (const std::exception& e) {
    fmt::print(stderr, "rank {}: {}\n", world.rank(), e.what());
    session.abort(1);
  }
}
