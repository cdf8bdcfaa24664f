#include "trainer/model/parameters.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/cast.h"
#include "tests/support/tiny_model.h"

namespace {

using kernels::DType;
using support::to_doubles;
using trainer::Init;
using trainer::ParameterStore;

TEST(Parameters, JoinedOnesAreOneMatrixAndOthersAreAligned) {
  ParameterStore store;
  const int q = store.add("q", {3, 5}, {Init::Kind::normal});
  const int k = store.add("k", {2, 5}, {Init::Kind::normal}, true);
  const int g = store.add("gain", {7}, {Init::Kind::ones});
  store.allocate({}, DType::f16, true);
  store.initialize({}, 1);
  EXPECT_EQ(store.parameters()[static_cast<size_t>(g)].begin % 32, 0);
  const kernels::Tensor both = store.fused_weight(q, k);
  EXPECT_EQ(both.shape, (kernels::Shape{5, 5}));
  std::vector<double> parts = to_doubles(store.weight(q));
  for (const double v : to_doubles(store.weight(k))) parts.push_back(v);
  EXPECT_EQ(to_doubles(both), parts);
  EXPECT_THROW(store.fused_weight(k, g), kernels::ShapeError);
  EXPECT_TRUE(store.parameters()[static_cast<size_t>(q)].decay);
  EXPECT_FALSE(store.parameters()[static_cast<size_t>(g)].decay);
}

TEST(Parameters, ValuesDependOnSeedAndNameAlone) {
  ParameterStore first, second;
  first.add("other", {64}, {Init::Kind::normal});
  const int a = first.add("matrix", {40, 50}, {Init::Kind::normal, 0.02f});
  const int b = second.add("matrix", {40, 50}, {Init::Kind::normal, 0.02f});
  first.allocate({}, DType::f32, true);
  second.allocate({}, DType::f32, true);
  first.initialize({}, 7);
  second.initialize({}, 7);
  const std::vector<double> values = to_doubles(first.master(a));
  EXPECT_EQ(values, to_doubles(second.master(b)));
  double mean = 0, square = 0;
  for (const double v : values) {
    mean += v / 2000;
    square += v * v / 2000;
  }
  // 2000 samples: the mean varies by 0.02 / sqrt(2000), the deviation by a factor of 1 +- 1 / sqrt(4000); 5
  // sigma.
  EXPECT_NEAR(mean, 0, 5 * 0.02 / std::sqrt(2000.0));
  EXPECT_NEAR(std::sqrt(square), 0.02, 5 * 0.02 / std::sqrt(4000.0));
  second.initialize({}, 8);
  EXPECT_NE(values, to_doubles(second.master(b)));
}

TEST(Parameters, WeightsAreTheRoundedMaster) {
  ParameterStore store;
  const int id = store.add("matrix", {8, 8}, {Init::Kind::normal});
  store.allocate({}, DType::f16, true);
  store.initialize({}, 3);
  const float* master = store.master(id).as<float>();
  const auto* weights = store.weight(id).as<kernels::f16>();
  for (int i = 0; i < 64; ++i)
    EXPECT_EQ(static_cast<float>(weights[i]), static_cast<float>(kernels::f16(master[i])));
}

TEST(Parameters, RehearsalTakesNoMemoryAndMeasuresAll) {
  ParameterStore store;
  store.add("matrix", {100, 64}, {Init::Kind::normal});
  store.allocate({}, DType::f16, true, true);
  size_t bytes = 0;
  for (const auto& arena : store.memory()) {
    EXPECT_TRUE(arena->measuring());
    bytes += arena->high_water();
  }
  EXPECT_GE(bytes, size_t{6400} * (2 + 4 * 4));
  EXPECT_LT(bytes, size_t{6400} * (2 + 4 * 4) + 1024);
}

TEST(Parameters, GradientsOfProductsAreLeftForThemToWrite) {
  ParameterStore store;
  store.add("gain", {7}, {});
  const int q = store.add("q", {3, 5}, {}), k = store.add("k", {2, 5}, {}, true);
  const int o = store.add("o", {4, 4}, {});
  store.set_product(q, k, true);
  store.set_product(o, o, true);
  store.allocate({}, DType::f32, true);
  EXPECT_FALSE(store.take_unwritten(q, k)) << "outside a step gradients are added to";
  const auto ones = [&] { kernels::fill({}, store.buffers().gradients, 1.0f); };
  ones();
  store.begin_gradients({});
  const kernels::Tensor all = store.buffers().gradients;
  for (int64_t i = 0; i < all.numel(); ++i) {
    const auto holds = [&](int id) {
      const trainer::Parameter& p = store.parameters()[static_cast<size_t>(id)];
      return i >= p.begin && i < p.begin + p.shape.numel();
    };
    EXPECT_EQ(all.as<float>()[i], holds(q) || holds(k) || holds(o) ? 1.0f : 0.0f) << i;
  }
  EXPECT_TRUE(store.take_unwritten(q, k));
  EXPECT_FALSE(store.take_unwritten(q, k)) << "the second product adds";
  EXPECT_THROW(store.check_written(), kernels::ShapeError) << "o was left out";
  EXPECT_THROW(store.take_unwritten(k, o), kernels::ShapeError) << "one is written, the other not";
  EXPECT_TRUE(store.take_unwritten(o, o));
  store.check_written();
}

TEST(Parameters, FreezeKeepsTheNamedTrainable) {
  ParameterStore store;
  store.add("blocks.0.weight", {4, 4}, {});
  store.add("medusa.0.weight", {4, 4}, {});
  store.freeze({"medusa."});
  EXPECT_FALSE(store.segments()[0].trainable);
  EXPECT_TRUE(store.segments()[1].trainable);
}

TEST(Parameters, AShardHoldsItsPartOfTheOptimizersStateAndNoMore) {
  const auto build = [](ParameterStore& store, kernels::Shard sharding, bool rehearsal) {
    store.add("embedding", {300, 40}, {Init::Kind::normal});
    store.add("gain", {41}, {Init::Kind::normal});
    store.add("matrix", {211, 64}, {Init::Kind::normal});
    store.allocate({}, DType::f16, true, rehearsal, sharding);
    if (!rehearsal) store.initialize({}, 5);
  };
  ParameterStore whole;
  build(whole, {}, false);
  for (const int ranks : {2, 3, 5}) {
    std::vector<double> masters(static_cast<size_t>(whole.elements()), -1000.0);
    for (int r = 0; r < ranks; ++r) {
      ParameterStore store, planned;
      build(store, {r, ranks}, false);
      build(planned, {r, ranks}, true);
      size_t state = 0;
      for (const auto& arena : planned.memory())
        if (arena->segment() == "master" || arena->segment() == "m" || arena->segment() == "v")
          state += arena->high_water();
      const auto elements = static_cast<size_t>(store.elements());
      EXPECT_GE(state * ranks, 12 * elements);
      // A shard is rounded up to whole pieces, of which there are 256.
      EXPECT_LE(state, 12 * (elements / ranks + 2 * kernels::optimizer_piece(store.elements())));
      EXPECT_EQ(to_doubles(store.buffers().weights), to_doubles(whole.buffers().weights));
      const std::vector<double> own = to_doubles(store.buffers().master);
      const auto segments = store.shard_segments();
      for (int id = 0; id < 3; ++id) {
        const kernels::Segment& segment = segments[static_cast<size_t>(id)];
        int64_t next = segment.begin;
        for (const auto& [begin, end, first] : store.held_by(r, id)) {
          EXPECT_EQ(first, next);
          next += end - begin;
          std::copy(own.begin() + first, own.begin() + next, masters.begin() + begin);
        }
        EXPECT_EQ(next, segment.begin + segment.count);
      }
    }
    std::vector<double> gap = to_doubles(whole.buffers().master);
    for (int64_t i = 12041; i < 12064; ++i) gap[static_cast<size_t>(i)] = -1000.0;  // between two parameters
    EXPECT_EQ(masters, gap) << ranks;
  }
}

}  // namespace
