#include "trainer/optim/settings.h"

namespace trainer {

namespace {

kernels::ScheduleKind schedule_kind(const std::string& name) {
  if (name == "constant") return kernels::ScheduleKind::constant;
  if (name == "linear") return kernels::ScheduleKind::linear;
  if (name == "warmup_stable_decay") return kernels::ScheduleKind::warmup_stable_decay;
  return kernels::ScheduleKind::cosine;
}

kernels::Hysteresis hysteresis_kind(const std::string& name) {
  if (name == "until_growth") return kernels::Hysteresis::until_growth;
  if (name == "consecutive") return kernels::Hysteresis::consecutive;
  return kernels::Hysteresis::none;
}

}  // namespace

kernels::DType compute_dtype(const configs::Config& config) {
  if (config.precision.compute == "bf16") return kernels::DType::bf16;
  if (config.precision.compute == "fp32") return kernels::DType::f32;
  return kernels::DType::f16;
}

kernels::AdamWParams adamw_params(const configs::Config& config) {
  const auto& o = config.optim;
  kernels::AdamWParams p;
  p.schedule = {
      schedule_kind(o.schedule), static_cast<float>(o.lr),       o.warmup,
      config.train.steps,        static_cast<float>(o.lr_floor), static_cast<float>(o.decay_fraction)};
  p.beta1 = static_cast<float>(o.beta1);
  p.beta2 = static_cast<float>(o.beta2);
  p.eps = static_cast<float>(o.eps);
  p.weight_decay = static_cast<float>(o.weight_decay);
  p.clip = static_cast<float>(o.clip);
  return p;
}

kernels::LossScaleRules loss_scale_rules(const configs::Config& config) {
  kernels::LossScaleRules r;
  r.dynamic = compute_dtype(config) == kernels::DType::f16;
  r.growth_interval = static_cast<int32_t>(config.precision.loss_scale_growth_interval);
  r.hysteresis = hysteresis_kind(config.precision.hysteresis);
  r.hysteresis_steps = static_cast<int32_t>(config.precision.hysteresis_steps);
  return r;
}

kernels::OptimizerState initial_state(const configs::Config& config) {
  kernels::OptimizerState s;
  s.loss_scale =
      loss_scale_rules(config).dynamic ? static_cast<float>(config.precision.loss_scale_initial) : 1.0f;
  s.hysteresis_left = static_cast<int32_t>(config.precision.hysteresis_steps);
  return s;
}

}  // namespace trainer
