#pragma once
// Every parameter of a model, in flat buffers: compute weights, fp32 masters, gradients and moments share one
// element order, that of registration (which is the order of the forward), so the backward finishes the
// buffer from its end.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/arena.h"
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/optimizer.h"

namespace trainer {

using kernels::Context;
using kernels::DType;
using kernels::Shape;
using kernels::Tensor;

struct Init {
  enum class Kind { zeros, ones, normal, copy } kind = Kind::zeros;
  float deviation = 0.02f;
  int source = -1;  // copy: the parameter whose initial values are taken
};

struct Parameter {
  std::string name;  // canonical: "blocks.0.attention.q.weight"
  Shape shape;
  Init init;
  bool decay = false;  // weight decay: matrices only
  bool trainable = true;
  int64_t begin = 0;  // first element in the flat buffers
};

class ParameterStore {
 public:
  // Registers a parameter and returns its number. Decay is on for matrices. A parameter starts at a multiple
  // of 32 elements, unless it is joined: then it follows its predecessor without a gap, so that fused_weight
  // sees both as one matrix.
  int add(std::string name, Shape shape, Init init, bool joined = false);
  int find(const std::string& name) const;  // -1 if absent

  // weights (compute type) always; master, gradients, m, v and the optimizer's state only for training. Only
  // weights and master wait for values; the rest starts at zero. `rehearsal` measures: the tensors have
  // addresses that must not be touched, nothing is allocated.
  void allocate(kernels::Device device, DType compute, bool training, bool rehearsal = false);
  // Random initial values keyed by (seed, parameter name, element): independent of ranks and of other
  // parameters.
  void initialize(const Context& ctx, uint64_t seed);
  // weights = master rounded to the compute type.
  void refresh_weights(const Context& ctx);
  // The values of one parameter, from dense host memory of the main type: into the master, where there is
  // one, and rounded into the weight.
  void assign(int id, const Tensor& values);
  // Every parameter whose name starts with none of the prefixes is no longer trainable.
  void freeze(const std::vector<std::string>& prefixes_kept_trainable);

  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t elements() const { return elements_; }
  DType compute() const { return compute_; }
  Tensor weight(int id) const;
  Tensor gradient(int id) const;
  Tensor master(int id) const;
  // Consecutive parameters with equal columns as one matrix (q, k, v: one product).
  Tensor fused_weight(int first, int last) const;
  Tensor fused_gradient(int first, int last) const;
  kernels::OptimizerBuffers& buffers() { return buffers_; }
  const kernels::OptimizerBuffers& buffers() const { return buffers_; }
  std::vector<kernels::Segment> segments() const;
  // One arena per segment of memory: weights, master, gradients, m, v, optimizer.
  const std::vector<std::unique_ptr<kernels::Arena>>& memory() const { return memory_; }

 private:
  Tensor part(const Tensor& buffer, int first, int last) const;
  Tensor place(const char* segment, DType dtype, int64_t count, bool rehearsal);
  void initialize(const Parameter& parameter, uint64_t seed, int id);

  std::vector<Parameter> parameters_;
  int64_t elements_ = 0;
  DType compute_ = DType::f16;
  kernels::Device device_;
  kernels::OptimizerBuffers buffers_;
  std::vector<std::unique_ptr<kernels::Arena>> memory_;
};

}  // namespace trainer
