// What the acceptance rules cost the host, beside the model: over rows as long as a vocabulary. The second
// argument is the rule: 0 a draw, 1 rejection of one draft, 2 typical acceptance of two.
#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

#include "kernels/core/arena.h"
#include "kernels/core/philox.h"
#include "kernels/core/row_math.h"
#include "trainer/decode/verifier.h"

namespace {

// Rows of logits, and of their probabilities.
struct Rows {
  std::vector<float> logits, p;
  Rows(int64_t rows, int64_t vocabulary) : logits(rows * vocabulary), p(rows * vocabulary) {
    for (size_t i = 0; i < p.size(); ++i) {
      logits[i] = 3 * static_cast<float>(kernels::normal(1, kernels::Purpose::test, i));
      p[i] = std::exp(logits[i]);
    }
    for (int64_t row = 0; row < rows; ++row) kernels::row_normalise(p.data() + row * vocabulary, vocabulary);
  }
  static kernels::Tensor tensor(std::vector<float>& x, int64_t rows) {
    return {x.data(), kernels::DType::f32, {rows, static_cast<int64_t>(x.size()) / 3}, {}};
  }
};

void acceptance(benchmark::State& state) {
  const int64_t vocabulary = state.range(0), rule = state.range(1);
  Rows rows(3, vocabulary);
  const float* q = rows.p.data() + vocabulary;
  kernels::Arena scratch("scratch", {});
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) scratch.place();
    const kernels::ArenaScope scope(scratch);
    scratch.allocate("left", kernels::DType::f32, {2, vocabulary});
  }
  kernels::Context ctx;
  ctx.scratch = &scratch;
  trainer::Verifier verifier({}, 1);
  trainer::DraftTree tree;
  const trainer::SamplingKey key;
  for (int64_t position = 0; auto _ : state) {
    ++position;
    tree.clear(0);
    const auto token = static_cast<int32_t>(position * 7919 % vocabulary);
    if (rule == 0) {
      benchmark::DoNotOptimize(kernels::row_draw(q, vocabulary, key.next(position)));
    } else if (rule == 1) {
      tree.add(0, token, q);
      verifier.clear();
      verifier.add_tree(tree, key, position);
      verifier.rejection(ctx, rows.tensor(rows.p, 2));
    } else {
      tree.add(tree.add(0, token), token / 2);
      verifier.clear();
      verifier.add_tree(tree, key, position);
      verifier.typical(ctx, rows.tensor(rows.logits, 3), rows.tensor(rows.p, 3), {1, 0.3, 0.09});
    }
  }
}
BENCHMARK(acceptance)
    ->ArgNames({"vocabulary", "rule"})
    ->ArgsProduct({{1024, 16384, 50304}, {0, 1, 2}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
