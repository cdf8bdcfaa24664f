// Training attention: against definitions in fp64, and against itself where two ways must agree.
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "kernels/core/parallel.h"
#include "kernels/ops/linear_attention.h"
#include "kernels/ops/softmax_attention.h"
#include "tests/kernels/attention_oracle.h"
#include "tests/support/instruction_sets.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::Context;
using kernels::DType;
using kernels::Shape;
using kernels::Tensor;
using oracle::Kind;
using oracle::Sizes;
using support::TensorBuffer;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double roundoff(DType dtype) {
  return dtype == DType::f16    ? 0x1p-11
         : dtype == DType::bf16 ? 0x1p-8
         : dtype == DType::f32  ? 0x1p-24
                                : 0x1p-53;
}

// One attention of any kind with its memory. Inputs may be replaced before run().
struct Attention {
  Kind kind;
  Sizes sizes;
  std::vector<int> cu;
  DType dtype;
  TensorBuffer q, k, v, o, statistics, dout, dq, dk, dv, boundaries;

  Attention(Kind kind, Sizes s, std::vector<int> cu, DType dtype, int64_t extra_rows = 0, double scale = 1)
      : kind(kind), sizes(s), cu(std::move(cu)), dtype(dtype) {
    const int64_t n = this->cu.back() + extra_rows;
    const DType main = kernels::main_dtype(dtype), out = kind == Kind::linear_plain ? main : dtype;
    for (TensorBuffer* x : {&q, &dq}) *x = TensorBuffer(dtype, {n, s.heads, s.width}, {}, 16);
    for (TensorBuffer* x : {&o, &dout}) *x = TensorBuffer(out, {n, s.heads, s.width});
    for (TensorBuffer* x : {&k, &v, &dk, &dv}) *x = TensorBuffer(dtype, {n, s.key_heads, s.width}, {}, 16);
    statistics = TensorBuffer(main, {n, s.heads});
    boundaries = TensorBuffer(DType::i32, {static_cast<int64_t>(this->cu.size())});
    boundaries.set(std::vector<double>(this->cu.begin(), this->cu.end()));
    uint64_t seed = 7;
    for (TensorBuffer* x : {&q, &k, &v}) x->fill_normal(seed++, scale);
    dout.fill_normal(seed);
  }
  void forward() {
    if (kind == Kind::softmax) {
      kernels::softmax_attention({}, q, k, v, boundaries, o, statistics);
    } else {
      kernels::linear_attention({}, {.normalise = kind == Kind::linear}, q, k, v, boundaries, o, statistics);
    }
  }
  void backward() {
    if (kind == Kind::softmax) {
      kernels::softmax_attention_backward({}, dout, q, k, v, o, statistics, boundaries, dq, dk, dv);
    } else {
      kernels::linear_attention_backward({}, {.normalise = kind == Kind::linear}, dout, q, k, v, o,
                                         statistics, boundaries, dq, dk, dv);
    }
  }
  std::vector<double> expected() const {
    return oracle::attention(kind, sizes, q.values(), k.values(), v.values(), cu);
  }
};

class AttentionKinds : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(All, AttentionKinds,
                         testing::Values(Kind::softmax, Kind::linear, Kind::linear_plain),
                         [](const auto& info) {
                           return info.param == Kind::softmax  ? "softmax"
                                  : info.param == Kind::linear ? "linear"
                                                               : "linear_plain";
                         });

// The result is rounded once to its type; before, a row is a sum over up to T + D products in fp32, relative
// to the sum of magnitudes: the largest |o| that the row's length allows (for the plain sum, the sum itself).
void expect_close(const Attention& a, const std::vector<double>& given, const std::vector<double>& expected,
                  int64_t longest) {
  double largest = 0;
  for (double x : expected) largest = std::max(largest, std::abs(x));
  const double sums =
      static_cast<double>(2 * longest + a.sizes.width) * (a.dtype == DType::f64 ? 0x1p-53 : 0x1p-24);
  for (size_t i = 0; i < given.size(); ++i)
    ASSERT_NEAR(given[i], expected[i],
                roundoff(a.o.tensor().dtype) * std::abs(expected[i]) + sums * largest +
                    1e-7 * (a.dtype != DType::f64))
        << "element " << i;
}

TEST_P(AttentionKinds, ForwardIsTheDefinitionForRaggedPackedSequences) {
  for (DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
    for (Sizes s : {Sizes{4, 2, 16}, Sizes{2, 2, 64}, Sizes{3, 1, 20}}) {
      Attention a(GetParam(), s, {0, 1, 64, 128, 128, 193, 323, 324}, dtype);
      a.forward();
      expect_close(a, a.o.values(), a.expected(), 130);
      EXPECT_TRUE(a.o.padding_intact());
    }
}

TEST_P(AttentionKinds, EveryInstructionSetComputesTheSame) {
  support::with_each_instruction_set([&](const char* set) {
    SCOPED_TRACE(set);
    Attention a(GetParam(), {2, 1, 24}, {0, 70, 100}, DType::f32);
    a.forward();
    a.backward();
    expect_close(a, a.o.values(), a.expected(), 70);
    Attention exact(GetParam(), {2, 1, 24}, {0, 70, 100}, DType::f64);
    for (auto [to, from] :
         {std::pair{&exact.q, &a.q}, {&exact.k, &a.k}, {&exact.v, &a.v}, {&exact.dout, &a.dout}})
      to->set(from->values());
    exact.forward();
    exact.backward();
    // Gradients pass through two such sums, and do . o of theirs.
    for (auto [given, wanted] : {std::pair{&a.dq, &exact.dq}, {&a.dk, &exact.dk}, {&a.dv, &exact.dv}}) {
      double largest = 0;
      for (double x : wanted->values()) largest = std::max(largest, std::abs(x));
      for (size_t i = 0; i < wanted->values().size(); i += 37)
        ASSERT_NEAR(given->values()[i], wanted->values()[i], 1000 * 0x1p-24 * largest);
    }
  });
}

TEST_P(AttentionKinds, PackedEqualsSeparateBitForBit) {
  const std::vector<int> cu = {0, 65, 66, 129, 259};
  Attention packed(GetParam(), {2, 1, 16}, cu, DType::f16);
  packed.forward();
  packed.backward();
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    const int64_t first = cu[s], rows = cu[s + 1] - cu[s];
    Attention alone(GetParam(), {2, 1, 16}, {0, static_cast<int>(rows)}, DType::f16);
    const auto part = [&](const TensorBuffer& x) {
      const auto all = x.values();
      const auto width = x.tensor().cols();
      return std::vector<double>(all.begin() + first * width, all.begin() + (first + rows) * width);
    };
    for (auto [to, from] : {std::pair{&alone.q, &packed.q},
                            {&alone.k, &packed.k},
                            {&alone.v, &packed.v},
                            {&alone.dout, &packed.dout}})
      to->set(part(*from));
    alone.forward();
    alone.backward();
    EXPECT_EQ(alone.o.values(), part(packed.o));
    EXPECT_EQ(alone.dq.values(), part(packed.dq));
    EXPECT_EQ(alone.dk.values(), part(packed.dk));
    EXPECT_EQ(alone.dv.values(), part(packed.dv));
  }
}

TEST_P(AttentionKinds, RowsOutsideSequencesNeitherLeakNorStayStale) {
  Attention a(GetParam(), {2, 2, 8}, {0, 5, 12}, DType::f32, 7),
      clean(GetParam(), {2, 2, 8}, {0, 5, 12}, DType::f32, 7);
  for (TensorBuffer* x : {&a.q, &a.k, &a.v, &a.dout})
    for (size_t i = 12 * 16; i < 19 * 16; ++i) x->set(i, kNan);
  for (Attention* x : {&a, &clean}) {
    x->forward();
    x->backward();
  }
  EXPECT_EQ(a.o.values(), clean.o.values());
  for (auto [given, wanted] : {std::pair{&a.dq, &clean.dq}, {&a.dk, &clean.dk}, {&a.dv, &clean.dv}}) {
    EXPECT_EQ(given->values(), wanted->values());
    for (size_t i = 12 * 16; i < 19 * 16; ++i) EXPECT_EQ(given->values()[i], 0);
  }
}

// An overflow must not vanish on the way (a masked value may turn it into NaN for close neighbours of the
// same sequence as well, which a skipped step does not mind).
TEST_P(AttentionKinds, NotANumberReachesEveryRowThatSeesIt) {
  for (const char* poisoned : {"q", "k", "v"}) {
    Attention a(GetParam(), {1, 1, 16}, {0, 80, 90}, DType::f16);
    TensorBuffer& x = *poisoned == 'q' ? a.q : *poisoned == 'k' ? a.k : a.v;
    x.set(20 * 16 + 3, kNan);
    a.forward();
    const auto o = a.o.values();
    for (size_t i = 0; i < 90; ++i) {
      const bool sees = *poisoned == 'q' ? i == 20 : i >= 20 && i < 80;
      if (sees) {
        EXPECT_TRUE(std::isnan(o[i * 16 + 3])) << poisoned << " row " << i;
      }
      if (i < 16 || i >= 80) {
        EXPECT_FALSE(std::isnan(o[i * 16 + 3])) << poisoned << " row " << i;
      }
    }
  }
}

TEST_P(AttentionKinds, ResultsDoNotDependOnThreads) {
  std::vector<std::vector<char>> first;
  for (int threads : {1, 2, 3, 4}) {
    kernels::set_threads(threads);
    Attention a(GetParam(), {4, 2, 16}, {0, 65, 66, 196}, DType::f16);
    a.forward();
    a.backward();
    const std::vector<std::vector<char>> all = {a.o.bytes(), a.statistics.bytes(), a.dq.bytes(), a.dk.bytes(),
                                                a.dv.bytes()};
    if (first.empty()) first = all;
    EXPECT_EQ(all, first) << threads << " threads";
  }
  kernels::set_threads(0);
}

// Denominators here exceed 10^4: squared or held in fp16 they would be infinite and gradients zero. The loss
// scale is one that fp16 training really uses.
TEST_P(AttentionKinds, LongSequencesKeepFiniteExactGradientsInFp16) {
  const Kind kind = GetParam();
  const double scale = kind == Kind::linear_plain ? 1.0 / 4096 : 256;
  Attention half(kind, {1, 1, 64}, {0, 700}, DType::f16), exact(kind, {1, 1, 64}, {0, 700}, DType::f64);
  auto dout = half.dout.values();
  for (double& x : dout) x *= scale;
  half.dout.set(dout);
  for (auto [to, from] :
       {std::pair{&exact.q, &half.q}, {&exact.k, &half.k}, {&exact.v, &half.v}, {&exact.dout, &half.dout}})
    to->set(from->values());
  for (Attention* a : {&half, &exact}) {
    a->forward();
    a->backward();
  }
  if (kind == Kind::linear) {
    EXPECT_GT(exact.statistics.values()[699], 1e4);
  }
  // Root mean squares: each gradient is rounded once (2^-11) and carries o's rounding through do . o, of its
  // own size, so together below 2^-9.
  for (auto [given, wanted] :
       {std::pair{&half.dq, &exact.dq}, {&half.dk, &exact.dk}, {&half.dv, &exact.dv}}) {
    const auto x = given->values(), y = wanted->values();
    double error = 0, size = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_TRUE(std::isfinite(x[i]));
      error += (x[i] - y[i]) * (x[i] - y[i]);
      size += y[i] * y[i];
    }
    EXPECT_LT(std::sqrt(error / size), 0x1p-9);
  }
}

TEST_P(AttentionKinds, TwoThousandTokensInFp16) {
  Attention a(GetParam(), {1, 1, 64}, {0, 2048}, DType::f16);
  a.v.fill_normal(3, 1, 1);
  a.forward();
  const auto expected = a.expected();
  expect_close(a, a.o.values(), expected, 2048);
  if (GetParam() == Kind::linear_plain) {
    EXPECT_GT(*std::max_element(expected.begin(), expected.end()), 65504.0);
  }
}

// The chunkwise form is the recurrence S += phi(k) v^T, z += phi(k) of every token.
TEST(LinearAttention, EqualsTheRecurrence) {
  for (bool normalise : {true, false}) {
    Attention a(normalise ? Kind::linear : Kind::linear_plain, {2, 2, 8}, {0, 65, 195}, DType::f64);
    a.forward();
    const auto q = a.q.values(), k = a.k.values(), v = a.v.values(), o = a.o.values();
    for (size_t head = 0; head < 2; ++head) {
      std::vector<double> s(64), z(8);
      for (size_t t = 0; t < 195; ++t) {
        if (t == 65) s.assign(64, 0), z.assign(8, 0);
        const size_t at = (t * 2 + head) * 8;
        double denominator = static_cast<double>(1e-6f);
        for (size_t d = 0; d < 8; ++d) {
          z[d] += oracle::phi(k[at + d]);
          denominator += oracle::phi(q[at + d]) * z[d];
          for (size_t e = 0; e < 8; ++e) s[d * 8 + e] += oracle::phi(k[at + d]) * v[at + e];
        }
        for (size_t e = 0; e < 8; ++e) {
          double sum = 0;
          for (size_t d = 0; d < 8; ++d) sum += oracle::phi(q[at + d]) * s[d * 8 + e];
          ASSERT_NEAR(o[at + e], normalise ? sum / denominator : sum, 1e-11);
        }
      }
    }
  }
}

TEST_P(AttentionKinds, ManySequencesAndHeads) {
  std::vector<int> cu(40001);
  std::iota(cu.begin(), cu.end(), 0);
  Attention a(GetParam(), {2, 2, 2}, cu, DType::f32);  // 80,000 tasks
  a.forward();
  expect_close(a, a.o.values(), a.expected(), 1);
}

TEST(Attention, ErrorsNameWhatIsWrong) {
  Attention a(Kind::softmax, {4, 2, 8}, {0, 5}, DType::f32);
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const kernels::ShapeError& e) {
      return e.what();
    }
    return "no error";
  };
  a.boundaries.set(0, 7);
  EXPECT_NE(message([&] { a.forward(); }).find("softmax_attention: cu_seqlens[0] is 7"), std::string::npos);
  a.boundaries.set(0, 0);
  Attention three(Kind::linear, {3, 2, 8}, {0, 5}, DType::f32);
  EXPECT_NE(message([&] { three.forward(); }).find("H a multiple of Hk"), std::string::npos);
  a.v = TensorBuffer(DType::f32, {5, 2, 4});
  EXPECT_EQ(message([&] { a.forward(); }), "softmax_attention: v is fp32 (5, 2, 4), expected (5, 2, 8)");
}

}  // namespace
