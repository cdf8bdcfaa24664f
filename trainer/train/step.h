#pragma once
// One optimizer step of one rank: its micro-batches forward and backward, gradients summed over ranks while
// the last backward runs, then statistics, loss scale and AdamW.
//
// Gradients are those of sum over losses of weight_i * (mean over all weighted tokens of the global batch),
// whichever rank holds them. The backward is seeded with loss_scale * weight_i * (W_0 / W_i) /
// reference_rows, where W_i is the global sum of token weights of loss i and reference_rows = micro_batch *
// context, so that fp16 gradients keep a size that does not depend on the number of ranks or micro-batches;
// the rest, reference_rows / W_0, is folded into the fp32 unscaling.
#include <memory>
#include <string>
#include <vector>

#include "comm/gradient_reducer.h"
#include "configs/config.h"
#include "data/batch_loader.h"
#include "trainer/model/model.h"

namespace trainer {

struct StepMetrics {
  int64_t step = 0;            // the number of the attempt just made, from 0
  std::vector<double> losses;  // mean over weighted tokens, one per Model::losses()
  double tokens = 0;           // rows trained on in this step, over all ranks
  double learning_rate = 0, gradient_norm = 0, loss_scale = 0;
  bool skipped = false;
  int64_t skipped_total = 0, consecutive_skips = 0;
  std::string nonfinite_tensor;  // of a skipped step: the first tensor with a non-finite gradient
  int nonfinite_rank = -1;       // the rank it came from, where known
  bool stop_requested = false;   // by any rank
};

class Stepper {
 public:
  // Measures and takes all memory of a step: nothing is allocated afterwards. A null communicator only
  // rehearses (plan).
  Stepper(const configs::Config& config, Model& model, const data::BatchLoader& loader,
          comm::Communicator& ranks, const kernels::Context& ctx);
  ~Stepper();

  StepMetrics run(bool stop_requested);
  // Mean losses over the given micro-batches of another split, shared among the ranks.
  std::vector<double> validate(const data::BatchLoader& loader,
                               std::span<const std::vector<int64_t>> micro_batches);

  const kernels::OptimizerState& state() const;  // host copy of the device's state, current after run()
  void set_state(const kernels::OptimizerState& state);
  const kernels::Arena& saved() const { return *saved_; }
  const kernels::Arena& scratch() const { return *scratch_; }

 private:
  void backward_micro_batches(const data::StepPlan& plan, bool overlap);
  ModelBatch upload(const data::Batch& batch) const;

  const configs::Config& config_;
  Model& model_;
  const data::BatchLoader& loader_;
  comm::Communicator& ranks_;
  kernels::Context ctx_;
  std::unique_ptr<kernels::Arena> saved_, scratch_;
  std::unique_ptr<comm::GradientReducer> reducer_;
  std::vector<kernels::Segment> segments_, shard_segments_;
  std::vector<double> loss_sums_;
  int64_t reference_rows_ = 1;
};

// Memory of activations and of scratch for one micro-batch of `rows` rows, measured without touching data.
struct Rehearsal {
  std::unique_ptr<kernels::Arena> saved, scratch;
};
Rehearsal rehearse(const Model& model, const kernels::Context& ctx, int64_t rows, int64_t sequences);

}  // namespace trainer
