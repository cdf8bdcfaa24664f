#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>

#include "kernels/core/stream.h"
#include "kernels/ops/cast.h"
#include "kernels/ops/linear.h"
#include "trainer/optim/settings.h"
#include "trainer/train/loop.h"
#include "trainer/train/step.h"

namespace trainer {

namespace {

using kernels::DType;

// Operations per second of this device's matrix product at a training shape.
double measured_rate(const kernels::Context& given, DType compute) {
  const bool gpu = given.device.is_cuda();
  const int64_t rows = gpu ? 8192 : 1024, width = gpu ? 4096 : 512;
  kernels::Arena arena("probe", given.device), scratch("scratch", given.device);
  kernels::Context ctx = given;
  ctx.scratch = &scratch;
  const auto take = [&] {
    return std::array{arena.allocate("x", compute, {rows, width}),
                      arena.allocate("w", compute, {width, width}),
                      arena.allocate("y", compute, {rows, width})};
  };
  const auto multiply = [&](const std::array<kernels::Tensor, 3>& t, bool rehearsal) {
    ctx.rehearsal = rehearsal;
    kernels::linear(ctx, t[0], {t[1], {}, {}}, t[2]);
  };
  multiply(take(), true);
  arena.place();
  scratch.place();
  const auto tensors = take();
  kernels::fill(given, tensors[0], 0.5f);
  kernels::fill(given, tensors[1], 0.25f);
  multiply(tensors, false);
  kernels::synchronize(given.device, given.stream);
  const auto start = std::chrono::steady_clock::now();
  constexpr int kRepeats = 10;
  for (int i = 0; i < kRepeats; ++i) multiply(tensors, false);
  kernels::synchronize(given.device, given.stream);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return kRepeats * 2.0 * static_cast<double>(rows * width * width) / time.count();
}

// Matrix products of one token, forward and backward: 2 operations a weight forward, 4 backward, none through
// a frozen layer. Each loss multiplies by an unembedding, the trunk's or its own. With a frozen trunk the
// language model's has no gradients, and the heads' have that of their input, of an own one the weights' as
// well.
double flop_per_token(const configs::Config& config, const Model& model) {
  double forward = 0, trained = 0;
  bool own = false;
  for (const auto& p : model.parameters().parameters()) {
    if (p.name.find(".vocabulary.") != std::string::npos) own = true;
    if (p.shape.rank() != 2 || p.name.find("embedding") != std::string::npos ||
        p.name.find(".vocabulary.") != std::string::npos)
      continue;
    forward += 2.0 * p.shape.numel();
    if (p.trainable) trained += 2.0 * p.shape.numel();
  }
  const double unembedding = 2.0 * static_cast<double>(model.vocabulary() * model.width());
  const auto losses = static_cast<double>(model.losses().size());
  const auto& m = config.model;
  const double attention = 4.0 * m.layers * m.width * std::min<double>(m.context, 512) / 2;
  const bool all = config.train.trainable == "all";
  const double unembeddings = all ? 2 * losses : (own ? 2 : 1) * (losses - 1);
  return forward + attention + losses * unembedding + 2 * (trained + (all ? attention : 0)) +
         unembeddings * unembedding;
}

// What an arena holds at its fullest, with what alignment adds.
void add_entries(Plan& plan, const kernels::Arena& arena) {
  std::map<std::string, int64_t> sums;
  for (const auto& e : arena.peak_entries()) sums[e.name] += static_cast<int64_t>(e.bytes);
  for (const auto& [name, bytes] : sums) plan.rows.push_back({arena.segment(), name, bytes});
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

// What a GPU holds besides the arenas, as measured: the driver's context with the kernels, and the libraries'
// working memory.
constexpr int64_t kMiB = 1 << 20, kContextBytes = 560 * kMiB;
void add_libraries(Plan& plan, int ranks) {
  plan.rows.push_back({"apart", "CUDA context and kernels", kContextBytes});
  plan.rows.push_back({"apart", "cuBLAS and cuDNN", 96 * kMiB});
  if (ranks > 1) plan.rows.push_back({"apart", "NCCL", 400 * kMiB});
}

std::string gibibytes(int64_t bytes) {
  return fmt::format("{:.1f} GiB", static_cast<double>(bytes) / (int64_t{1} << 30));
}

// The largest segments, and the settings that make them smaller.
std::string what_does_not_fit(const Plan& plan, const configs::Config& config, int ranks) {
  std::map<std::string, int64_t> sums;
  for (const Plan::Row& row : plan.rows) sums[row.segment] += row.bytes;
  std::vector<std::pair<int64_t, std::string>> segments;
  for (const auto& [name, bytes] : sums) segments.emplace_back(bytes, name);
  std::sort(segments.rbegin(), segments.rend());
  std::string largest;
  for (size_t i = 0; i < std::min<size_t>(3, segments.size()); ++i)
    largest += fmt::format("{}{} {}", i == 0 ? "" : ", ", segments[i].second, gibibytes(segments[i].first));
  std::vector<std::string> remedies;
  if (config.train.micro_batch > 1) remedies.push_back("train.micro_batch");
  for (const char* key : {"model.context", "model.layers", "model.width"}) remedies.push_back(key);
  std::string text = fmt::format("{} of memory are needed and {} has {}; the largest parts are {}; lower {}",
                                 gibibytes(plan.total_bytes), plan.device, gibibytes(plan.free_bytes),
                                 largest, fmt::join(remedies, ", "));
  if (ranks > 1 && config.comm.zero == 0)
    text += ", or spread the optimizer over the ranks with comm.zero = 1";
  return text;
}

}  // namespace

Plan plan_memory(const configs::Config& config, int64_t vocabulary, int ranks, const kernels::Context& ctx) {
  Model model(config, vocabulary);
  Plan plan;
  plan.device = kernels::describe(ctx.device);
  plan.parameters = model.parameters().elements();
  const int shards = config.comm.zero > 0 ? ranks : 1;
  model.parameters().allocate(ctx.device, compute_dtype(config), true, true, {0, shards});
  for (const auto& arena : model.parameters().memory())
    plan.rows.push_back(
        {arena->segment(), buffer_name(arena->segment(), shards), static_cast<int64_t>(arena->high_water())});
  const data::LoaderParams params{static_cast<uint64_t>(config.train.seed), config.train.batch,
                                  config.train.micro_batch, config.model.context, model.offsets()};
  const StepRehearsal step = rehearse_step(model, ctx, params, ranks);
  for (const auto* arena : {step.saved.get(), step.scratch.get(), step.step.get()}) add_entries(plan, *arena);
  if (ctx.device.is_cuda()) add_libraries(plan, ranks);
  for (const auto& row : plan.rows) plan.total_bytes += row.bytes;
  const kernels::DeviceMemory memory = kernels::memory_of(ctx.device);
  // This process's context is there already.
  plan.free_bytes = ctx.device.is_cuda() ? static_cast<int64_t>(memory.free) + kContextBytes
                                         : static_cast<int64_t>(memory.total);
  if (plan.total_bytes > plan.free_bytes) plan.problem = what_does_not_fit(plan, config, ranks);
  return plan;
}

Plan plan(const configs::Config& config, int64_t vocabulary, int ranks, const kernels::Context& ctx) {
  Plan plan = plan_memory(config, vocabulary, ranks, ctx);
  const int64_t micro_batches =
      (config.train.batch + config.train.micro_batch - 1) / config.train.micro_batch;
  plan.micro_batches_per_rank = (micro_batches + ranks - 1) / ranks;
  plan.flop_per_token = flop_per_token(config, Model(config, vocabulary));
  plan.tokens_per_step = static_cast<double>(config.train.batch * config.model.context);
  const double tokens_per_rank =
      static_cast<double>(plan.micro_batches_per_rank * config.train.micro_batch * config.model.context);
  // Norms, attention and the optimizer come on top of the matrix products: about a third of the time.
  plan.seconds_per_step =
      1.5 * plan.flop_per_token * tokens_per_rank / measured_rate(ctx, compute_dtype(config));
  return plan;
}

}  // namespace trainer
