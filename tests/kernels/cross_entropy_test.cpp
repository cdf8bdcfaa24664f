#include "kernels/ops/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/core/parallel.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using kernels::ShapeError;
using support::buffer_of;
using support::TensorBuffer;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TensorBuffer seed_of(double value) { return buffer_of(DType::f32, {1}, {value}); }

// The loss of one row of logits and, in the buffer, its gradient.
double loss_of(TensorBuffer& logits, int32_t target, const TensorBuffer& seed, double weight = 1) {
  const auto targets = buffer_of(DType::i32, {1}, {static_cast<double>(target)}),
             weights = buffer_of(DType::f32, {1}, {weight});
  auto loss = buffer_of(DType::f64, {1}, {0});
  kernels::cross_entropy({}, logits, targets, weights, seed, loss);
  return loss.values()[0];
}

TEST(CrossEntropy, EqualLogitsGiveTheLogarithmOfTheVocabulary) {
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    auto logits = buffer_of(dtype, {1, 8}, std::vector<double>(8, 5.0));
    EXPECT_NEAR(loss_of(logits, 3, seed_of(4.0), 0.5), 0.5 * std::log(8.0), 1e-7);
    for (int i = 0; i < 8; ++i)
      EXPECT_EQ(logits.values()[i], i == 3 ? 4 * 0.5 * (0.125 - 1) : 4 * 0.5 * 0.125);
  }
}

TEST(CrossEntropy, WithoutASeedLogitsStay) {
  TensorBuffer logits(DType::f16, {1, 37});
  logits.fill_normal(1);
  const auto before = logits.bytes();
  EXPECT_GT(loss_of(logits, 5, {}), 0);
  EXPECT_EQ(logits.bytes(), before);
}

// fp16's range: differences of 120000 do not fit fp16, and exp of them is 0.
TEST(CrossEntropy, ExtremeLogits) {
  auto sure = buffer_of(DType::f16, {1, 5}, {-60000, 60000, 0, -kInfinity, 1});
  EXPECT_EQ(loss_of(sure, 1, seed_of(1.0)), 0);
  EXPECT_EQ(sure.values(), (std::vector<double>{0, 0, 0, 0, 0}));
  auto wrong = buffer_of(DType::f16, {1, 5}, {-60000, 60000, 0, -kInfinity, 1});
  EXPECT_EQ(loss_of(wrong, 0, seed_of(2.0)), 120000);
  EXPECT_EQ(wrong.values(), (std::vector<double>{-2, 2, 0, 0, 0}));
  auto impossible = buffer_of(DType::f32, {1, 3}, {0, 1, -kInfinity});
  EXPECT_EQ(loss_of(impossible, 2, {}), kInfinity);
}

// A number that is not one must reach the loss and the gradient, or a loss scaler would never skip the step.
TEST(CrossEntropy, NonFiniteLogitsAreSeen) {
  for (DType dtype : {DType::f16, DType::f32})
    for (double bad : {std::nan(""), kInfinity})
      for (int64_t vocabulary : {3, 40}) {
        std::vector<double> values(static_cast<size_t>(vocabulary), 0.5);
        values[static_cast<size_t>(vocabulary) - 1] = bad;
        auto logits = buffer_of(dtype, {1, vocabulary}, values);
        EXPECT_TRUE(std::isnan(loss_of(logits, 0, seed_of(1.0))));
        EXPECT_TRUE(std::isnan(logits.values()[0]));
        EXPECT_TRUE(std::isnan(logits.values()[1]));
      }
}

TEST(CrossEntropy, RowsWithoutWeightOrTargetAreZeroWhateverTheyHold) {
  auto logits = buffer_of(DType::f16, {3, 4}, {1, 2, 3, 4, std::nan(""), 1, 1, 1, kInfinity, 0, 0, 0});
  const auto targets = buffer_of(DType::i32, {3}, {2, 1, -1}),
             weights = buffer_of(DType::f32, {3}, {1, 0, 1});
  auto loss = buffer_of(DType::f64, {1}, {10});
  kernels::cross_entropy({}, logits, targets, weights, seed_of(1.0), loss);
  double sum = 0;
  for (int i = 1; i <= 4; ++i) sum += std::exp(i - 3.0);
  EXPECT_NEAR(loss.values()[0], 10 + std::log(sum), 1e-6);
  for (int i = 4; i < 12; ++i) EXPECT_EQ(logits.values()[i], 0);
}

// Gradients below fp16's smallest number survive because the seed carries the loss scale.
TEST(CrossEntropy, SeedKeepsSmallGradients) {
  std::vector<double> values(64, 0.0);
  values[0] = 20;  // the others have probability 2e-9, below half of fp16's smallest subnormal
  auto lost = buffer_of(DType::f16, {1, 64}, values), kept = buffer_of(DType::f16, {1, 64}, values);
  loss_of(lost, 0, seed_of(1.0));
  loss_of(kept, 0, seed_of(65536.0));
  EXPECT_EQ(lost.values()[1], 0);
  EXPECT_NEAR(kept.values()[1], 65536 * std::exp(-20.0), 65536 * std::exp(-20.0) * 1e-3);
}

// V columns of a wider matrix: what stands behind them is not read or written.
TEST(CrossEntropy, PaddingOfTheVocabularyIsLeftAlone) {
  constexpr int64_t kRows = 6, kVocabulary = 37;
  for (DType dtype : {DType::f16, DType::f32}) {
    TensorBuffer dense(dtype, {kRows, kVocabulary}), padded(dtype, {kRows, kVocabulary}, {}, 11);
    dense.fill_normal(3, 2);
    padded.fill_normal(3, 2);
    const auto targets = buffer_of(DType::i32, {kRows}, {0, 36, 5, -1, 7, 8}),
               weights = buffer_of(DType::f32, {kRows}, {1, 1, .5, 1, 0, 2});
    auto first = buffer_of(DType::f64, {1}, {0}), second = buffer_of(DType::f64, {1}, {0});
    kernels::cross_entropy({}, dense, targets, weights, seed_of(3.0), first);
    kernels::cross_entropy({}, padded, targets, weights, seed_of(3.0), second);
    EXPECT_EQ(first.values(), second.values());
    EXPECT_EQ(dense.values(), padded.values());
    EXPECT_TRUE(padded.padding_intact());
  }
}

// More rows than one block of losses holds: every row counts once, in order, whatever the threads.
TEST(CrossEntropy, ManyRowsAreSummedInOrder) {
  constexpr int64_t kRows = 9001, kVocabulary = 5;
  TensorBuffer logits(DType::f32, {kRows, kVocabulary});
  logits.fill_normal(7, 2);
  std::vector<double> targets(kRows), weights(kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    targets[i] = static_cast<double>(i % kVocabulary);
    weights[i] = i % 11 == 0 ? 0 : 0.5 * static_cast<double>(1 + i % 3);
  }
  const auto t = buffer_of(DType::i32, {kRows}, targets), w = buffer_of(DType::f32, {kRows}, weights);
  const auto values = logits.values();
  double expected = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < kVocabulary; ++c) sum += std::exp(values[i * kVocabulary + c]);
    expected += weights[i] * (std::log(sum) - values[i * kVocabulary + i % kVocabulary]);
  }
  std::vector<double> sums;
  for (int threads : {1, 2, 3}) {
    kernels::set_threads(threads);
    auto loss = buffer_of(DType::f64, {1}, {0});
    kernels::cross_entropy({}, logits, t, w, {}, loss);
    sums.push_back(loss.values()[0]);
  }
  kernels::set_threads(0);
  EXPECT_EQ(sums[1], sums[0]);
  EXPECT_EQ(sums[2], sums[0]);
  // Each of the terms, of magnitude 2, carries a few fp32 roundings.
  EXPECT_NEAR(sums[0], expected, kRows * 8 * 0x1p-24);
}

TEST(CrossEntropy, WrongArgumentsAreNamed) {
  auto logits = buffer_of(DType::f32, {1, 3}, {1, 2, 3});
  try {
    loss_of(logits, 3, seed_of(1.0));
    FAIL() << "target 3 of 3 was accepted";
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "cross_entropy: target 3 of row 0 is beyond the vocabulary of 3");
  }
  const auto targets = buffer_of(DType::i32, {1}, {0}), weights = buffer_of(DType::f32, {1}, {1}),
             short_loss = buffer_of(DType::f32, {1}, {0});
  EXPECT_THROW(kernels::cross_entropy({}, logits, targets, weights, seed_of(1.0), short_loss), ShapeError);
  EXPECT_THROW(
      kernels::cross_entropy({}, logits, weights, weights, seed_of(1.0), buffer_of(DType::f64, {1}, {0})),
      ShapeError);
}

}  // namespace
