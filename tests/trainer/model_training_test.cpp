// What the training step relies on: precision, packing, frozen trunks, rehearsal, the order of finished
// gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/philox.h"
#include "tests/support/tiny_model.h"

namespace {

using kernels::DType;
using support::PackedBatch;
using support::TinyModel;

configs::Config full_config() {
  configs::Config config = support::tiny_config();
  config.model.attention = "linear,softmax";
  config.model.tie_embeddings = false;
  config.heads.medusa = 2;
  config.heads.mtp = 2;
  return config;
}

std::vector<std::vector<int32_t>> sequences() {
  return {support::random_tokens(17, TinyModel::kVocabulary, 1),
          support::random_tokens(9, TinyModel::kVocabulary, 2),
          support::random_tokens(2, TinyModel::kVocabulary, 3)};
}

TEST(ModelTraining, EvaluateGivesTheLossesOfTraining) {
  for (const DType compute : {DType::f16, DType::f64}) {
    TinyModel tiny(full_config(), compute);
    const PackedBatch batch(sequences(), tiny.model().offsets(), 4);
    EXPECT_EQ(tiny.train(batch), tiny.evaluate(batch));
  }
}

TEST(ModelTraining, LossesInSmallTypesStayNearFp64) {
  TinyModel exact(full_config(), DType::f64);
  const PackedBatch batch(sequences(), exact.model().offsets(), 4);
  const std::vector<double> expected = exact.evaluate(batch);
  for (const auto& [compute, unit] :
       {std::pair{DType::f16, 0x1p-11}, {DType::bf16, 0x1p-8}, {DType::f32, 0x1p-24}}) {
    TinyModel tiny(full_config(), compute);
    const std::vector<double> losses = tiny.evaluate(batch);
    for (size_t i = 0; i < losses.size(); ++i) {
      // A path of about 12 roundings a block through at most four blocks, each of relative size `unit`,
      // reaches logits of |hidden| |row| = 4 * 4 * 0.25 (the weights' deviation) = 4; a token's loss moves by
      // at most twice its largest logit error. Roundings add up like a walk: sqrt(48).
      double weight = 0;
      const int64_t offset = tiny.model().losses()[i].offset;
      for (int64_t row = 0; row < batch.rows(); ++row)
        weight += batch.weights[static_cast<size_t>(offset * batch.rows() + row)];
      EXPECT_NEAR(losses[i] / weight, expected[i] / weight, 2 * 4 * std::sqrt(48.0) * unit)
          << name_of(compute) << " " << tiny.model().losses()[i].name;
      EXPECT_NE(losses[i], expected[i]);
    }
  }
}

TEST(ModelTraining, PackedSequencesAreTheSumOfSeparateOnes) {
  TinyModel tiny(full_config(), DType::f64);
  const PackedBatch packed(sequences(), tiny.model().offsets(), 5);
  const std::vector<double> losses = tiny.train(packed), gradients = tiny.gradients();
  std::vector<double> loss_sum(losses.size()), gradient_sum(gradients.size());
  const auto all = sequences();
  for (size_t s = 0; s < all.size(); ++s) {
    // Weights depend on the place in the batch: earlier sequences stay as empty as they can be.
    PackedBatch alone({all[s]}, tiny.model().offsets());
    for (size_t k = 0; k < static_cast<size_t>(alone.offsets); ++k)
      for (size_t i = 0; i < alone.tokens.size(); ++i) {
        const size_t row = static_cast<size_t>(packed.cu_seqlens[s]) + i;
        alone.weights[k * alone.tokens.size() + i] = packed.weights[k * packed.tokens.size() + row];
      }
    const std::vector<double> part = tiny.train(alone), gradient = tiny.gradients();
    for (size_t i = 0; i < part.size(); ++i) loss_sum[i] += part[i];
    for (size_t i = 0; i < gradient.size(); ++i) gradient_sum[i] += gradient[i];
  }
  // The same sums in another order, in fp64.
  for (size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(losses[i], loss_sum[i], 1e-12 * losses[i]);
  for (size_t i = 0; i < gradients.size(); ++i) ASSERT_NEAR(gradients[i], gradient_sum[i], 1e-10) << i;
}

void expect_frozen_trunk_left_alone(configs::Config config) {
  TinyModel joint(config, DType::f64);
  config.train.trainable = "heads";
  TinyModel frozen(config, DType::f64);
  const PackedBatch batch(sequences(), joint.model().offsets());
  EXPECT_EQ(joint.train(batch), frozen.train(batch));
  for (size_t i = 0; i < joint.parameters().parameters().size(); ++i) {
    const auto& p = frozen.parameters().parameters()[i];
    const bool head = p.name.starts_with("medusa.") || p.name.starts_with("mtp.");
    EXPECT_EQ(p.trainable, head) << p.name;
    const std::vector<double> gradient = frozen.gradient(static_cast<int>(i));
    // The heads' own gradients do not depend on whether the trunk learns.
    const std::vector<double> expected =
        head ? joint.gradient(static_cast<int>(i)) : std::vector<double>(gradient.size());
    EXPECT_EQ(gradient, expected) << p.name;
  }
  kernels::Arena saved[2] = {{"saved", {}}, {"saved", {}}}, scratch[2] = {{"scratch", {}}, {"scratch", {}}};
  joint.rehearse(batch, saved[0], scratch[0]);
  frozen.rehearse(batch, saved[1], scratch[1]);
  EXPECT_LT(saved[1].high_water(), saved[0].high_water());
}

TEST(ModelTraining, AFrozenTrunkIsLeftAlone) {
  configs::Config config = full_config();
  expect_frozen_trunk_left_alone(config);
  config.heads.medusa_sequential = true;
  expect_frozen_trunk_left_alone(config);
}

// An arena of `bytes` that has been measured and placed.
std::unique_ptr<kernels::Arena> arena_of(size_t bytes) {
  auto arena = std::make_unique<kernels::Arena>("test", kernels::Device{});
  arena->allocate("all", DType::u8, {static_cast<int64_t>(bytes)});
  arena->release(0);
  arena->place();
  return arena;
}

TEST(ModelTraining, RehearsalMeasuresExactlyWhatARunTakes) {
  TinyModel tiny(full_config(), DType::f16);
  const PackedBatch batch(sequences(), tiny.model().offsets());
  kernels::Arena saved("saved", {}), scratch("scratch", {});
  tiny.rehearse(batch, saved, scratch);
  std::vector<double> losses(tiny.model().losses().size());
  const kernels::Tensor sums(losses.data(), DType::f64, {static_cast<int64_t>(losses.size())});
  const auto run = [&](size_t saved_bytes, size_t scratch_bytes) {
    const auto keep = arena_of(saved_bytes), work = arena_of(scratch_bytes);
    const kernels::Context ctx{{}, {}, work.get(), false};
    tiny.model().forward_backward(ctx, batch.view(), tiny.seeds(), *keep, sums, {});
    EXPECT_EQ(keep->mark(), 0u);
    EXPECT_EQ(work->mark(), 0u);
  };
  run(saved.high_water(), scratch.high_water());
  EXPECT_THROW(run(saved.high_water() - 64, scratch.high_water()), kernels::DeviceError);
  EXPECT_THROW(run(saved.high_water(), scratch.high_water() - 64), kernels::DeviceError);
}

TEST(ModelTraining, GradientsAreFinalWhenAnnounced) {
  for (const bool tied : {true, false}) {
    configs::Config config = full_config();
    config.model.tie_embeddings = tied;
    TinyModel tiny(config, DType::f64);
    const PackedBatch batch(sequences(), tiny.model().offsets());
    struct Part {
      int64_t begin, end;
      std::vector<double> gradients;
    };
    std::vector<Part> announced;
    tiny.train(batch, [&](int64_t begin, int64_t end) {
      announced.push_back({begin, end, tiny.gradients()});
    });
    const std::vector<double> last = tiny.gradients();
    // Each head, final norm, each block, the first in two parts around the embedding; the unembedding where
    // it is a matrix of its own.
    EXPECT_EQ(announced.size(), size_t{4 + 1 + 2 + 2} + (tied ? 0 : 1));
    std::vector<int> said(last.size(), 0);
    for (const auto& [begin, end, gradients] : announced) {
      EXPECT_LT(begin, end);
      EXPECT_TRUE(std::equal(gradients.begin() + begin, gradients.begin() + end, last.begin() + begin))
          << begin;
      for (int64_t i = begin; i < end; ++i) ++said[static_cast<size_t>(i)];
    }
    EXPECT_EQ(said, std::vector<int>(last.size(), 1));
    EXPECT_EQ(announced[announced.size() - 2].begin, 0) << "what is exchanged for longest is not final last";
  }
}

TEST(ModelTraining, GradientsAccumulateAndScale) {
  TinyModel tiny(full_config(), DType::f64);
  const PackedBatch batch(sequences(), tiny.model().offsets());
  tiny.train(batch);
  const std::vector<double> once = tiny.gradients();
  tiny.train(batch, {}, 4.0f);
  const std::vector<double> scaled = tiny.gradients();
  for (size_t i = 0; i < once.size(); ++i) ASSERT_EQ(scaled[i], 4 * once[i]) << i;  // a power of two is exact
  tiny.train(batch, {}, 1.0f, false);
  const std::vector<double> both = tiny.gradients();
  double largest = 0;
  for (const double g : once) largest = std::max(largest, std::abs(g));
  // fp64 sums of some dozen terms, from zero and from what is there.
  for (size_t i = 0; i < once.size(); ++i) ASSERT_NEAR(both[i], 5 * once[i], 1e-13 * largest) << i;
}

TEST(ModelTraining, NewMedusaHeadsEqualTheLanguageModel) {
  configs::Config config = full_config();
  config.heads.medusa_vocabulary = "own";
  trainer::Model model(config, TinyModel::kVocabulary);
  model.parameters().allocate({}, DType::f16, true);
  model.parameters().initialize({}, 5);
  const auto& store = model.parameters();
  EXPECT_EQ(support::to_doubles(store.weight(store.find("medusa.1.vocabulary.weight"))),
            support::to_doubles(store.weight(store.find("unembedding.weight"))));
  for (const double w : support::to_doubles(store.weight(store.find("medusa.1.layers.0.weight"))))
    EXPECT_EQ(w, 0);
}

// Whatever tokens they read, fresh sequential heads say what the language model says of the same hidden rows.
TEST(ModelTraining, NewSequentialHeadsEqualTheLanguageModel) {
  configs::Config config = full_config();
  config.heads.medusa_sequential = true;
  trainer::Model model(config, TinyModel::kVocabulary);
  kernels::Context ctx;
  model.parameters().allocate({}, DType::f32, false);
  model.parameters().initialize(ctx, 5);
  model.prepare_decoding(ctx);
  constexpr int64_t kRows = 5;
  support::TensorBuffer hidden(DType::f32, {kRows, model.width()}), out(DType::f32, {kRows, model.width()});
  for (int64_t i = 0; i < hidden.tensor().numel(); ++i)
    hidden.tensor().as<float>()[i] =
        static_cast<float>(kernels::normal(3, kernels::Purpose::test, static_cast<uint64_t>(i)));
  for (int64_t k = 0; k < 2; ++k) {
    std::vector<int32_t> tokens = support::random_tokens(kRows * (k + 1), TinyModel::kVocabulary, 6);
    tokens.back() = -1;
    const trainer::Tensor between(tokens.data(), DType::i32, {kRows, k + 1});
    kernels::Arena scratch("scratch", {});
    for (const bool rehearsal : {true, false}) {
      if (!rehearsal) scratch.place();
      model.medusa_hidden({{}, {}, &scratch, rehearsal}, k, hidden, between, out);
    }
    EXPECT_EQ(out.values(), hidden.values()) << "head " << k;
  }
}

}  // namespace
