// The backward of the whole model against central differences in fp64, for every kind of part.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/core/philox.h"
#include "tests/support/tiny_model.h"

namespace {

using kernels::DType;
using support::PackedBatch;
using support::TinyModel;

struct Variant {
  const char* name;
  void (*change)(configs::Config&);
};
void PrintTo(const Variant& v, std::ostream* out) { *out << v.name; }

const Variant kVariants[] = {
    {"softmax_tied_rms_swiglu", [](configs::Config&) {}},
    {"linear_pattern_untied",
     [](configs::Config& c) {
       c.model.attention = "linear,softmax";
       c.model.tie_embeddings = false;
     }},
    {"linear_norm_layer_gelu_learned",
     [](configs::Config& c) {
       c.model.attention = "linear";
       c.attention.linear_normaliser = "norm";
       c.model.norm = "layer";
       c.model.mlp = "gelu";
       c.model.position = "learned";
     }},
    {"no_positions_medusa_two_layers",
     [](configs::Config& c) {
       c.model.position = "none";
       c.heads.medusa = 2;
       c.heads.medusa_layers = 2;
     }},
    {"medusa_own_vocabulary_untied",
     [](configs::Config& c) {
       c.heads.medusa = 2;
       c.heads.medusa_vocabulary = "own";
       c.model.tie_embeddings = false;
     }},
    {"medusa_sequential_tied",
     [](configs::Config& c) {
       c.heads.medusa = 3;
       c.heads.medusa_sequential = true;
     }},
    {"medusa_sequential_untied",
     [](configs::Config& c) {
       c.heads.medusa = 2;
       c.heads.medusa_layers = 2;
       c.heads.medusa_vocabulary = "own";
       c.heads.medusa_sequential = true;
       c.model.tie_embeddings = false;
     }},
    {"embedding_norm_tied", [](configs::Config& c) { c.model.embedding_norm = true; }},
    {"mtp_two_tied", [](configs::Config& c) { c.heads.mtp = 2; }},
    {"everything",
     [](configs::Config& c) {
       c.model.embedding_norm = true;
       c.model.attention = "linear,softmax";
       c.model.norm = "layer";
       c.model.tie_embeddings = false;
       c.heads.medusa = 2;
       c.heads.mtp = 2;
     }},
};

class ModelGradient : public testing::TestWithParam<Variant> {};

// d total / d weights along `direction`, by central differences.
double slope(TinyModel& tiny, const PackedBatch& batch, double* weights,
             const std::vector<double>& direction) {
  // Truncation h^2 L'''/6 and rounding 2^-53 L / h are both about 1e-10 of the loss here.
  constexpr double h = 1e-5;
  const std::vector<double> original(weights, weights + direction.size());
  double values[2];
  for (int side = 0; side < 2; ++side) {
    for (size_t e = 0; e < direction.size(); ++e)
      weights[e] = original[e] + (side == 0 ? h : -h) * direction[e];
    values[side] = tiny.total(tiny.evaluate(batch));
  }
  std::copy(original.begin(), original.end(), weights);
  return (values[0] - values[1]) / (2 * h);
}

TEST_P(ModelGradient, MatchesCentralDifferences) {
  configs::Config config = support::tiny_config();
  GetParam().change(config);
  TinyModel tiny(config, DType::f64);
  const PackedBatch batch({support::random_tokens(12, TinyModel::kVocabulary, 1),
                           support::random_tokens(5, TinyModel::kVocabulary, 2)},
                          tiny.model().offsets(), 3);
  tiny.train(batch);
  const auto& parameters = tiny.parameters().parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const std::vector<double> gradient = tiny.gradient(static_cast<int>(i));
    double* weights = tiny.parameters().weight(static_cast<int>(i)).as<double>();
    // One direction through all elements, and one element alone.
    std::vector<double> direction(gradient.size()), single(gradient.size());
    double expected = 0, norm = 0;
    for (size_t e = 0; e < direction.size(); ++e) {
      direction[e] = kernels::normal(i + 100, kernels::Purpose::test, e);
      expected += direction[e] * gradient[e];
      norm += gradient[e] * gradient[e];
    }
    const size_t element = gradient.size() / 3;
    single[element] = 1;
    EXPECT_GT(norm, 0) << parameters[i].name;
    // Two orders of magnitude above the errors of the difference quotient.
    const double tolerance = 1e-7 * (1 + std::sqrt(norm));
    EXPECT_NEAR(slope(tiny, batch, weights, direction), expected, tolerance * std::sqrt(direction.size()))
        << parameters[i].name;
    EXPECT_NEAR(slope(tiny, batch, weights, single), gradient[element], tolerance) << parameters[i].name;
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, ModelGradient, testing::ValuesIn(kVariants),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
