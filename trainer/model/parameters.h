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
  bool product = false;  // its gradient is a linear layer's product alone
  int64_t begin = 0;     // first element in the flat buffers
};

// Elements [begin, end) of the flat buffers, which a rank has from its own element `own` on.
struct HeldRun {
  int64_t begin, end, own;
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
  // addresses that must not be touched, nothing is allocated. `shard` says which rank of how many holds its
  // part of the optimizer's state here (the pieces are the store's choice); weights and gradients are whole
  // on every rank.
  void allocate(kernels::Device device, DType compute, bool training, bool rehearsal = false,
                kernels::Shard shard = {});
  // Random initial values keyed by (seed, parameter name, element): independent of ranks and of other
  // parameters.
  void initialize(const Context& ctx, uint64_t seed);
  // The values of one parameter, from dense host memory of the main type: into the master, where there is
  // one, and rounded into the weight.
  void assign(int id, const Tensor& values);
  // The elements of parameter `id` that `flat` (master, m or v) holds, from and to dense host memory of the
  // whole parameter.
  void put(const Tensor& flat, int id, const Tensor& values);
  // What rank `rank` holds of parameter `id`, in ascending order.
  std::vector<HeldRun> held_by(int rank, int id) const;
  // Every parameter whose name starts with none of the prefixes is no longer trainable.
  void freeze(const std::vector<std::string>& prefixes_kept_trainable);

  // Who computes the gradient of parameters [first, last]: linear layers alone, or others too.
  void set_product(int first, int last, bool product);
  // Ahead of a step's first backward: no gradient counts any more. Those that are products alone are left as
  // they are, for the first product to write; all others become zero.
  void begin_gradients(const Context& ctx);
  // Whether a product has to write the gradient of [first, last] because nothing did in this step; from now
  // on something has.
  bool take_unwritten(int first, int last);
  // ShapeError when the backward left out a gradient that was for a product to write.
  void check_written() const;

  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t elements() const { return elements_; }
  DType compute() const { return compute_; }
  Tensor weight(int id) const;
  Tensor gradient(int id) const;
  Tensor master(int id) const;  // not of a sharded store
  // Consecutive parameters with equal columns as one matrix (q, k, v: one product), or vectors as one.
  Tensor fused_weight(int first, int last) const;
  Tensor fused_gradient(int first, int last) const;
  // Weights and gradients (P); master, m and v: what this rank holds.
  kernels::OptimizerBuffers& buffers() { return buffers_; }
  const kernels::OptimizerBuffers& buffers() const { return buffers_; }
  std::vector<kernels::Segment> segments() const;
  // What this rank's optimizer updates: the whole, or its shard of everything, with segments to match (as
  // many as parameters, empty where it holds nothing).
  kernels::OptimizerBuffers shard() const;
  std::vector<kernels::Segment> shard_segments() const;
  bool sharded() const { return shard_.ranks > 1; }
  // Which pieces of the flat buffers this rank's optimizer has.
  const kernels::Shard& sharding() const { return shard_; }
  // All gradients, padded to whole stripes.
  Tensor padded_gradients() const { return padded_gradients_; }
  // The stripes (n, ranks, piece) of all weights that have own elements [begin, end) of every rank.
  Tensor weight_stripes(int64_t begin, int64_t end) const;
  // One arena per segment of memory: weights, master, gradients, m, v, optimizer.
  const std::vector<std::unique_ptr<kernels::Arena>>& memory() const { return memory_; }

 private:
  Tensor part(const Tensor& buffer, int first, int last) const;
  Tensor place(const char* segment, DType dtype, int64_t count, bool rehearsal);
  void place_state(bool rehearsal);
  void initialize(const Parameter& parameter, uint64_t seed, int id);

  std::vector<Parameter> parameters_;
  std::vector<bool> unwritten_;  // of each parameter's gradient in this step; empty: none
  int64_t elements_ = 0;
  DType compute_ = DType::f16;
  kernels::Device device_;
  kernels::Shard shard_;
  kernels::OptimizerBuffers buffers_;
  Tensor padded_weights_, padded_gradients_, sums_;
  std::vector<std::unique_ptr<kernels::Arena>> memory_;
};

}  // namespace trainer
