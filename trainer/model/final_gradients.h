#pragma once
// Tells which parts of the flat gradient buffer are final while a backward runs. Parts follow one another
// from the buffer's end to its beginning, except where the backward finishes one ahead of its turn.
#include <cstdint>
#include <functional>
#include <utility>

namespace trainer {

// Elements [begin, end) are final.
using GradientsFinal = std::function<void(int64_t begin, int64_t end)>;

class FinalGradients {
 public:
  FinalGradients(int64_t elements, GradientsFinal tell) : end_(elements), tell_(std::move(tell)) {}
  // Everything from `begin` on is final.
  void from(int64_t begin) {
    part(begin, end_);
    end_ = begin;
  }
  void part(int64_t begin, int64_t end) {
    if (tell_) tell_(begin, end);
  }

 private:
  int64_t end_;
  GradientsFinal tell_;
};

}  // namespace trainer
