#include "launch/plan_table.h"

#include <fmt/format.h>

#include <filesystem>

#include "data/dataset.h"
#include "launch/console.h"
#include "trainer/train/loop.h"

namespace launch {
namespace {

int64_t choose_vocabulary(const configs::Config& config, int64_t wanted) {
  if (wanted > 0) return wanted;
  if (!config.data.path.empty() && std::filesystem::exists(config.data.path))
    return data::read_dataset_info(config.data.path).vocabulary;
  constexpr int64_t kSupposed = 2048;
  fmt::print("no prepared data at '{}': a vocabulary of {} is supposed; --vocabulary sets another\n",
             config.data.path, kSupposed);
  return kSupposed;
}

void print_rows(const trainer::Plan& plan) {
  std::string segment;
  for (const trainer::Plan::Row& row : plan.rows) {
    fmt::print("{:<12} {:<36} {:>12}\n", row.segment == segment ? "" : row.segment, row.name,
               bytes_text(static_cast<double>(row.bytes)));
    segment = row.segment;
  }
}

}  // namespace

void print_plan(const configs::Config& config, int64_t vocabulary, int ranks, const kernels::Context& ctx) {
  const trainer::Plan plan = trainer::plan(config, choose_vocabulary(config, vocabulary), ranks, ctx);
  fmt::print("{:<12} {:<36} {:>12}\n", "memory", "of one rank", "bytes");
  print_rows(plan);
  fmt::print("{:<12} {:<36} {:>12}   of {} ({})\n\n", "total", "",
             bytes_text(static_cast<double>(plan.total_bytes)),
             bytes_text(static_cast<double>(plan.free_bytes)), plan.device);
  fmt::print("parameters              {}\n", count_text(plan.parameters));
  fmt::print("ranks                   {}, each {} micro-batches of {} sequences in a step\n", ranks,
             plan.micro_batches_per_rank, config.train.micro_batch);
  fmt::print("tokens in a step        {}\n", count_text(static_cast<int64_t>(plan.tokens_per_step)));
  fmt::print("operations per token    {:.2f} million\n", plan.flop_per_token / 1e6);
  fmt::print("estimated               {:.0f} ms a step, {} for {} steps\n", 1e3 * plan.seconds_per_step,
             time_text(plan.seconds_per_step * static_cast<double>(config.train.steps)),
             count_text(config.train.steps));
  if (!plan.problem.empty()) fmt::print("This does not fit: {}\n", plan.problem);
}

}  // namespace launch
