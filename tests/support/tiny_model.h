#pragma once
// A small model with its memory, and batches for it: what the tests of the model room share.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "configs/config.h"
#include "tests/support/tensor_buffer.h"
#include "trainer/model/model.h"

namespace support {

// Two blocks of width 16 with grouped key/value heads; no extra heads.
configs::Config tiny_config();

// Packed sequences of seeded tokens, targets and weights as data::Batch defines them, and `padding` rows of
// weight 0 behind them as a sequence of their own.
struct PackedBatch {
  PackedBatch(const std::vector<std::vector<int32_t>>& sequences, int64_t offsets, int64_t padding = 0);
  trainer::ModelBatch view() const;
  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }

  int64_t offsets;
  std::vector<int32_t> tokens, positions, cu_seqlens, targets;
  std::vector<float> weights;
};
std::vector<int32_t> random_tokens(int64_t count, int64_t vocabulary, uint64_t seed);

class TinyModel {
 public:
  static constexpr int64_t kVocabulary = 37;
  // Every parameter gets seeded normal values (norm gains around 1) that fp16 can hold, so that runs in
  // different types compute the same function.
  TinyModel(const configs::Config& config, kernels::DType compute, bool training = true);

  trainer::Model& model() { return *model_; }
  trainer::ParameterStore& parameters() { return model_->parameters(); }
  TensorBuffer seeds(float scale = 1.0f) const;
  void rehearse(const PackedBatch& batch, kernels::Arena& saved, kernels::Arena& scratch);
  // Loss sums by forward_backward; the gradients are cleared before, or added to.
  std::vector<double> train(const PackedBatch& batch, const trainer::GradientsFinal& gradients_final = {},
                            float scale = 1.0f, bool clear = true);
  std::vector<double> evaluate(const PackedBatch& batch);
  // Sum of the losses times their weights.
  double total(const std::vector<double>& losses) const;

  std::vector<double> gradient(int id) const;
  std::vector<double> gradients() const;  // the whole flat buffer

 private:
  std::unique_ptr<trainer::Model> model_;
};

// The elements of a dense tensor in host memory.
std::vector<double> to_doubles(const kernels::Tensor& t);

}  // namespace support
