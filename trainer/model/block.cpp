#include "trainer/model/block.h"

#include <cmath>

#include "kernels/core/error.h"
#include "kernels/ops/rotary.h"

namespace trainer {

namespace {
constexpr float kDeviation = 0.02f;

// Output projections start smaller, so that the residual stream does not grow with depth (GPT-2).
float output_deviation(const configs::ModelConfig& model) {
  return kDeviation / std::sqrt(2.0f * static_cast<float>(model.layers));
}

Linear add_qkv(ParameterStore& store, const configs::ModelConfig& model, const std::string& prefix) {
  const int64_t size = model.width / model.heads;
  const Init init{Init::Kind::normal, kDeviation};
  const int q = store.add(prefix + ".q.weight", {model.heads * size, model.width}, init);
  store.add(prefix + ".k.weight", {model.kv_heads * size, model.width}, init, true);
  const int v = store.add(prefix + ".v.weight", {model.kv_heads * size, model.width}, init, true);
  if (!model.bias) return Linear(store, q, v);
  const int q_bias = store.add(prefix + ".q.bias", {model.heads * size}, {});
  store.add(prefix + ".k.bias", {model.kv_heads * size}, {}, true);
  const int v_bias = store.add(prefix + ".v.bias", {model.kv_heads * size}, {}, true);
  return Linear(store, q, v, q_bias, v_bias);
}

Linear add_output(ParameterStore& store, const configs::ModelConfig& model, const std::string& prefix) {
  const Init init{Init::Kind::normal, output_deviation(model)};
  const int o = store.add(prefix + ".o.weight", {model.width, model.width}, init);
  return Linear(store, o, o, model.bias ? store.add(prefix + ".o.bias", {model.width}, {}) : -1);
}

std::unique_ptr<Attention> make_attention(ParameterStore& store, const configs::Config& config,
                                          const std::string& kind, const std::string& prefix) {
  for (const AttentionKind& entry : attention_kinds())
    if (kind == entry.name) return entry.make(store, config, prefix);
  throw kernels::ConfigError("model.attention: there is no attention kind '" + kind + "'");
}
}  // namespace

// The members are initialised in the order of the forward, which is the order of the parameters.
Block::Block(ParameterStore& store, const configs::Config& config, const std::string& kind,
             const std::string& prefix)
    : heads_(config.model.heads),
      kv_heads_(config.model.kv_heads),
      head_size_(config.model.width / config.model.heads),
      rotary_(config.model.position == "rope"),
      theta_(static_cast<float>(config.model.rope_theta)),
      attention_norm_(store, config.model, prefix + ".attention_norm"),
      qkv_(add_qkv(store, config.model, prefix + ".attention")),
      attention_(make_attention(store, config, kind, prefix + ".attention")),
      output_(add_output(store, config.model, prefix + ".attention")),
      mlp_norm_(store, config.model, prefix + ".mlp_norm"),
      mlp_(store, config.model, prefix + ".mlp", output_deviation(config.model)) {}

Block::Saved Block::allocate(kernels::Arena& arena, int64_t rows, DType dtype) const {
  Saved s;
  s.attention_statistics = attention_norm_.allocate_statistics(arena, rows);
  s.attention_in = arena.allocate("attention in", dtype, {rows, qkv_.inputs()});
  s.qkv = arena.allocate("qkv", dtype, {rows, qkv_.outputs()});
  s.attention_out = arena.allocate("attention out", dtype, {rows, output_.inputs()});
  s.middle = arena.allocate("middle", dtype, {rows, output_.outputs()});
  s.mlp_statistics = mlp_norm_.allocate_statistics(arena, rows);
  s.mlp_in = arena.allocate("mlp in", dtype, {rows, output_.outputs()});
  mlp_.allocate(arena, dtype, rows, s.mlp);
  return s;
}

AttentionInput Block::split(const Tensor& qkv, const RowPlan& plan) const {
  const int64_t n = qkv.rows(), q = heads_ * head_size_, kv = kv_heads_ * head_size_;
  return {.q = qkv.columns(0, q).view({n, heads_, head_size_}),
          .k = qkv.columns(q, kv).view({n, kv_heads_, head_size_}),
          .v = qkv.columns(q + kv, kv).view({n, kv_heads_, head_size_}),
          .cu_seqlens = plan.cu_seqlens,
          .hints = plan.hints};
}

void Block::rotate(const Context& ctx, const Tensor& qkv, const RowPlan& plan, int direction) const {
  if (!rotary_) return;
  const int64_t rotated = heads_ + kv_heads_;  // q and k stand side by side
  const Tensor qk = qkv.columns(0, rotated * head_size_).view({qkv.rows(), rotated, head_size_});
  kernels::rotary(ctx, qk, plan.positions, theta_, direction);
}

void Block::forward(const Context& ctx, const Tensor& x, const RowPlan& plan, AttentionState* state, Tensor y,
                    Saved& saved, kernels::Arena& arena) const {
  saved = allocate(arena, x.rows(), x.dtype);
  const bool alone = plan.decoding();
  qkv_.forward(ctx, {attention_norm_, x, saved.attention_in, saved.attention_statistics}, saved.qkv, alone);
  rotate(ctx, saved.qkv, plan, 1);
  if (plan.decoding())
    attention_->decode(ctx, split(saved.qkv, plan), *plan.rows, *state, saved.attention_out);
  else
    attention_->forward(ctx, split(saved.qkv, plan), saved.attention_out, saved.attention, arena);

  mlp_.forward(ctx, add_attention(ctx, x, saved, alone), saved.middle, y, saved.mlp, alone);
}

// A GPU's matrix product adds the residual; on the CPU the norm does.
LayerInput Block::add_attention(const Context& ctx, const Tensor& x, const Saved& saved, bool alone) const {
  if (ctx.device.is_cuda()) {
    output_.forward_add(ctx, saved.attention_out, x, saved.middle, alone);
    return {mlp_norm_, saved.middle, saved.mlp_in, saved.mlp_statistics};
  }
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor branch = ctx.scratch->allocate("branch", x.dtype, x.shape);
  output_.forward(ctx, saved.attention_out, branch, alone);
  mlp_norm_.forward(ctx, x, branch, saved.middle, saved.mlp_in, saved.mlp_statistics);
  return saved.mlp_in;
}

void Block::backward_attention(const Context& ctx, const RowPlan& plan, const Saved& saved, const Tensor& d,
                               Tensor dattention_in) const {
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor dout = ctx.scratch->allocate("dattention", d.dtype, saved.attention_out.shape);
  const Tensor dqkv = ctx.scratch->allocate("dqkv", d.dtype, saved.qkv.shape);
  output_.backward_weight(ctx, d, saved.attention_out);
  output_.backward_input(ctx, d, dout);
  const AttentionInput in = split(saved.qkv, plan), din = split(dqkv, plan);
  attention_->backward(ctx, in, dout, saved.attention, din.q, din.k, din.v);
  rotate(ctx, dqkv, plan, -1);
  qkv_.backward_weight(ctx, dqkv, saved.attention_in);
  qkv_.backward_input(ctx, dqkv, dattention_in);
}

void Block::backward(const Context& ctx, const Tensor& x, const RowPlan& plan, const Saved& saved, Tensor d,
                     Tensor dexpanded) const {
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor dbranch = ctx.scratch->allocate("dbranch", d.dtype, d.shape);
  mlp_.backward(ctx, d, saved.mlp, dexpanded, dbranch);
  mlp_norm_.backward(ctx, dbranch, saved.middle, saved.mlp_statistics, d, true);
  backward_attention(ctx, plan, saved, d, dbranch);
  attention_norm_.backward(ctx, dbranch, x, saved.attention_statistics, d, true);
}

std::unique_ptr<AttentionState> Block::make_state(const Context& ctx, int64_t batch, int64_t capacity) const {
  return attention_->make_state(ctx, batch, capacity);
}

void Block::pack(const Context& ctx, kernels::Arena& panels) {
  qkv_.pack(ctx, panels, &attention_norm_);
  output_.pack(ctx, panels);
  mlp_.pack(ctx, panels, mlp_norm_);
}

}  // namespace trainer
