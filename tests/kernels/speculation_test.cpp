// Draws and acceptance rules against their definitions in double precision, on the CPU and on a GPU. Both add
// rows of up to 50304 numbers: a sum is off by at most a few ten units of 2^-24, and so are borders between
// tokens. kClose is five times that; decisions that lie so close to a border are not compared.
#include "kernels/ops/speculation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/core/arena.h"
#include "kernels/core/philox.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::Device;
using kernels::DType;
using kernels::ShapeError;
using support::buffer_of;
using support::TensorBuffer;
using Numbers = std::vector<double>;

constexpr double kClose = 1e-5;

class Speculation : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (GetParam().is_cuda() && kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}
  double number() { return kernels::uniform(seed_, kernels::Purpose::test, next_++); }
  int below(int64_t n) { return static_cast<int>(number() * static_cast<double>(n)); }
  // fp32 numbers that add up to 1, very different ones.
  Numbers distribution(int64_t n) {
    Numbers x(static_cast<size_t>(n));
    for (double& p : x) p = std::exp(8 * number());
    const double sum = std::accumulate(x.begin(), x.end(), 0.0);
    for (double& p : x) p = static_cast<float>(p / sum);
    return x;
  }

 private:
  uint64_t seed_, next_ = 0;
};

// Where index i ends on the way from 0 to 1.
double share_up_to(const Numbers& x, int64_t i) {
  const double all = std::accumulate(x.begin(), x.end(), 0.0);
  return std::accumulate(x.begin(), x.begin() + i + 1, 0.0) / all;
}
// Whether a uniform number draws this index, but for rounding.
testing::AssertionResult drawn(const Numbers& x, double u, int64_t index) {
  if (index < 0 || index >= static_cast<int64_t>(x.size()) || x[static_cast<size_t>(index)] <= 0)
    return testing::AssertionFailure() << index << " of " << x.size() << " has nothing";
  const double end = share_up_to(x, index), begin = index > 0 ? share_up_to(x, index - 1) : 0;
  if (begin <= u + kClose && u < end + kClose) return testing::AssertionSuccess();
  return testing::AssertionFailure() << u << " draws " << index << " of [" << begin << ", " << end << ")";
}

// Small integers and few bits of u: every sum and product is exact, ends of ranges are hit.
TEST_P(Speculation, DrawIsTheDefinitionWhereNothingIsRounded) {
  for (const int64_t columns : {1, 31, 333, 5003, 50304})
    for (const int64_t count : {1, 3, 10}) {
      constexpr int64_t kRows = 3;
      Random random(static_cast<uint64_t>(columns * 100 + count));
      Numbers x(static_cast<size_t>(kRows * columns)), u(static_cast<size_t>(kRows * count)), expected;
      for (double& value : x) value = std::max(0, random.below(7) - 3);
      for (double& value : u) value = random.below(256) / 256.0;
      u[0] = 0;
      for (int64_t row = 0; row < kRows; ++row) {
        Numbers left(x.begin() + row * columns, x.begin() + (row + 1) * columns);
        for (int64_t r = 0; r < count; ++r) {
          const double target =
              u[static_cast<size_t>(row * count + r)] * std::accumulate(left.begin(), left.end(), 0.0);
          double sum = 0;
          int token = -1;
          for (size_t i = 0; i < left.size() && token < 0; ++i)
            if ((sum += left[i]) > target) token = static_cast<int>(i);
          expected.push_back(token);
          if (token >= 0) left[static_cast<size_t>(token)] = 0;
        }
      }
      const TensorBuffer weights = buffer_of(DType::f32, {kRows, columns}, x, GetParam(), 3),
                         chances = buffer_of(DType::f32, {kRows, count}, u, GetParam());
      TensorBuffer tokens(DType::i32, {kRows, count}, GetParam(), 2);
      kernels::draw({.device = GetParam(), .stream = {}}, weights, chances, tokens);
      EXPECT_EQ(tokens.values(), expected) << count << " of " << columns;
      EXPECT_TRUE(tokens.padding_intact());
    }
}

TEST_P(Speculation, DrawsOfDistributionsAndOfNothing) {
  for (const int64_t columns : {333, 50304}) {
    Random random(static_cast<uint64_t>(columns));
    for (const double u : {0.0, 0.3, 0.77, 1 - 0x1p-24}) {
      const Numbers x = random.distribution(columns);
      TensorBuffer token(DType::i32, {1, 1}, GetParam());
      kernels::draw({.device = GetParam(), .stream = {}}, buffer_of(DType::f32, {1, columns}, x, GetParam()),
                    buffer_of(DType::f32, {1, 1}, {u}, GetParam()), token);
      EXPECT_TRUE(drawn(x, u, static_cast<int64_t>(token.values()[0])));
    }
    Numbers nothing(static_cast<size_t>(columns), -1.0);
    nothing[5] = std::nan("");
    TensorBuffer tokens(DType::i32, {1, 2}, GetParam());
    kernels::draw({.device = GetParam(), .stream = {}},
                  buffer_of(DType::f32, {1, columns}, nothing, GetParam()),
                  buffer_of(DType::f32, {1, 2}, {0.0, 0.5}, GetParam()), tokens);
    EXPECT_EQ(tokens.values(), (Numbers{-1, -1})) << columns;
  }
}

// Random draft trees of several sequences, one of which has no rows, with all that the rules read.
struct Drafts {
  int64_t columns;
  Numbers first_row{0}, parents, tokens, accept, next;
  std::vector<Numbers> logits, p, q;  // q: of each row, empty where its draft is deterministic
  double temperature = 0.7;
  Device device;

  Drafts(uint64_t seed, int64_t columns, Device device) : columns(columns), device(device) {
    Random random(seed);
    for (const int count : {1 + random.below(12), 0, 1 + random.below(40)}) {
      for (int node = 0; node < count; ++node) add(random, node == 0 ? -1 : random.below(node));
      first_row.push_back(static_cast<double>(parents.size()));
    }
  }

  void add(Random& random, int parent) {
    parents.push_back(parent);
    accept.push_back(random.number());
    next.push_back(random.number());
    Numbers row(static_cast<size_t>(columns));
    for (double& l : row) l = static_cast<float>(5 * random.number());
    // Some rows are sure of a token, and drafts are often likely ones.
    if (random.below(3) == 0) row[static_cast<size_t>(random.below(columns))] = 12;
    logits.push_back(row);
    const double largest = *std::max_element(row.begin(), row.end());
    for (double& l : row) l = std::exp((l - largest) / temperature);
    const double sum = std::accumulate(row.begin(), row.end(), 0.0);
    for (double& x : row) x = static_cast<float>(x / sum);
    p.push_back(row);
    q.push_back(random.below(4) == 0 ? Numbers{} : random.distribution(columns));
    int token = random.below(columns);
    if (parent >= 0 && random.below(2) == 0) {
      const Numbers& before = p[static_cast<size_t>(first_row.back()) + static_cast<size_t>(parent)];
      token = static_cast<int>(std::max_element(before.begin(), before.end()) - before.begin());
    }
    tokens.push_back(token);
  }

  int64_t sequences() const { return static_cast<int64_t>(first_row.size()) - 1; }
  int64_t rows() const { return static_cast<int64_t>(parents.size()); }
  int begin(int64_t sequence) const { return static_cast<int>(first_row[static_cast<size_t>(sequence)]); }
  int count(int64_t sequence) const { return begin(sequence + 1) - begin(sequence); }

  // accepted (B, 2)
  Numbers run(const kernels::TypicalRule* typical) const {
    const auto joined = [](const std::vector<Numbers>& rows) {
      Numbers all;
      for (const Numbers& row : rows) all.insert(all.end(), row.begin(), row.end());
      return all;
    };
    std::vector<TensorBuffer> q_rows;
    Numbers addresses;
    for (const Numbers& row : q) {
      if (!row.empty()) q_rows.push_back(buffer_of(DType::f32, {columns}, row, device));
      addresses.push_back(
          row.empty() ? 0 : static_cast<double>(reinterpret_cast<int64_t>(q_rows.back().tensor().data)));
    }
    const auto numbers = [&](DType dtype, const Numbers& x) {
      return buffer_of(dtype, {static_cast<int64_t>(x.size())}, x, device);
    };
    const TensorBuffer first = numbers(DType::i32, first_row), above = numbers(DType::i32, parents),
                       drafts = numbers(DType::i32, tokens), chances = numbers(DType::f32, accept),
                       draws = numbers(DType::f32, next), at = numbers(DType::i64, addresses),
                       scores = buffer_of(DType::f32, {rows(), columns}, joined(logits), device),
                       predicted = buffer_of(DType::f32, {rows(), columns}, joined(p), device, 5);
    TensorBuffer accepted(DType::i32, {sequences(), 2}, device);
    accepted.set(Numbers(static_cast<size_t>(2 * sequences()), -7.0));
    const kernels::DraftRows described{first, above, drafts, chances, draws, at};
    kernels::Arena scratch("test", device);
    kernels::Context ctx{.device = device, .stream = {}, .scratch = &scratch};
    for (const bool rehearsal : {true, false}) {
      ctx.rehearsal = rehearsal;
      if (typical != nullptr)
        kernels::accept_typical(ctx, described, scores, predicted, *typical, accepted);
      else
        kernels::accept_rejection(ctx, described, predicted, accepted);
      if (rehearsal) scratch.place();
    }
    return accepted.values();
  }
};

// What a rule has to give: the end of the path, and what the next token is drawn from or, of typical
// acceptance, the only one it may be. close: a decision lay next to a border.
struct Expected {
  int node = 0;
  Numbers left;
  bool close = false;
};

void normalise(Numbers& x) {
  const double sum = std::accumulate(x.begin(), x.end(), 0.0);
  for (double& value : x) value /= sum;
}

Expected rejection(const Drafts& drafts, int64_t sequence) {
  const int first = drafts.begin(sequence), count = drafts.count(sequence);
  Expected expected;
  expected.left = drafts.p[static_cast<size_t>(first)];
  Numbers q;
  bool sampled = false, of_siblings = false;
  for (int child = 1; child < count; ++child) {
    const auto row = static_cast<size_t>(first + child);
    if (static_cast<int>(drafts.parents[row]) != expected.node) continue;
    const auto token = static_cast<size_t>(drafts.tokens[row]);
    if (!of_siblings || !sampled || drafts.q[row].empty()) q = drafts.q[row];
    of_siblings = true;
    sampled = !drafts.q[row].empty();
    const double bound = drafts.accept[row] * (sampled ? q[token] : 1), p = expected.left[token];
    if (std::abs(bound - p) < kClose * p) expected.close = true;
    if (bound < p) {
      expected.node = child;
      expected.left = drafts.p[row];
      of_siblings = false;
      continue;
    }
    for (size_t i = 0; i < expected.left.size(); ++i)
      expected.left[i] = sampled ? std::max(expected.left[i] - q[i], 0.0) : i == token ? 0 : expected.left[i];
    normalise(expected.left);
    if (!sampled) continue;
    q[token] = 0;
    normalise(q);
  }
  return expected;
}

TEST_P(Speculation, RejectionIsTheDefinition) {
  int compared = 0, deep = 0, rejected = 0;
  for (const int64_t columns : {7, 333, 5003, 50304})
    for (uint64_t seed = 0; seed < (columns > 5003 ? 4u : 40u); ++seed) {
      const Drafts drafts(seed, columns, GetParam());
      const Numbers accepted = drafts.run(nullptr);
      for (int64_t b = 0; b < drafts.sequences(); ++b) {
        const double node = accepted[static_cast<size_t>(2 * b)],
                     next = accepted[static_cast<size_t>(2 * b + 1)];
        if (drafts.count(b) == 0) {
          EXPECT_EQ(node, -7);
          continue;
        }
        const Expected expected = rejection(drafts, b);
        if (expected.close) continue;
        ASSERT_EQ(node, expected.node) << columns << " tokens, seed " << seed;
        const auto end = static_cast<size_t>(drafts.begin(b) + expected.node);
        EXPECT_TRUE(drawn(expected.left, drafts.next[end], static_cast<int64_t>(next)));
        ++compared;
        deep += expected.node > 0;
        rejected += expected.left != drafts.p[end];
      }
    }
  EXPECT_GT(compared, 200);
  EXPECT_GT(deep, 50);
  EXPECT_GT(rejected, 50);
}

Expected typical(const Drafts& drafts, int64_t sequence, const kernels::TypicalRule& rule) {
  const int first = drafts.begin(sequence), count = drafts.count(sequence);
  Numbers score(static_cast<size_t>(count), -INFINITY);
  std::vector<int> depth(static_cast<size_t>(count));
  score[0] = 0;
  Expected expected;
  for (int child = 1; child < count; ++child) {
    const auto row = static_cast<size_t>(first + child), node = static_cast<size_t>(child);
    const auto parent = static_cast<size_t>(drafts.parents[row]);
    const Numbers& p = drafts.p[static_cast<size_t>(first) + parent];
    double entropy = 0;
    for (const double x : p) entropy -= x > 0 ? x * std::log(x) : 0;
    const double likely = p[static_cast<size_t>(drafts.tokens[row])],
                 bound = std::min(rule.epsilon, rule.delta * std::exp(-entropy));
    // The exponential of H, a sum of up to 50304 terms.
    if (std::abs(likely - bound) < 10 * kClose * bound) expected.close = true;
    if (likely > bound) score[node] = score[parent] + std::log(likely);
    depth[node] = depth[parent] + 1;
    if (std::isinf(score[node])) continue;
    const auto best = static_cast<size_t>(expected.node);
    if (depth[node] > depth[best] || (depth[node] == depth[best] && score[node] > score[best]))
      expected.node = child;
  }
  const Numbers& p = drafts.p[static_cast<size_t>(first + expected.node)];
  expected.left = {static_cast<double>(std::max_element(p.begin(), p.end()) - p.begin())};
  return expected;
}

TEST_P(Speculation, TypicalAcceptanceIsTheDefinition) {
  const kernels::TypicalRule rule{.temperature = 0.7, .epsilon = 0.09, .delta = 0.3};
  int compared = 0, deep = 0;
  for (const int64_t columns : {7, 333, 5003, 50304})
    for (uint64_t seed = 0; seed < (columns > 5003 ? 4u : 40u); ++seed) {
      const Drafts drafts(seed, columns, GetParam());
      const Numbers accepted = drafts.run(&rule);
      for (int64_t b = 0; b < drafts.sequences(); ++b) {
        if (drafts.count(b) == 0) continue;
        const Expected expected = typical(drafts, b, rule);
        if (expected.close) continue;
        ASSERT_EQ(accepted[static_cast<size_t>(2 * b)], expected.node) << columns << " tokens, seed " << seed;
        EXPECT_EQ(accepted[static_cast<size_t>(2 * b + 1)], expected.left[0]);
        ++compared;
        deep += expected.node > 0;
      }
    }
  EXPECT_GT(compared, 200);
  EXPECT_GT(deep, 50);
}

// p = q: nothing is left where rounding rejects a draft, and it stands.
TEST_P(Speculation, ADraftOfTheTargetItselfIsAccepted) {
  Drafts drafts(1, 5003, GetParam());
  drafts.first_row = {0, 2};
  for (Numbers* x : {&drafts.parents, &drafts.tokens, &drafts.accept, &drafts.next}) x->resize(2);
  drafts.parents = {-1, 0};
  for (auto* x : {&drafts.p, &drafts.q, &drafts.logits}) x->resize(2);
  drafts.q[1] = drafts.p[0];
  for (const double u : {0.0, 0.5, 1 - 0x1p-24, 1.0}) {
    drafts.accept[1] = u;
    EXPECT_EQ(drafts.run(nullptr)[0], 1) << u;
  }
}

// A row's tokens do not depend on how many rows there are.
TEST_P(Speculation, ARowIsDrawnAlone) {
  constexpr int64_t kRows = 64, kColumns = 5003;
  Random random(3);
  Numbers x, u;
  for (int64_t i = 0; i < kRows; ++i) {
    const Numbers row = random.distribution(kColumns);
    x.insert(x.end(), row.begin(), row.end());
    for (int r = 0; r < 4; ++r) u.push_back(random.number());
  }
  const TensorBuffer weights = buffer_of(DType::f32, {kRows, kColumns}, x, GetParam()),
                     chances = buffer_of(DType::f32, {kRows, 4}, u, GetParam());
  TensorBuffer together(DType::i32, {kRows, 4}, GetParam());
  const kernels::Context ctx{.device = GetParam(), .stream = {}};
  kernels::draw(ctx, weights, chances, together);
  const Numbers all = together.values();
  for (int64_t i = 0; i < kRows; i += 9) {
    TensorBuffer alone(DType::i32, {1, 4}, GetParam());
    kernels::draw(ctx, weights.tensor().slice(i, 1), chances.tensor().slice(i, 1), alone);
    EXPECT_EQ(alone.values(), Numbers(all.begin() + i * 4, all.begin() + i * 4 + 4));
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Speculation, testing::Values(Device{}), [](const auto&) { return "cpu"; });
INSTANTIATE_TEST_SUITE_P(Cuda, Speculation, testing::Values(Device{Device::Kind::cuda, 0}),
                         [](const auto&) { return "gpu"; });

TEST(SpeculationChecks, WrongShapesAreNamed) {
  const TensorBuffer x(DType::f32, {2, 9}), u(DType::f32, {2, 3}), half(DType::f16, {2, 9});
  TensorBuffer tokens(DType::i32, {2, 3}), other(DType::i32, {2, 4});
  EXPECT_THROW(kernels::draw({}, x, u, other), ShapeError);
  EXPECT_THROW(kernels::draw({}, half, u, tokens), ShapeError);
  TensorBuffer accepted(DType::i32, {1, 2});
  EXPECT_THROW(kernels::accept_rejection({}, {}, x, accepted), ShapeError);
  EXPECT_THROW(kernels::accept_typical({}, {}, x, x, {}, accepted), ShapeError);
}

}  // namespace
