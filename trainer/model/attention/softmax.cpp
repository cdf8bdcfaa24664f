#include "trainer/model/attention/softmax.h"

#include "kernels/ops/cast.h"
#include "kernels/ops/softmax_attention.h"

namespace trainer {

namespace {

struct SoftmaxState final : AttentionState {
  SoftmaxState(const Context& ctx, DType dtype, Shape cache) : arena("softmax state", ctx.device) {
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 1) arena.place();
      k = arena.allocate("cache k", dtype, cache);
      v = arena.allocate("cache v", dtype, cache);
    }
    reset(ctx);
  }
  void commit(const Context& ctx, const kernels::CommitPath& path) override {
    kernels::commit_rows(ctx, path, false, k);
    kernels::commit_rows(ctx, path, false, v);
  }
  void reset(const Context& ctx) override {
    kernels::fill(ctx, k, 0.0f);
    kernels::fill(ctx, v, 0.0f);
  }

  kernels::Arena arena;
  Tensor k, v;  // (B, capacity, Hk, D)
};

class SoftmaxAttention final : public Attention {
 public:
  SoftmaxAttention(const ParameterStore& store, const configs::ModelConfig& model)
      : store_(store), kv_heads_(model.kv_heads), head_size_(model.width / model.heads) {}

  void forward(const Context& ctx, const AttentionInput& in, Tensor o, AttentionSaved& saved,
               kernels::Arena& arena) const override {
    saved.output = o.view(in.q.shape);
    saved.statistics = arena.allocate("log sum", kernels::main_dtype(o.dtype), {in.q.dim(0), in.q.dim(1)});
    kernels::softmax_attention(ctx, in.q, in.k, in.v, in.cu_seqlens, saved.output, saved.statistics,
                               in.hints);
  }

  void backward(const Context& ctx, const AttentionInput& in, const Tensor& dout, const AttentionSaved& saved,
                Tensor dq, Tensor dk, Tensor dv) const override {
    kernels::softmax_attention_backward(ctx, dout.view(in.q.shape), in.q, in.k, in.v, saved.output,
                                        saved.statistics, in.cu_seqlens, dq, dk, dv, in.hints);
  }

  std::unique_ptr<AttentionState> make_state(const Context& ctx, int64_t batch,
                                             int64_t capacity) const override {
    return std::make_unique<SoftmaxState>(ctx, store_.compute(),
                                          Shape{batch, capacity, kv_heads_, head_size_});
  }

  void decode(const Context& ctx, const AttentionInput& in, const kernels::DecodeRows& rows,
              AttentionState& state, Tensor o) const override {
    auto& cache = static_cast<SoftmaxState&>(state);
    kernels::softmax_attention_decode(ctx, in.q, in.k, in.v, rows, cache.k, cache.v, o.view(in.q.shape));
  }

 private:
  const ParameterStore& store_;
  int64_t kv_heads_, head_size_;
};

}  // namespace

std::unique_ptr<Attention> make_softmax_attention(ParameterStore& store, const configs::Config& config,
                                                  const std::string&) {
  return std::make_unique<SoftmaxAttention>(store, config.model);
}

}  // namespace trainer
