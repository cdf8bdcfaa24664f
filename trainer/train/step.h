#pragma once
// One optimizer step of one rank: its micro-batches forward and backward, gradients summed over ranks while
// the last backward runs, then statistics, loss scale and AdamW.
//
// Gradients are those of sum over losses of weight_i * (mean over all weighted tokens of the global batch),
// whichever rank holds them. The backward is seeded with loss_scale * weight_i * (W_0 / W_i) /
// reference_rows, where W_i is the global sum of token weights of loss i and reference_rows = micro_batch *
// context, so that fp16 gradients keep a size that does not depend on the number of ranks or micro-batches;
// the rest, reference_rows / W_0, is folded into the fp32 unscaling.
//
// A step is put into the context's stream whole; the host reads its results `late` steps afterwards, so that
// a GPU never waits for it. On a GPU the work of a micro-batch is captured into a CUDA graph for each shape,
// after one eager run in which the libraries choose their algorithms, and replayed from then on.
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/gradient_reducer.h"
#include "configs/config.h"
#include "data/batch_loader.h"
#include "trainer/model/model.h"
#include "trainer/train/staging.h"

namespace trainer {

struct StepMetrics {
  int64_t step = 0;            // the number of the attempt, from 0
  std::vector<double> losses;  // mean over weighted tokens, one per Model::losses()
  double tokens = 0;           // trained on in this step, over all ranks: the sum of their loss weights
  double learning_rate = 0, gradient_norm = 0, loss_scale = 0;
  bool skipped = false;
  int64_t consecutive_skips = 0;
  std::string nonfinite_tensor;  // of a skipped step: the first tensor with a non-finite gradient
  int nonfinite_rank = -1;       // the rank it came from, where known
  bool stop_requested = false;   // by any rank
};

// What rehearsing a step tells, without touching data. Its memory: saved, activations of one micro-batch;
// scratch, working memory; step, a micro-batch and the numbers of a step. And in which order gradients become
// final.
struct StepRehearsal {
  std::unique_ptr<kernels::Arena> saved, scratch, step;
  std::vector<comm::GradientRange> gradients;
};
StepRehearsal rehearse_step(const Model& model, const kernels::Context& ctx, const data::LoaderParams& params,
                            int ranks);

class Stepper {
 public:
  // Measures and takes all memory of a step: nothing is allocated afterwards. `late`: steps whose results may
  // be outstanding when run() returns; by default 1 on a GPU and 0 on the CPU.
  Stepper(const configs::Config& config, Model& model, const data::BatchLoader& loader,
          comm::Communicator& ranks, const kernels::Context& ctx, std::optional<size_t> late = {});
  ~Stepper();

  // Makes one step; returns the metrics of the latest one that is finished, if that is news.
  std::optional<StepMetrics> run(bool stop_requested);
  // Waits for every step made; call it until it returns nothing.
  std::optional<StepMetrics> flush();
  // Mean losses over the given micro-batches of another split, shared among the ranks. Waits for the result.
  std::vector<double> validate(const data::BatchLoader& loader,
                               std::span<const std::vector<int64_t>> micro_batches);

  int64_t attempts() const { return attempts_; }  // steps made since the beginning of the run
  // The optimizer's state after the latest finished step.
  const kernels::OptimizerState& state() const { return state_; }
  void set_state(const kernels::OptimizerState& state);
  // Takes over the state that something else (a checkpoint) has put on the device.
  void read_state();
  const StepRehearsal& rehearsal() const { return rehearsal_; }
  bool captured() const;  // some work runs as a graph

 private:
  // What is computed for one micro-batch: the first clears the gradients, the last finishes the step. Without
  // rows there is no micro-batch on this rank.
  struct Work {
    BatchShape shape;
    bool first = false, last = false, attribute = false;
    auto operator<=>(const Work&) const = default;
  };
  struct Recorded {
    bool warm = false;
    kernels::Graph graph;
  };
  // A step whose results are on their way to the host.
  struct Flight {
    Flight(kernels::Device device, size_t bytes) : memory(device, bytes), landed(device) {}
    kernels::PinnedBuffer memory;  // the optimizer's state, then the step's numbers
    kernels::Event landed;
    int64_t step = 0;
    std::vector<double> weight_sums;
    bool attribute = false;
  };

  void upload_numbers(const data::StepPlan& plan, bool stop_requested);
  BatchShape upload(const data::Batch& batch);
  void enqueue(const Work& work);
  void capture(const Work& work, kernels::Graph& graph);
  void compute(const Work& work);
  void backward(const BatchShape& shape, bool reduce);
  void finish_step(bool attribute);
  void update(kernels::OptimizerBuffers& shard);
  void send_results(const data::StepPlan& plan, bool attribute);
  StepMetrics collect();

  const configs::Config& config_;
  Model& model_;
  const data::BatchLoader& loader_;
  comm::Communicator& ranks_;
  kernels::Context ctx_;
  StepRehearsal rehearsal_;
  kernels::Tensor batch_, block_, seeds_, validation_;  // in rehearsal_.step; block_ holds numbers_
  StepNumbers numbers_;
  std::unique_ptr<Uploads> uploads_;
  std::unique_ptr<comm::GradientReducer> reducer_;
  std::vector<kernels::Segment> segments_, shard_segments_;
  std::map<Work, Recorded> recorded_;
  std::vector<std::unique_ptr<Flight>> flights_;
  std::deque<Flight*> in_flight_;
  size_t late_;
  bool graphs_;
  int64_t update_elements_ = 0;  // 0: all at once
  int64_t attempts_ = 0, reference_rows_ = 1;
  kernels::OptimizerState state_;
};

}  // namespace trainer
