#include "comm/gradient_reducer.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace {

using kernels::DType;
using kernels::Tensor;

class Recorder final : public comm::Communicator {
 public:
  struct Sent {
    const void* data;
    int64_t count;
    int root = -1;
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
    sent.push_back({t.data, t.numel()});
    return std::make_unique<Done>(waits);
  }
  std::unique_ptr<comm::Request> reduce_async(Tensor t, comm::Reduce, int root) override {
    sent.push_back({t.data, t.numel(), root});
    return std::make_unique<Done>(waits);
  }
  void transfer(Tensor, int, int) override { throw std::logic_error("not used"); }
  void all_reduce(Tensor, comm::Reduce) override { throw std::logic_error("not used"); }
  void broadcast(Tensor, int) override { throw std::logic_error("not used"); }
  void all_gather(const Tensor&, Tensor) override { throw std::logic_error("not used"); }
  void barrier() override { throw std::logic_error("not used"); }

  std::vector<Sent> sent;
  int waits = 0;
};

TEST(GradientReducer, BucketsCoverEverythingOnceFromTheEnd) {
  Recorder ranks;
  for (int64_t parameters : {0, 1, 2, 99, 100, 101, 199, 200, 201, 12345})
    for (size_t bytes : {size_t{0}, size_t{1}, size_t{4}, size_t{399}, size_t{400}, size_t{1} << 30}) {
      std::vector<float> gradients(static_cast<size_t>(parameters));
      const comm::GradientReducer reducer(ranks, Tensor(gradients.data(), DType::f32, {parameters}),
                                          {.bytes = bytes});
      int64_t end = parameters;
      for (const auto& [begin, last] : reducer.buckets()) {
        EXPECT_EQ(last, end);
        EXPECT_LT(begin, last);
        EXPECT_GE(begin, 0);
        if (begin > 0 || last < parameters) {
          EXPECT_GE(static_cast<size_t>(last - begin) * 4, bytes);
        }
        end = begin;
      }
      EXPECT_EQ(end, 0) << parameters << " in buckets of " << bytes;
    }
}

TEST(GradientReducer, ABucketIsSentOnceItIsWholeAndNotBefore) {
  Recorder ranks;
  std::vector<float> gradients(1000);
  comm::GradientReducer reducer(ranks, Tensor(gradients.data(), DType::f32, {1000}),
                                {.bytes = 400});  // of 100 elements
  ASSERT_EQ(reducer.buckets().size(), 10u);
  for (int step = 1; step <= 2; ++step) {
    ranks.sent.clear();
    reducer.ready(901);
    EXPECT_EQ(ranks.sent.size(), 0u);
    reducer.ready(900);
    EXPECT_EQ(ranks.sent.size(), 1u);
    reducer.ready(900);
    reducer.progress();
    EXPECT_EQ(ranks.sent.size(), 1u);
    reducer.ready(650);
    EXPECT_EQ(ranks.sent.size(), 3u);
    reducer.finish();
    ASSERT_EQ(ranks.sent.size(), 10u);
    EXPECT_EQ(ranks.waits, 10 * step);
    for (size_t i = 0; i < 10; ++i) {
      EXPECT_EQ(ranks.sent[i].data, gradients.data() + (9 - i) * 100);
      EXPECT_EQ(ranks.sent[i].count, 100);
    }
  }
}

TEST(GradientReducer, ShardsGoToTheirOwners) {
  Recorder ranks;
  std::vector<float> gradients(1000);
  const Tensor flat(gradients.data(), DType::f32, {1000});
  comm::GradientReducer reducer(ranks, flat, {.bytes = 4 * 150, .shard = 600});
  reducer.ready(700);
  EXPECT_EQ(ranks.sent.size(), 1u);  // [850, 1000) is whole, the rest of shard 1 is not
  reducer.finish();
  std::vector<std::pair<int64_t, int>> sent;  // end and owner
  for (const auto& s : ranks.sent)
    sent.emplace_back(static_cast<const float*>(s.data) - gradients.data() + s.count, s.root);
  EXPECT_EQ(sent, (std::vector<std::pair<int64_t, int>>{
                      {1000, 1}, {850, 1}, {600, 0}, {450, 0}, {300, 0}, {150, 0}}));
  EXPECT_THROW(comm::GradientReducer(ranks, flat, {.bytes = 4, .shard = 499}), kernels::ShapeError);
}

TEST(GradientReducer, WhatBecomesFinalLastKeepsNoOtherWaiting) {
  Recorder ranks;
  std::vector<float> gradients(1000);
  const Tensor flat(gradients.data(), DType::f32, {1000});
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;
  const auto sent = [&] {
    Ranges ranges;
    for (const auto& s : ranks.sent) {
      const int64_t begin = static_cast<const float*>(s.data) - gradients.data();
      ranges.emplace_back(begin, begin + s.count);
    }
    ranks.sent.clear();
    return ranges;
  };
  comm::GradientReducer apart(ranks, flat, {.bytes = 4 * 200, .last = 430});
  apart.ready(430);
  EXPECT_EQ(sent(), (Ranges{{800, 1000}, {430, 800}}));
  apart.finish();
  EXPECT_EQ(sent(), (Ranges{{230, 430}, {0, 230}}));
  comm::GradientReducer joined(ranks, flat, {.bytes = 4 * 200, .last = 430, .joined = true});
  joined.ready(800);
  joined.ready(430);
  joined.finish();
  EXPECT_EQ(sent(), (Ranges{{800, 1000}, {430, 800}, {0, 430}}));
  comm::GradientReducer sharded(ranks, flat, {.bytes = 4 * 100, .shard = 500, .last = 430, .joined = true});
  sharded.finish();
  EXPECT_EQ(sent(), (Ranges{{500, 1000}, {0, 500}})) << "one exchange for each owner";
}

TEST(GradientReducer, OneRankSendsNothing) {
  const auto alone = comm::make_local_communicator();
  std::vector<float> gradients{1.5f, -2.5f};
  comm::GradientReducer reducer(*alone, Tensor(gradients.data(), DType::f32, {2}), {.bytes = 4});
  reducer.ready(1);
  reducer.progress();
  reducer.finish();
  EXPECT_EQ(gradients, (std::vector<float>{1.5f, -2.5f}));
}

TEST(GradientReducer, WhatCannotBeReducedIsRefused) {
  const auto alone = comm::make_local_communicator();
  std::vector<float> v(8);
  const Tensor half(v.data(), DType::f16, {4});
  EXPECT_THROW(comm::GradientReducer(*alone, half, {.bytes = 4}), kernels::ShapeError);
  EXPECT_THROW(alone->all_reduce(half, comm::Reduce::sum), kernels::ShapeError);
  const Tensor strided = Tensor(v.data(), DType::f32, {2, 4}).columns(0, 2);
  EXPECT_THROW(alone->all_reduce(strided, comm::Reduce::sum), kernels::ShapeError);
  EXPECT_THROW(alone->broadcast(Tensor(v.data(), DType::f32, {8}), 1), kernels::ShapeError);
  EXPECT_THROW(alone->all_gather(Tensor(v.data(), DType::f32, {3}), Tensor(v.data(), DType::f32, {4})),
               kernels::ShapeError);
}

}  // namespace
