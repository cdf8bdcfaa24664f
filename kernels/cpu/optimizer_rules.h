#pragma once
// The scalar part of the optimizer, the same code on every device: the schedule, the state machine of loss
// scaling and what AdamW's factors are. constexpr, so that device code can call it too.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/ops/optimizer.h"

namespace kernels::cpu {

constexpr float scheduled_rate(const Schedule& s, int64_t updates) {
  if (updates < s.warmup)
    return static_cast<float>(s.lr * static_cast<double>(updates + 1) / static_cast<double>(s.warmup));
  // The fraction of [begin, total) that lies behind.
  auto progress = [&](double begin) {
    const double length = static_cast<double>(s.total) - begin;
    if (static_cast<double>(updates) < begin) return 0.0;
    return length <= 0 ? 1.0 : std::clamp((static_cast<double>(updates) - begin) / length, 0.0, 1.0);
  };
  const double floor = s.floor, warmup = static_cast<double>(s.warmup);
  double factor = 1;
  switch (s.kind) {
    case ScheduleKind::constant:
      break;
    case ScheduleKind::cosine:
      factor = floor + (1 - floor) * (1 + std::cos(std::numbers::pi * progress(warmup))) / 2;
      break;
    case ScheduleKind::linear:
      factor = 1 - (1 - floor) * progress(warmup);
      break;
    case ScheduleKind::warmup_stable_decay:
      factor = 1 - (1 - floor) *
                       progress(std::max(warmup, static_cast<double>(s.total) * (1.0 - s.decay_fraction)));
      break;
  }
  return static_cast<float>(s.lr * factor);
}

constexpr void back_off(const LossScaleRules& rules, OptimizerState& state) {
  if (rules.hysteresis != Hysteresis::none) {
    state.hysteresis_left = std::clamp(state.hysteresis_left - 1, 0, std::max(0, rules.hysteresis_steps - 1));
    if (state.hysteresis_left > 0) return;
  }
  state.loss_scale = std::max(state.loss_scale * rules.backoff, rules.minimum);
}

// update_loss_scale.
constexpr void apply_rules(const LossScaleRules& rules, OptimizerState& state) {
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

struct AdamWFactors {
  bool skip = false;
  float learning_rate = 0, beta1 = 0, beta2 = 0, eps = 0;
  double gradient = 1;              // unscales and clips
  double unbias1 = 1, unbias2 = 1;  // 1 / (1 - beta^t)
};

// Counts the attempt and, unless it is skipped, the update; what adamw multiplies by.
constexpr AdamWFactors begin_update(const AdamWParams& params, float normaliser, OptimizerState& state) {
  AdamWFactors f;
  ++state.step;
  f.skip = state.skip != 0;
  if (f.skip) return f;
  state.learning_rate = scheduled_rate(params.schedule, state.updates);
  f.learning_rate = state.learning_rate;
  f.beta1 = params.beta1, f.beta2 = params.beta2, f.eps = params.eps;
  const double norm = state.gradient_norm, t = static_cast<double>(++state.updates);
  f.gradient = static_cast<double>(normaliser) / static_cast<double>(state.gradient_scale);
  if (params.clip > 0 && norm > static_cast<double>(params.clip))
    f.gradient *= static_cast<double>(params.clip) / norm;
  f.unbias1 = 1 / (1 - std::pow(static_cast<double>(params.beta1), t));
  f.unbias2 = 1 / (1 - std::pow(static_cast<double>(params.beta2), t));
  return f;
}

}  // namespace kernels::cpu
