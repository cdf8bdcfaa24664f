#include "comm/gradient_reducer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "tests/comm/rank_values.h"

namespace {

using kernels::DType;
using kernels::Tensor;

class Recorder final : public comm::Communicator {
 public:
  struct Sent {
    const void* data;
    kernels::Shape shape;
  };
  struct Done final : comm::Request {
    explicit Done(int& waits) : waits(waits) {}
    bool test() override { return false; }
    void wait() override { ++waits; }
    int& waits;
  };
  int rank() const override { return 0; }
  int size() const override { return 2; }
  std::unique_ptr<comm::Request> all_reduce_async(Tensor t, comm::Reduce) override {
    sent.push_back({t.data, t.shape});
    return std::make_unique<Done>(waits);
  }
  std::unique_ptr<comm::Request> reduce_scatter_async(Tensor t, comm::Reduce op) override {
    return all_reduce_async(t, op);
  }
  void transfer(Tensor, int, int) override { throw std::logic_error("not used"); }
  void all_reduce(Tensor, comm::Reduce) override { throw std::logic_error("not used"); }
  void broadcast(Tensor, int) override { throw std::logic_error("not used"); }
  std::unique_ptr<comm::Request> all_gather_async(Tensor) override { throw std::logic_error("not used"); }
  void barrier() override { throw std::logic_error("not used"); }

  std::vector<Sent> sent;
  int waits = 0;
};

using Ranges = std::vector<comm::GradientRange>;

class GradientReducer : public testing::Test {
 protected:
  comm::GradientReducer reducer(const Ranges& parts, const comm::Buckets& buckets) {
    return {ranks_, Tensor(gradients_.data(), DType::f32, {1000}), parts, buckets};
  }
  // What was sent since the last call.
  Ranges sent() {
    Ranges ranges;
    for (const auto& s : ranks_.sent) {
      const int64_t begin = static_cast<const float*>(s.data) - gradients_.data();
      ranges.emplace_back(begin, begin + s.shape.numel());
    }
    ranks_.sent.clear();
    return ranges;
  }

  Recorder ranks_;
  std::vector<float> gradients_ = std::vector<float>(1000);
};

TEST_F(GradientReducer, BucketsCoverEverythingOnceFromTheEnd) {
  for (int64_t parameters : {0, 1, 2, 99, 100, 101, 199, 200, 201, 12345})
    for (int64_t part : {1, 37, 1000, 20000})
      for (size_t bytes : {size_t{0}, size_t{1}, size_t{4}, size_t{399}, size_t{400}, size_t{1} << 30})
        for (bool joined : {false, true}) {
          std::vector<float> gradients(static_cast<size_t>(parameters));
          const comm::GradientReducer reducer(ranks_, Tensor(gradients.data(), DType::f32, {parameters}),
                                              ranks::layers(parameters, part),
                                              {.bytes = bytes, .joined = joined});
          int64_t end = parameters;
          for (const auto& [begin, last] : reducer.buckets()) {
            EXPECT_EQ(last, end);
            EXPECT_LT(begin, last);
            if (begin > 0) {
              EXPECT_GE(static_cast<size_t>(last - begin) * 4, bytes);
            }
            end = begin;
          }
          EXPECT_EQ(end, 0) << parameters << " in buckets of " << bytes;
        }
}

TEST_F(GradientReducer, ABucketIsSentOnceItIsWholeAndNotBefore) {
  const Ranges parts{{901, 1000}, {900, 901}, {650, 900}, {0, 650}}, all = ranks::layers(1000, 100);
  comm::GradientReducer reducer = this->reducer(parts, {.bytes = 400});  // of 100 elements
  EXPECT_EQ(reducer.buckets(), all);
  for (int step = 1; step <= 2; ++step) {
    reducer.ready(parts[0]);
    EXPECT_EQ(ranks_.sent.size(), 0u);
    reducer.ready(parts[1]);
    EXPECT_EQ(ranks_.sent.size(), 1u);
    reducer.progress();
    EXPECT_EQ(ranks_.sent.size(), 1u);
    reducer.ready(parts[2]);
    EXPECT_EQ(ranks_.sent.size(), 3u);
    EXPECT_THROW(reducer.ready(parts[2]), kernels::ShapeError);
    reducer.finish();
    EXPECT_EQ(ranks_.waits, 10 * step);
    EXPECT_EQ(sent(), all);
  }
}

TEST_F(GradientReducer, StripesAreSentWholeWithTheirPadding) {
  const Ranges parts{{731, 990}, {0, 731}};
  comm::GradientReducer reducer = this->reducer(parts, {.bytes = 4 * 150, .stripe = 100});
  reducer.ready(parts[0]);
  ASSERT_EQ(ranks_.sent.size(), 1u);
  EXPECT_EQ(ranks_.sent[0].shape, (kernels::Shape{2, 2, 50}));
  EXPECT_EQ(sent(), (Ranges{{800, 1000}}));
  reducer.finish();
  EXPECT_EQ(sent(), (Ranges{{600, 800}, {400, 600}, {200, 400}, {0, 200}}));
  for (const int64_t stripe : {-2, 99, 300})
    EXPECT_THROW(this->reducer({{0, 1000}}, {.bytes = 4, .stripe = stripe}), kernels::ShapeError) << stripe;
  EXPECT_THROW(this->reducer({{0, 900}}, {.bytes = 4, .stripe = 100}), kernels::ShapeError)
      << "a stripe that is in no part";
}

TEST_F(GradientReducer, WhatTheBackwardLeavesForItsEndKeepsNoOtherWaiting) {
  const Ranges parts{{800, 1000}, {700, 800}, {600, 700}, {0, 300}, {300, 600}};
  comm::GradientReducer apart = reducer(parts, {.bytes = 4 * 150});
  apart.ready(parts[0]);
  apart.ready(parts[1]);
  EXPECT_EQ(sent(), (Ranges{{850, 1000}, {700, 850}}));
  apart.ready(parts[2]);
  EXPECT_EQ(sent(), (Ranges{{600, 700}})) << "nothing that could join it is final soon";
  apart.ready(parts[3]);
  EXPECT_EQ(sent(), (Ranges{{150, 300}, {0, 150}}));
  apart.finish();
  EXPECT_EQ(sent(), (Ranges{{450, 600}, {300, 450}}));

  comm::GradientReducer joined = reducer(parts, {.bytes = 4 * 250, .joined = true});
  joined.ready(parts[0]);
  EXPECT_EQ(sent(), Ranges{});
  joined.ready(parts[1]);
  EXPECT_EQ(sent(), (Ranges{{700, 1000}}));
  joined.finish();
  EXPECT_EQ(sent(), (Ranges{{600, 700}, {0, 300}, {300, 600}}));
  comm::GradientReducer sharded = reducer(parts, {.bytes = 4 * 250, .stripe = 40, .joined = true});
  sharded.ready(parts[0]);
  sharded.ready(parts[1]);
  EXPECT_EQ(sent(), (Ranges{{720, 1000}}));
  sharded.finish();
  EXPECT_EQ(sent(), (Ranges{{600, 720}, {0, 280}, {280, 600}})) << "stripes wait for their last part";
}

// Ranks without a micro-batch announce nothing; what they send has to match what the others do.
TEST_F(GradientReducer, WhatIsSentDoesNotDependOnWhenItIsAnnounced) {
  const Ranges parts{{800, 1000}, {700, 800}, {600, 700}, {0, 300}, {300, 600}};
  for (bool joined : {false, true}) {
    comm::GradientReducer reducer = this->reducer(parts, {.bytes = 4 * 150, .joined = joined});
    for (const auto& part : parts) reducer.ready(part);
    reducer.finish();
    const Ranges announced = sent();
    reducer.finish();
    EXPECT_EQ(sent(), announced);
  }
}

TEST_F(GradientReducer, PartsThatDoNotCoverTheGradientsAreRefused) {
  for (const Ranges& parts :
       {Ranges{}, Ranges{{0, 999}}, Ranges{{500, 1000}, {0, 499}}, Ranges{{400, 1000}, {0, 500}},
        Ranges{{500, 1001}, {0, 500}}, Ranges{{500, 1000}, {0, 1000}}, Ranges{{0, 1000}, {0, 1000}}})
    EXPECT_THROW(reducer(parts, {.bytes = 4}), kernels::ShapeError);
}

TEST_F(GradientReducer, OneRankSendsNothing) {
  const auto alone = comm::make_local_communicator();
  std::vector<float> gradients{1.5f, -2.5f};
  comm::GradientReducer reducer(*alone, Tensor(gradients.data(), DType::f32, {2}), {{1, 2}, {0, 1}},
                                {.bytes = 4});
  reducer.ready({1, 2});
  reducer.progress();
  reducer.finish();
  EXPECT_EQ(gradients, (std::vector<float>{1.5f, -2.5f}));
}

TEST_F(GradientReducer, WhatCannotBeReducedIsRefused) {
  const auto alone = comm::make_local_communicator();
  std::vector<float> v(8);
  const Tensor half(v.data(), DType::f16, {4});
  EXPECT_THROW(comm::GradientReducer(*alone, half, {{0, 4}}, {.bytes = 4}), kernels::ShapeError);
  EXPECT_THROW(alone->all_reduce(half, comm::Reduce::sum), kernels::ShapeError);
  const Tensor strided = Tensor(v.data(), DType::f32, {2, 4}).columns(0, 2);
  EXPECT_THROW(alone->all_reduce(strided, comm::Reduce::sum), kernels::ShapeError);
  EXPECT_THROW(alone->broadcast(Tensor(v.data(), DType::f32, {8}), 1), kernels::ShapeError);
  const Tensor two(v.data(), DType::f32, {1, 2, 4}), flat(v.data(), DType::f32, {8});
  EXPECT_THROW(alone->all_gather_async(two), kernels::ShapeError);
  EXPECT_THROW(alone->reduce_scatter_async(flat, comm::Reduce::sum), kernels::ShapeError);
}

}  // namespace
