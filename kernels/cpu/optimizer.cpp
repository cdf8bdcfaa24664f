#include "kernels/ops/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/optimizer_rules.h"

namespace kernels::cpu {

namespace {

OptimizerState& state_of(OptimizerBuffers& buffers) {
  return *reinterpret_cast<OptimizerState*>(buffers.state.as<uint8_t>());
}

// Splits own elements [first, last) over threads in pieces and calls fn(piece, segment, begin, end, apart)
// for the part of each trainable segment that lies in a piece; `piece` counts those of the whole flat
// buffers, where own element i is element i + apart.
template <typename Fn>
void for_pieces(std::span<const Segment> segments, const OptimizerBuffers& buffers, int64_t first,
                int64_t last, Fn&& fn) {
  const Shard& shard = buffers.shard;
  const int64_t size = shard.piece > 0 ? shard.piece : optimizer_piece(buffers.gradients.numel());
  const int64_t before = first / size, pieces = (last + size - 1) / size - before;
  parallel_for(pieces, last - first < (int64_t{1} << 15) ? std::max<int64_t>(1, pieces) : 1,
               [&](int64_t from, int64_t to) {
                 for (int64_t piece = before + from; piece < before + to; ++piece) {
                   const int64_t low = piece * size, high = std::min(last, low + size);
                   for (const Segment& s : segments) {
                     const int64_t begin = std::max(low, s.begin), end = std::min(high, s.begin + s.count);
                     if (s.trainable && begin < end)
                       fn(piece * shard.ranks + shard.rank, s, begin, end, shard.place(low) - low);
                   }
                 }
               });
}

// Squares of fp32 numbers do not overflow in fp64: the sum is finite exactly when every element is.
template <typename M>
double sum_of_squares(const M* g, int64_t n) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const double value = g[i + j];
      sums[j] += value * value;
    }
  for (; i < n; ++i) sums[i % kLanes] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// How many elements are not finite, and the first segment that holds one.
template <typename M>
void find_nonfinite(std::span<const Segment> segments, const Shard& shard, const M* g,
                    OptimizerState& state) {
  int64_t found = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    if (!segments[s].trainable) continue;
    for (int64_t i = segments[s].begin; i < segments[s].begin + segments[s].count; ++i) {
      if (std::isfinite(g[shard.place(i)])) continue;
      if (found++ == 0) state.first_nonfinite = static_cast<int32_t>(s);
    }
  }
  state.nonfinite = static_cast<int32_t>(std::min<int64_t>(found, std::numeric_limits<int32_t>::max()));
}

// The norm from the sums of the pieces, in their order; false when an element was not finite.
bool set_norm(std::span<const double> sums, const Tensor& normaliser, OptimizerState& state) {
  double sum = 0;
  for (double s : sums) sum += s;
  const double multiplier = static_cast<double>(*normaliser.as<float>()) / state.gradient_scale;
  const bool finite = std::isfinite(sum);
  state.gradient_norm = finite ? static_cast<float>(std::sqrt(sum) * std::abs(multiplier))
                               : std::numeric_limits<float>::infinity();
  return finite;
}

// One piece: moments and master in one pass; weights are rounded from the master while it is in cache.
template <typename W, typename M>
void adamw_piece(const AdamWFactors& f, M decay, int64_t n, const M* __restrict g, M* __restrict m,
                 M* __restrict v, M* __restrict master, W* weights) {
  const M beta1 = static_cast<M>(f.beta1), beta2 = static_cast<M>(f.beta2), eps = static_cast<M>(f.eps);
  const M rest1 = 1 - beta1, rest2 = 1 - beta2, lr = static_cast<M>(f.learning_rate);
  const M scale = static_cast<M>(f.gradient), unbias1 = static_cast<M>(f.unbias1),
          unbias2 = static_cast<M>(f.unbias2);
  constexpr int64_t kBlock = 1024;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = std::min(n, first + kBlock);
    for (int64_t i = first; i < last; ++i) {
      const M gradient = scale * g[i];
      m[i] = beta1 * m[i] + rest1 * gradient;
      v[i] = beta2 * v[i] + rest2 * (gradient * gradient);
      master[i] -= lr * (m[i] * unbias1 / (std::sqrt(v[i] * unbias2) + eps) + decay * master[i]);
    }
    store_row(master + first, weights + first, last - first);
  }
}

}  // namespace

void loss_seeds(const Context&, const Tensor& state, const Tensor& factors, Tensor seeds) {
  const float scale = reinterpret_cast<const OptimizerState*>(state.as<uint8_t>())->loss_scale;
  for (int64_t i = 0; i < seeds.numel(); ++i) seeds.as<float>()[i] = scale * factors.as<float>()[i];
}

void gradient_statistics(const Context&, std::span<const Segment> segments, const Tensor& normaliser,
                         OptimizerBuffers& buffers) {
  OptimizerState& state = state_of(buffers);
  state.nonfinite = 0;
  state.first_nonfinite = -1;
  state.gradient_scale = state.loss_scale;
  visit_dtype(buffers.gradients.dtype, [&](auto tag) {
    using M = acc_t<decltype(tag)>;
    const M* g = buffers.gradients.as<M>();
    std::array<double, kOptimizerPieces> sums{};
    for_pieces(segments, buffers, 0, buffers.gradients.numel() / buffers.shard.ranks,
               [&](int64_t piece, const Segment&, int64_t begin, int64_t end, int64_t apart) {
                 sums[static_cast<size_t>(piece)] += sum_of_squares(g + begin + apart, end - begin);
               });
    if (buffers.sums) std::copy(sums.begin(), sums.end(), buffers.sums.as<double>());
    if (!set_norm(sums, normaliser, state)) find_nonfinite(segments, buffers.shard, g, state);
  });
}

void gradient_norm(const Context&, const Tensor& normaliser, OptimizerBuffers& buffers) {
  OptimizerState& state = state_of(buffers);
  state.nonfinite = !set_norm({buffers.sums.as<double>(), kOptimizerPieces}, normaliser, state);
}

void update_loss_scale(const Context&, const LossScaleRules& rules, OptimizerBuffers& buffers) {
  apply_rules(rules, state_of(buffers));
}

void adamw(const Context&, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers, const UpdateParts& parts) {
  OptimizerState& state = state_of(buffers);
  const AdamWFactors f = begin_update(params, *normaliser.as<float>(), state);
  const int64_t own = buffers.master.numel(), step = parts.elements > 0 ? parts.elements : own;
  visit_dtype(buffers.weights.dtype, [&](auto tag) {
    using W = decltype(tag);
    using M = acc_t<W>;
    M *g = buffers.gradients.as<M>(), *m = buffers.m.as<M>(), *v = buffers.v.as<M>(),
      *master = buffers.master.as<M>();
    W* weights = buffers.weights.as<W>();
    for (int64_t first = 0; first < own; first += step) {
      const int64_t last = std::min(own, first + step);
      if (!f.skip)
        for_pieces(segments, buffers, first, last,
                   [&](int64_t, const Segment& s, int64_t begin, int64_t end, int64_t apart) {
                     const M decay = s.decay ? static_cast<M>(params.weight_decay) : M{0};
                     adamw_piece(f, decay, end - begin, g + begin + apart, m + begin, v + begin,
                                 master + begin, weights + begin + apart);
                   });
      if (parts.updated) parts.updated(first, last);
    }
  });
}

}  // namespace kernels::cpu
