#include "trainer/model/attention/linear.h"

#include <optional>

#include "kernels/ops/cast.h"
#include "kernels/ops/linear_attention.h"
#include "trainer/model/norm.h"

namespace trainer {

namespace {

struct LinearState final : AttentionState {
  LinearState(const Context& ctx, DType dtype, int64_t batch, int64_t heads, int64_t size)
      : arena("linear state", ctx.device) {
    const DType main = kernels::main_dtype(dtype);
    const Shape recent{batch, 2 * kernels::kFold, heads, size};
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 1) arena.place();
      folded.s = arena.allocate("state s", main, {batch, heads, size, size});
      folded.z = arena.allocate("state z", main, {batch, heads, size});
      folded.recent_k = arena.allocate("recent k", main, recent);
      folded.recent_v = arena.allocate("recent v", dtype, recent);
    }
    reset(ctx);
  }
  void commit(const Context& ctx, const kernels::CommitPath& path) override {
    kernels::linear_attention_commit(ctx, path, folded);
  }
  void reset(const Context& ctx) override {
    for (const Tensor& t : {folded.s, folded.z, folded.recent_k, folded.recent_v})
      kernels::fill(ctx, t, 0.0f);
  }

  kernels::Arena arena;
  kernels::LinearAttentionState folded;
};

class LinearAttention final : public Attention {
 public:
  LinearAttention(ParameterStore& store, const configs::Config& config, const std::string& prefix)
      : store_(store), kv_heads_(config.model.kv_heads), head_size_(config.model.width / config.model.heads) {
    params_.normalise = config.attention.linear_normaliser == "sum";
    params_.eps = static_cast<float>(config.attention.linear_eps);
    if (!params_.normalise)
      norm_ = Norm::per_head(store, config.model.norm_eps, config.model.heads, head_size_, prefix + ".norm");
  }

  void forward(const Context& ctx, const AttentionInput& in, Tensor o, AttentionSaved& saved,
               kernels::Arena& arena) const override {
    const DType main = kernels::main_dtype(o.dtype);
    if (params_.normalise) {
      saved.output = o.view(in.q.shape);
      saved.statistics = arena.allocate("denominator", main, {in.q.dim(0), in.q.dim(1)});
    } else {
      saved.output = arena.allocate("sums", main, in.q.shape);
      saved.norm_statistics = norm_->allocate_statistics(arena, o.rows());
    }
    kernels::linear_attention(ctx, params_, in.q, in.k, in.v, in.cu_seqlens, saved.output, saved.statistics);
    if (norm_) norm_->forward(ctx, saved.output.view(o.shape), o, saved.norm_statistics);
  }

  void backward(const Context& ctx, const AttentionInput& in, const Tensor& dout, const AttentionSaved& saved,
                Tensor dq, Tensor dk, Tensor dv) const override {
    const kernels::ArenaScope scope(*ctx.scratch);
    Tensor doutput = dout.view(in.q.shape);
    if (norm_) {
      doutput = ctx.scratch->allocate("dsums", saved.output.dtype, in.q.shape);
      norm_->backward(ctx, dout, saved.output.view(dout.shape), saved.norm_statistics,
                      doutput.view(dout.shape), false);
    }
    kernels::linear_attention_backward(ctx, params_, doutput, in.q, in.k, in.v, saved.output,
                                       saved.statistics, in.cu_seqlens, dq, dk, dv);
  }

  std::unique_ptr<AttentionState> make_state(const Context& ctx, int64_t batch, int64_t) const override {
    return std::make_unique<LinearState>(ctx, store_.compute(), batch, kv_heads_, head_size_);
  }

  void decode(const Context& ctx, const AttentionInput& in, const kernels::DecodeRows& rows,
              AttentionState& state, Tensor o) const override {
    auto& folded = static_cast<LinearState&>(state).folded;
    if (!norm_)
      return kernels::linear_attention_decode(ctx, params_, in.q, in.k, in.v, rows, folded,
                                              o.view(in.q.shape));
    const kernels::ArenaScope scope(*ctx.scratch);
    const Tensor sums = ctx.scratch->allocate("sums", kernels::main_dtype(o.dtype), in.q.shape);
    const Tensor statistics = norm_->allocate_statistics(*ctx.scratch, o.rows());
    kernels::linear_attention_decode(ctx, params_, in.q, in.k, in.v, rows, folded, sums);
    norm_->forward(ctx, sums.view(o.shape), o, statistics);
  }

 private:
  const ParameterStore& store_;
  kernels::LinearAttentionParams params_;
  int64_t kv_heads_, head_size_;
  std::optional<Norm> norm_;
};

}  // namespace

std::unique_ptr<Attention> make_linear_attention(ParameterStore& store, const configs::Config& config,
                                                 const std::string& prefix) {
  return std::make_unique<LinearAttention>(store, config, prefix);
}

}  // namespace trainer
