#pragma once
// One optimizer step over flat buffers, driven by a state that lives on the device. No value is read back by
// the host inside a step.
//
// Order:  gradients reduced, to equal bits on every rank -> gradient_statistics -> update_loss_scale ->
// adamw.  What changes from step to step is read from the device: the state, and the host's `normaliser` (1)
// and `factors` (K), fp32, uploaded before the step.
//
//   loss_seeds            seeds_i = state.loss_scale * factors_i: what the backward of each loss starts from
//   gradient_statistics   norm^2 = sum (multiplier * g)^2 over trainable segments, fp64 in fixed order;
//                         counts non-finite elements and records the first segment that holds one.
//                         multiplier = normaliser / loss_scale; the scale is kept in
//                         state.gradient_scale for adamw.
//   update_loss_scale     the state machine of dynamic loss scaling; sets state.skip.
//   adamw                 skipped when state.skip: nothing moves but state.step. Otherwise, with c = min(1,
//                         clip / norm), multiplier = normaliser / gradient_scale and t = updates + 1,
//                         g' = c * multiplier * g;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
//                         master -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + decay * master),
//                         weight = master rounded to the compute type.  decay applies to segments marked so.
// On a GPU gradient_statistics and adamw take working memory from ctx.scratch.
// Gradients are left as they are; the next step clears them. Everything but `weights` is fp32.
//
// Sharded over ranks (ZeRO stage 1), the optimizer's buffers are cut into pieces and dealt out: a rank knows
// the norm of its own pieces alone. gradient_statistics then only fills `sums`, the caller adds those over
// the ranks, and gradient_norm makes norm and non-finite count of them on every rank. On the CPU the bits are
// those of the whole buffers.
// Sources: Loshchilov & Hutter 2019 (AdamW); Micikevicius et al. 2018 (loss scaling); hysteresis as
// Megatron-LM.
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

// A parameter's place in the flat buffers, in elements. Segments are given in ascending order and do not
// overlap.
struct Segment {
  int64_t begin = 0, count = 0;
  bool decay = false;
  bool trainable = true;
};

enum class Hysteresis : int32_t { none, until_growth, consecutive };
enum class ScheduleKind : int32_t { constant, cosine, linear, warmup_stable_decay };

// Learning rate as a function of the number of updates u made so far:
//   u < warmup: lr (u + 1) / warmup.  After it, with s = (u - warmup) / (total - warmup) clamped to [0, 1]:
//   cosine: floor + (1 - floor) (1 + cos(pi s)) / 2;   linear: 1 - (1 - floor) s;
//   warmup_stable_decay: 1 until the last decay_fraction of all updates, then linear to floor.   All times
//   lr.
struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  float lr = 3e-4f;
  int64_t warmup = 0, total = 1;
  float floor = 0.1f;
  float decay_fraction = 0.2f;
};
float learning_rate(const Schedule& schedule, int64_t updates);

struct LossScaleRules {
  bool dynamic = true;  // false: the scale stays as it is (bf16, fp32), non-finite steps are still skipped
  float growth = 2.0f, backoff = 0.5f;
  int32_t growth_interval = 2000;
  Hysteresis hysteresis = Hysteresis::none;
  // The n-th overflow backs off (1: the first). until_growth counts over all steps since the scale last grew,
  // consecutive since the last clean step; further overflows back off every time until refilled.
  int32_t hysteresis_steps = 2;
  float minimum = 1.0f, maximum = 4294967296.0f;
};

// Lives in device memory, is saved whole in checkpoints. Plain data.
struct OptimizerState {
  int64_t step = 0;     // attempts: keys the data
  int64_t updates = 0;  // successful ones: keys schedule and bias correction
  float loss_scale = 65536.0f;
  int32_t clean_steps = 0;      // since the last growth or overflow
  int32_t hysteresis_left = 2;  // start at rules.hysteresis_steps
  int32_t consecutive_skips = 0;
  int64_t skipped = 0;  // all skipped steps so far
  // Of the current step:
  int32_t nonfinite = 0;
  int32_t first_nonfinite = -1;  // segment index on this rank, -1 if none
  int32_t skip = 0;
  float gradient_norm = 0.0f;  // unscaled, before clipping; infinite when nonfinite
  float learning_rate = 0.0f;
  float gradient_scale =
      1.0f;  // the loss scale these gradients carry: update_loss_scale may change loss_scale
};

struct AdamWParams {
  Schedule schedule;
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f, clip = 1.0f;  // clip 0: none
};

// Work and sums are cut into pieces of the whole flat buffers, the same whoever computes them: pieces of a
// multiple of 32 elements, at most kOptimizerPieces of them.
inline constexpr int64_t kOptimizerPieces = 256;
int64_t optimizer_piece(int64_t total);  // elements of a piece of buffers of `total` elements

// What a rank has of pieces that are dealt out in turn: `rank`, rank + ranks, rank + 2 ranks, ..., one behind
// the other. So every rank has an equal part of each stripe of ranks * piece elements, and what it has of
// neighbours is together.
struct Shard {
  int rank = 0, ranks = 1;
  int64_t piece = 0;  // elements; 0 where one rank has everything
  int64_t stripe() const { return ranks * piece; }
  // Where own element `own` stands in the whole.
  int64_t place(int64_t own) const;
  // How many own elements are ahead of element `place` of the whole.
  int64_t before(int64_t place) const;
};

struct OptimizerBuffers {
  Tensor weights;    // (ranks * P) compute type: the whole, of which the shard is updated
  Tensor master;     // (P) main type, as are the rest
  Tensor gradients;  // (ranks * P): the whole, of which the shard is read
  Tensor m, v;       // (P)
  Tensor state;      // (sizeof(OptimizerState)) uint8, on the same device
  // Segments count own elements. P is a number of pieces.
  Shard shard = {};
  // (kOptimizerPieces) fp64, null where one rank has everything: sums of g^2 of this rank's pieces; those of
  // other ranks are 0. On a GPU the sums may be cut otherwise: what counts is that all entries of all ranks
  // add up to the whole.
  Tensor sums = {};
};

// An update in parts of so many own elements (a number of pieces; 0: all at once): once the weights of own
// elements [begin, end) are updated, in the order of ctx.stream, `updated` is called with them.
struct UpdateParts {
  int64_t elements = 0;
  std::function<void(int64_t begin, int64_t end)> updated = {};
};

void loss_seeds(const Context& ctx, const Tensor& state, const Tensor& factors, Tensor seeds);
void gradient_statistics(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
                         OptimizerBuffers& buffers);
// Of a shard, once `sums` holds those of all ranks; nonfinite becomes 1 unless their sum is finite.
void gradient_norm(const Context& ctx, const Tensor& normaliser, OptimizerBuffers& buffers);
void update_loss_scale(const Context& ctx, const LossScaleRules& rules, OptimizerBuffers& buffers);
void adamw(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers, const UpdateParts& parts = {});

namespace cpu {
void loss_seeds(const Context& ctx, const Tensor& state, const Tensor& factors, Tensor seeds);
void gradient_statistics(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
                         OptimizerBuffers& buffers);
void gradient_norm(const Context& ctx, const Tensor& normaliser, OptimizerBuffers& buffers);
void update_loss_scale(const Context& ctx, const LossScaleRules& rules, OptimizerBuffers& buffers);
void adamw(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers, const UpdateParts& parts);
}  // namespace cpu

namespace cuda {
void loss_seeds(const Context& ctx, const Tensor& state, const Tensor& factors, Tensor seeds);
void gradient_statistics(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
                         OptimizerBuffers& buffers);
void gradient_norm(const Context& ctx, const Tensor& normaliser, OptimizerBuffers& buffers);
void update_loss_scale(const Context& ctx, const LossScaleRules& rules, OptimizerBuffers& buffers);
void adamw(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers, const UpdateParts& parts);
}  // namespace cuda

}  // namespace kernels
