#pragma once
// One rank's shard of a model's optimizer buffers. What belongs to other ranks, and padding, is poisoned.
#include <cmath>
#include <vector>

#include "kernels/ops/optimizer.h"
#include "tests/support/tensor_buffer.h"

namespace support {

struct OptimizerShard {
  kernels::Shard shard;
  int64_t elements, padded;  // of the whole
  TensorBuffer weights, gradients, master, m, v, sums;
  kernels::OptimizerBuffers buffers;

  // Of `whole`, buffers in host memory. `state` is on the shard's device.
  OptimizerShard(const kernels::OptimizerBuffers& whole, const kernels::Tensor& state, int rank, int ranks)
      : shard{rank, ranks, kernels::optimizer_piece(whole.master.numel())},
        elements(whole.master.numel()),
        padded((elements + shard.stripe() - 1) / shard.stripe() * shard.stripe()),
        weights(whole.weights.dtype, {padded}, state.device),
        gradients(whole.gradients.dtype, {padded}, state.device),
        master(whole.master.dtype, {padded / ranks}, state.device),
        m(whole.m.dtype, {padded / ranks}, state.device),
        v(whole.v.dtype, {padded / ranks}, state.device),
        sums(kernels::DType::f64, {kernels::kOptimizerPieces}, state.device),
        buffers{weights, master, gradients, m, v, state, shard, sums} {
    weights.set(std::vector<double>(static_cast<size_t>(padded), -77.0));
    sums.poison();
    const float* g = whole.gradients.as<float>();
    std::vector<double> own(static_cast<size_t>(padded), std::nan(""));
    for (int64_t i = 0; i < elements; ++i)
      if (has(i)) own[static_cast<size_t>(i)] = g[i];
    gradients.set(own);
    take(whole.master, master);
    take(whole.m, m);
    take(whole.v, v);
  }
  bool has(int64_t i) const { return shard.before(i) < shard.before(i + 1); }

  // Segments of the whole as this rank counts them.
  std::vector<kernels::Segment> own(std::vector<kernels::Segment> segments) const {
    for (kernels::Segment& s : segments) {
      const int64_t begin = shard.before(s.begin);
      s.count = shard.before(s.begin + s.count) - begin;
      s.begin = begin;
    }
    return segments;
  }
  // The shard's elements of the whole's weights, or of a buffer that holds own elements alone, into `whole`.
  void give(const TensorBuffer& from, std::vector<double>& whole) const {
    const std::vector<double> values = from.values();
    const bool own = static_cast<int64_t>(values.size()) < padded;
    for (int64_t i = 0; i < elements; ++i)
      if (has(i)) whole[static_cast<size_t>(i)] = values[static_cast<size_t>(own ? shard.before(i) : i)];
  }

 private:
  void take(const kernels::Tensor& from, TensorBuffer& to) const {
    std::vector<double> own(static_cast<size_t>(padded / shard.ranks), std::nan(""));
    for (int64_t i = 0; i < elements; ++i)
      if (has(i)) own[static_cast<size_t>(shard.before(i))] = from.as<float>()[i];
    to.set(own);
  }
};

}  // namespace support
