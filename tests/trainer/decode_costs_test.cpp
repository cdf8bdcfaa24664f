// How many drafts are worth their cost.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tests/trainer/decode_model.h"
#include "trainer/decode/costs.h"
#include "trainer/decode/drafters/drafter.h"

namespace trainer {
namespace {

TEST(Costs, ChoosesByCostAndAcceptance) {
  const std::vector<double> cheap = {1, 1.05, 1.1, 1.17, 1.33}, dear = {1, 2, 3, 4, 5};
  AcceptanceEstimate estimate;
  for (int d = 0; d < 4; ++d) {
    estimate.reach.push_back(std::pow(0.7, d + 1));
    estimate.drafted.push_back(1);
  }
  // S(3) = (1 + .7 + .49 + .343) / 1.17 = 2.165; S(4) = 2.7731 / 1.33 = 2.085.
  const DraftChoice best = choose_drafts(cheap, estimate, {}, 4);
  EXPECT_EQ(best.drafts, 3);
  EXPECT_NEAR(best.predicted_speedup, 2.165, 1e-3);
  EXPECT_NEAR(best.speedups[4], 2.085, 1e-3);
  EXPECT_EQ(choose_drafts(dear, estimate, {}, 4).drafts, 1);
  EXPECT_LT(choose_drafts(dear, estimate, {}, 4).predicted_speedup, 1);
  EXPECT_EQ(choose_drafts(cheap, estimate, {{{1, 0.1}, {4, 1.6}}}, 4).drafts, 1);
  // Half of the steps have drafts: cost 1 + .5 (.05), tokens 1.35.
  for (double& share : estimate.drafted) share = 0.5;
  for (double& reach : estimate.reach) reach *= 0.5;
  EXPECT_NEAR(choose_drafts(cheap, estimate, {}, 1).predicted_speedup, 1.35 / 1.025, 1e-9);
}

// What drafting and the rule take beside the rows of a step, plain ones included; one slow run counts for
// nothing.
TEST(Costs, PredictionsMeetWhatWasMeasured) {
  const std::vector<double> rows = {1, 1.2, 1.4, 1.6, 1.8};
  AcceptanceEstimate estimate;
  for (int d = 0; d < 4; ++d) {
    estimate.reach.push_back(std::pow(0.7, d + 1));
    estimate.drafted.push_back(1);
  }
  StepSeconds measured = {{0, {1.5, 90, 1.4}}, {1, {2.1, 2.0, 70}}, {4, {80, 2.9, 3.0}}};
  const RestCost rest = rest_cost(rows, estimate, measured);
  const DraftChoice choice = choose_drafts(rows, estimate, rest, 4);
  EXPECT_NEAR(choice.speedups[1], 1.7 * 1.5 / 2.1, 1e-9);
  EXPECT_NEAR(choice.speedups[2], 2.19 * 1.5 / (1.4 + 1.0), 1e-9) << "rest 0.9 with one draft, 1.2 with four";
  EXPECT_NEAR(choice.speedups[4], 2.7731 * 1.5 / 3.0, 1e-9);
  measured[2] = {2.9, 2.5, 2.7};
  const DraftChoice again = choose_drafts(rows, estimate, rest_cost(rows, estimate, measured), 4);
  EXPECT_NEAR(again.speedups[2], 2.19 * 1.5 / 2.7, 1e-9);
  EXPECT_NEAR(again.speedups[3], 2.533 * 1.5 / (1.6 + (1.3 + 1.2) / 2), 1e-9);
  // Fewer rows than drafts were measured: the choice ends there.
  EXPECT_EQ(choose_drafts({1, 1.2}, estimate, rest_cost({1, 1.2}, estimate, measured), 4).drafts, 1);
  // Rows that met a slow moment, when every step took three times as long.
  std::vector<double> slow = rows;
  for (double& seconds : slow) seconds *= 3;
  const DraftChoice same = choose_drafts(slow, estimate, rest_cost(slow, estimate, measured), 4);
  for (const size_t g : {1, 2, 4}) EXPECT_NEAR(same.speedups[g], again.speedups[g], 1e-9) << g;
}

// The machine becomes slower from one round to the next, and what is compared does not.
TEST(Costs, StepsAreComparedWithPlainOnesBesideThem) {
  StepComparison steps;
  for (const double slow : {1.0, 1.0, 1.0}) steps.add(2 * slow, 1, 3 * slow);
  for (const double slow : {4.0, 5.0}) steps.add(2 * slow, 4, 6 * slow);
  steps.add(0, 4, 1);
  steps.add(1, 4, 0);
  const StepSeconds seconds = steps.seconds();
  EXPECT_EQ(seconds.at(0), (std::vector<double>{2, 2, 2, 8, 10}));
  EXPECT_EQ(seconds.at(1), (std::vector<double>{3, 3, 3}));
  EXPECT_EQ(seconds.at(4), (std::vector<double>{6, 6}));
  // Prompts whose first token ended every text: nothing was measured, and rows alone count.
  const AcceptanceEstimate half{{0.5}, {1}};
  EXPECT_NEAR(choose_drafts({1, 1.2}, half, rest_cost({1, 1.2}, half, StepComparison().seconds()), 1)
                  .predicted_speedup,
              1.5 / 1.2, 1e-9);
}

// With a threshold that everything passes all of a longest path is accepted.
DecodeRun run_typically(const char* drafter) {
  const auto model = decode_test::tiny_model({});
  Decoder decoder({}, *model, 1, 128);
  DecodeSettings settings;
  settings.max_tokens = 60;
  settings.acceptance = Acceptance::typical;
  settings.temperature = 1;
  settings.typical_epsilon = 0;
  const std::vector<std::vector<int32_t>> prompts = {decode_test::random_tokens(7, 12)};
  return decoder.run(prompts, settings, make_drafter(decoder, drafter, model->config().decode).get());
}
int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

// Draft by draft: no estimate of a tree's own enters, which takes one level as independent of another.
TEST(Costs, AcceptanceIsThatOfEachDraft) {
  const DecodeRun chain = run_typically("medusa"), tree = run_typically("medusa_tree");
  EXPECT_EQ(chain.accepted, chain.reached);
  EXPECT_GT(sum(tree.accepted), 0);
  const configs::DecodeConfig defaults;
  for (const DecodeRun* run : {&chain, &tree}) {
    EXPECT_EQ(sum(run->accepted), sum(run->reached));
    const int64_t most = run == &chain ? defaults.max_drafts : defaults.tree_nodes;
    const AcceptanceEstimate estimate = estimate_acceptance(*run, most);
    double tokens = 1;
    for (int64_t d = 0; d < most; ++d) {
      EXPECT_LE(estimate.reach[d], estimate.drafted[d]) << d;
      EXPECT_LE(estimate.drafted[d], 1) << d;
      tokens += estimate.reach[d];
    }
    EXPECT_NEAR(tokens, 1 + static_cast<double>(sum(run->reached)) / static_cast<double>(run->steps), 1e-12);
  }
}

}  // namespace
}  // namespace trainer
