#include "kernels/ops/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"

namespace kernels::cpu {

namespace {

OptimizerState& state_of(OptimizerBuffers& buffers) {
  return *reinterpret_cast<OptimizerState*>(buffers.state.as<uint8_t>());
}

// Splits the buffers over threads in pieces and calls fn(piece, segment, begin, end) for the part of each
// trainable segment that lies in a piece; `piece` counts from the start of the whole flat buffers.
template <typename Fn>
void for_pieces(std::span<const Segment> segments, const OptimizerBuffers& buffers, Fn&& fn) {
  const int64_t count = buffers.gradients.numel();
  const int64_t size = optimizer_piece(buffers.sums ? buffers.total : count);
  const int64_t before = buffers.sums ? buffers.begin / size : 0, pieces = (count + size - 1) / size;
  parallel_for(pieces, count < (int64_t{1} << 15) ? pieces : 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t low = piece * size, high = low + size;
      for (const Segment& s : segments) {
        const int64_t begin = std::max(low, s.begin), end = std::min(high, s.begin + s.count);
        if (s.trainable && begin < end) fn(before + piece, s, begin, end);
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
void find_nonfinite(std::span<const Segment> segments, const M* g, OptimizerState& state) {
  int64_t found = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    if (!segments[s].trainable) continue;
    const M* begin = g + segments[s].begin;
    const int64_t here =
        std::count_if(begin, begin + segments[s].count, [](M v) { return !std::isfinite(v); });
    if (here > 0 && found == 0) state.first_nonfinite = static_cast<int32_t>(s);
    found += here;
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

struct AdamWFactors {
  float learning_rate = 0, beta1 = 0, beta2 = 0, eps = 0;
  double gradient = 1;          // unscales and clips
  double bias1 = 1, bias2 = 1;  // 1 - beta^t
};

// One piece: moments and master in one pass; weights are rounded from the master while it is in cache.
template <typename W, typename M>
void adamw_piece(const AdamWFactors& f, M decay, int64_t n, const M* __restrict g, M* __restrict m,
                 M* __restrict v, M* __restrict master, W* weights) {
  const M beta1 = static_cast<M>(f.beta1), beta2 = static_cast<M>(f.beta2), eps = static_cast<M>(f.eps);
  const M rest1 = 1 - beta1, rest2 = 1 - beta2, lr = static_cast<M>(f.learning_rate);
  const M scale = static_cast<M>(f.gradient), unbias1 = static_cast<M>(1 / f.bias1),
          unbias2 = static_cast<M>(1 / f.bias2);
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

AdamWFactors factors(const AdamWParams& params, float normaliser, const OptimizerState& state) {
  AdamWFactors f{
      .learning_rate = state.learning_rate, .beta1 = params.beta1, .beta2 = params.beta2, .eps = params.eps};
  const double norm = state.gradient_norm, t = static_cast<double>(state.updates + 1);
  f.gradient = static_cast<double>(normaliser) / state.gradient_scale;
  if (params.clip > 0 && norm > params.clip) f.gradient *= params.clip / norm;
  f.bias1 = 1 - std::pow(static_cast<double>(params.beta1), t);
  f.bias2 = 1 - std::pow(static_cast<double>(params.beta2), t);
  return f;
}

void back_off(const LossScaleRules& rules, OptimizerState& state) {
  if (rules.hysteresis != Hysteresis::none) {
    state.hysteresis_left = std::clamp(state.hysteresis_left - 1, 0, std::max(0, rules.hysteresis_steps - 1));
    if (state.hysteresis_left > 0) return;
  }
  state.loss_scale = std::max(state.loss_scale * rules.backoff, rules.minimum);
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
    for_pieces(segments, buffers, [&](int64_t piece, const Segment&, int64_t begin, int64_t end) {
      sums[piece] += sum_of_squares(g + begin, end - begin);
    });
    if (buffers.sums) std::copy(sums.begin(), sums.end(), buffers.sums.as<double>());
    if (!set_norm(sums, normaliser, state)) find_nonfinite(segments, g, state);
  });
}

void gradient_norm(const Context&, const Tensor& normaliser, OptimizerBuffers& buffers) {
  OptimizerState& state = state_of(buffers);
  state.nonfinite = !set_norm({buffers.sums.as<double>(), kOptimizerPieces}, normaliser, state);
}

void update_loss_scale(const Context&, const LossScaleRules& rules, OptimizerBuffers& buffers) {
  OptimizerState& state = state_of(buffers);
  state.skip = state.nonfinite != 0;
  if (state.skip) {
    ++state.skipped;
    ++state.consecutive_skips;
    state.clean_steps = 0;
    if (rules.dynamic) back_off(rules, state);
    return;
  }
  state.consecutive_skips = 0;
  if (rules.hysteresis == Hysteresis::consecutive) state.hysteresis_left = rules.hysteresis_steps;
  if (!rules.dynamic || ++state.clean_steps < rules.growth_interval) return;
  state.clean_steps = 0;
  state.loss_scale = std::min(state.loss_scale * rules.growth, rules.maximum);
  if (rules.hysteresis == Hysteresis::until_growth) state.hysteresis_left = rules.hysteresis_steps;
}

void adamw(const Context&, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers) {
  OptimizerState& state = state_of(buffers);
  ++state.step;
  if (state.skip) return;
  state.learning_rate = kernels::learning_rate(params.schedule, state.updates);
  const AdamWFactors f = factors(params, *normaliser.as<float>(), state);
  visit_dtype(buffers.weights.dtype, [&](auto tag) {
    using W = decltype(tag);
    using M = acc_t<W>;
    M *g = buffers.gradients.as<M>(), *m = buffers.m.as<M>(), *v = buffers.v.as<M>(),
      *master = buffers.master.as<M>();
    W* weights = buffers.weights.as<W>();
    for_pieces(segments, buffers, [&](int64_t, const Segment& s, int64_t begin, int64_t end) {
      const M decay = s.decay ? static_cast<M>(params.weight_decay) : M{0};
      adamw_piece(f, decay, end - begin, g + begin, m + begin, v + begin, master + begin, weights + begin);
    });
  });
  ++state.updates;
}

}  // namespace kernels::cpu
