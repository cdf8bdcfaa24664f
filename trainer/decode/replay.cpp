#include "trainer/decode/replay.h"

#include <algorithm>

#include "kernels/core/error.h"

namespace trainer {

namespace {

void record(kernels::Stream stream, kernels::Graph& graph, const std::function<void()>& work) {
  kernels::Graph::begin(stream);
  try {
    work();
  } catch (...) {
    // Ends the recording, so that the stream can be used again; what went wrong first is what counts.
    try {
      graph.end(stream);
    } catch (const kernels::DeviceError&) {
    }
    throw;
  }
  graph.end(stream);
}

}  // namespace

void Replay::operator()(const kernels::Context& ctx, const Key& key, const std::function<void()>& work) {
  if (!enabled_ || ctx.rehearsal || !ctx.device.is_cuda() || !ctx.stream.handle) return work();
  forget_other_memory(ctx);
  Recorded& recorded = recorded_[key];
  if (!recorded.warm) {
    recorded.warm = true;
    return work();
  }
  if (!recorded.graph.ready()) record(ctx.stream, recorded.graph, work);
  recorded.graph.launch(ctx.stream);
}

void Replay::forget_other_memory(const kernels::Context& ctx) {
  const kernels::ArenaScope scope(*ctx.scratch);
  const void* scratch = ctx.scratch->allocate("probe", kernels::DType::i32, {1}).data;
  if (scratch == scratch_ && ctx.stream.handle == stream_) return;
  recorded_.clear();
  scratch_ = scratch;
  stream_ = ctx.stream.handle;
}

int64_t Replay::recorded() const {
  return std::count_if(recorded_.begin(), recorded_.end(),
                       [](const auto& entry) { return entry.second.graph.ready(); });
}

SharedResult::SharedResult(kernels::Device device, kernels::DType dtype, kernels::Shape shape)
    : memory_(device, static_cast<size_t>(shape.numel()) * size_of(dtype)),
      tensor_(memory_.data(), dtype, shape, device) {}

void HostCopy::send(const kernels::Context& ctx, const kernels::Tensor& t) {
  data_ = t.data;
  if (!ctx.device.is_cuda()) return;
  if (!memory_ || memory_->size() < t.bytes())
    memory_ = std::make_unique<kernels::PinnedBuffer>(ctx.device, t.bytes());
  kernels::copy_async(memory_->data(), t.data, t.bytes(), ctx.device, ctx.stream);
  data_ = memory_->data();
}

}  // namespace trainer
