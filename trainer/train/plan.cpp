#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>

#include "kernels/core/parallel.h"
#include "kernels/ops/cast.h"
#include "kernels/ops/linear.h"
#include "trainer/optim/settings.h"
#include "trainer/train/loop.h"
#include "trainer/train/step.h"

namespace trainer {

namespace {

using kernels::DType;

// Operations per second of this machine's matrix product at a training shape.
double measured_rate(const kernels::Context& ctx, DType compute) {
  constexpr int64_t kRows = 1024, kWidth = 512;
  kernels::Arena arena("probe", ctx.device);
  const auto take = [&] {
    return std::array{arena.allocate("x", compute, {kRows, kWidth}),
                      arena.allocate("w", compute, {kWidth, kWidth}),
                      arena.allocate("y", compute, {kRows, kWidth})};
  };
  take();
  arena.place();
  const auto [x, w, y] = take();
  kernels::fill(ctx, x, 0.5f);
  kernels::fill(ctx, w, 0.25f);
  kernels::linear(ctx, x, {w, {}, {}}, y);
  const auto start = std::chrono::steady_clock::now();
  constexpr int kRepeats = 10;
  for (int i = 0; i < kRepeats; ++i) kernels::linear(ctx, x, {w, {}, {}}, y);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return kRepeats * 2.0 * kRows * kWidth * kWidth / time.count();
}

// Matrix products of one token, forward and backward: 2 operations a weight forward, 4 backward (2 through a
// frozen layer are not done at all). Each head multiplies by the unembedding once more.
double flop_per_token(const configs::Config& config, const Model& model) {
  double forward = 0, trained = 0;
  for (const auto& p : model.parameters().parameters()) {
    if (p.shape.rank() != 2 || p.name.find("embedding") != std::string::npos) continue;
    forward += 2.0 * p.shape.numel();
    if (p.trainable) trained += 2.0 * p.shape.numel();
  }
  const double unembedding = 2.0 * model.vocabulary() * model.width() * model.losses().size();
  const auto& m = config.model;
  const double attention = 4.0 * m.layers * m.width * std::min<double>(m.context, 512) / 2;
  const bool all = config.train.trainable == "all";
  return forward + attention + unembedding + 2 * (trained + (all ? attention : 0) + unembedding);
}

void add_entries(Plan& plan, const std::string& segment, const std::vector<kernels::Arena::Entry>& entries) {
  std::map<std::string, int64_t> sums;
  for (const auto& e : entries) sums[e.name] += static_cast<int64_t>(e.bytes);
  for (const auto& [name, bytes] : sums) plan.rows.push_back({segment, name, bytes});
}

// What a segment of the parameter store holds, as the table says it.
std::string buffer_name(const std::string& segment, int shards) {
  static const std::map<std::string, std::string> names = {{"weights", "compute weights"},
                                                           {"gradients", "fp32 gradients"},
                                                           {"master", "fp32 master weights"},
                                                           {"m", "AdamW m"},
                                                           {"v", "AdamW v"}};
  const auto it = names.find(segment);
  if (it == names.end()) return "state";
  const bool shared = shards > 1 && segment != "weights" && segment != "gradients";
  return shared ? fmt::format("{}, 1 of {} shards", it->second, shards) : it->second;
}

}  // namespace

Plan plan(const configs::Config& config, int64_t vocabulary, int ranks) {
  Model model(config, vocabulary);
  const DType compute = compute_dtype(config);
  kernels::Context ctx;
  Plan plan;
  plan.parameters = model.parameters().elements();
  const int shards = config.comm.zero > 0 ? ranks : 1;
  model.parameters().allocate(ctx.device, compute, true, true, {0, shards});
  for (const auto& arena : model.parameters().memory())
    plan.rows.push_back(
        {arena->segment(), buffer_name(arena->segment(), shards), static_cast<int64_t>(arena->high_water())});
  const int64_t rows = (config.train.micro_batch * config.model.context + 63) / 64 * 64;
  const Rehearsal rehearsal = rehearse(model, ctx, rows, config.train.micro_batch + 1);
  add_entries(plan, "saved", rehearsal.saved->peak_entries());
  add_entries(plan, "scratch", rehearsal.scratch->peak_entries());
  for (const auto& row : plan.rows) plan.total_bytes += row.bytes;
  plan.machine_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  const int64_t micro_batches =
      (config.train.batch + config.train.micro_batch - 1) / config.train.micro_batch;
  plan.micro_batches_per_rank = (micro_batches + ranks - 1) / ranks;
  plan.flop_per_token = flop_per_token(config, model);
  plan.tokens_per_step = static_cast<double>(config.train.batch * config.model.context);
  const double tokens_per_rank =
      static_cast<double>(plan.micro_batches_per_rank * config.train.micro_batch * config.model.context);
  // Norms, attention and the optimizer come on top of the matrix products: about a third of the time on CPU
  // cores.
  plan.seconds_per_step = 1.5 * plan.flop_per_token * tokens_per_rank / measured_rate(ctx, compute);
  return plan;
}

}  // namespace trainer
