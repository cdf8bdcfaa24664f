#include "trainer/model/parameters.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "kernels/core/error.h"
#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "kernels/ops/cast.h"

namespace trainer {

namespace {
constexpr int64_t kAlignment = 32;
constexpr int64_t kInitGrain = 4096;

// A dense tensor in host memory that owns its bytes.
struct HostTensor {
  HostTensor(DType dtype, Shape shape)
      : bytes(static_cast<size_t>(shape.numel()) * kernels::size_of(dtype)),
        tensor(bytes.data(), dtype, shape) {}
  std::vector<unsigned char> bytes;
  Tensor tensor;
};
}  // namespace

int ParameterStore::add(std::string name, Shape shape, Init init, bool joined) {
  const int64_t begin = joined ? elements_ : (elements_ + kAlignment - 1) / kAlignment * kAlignment;
  Parameter p{
      .name = std::move(name), .shape = shape, .init = init, .decay = shape.rank() > 1, .begin = begin};
  elements_ = begin + shape.numel();
  parameters_.push_back(std::move(p));
  return static_cast<int>(parameters_.size()) - 1;
}

int ParameterStore::find(const std::string& name) const {
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (parameters_[i].name == name) return static_cast<int>(i);
  return -1;
}

Tensor ParameterStore::place(const char* segment, DType dtype, int64_t count, bool rehearsal) {
  auto& arena = *memory_.emplace_back(std::make_unique<kernels::Arena>(segment, device_));
  const Tensor measured = arena.allocate(segment, dtype, {count});
  if (rehearsal) return measured;
  arena.place();
  const Tensor placed = arena.allocate(segment, dtype, {count});
  kernels::fill({device_, {}, nullptr, false}, placed, 0.0f);
  return placed;
}

void ParameterStore::allocate(kernels::Device device, DType compute, bool training, bool rehearsal,
                              kernels::Shard shard) {
  device_ = device;
  compute_ = compute;
  memory_.clear();
  buffers_ = {};
  shard_ = shard;
  shard_.piece = sharded() ? kernels::optimizer_piece(elements_) : 0;
  // The same on every rank, padding included.
  const int64_t own =
      sharded() ? (elements_ + shard_.stripe() - 1) / shard_.stripe() * shard_.piece : elements_;
  const int64_t padded = shard_.ranks * own;
  const DType main = kernels::main_dtype(compute);
  padded_weights_ = place("weights", compute, padded, rehearsal);
  buffers_.weights = padded_weights_.slice(0, elements_);
  if (!training) return;
  buffers_.master = place("master", main, own, rehearsal);
  padded_gradients_ = place("gradients", main, padded, rehearsal);
  buffers_.gradients = padded_gradients_.slice(0, elements_);
  buffers_.m = place("m", main, own, rehearsal);
  buffers_.v = place("v", main, own, rehearsal);
  place_state(rehearsal);
}

void ParameterStore::place_state(bool rehearsal) {
  auto& arena = *memory_.emplace_back(std::make_unique<kernels::Arena>("optimizer", device_));
  const auto take = [&] {
    buffers_.state =
        arena.allocate("state", DType::u8, {static_cast<int64_t>(sizeof(kernels::OptimizerState))});
    if (sharded()) sums_ = arena.allocate("sums", DType::f64, {kernels::kOptimizerPieces});
  };
  take();
  if (rehearsal) return;
  arena.place();
  take();
  const kernels::OptimizerState fresh;
  kernels::copy_bytes(buffers_.state.data, device_, &fresh, {}, sizeof(fresh));
}

void ParameterStore::assign(int id, const Tensor& values) {
  const Parameter& p = parameters_[static_cast<size_t>(id)];
  kernels::check_shape("assign", p.name.c_str(), values, p.shape);
  kernels::check_dtype("assign", p.name.c_str(), values, kernels::main_dtype(compute_));
  HostTensor rounded(compute_, p.shape);
  kernels::cast({}, values, rounded.tensor);
  kernels::copy_bytes(weight(id).data, device_, rounded.tensor.data, {}, rounded.tensor.bytes());
  if (buffers_.master) put(buffers_.master, id, values);
}

std::vector<HeldRun> ParameterStore::held_by(int rank, int id) const {
  const Parameter& p = parameters_[static_cast<size_t>(id)];
  kernels::Shard shard = shard_;
  shard.rank = rank;
  const int64_t end = shard.before(p.begin + p.shape.numel());
  std::vector<HeldRun> runs;
  for (int64_t own = shard.before(p.begin), next; own < end; own = next) {
    next = sharded() ? std::min(end, (own / shard.piece + 1) * shard.piece) : end;
    runs.push_back({shard.place(own), shard.place(own) + next - own, own});
  }
  return runs;
}

void ParameterStore::put(const Tensor& flat, int id, const Tensor& values) {
  const Parameter& p = parameters_[static_cast<size_t>(id)];
  for (const auto& [begin, end, own] : held_by(shard_.rank, id)) {
    const Tensor target = flat.slice(own, end - begin);
    const Tensor source = values.view({p.shape.numel()}).slice(begin - p.begin, end - begin);
    kernels::copy_bytes(target.data, device_, source.data, {}, target.bytes());
  }
}

void ParameterStore::initialize(const Parameter& parameter, uint64_t seed, int id) {
  const uint64_t key = XXH3_64bits_withSeed(parameter.name.data(), parameter.name.size(), seed);
  HostTensor values(kernels::main_dtype(compute_), parameter.shape);
  kernels::visit_dtype(values.tensor.dtype, [&](auto tag) {
    using T = decltype(tag);
    T* out = values.tensor.as<T>();
    const Init& init = parameter.init;
    kernels::parallel_for(values.tensor.numel(), kInitGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float value = init.kind == Init::Kind::ones ? 1.0f : 0.0f;
        if (init.kind == Init::Kind::normal)
          value = init.deviation * kernels::normal(key, kernels::Purpose::init, static_cast<uint64_t>(i));
        out[i] = T(value);
      }
    });
  });
  assign(id, values.tensor);
}

void ParameterStore::initialize(const Context&, uint64_t seed) {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter p = parameters_[i];
    // A copy draws its source's numbers again: no order of initialisation to mind.
    while (p.init.kind == Init::Kind::copy) p = parameters_[static_cast<size_t>(p.init.source)];
    initialize(p, seed, static_cast<int>(i));
  }
}

void ParameterStore::freeze(const std::vector<std::string>& prefixes_kept_trainable) {
  for (Parameter& p : parameters_)
    p.trainable = std::any_of(prefixes_kept_trainable.begin(), prefixes_kept_trainable.end(),
                              [&](const std::string& prefix) { return p.name.starts_with(prefix); });
}

void ParameterStore::set_product(int first, int last, bool product) {
  for (int i = first; i <= last; ++i) parameters_[static_cast<size_t>(i)].product = product;
}

void ParameterStore::begin_gradients(const Context& ctx) {
  unwritten_.assign(parameters_.size(), false);
  int64_t cleared = 0;
  const auto clear_until = [&](int64_t end) {
    if (end > cleared) kernels::fill(ctx, buffers_.gradients.slice(cleared, end - cleared), 0.0f);
  };
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = parameters_[i];
    unwritten_[i] = p.product && p.trainable;
    if (!unwritten_[i]) continue;
    clear_until(p.begin);
    cleared = p.begin + p.shape.numel();
  }
  clear_until(elements_);
}

bool ParameterStore::take_unwritten(int first, int last) {
  if (unwritten_.empty()) return false;
  const auto begin = unwritten_.begin() + first, end = unwritten_.begin() + last + 1;
  const bool unwritten = *begin;
  if (std::find(begin, end, !unwritten) != end)
    throw kernels::ShapeError(fmt::format("gradients of '{}' and '{}' are not of one product",
                                          parameters_[static_cast<size_t>(first)].name,
                                          parameters_[static_cast<size_t>(last)].name));
  std::fill(begin, end, false);
  return unwritten;
}

void ParameterStore::check_written() const {
  for (size_t i = 0; i < unwritten_.size(); ++i)
    if (unwritten_[i])
      throw kernels::ShapeError(
          fmt::format("the backward left out the gradient of '{}'", parameters_[i].name));
}

Tensor ParameterStore::part(const Tensor& buffer, int first, int last) const {
  const Parameter& p = parameters_[static_cast<size_t>(first)];
  Shape shape = p.shape;
  for (int i = first + 1; i <= last; ++i) {
    const Parameter& next = parameters_[static_cast<size_t>(i)];
    if (next.begin != p.begin + shape.numel() || next.shape.rank() != shape.rank() || next.shape.rank() > 2 ||
        (next.shape.rank() == 2 && next.shape[1] != shape[1]))
      throw kernels::ShapeError(
          fmt::format("parameters '{}' and '{}' are not one matrix or vector", p.name, next.name));
    shape[0] += next.shape[0];
  }
  return buffer.slice(p.begin, shape.numel()).view(shape);
}

Tensor ParameterStore::weight(int id) const { return part(buffers_.weights, id, id); }
Tensor ParameterStore::gradient(int id) const { return part(buffers_.gradients, id, id); }
Tensor ParameterStore::master(int id) const { return part(buffers_.master, id, id); }
Tensor ParameterStore::fused_weight(int first, int last) const { return part(buffers_.weights, first, last); }
Tensor ParameterStore::fused_gradient(int first, int last) const {
  return part(buffers_.gradients, first, last);
}

std::vector<kernels::Segment> ParameterStore::segments() const {
  std::vector<kernels::Segment> segments;
  for (const Parameter& p : parameters_)
    segments.push_back(
        {.begin = p.begin, .count = p.shape.numel(), .decay = p.decay, .trainable = p.trainable});
  return segments;
}

kernels::OptimizerBuffers ParameterStore::shard() const {
  kernels::OptimizerBuffers own = buffers_;
  if (!sharded()) return own;
  own.shard = shard_;
  own.sums = sums_;
  own.weights = padded_weights_;
  own.gradients = padded_gradients_;
  return own;
}

Tensor ParameterStore::weight_stripes(int64_t begin, int64_t end) const {
  const int64_t ranks = shard_.ranks, piece = shard_.piece;
  return padded_weights_.slice(begin * ranks, (end - begin) * ranks)
      .view({(end - begin) / piece, ranks, piece});
}

std::vector<kernels::Segment> ParameterStore::shard_segments() const {
  std::vector<kernels::Segment> own = segments();
  for (kernels::Segment& s : own) {
    const int64_t begin = shard_.before(s.begin);
    s.count = shard_.before(s.begin + s.count) - begin;
    s.begin = begin;
  }
  return own;
}

}  // namespace trainer
