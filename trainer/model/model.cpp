#include "trainer/model/model.h"

#include <algorithm>
#include <cmath>

#include "kernels/ops/cast.h"
#include "trainer/model/heads/medusa.h"
#include "trainer/model/heads/mtp.h"
#include "trainer/model/heads/vocabulary.h"
#include "trainer/model/transformer.h"
#include "trainer/optim/settings.h"

namespace trainer {

void DecodeState::commit(const Context& ctx, const kernels::CommitPath& path) {
  for (auto& layer : layers_) layer->commit(ctx, path);
}

void DecodeState::reset(const Context& ctx) {
  for (auto& layer : layers_) layer->reset(ctx);
}

namespace {
// One row of (K, N).
Tensor offset_row(const Tensor& t, int64_t offset) { return t.slice(offset, 1).view({t.dim(1)}); }
Tensor seed_of(const Tensor& seeds, size_t loss) { return seeds.slice(static_cast<int64_t>(loss), 1); }
}  // namespace

struct Model::Impl {
  configs::Config config;
  int64_t vocabulary;
  ParameterStore store;
  Transformer trunk;
  int unembedding_id;
  Linear unembedding;
  std::vector<std::unique_ptr<Medusa>> medusa;
  std::vector<std::unique_ptr<Mtp>> mtp;
  std::vector<HeadLoss> losses;
  bool frozen;
  std::unique_ptr<kernels::Arena> panels;

  Impl(const configs::Config& config, int64_t vocabulary);
  int add_unembedding();
  int64_t begin(int parameter) const { return store.parameters()[static_cast<size_t>(parameter)].begin; }
  size_t mtp_loss(size_t depth_index) const { return 1 + medusa.size() + depth_index; }
  const Linear& vocabulary_of(const Head& head) const {
    return head.own_vocabulary() ? *head.own_vocabulary() : unembedding;
  }
  HeadInput medusa_input(const ModelBatch& batch, const Tensor& hidden, const Head& head) const;
  HeadInput mtp_input(const ModelBatch& batch, const Tensor& hidden, size_t depth_index) const;
  void loss(const Context& ctx, const Linear& matrix, const Tensor& hidden, const ModelBatch& batch, size_t i,
            const Tensor& seed, Tensor loss_sums, Tensor dhidden) const;
  void train_mtp(const Context& ctx, const ModelBatch& batch, const Tensor& hidden, const Tensor& seeds,
                 kernels::Arena& saved, Tensor loss_sums, Tensor dhidden, FinalGradients& final) const;
  void train_medusa(const Context& ctx, const ModelBatch& batch, const Tensor& hidden, const Tensor& seeds,
                    kernels::Arena& saved, Tensor loss_sums, Tensor dhidden, FinalGradients& final) const;
};

Model::Impl::Impl(const configs::Config& config, int64_t vocabulary)
    : config(config),
      vocabulary(vocabulary),
      trunk(store, config, vocabulary),
      unembedding_id(add_unembedding()),
      unembedding(store, unembedding_id, unembedding_id),
      frozen(config.train.trainable == "heads") {
  losses.push_back({"lm", 0, 1.0});
  const configs::HeadsConfig& heads = config.heads;
  const auto add_loss = [&](const Head& head, int64_t place) {
    losses.push_back({head.name(), head.offset(),
                      heads.loss_weight * std::pow(heads.loss_decay, static_cast<double>(place))});
  };
  for (int64_t i = 0; i < heads.medusa; ++i)
    add_loss(*medusa.emplace_back(
                 std::make_unique<Medusa>(store, config, i, vocabulary, trunk.embedding(), unembedding_id)),
             i);
  for (int64_t i = 0; i < heads.mtp; ++i)
    add_loss(*mtp.emplace_back(std::make_unique<Mtp>(store, config, i + 1, trunk.embedding())), i);
  // Tied or not: what looks tokens up adds to it.
  store.set_product(trunk.embedding(), trunk.embedding(), false);
  if (frozen) store.freeze({"medusa.", "mtp."});
  // Until the caller allocates, the model can be rehearsed.
  store.allocate({}, compute_dtype(config), true, true);
}

int Model::Impl::add_unembedding() {
  if (config.model.tie_embeddings) return trunk.embedding();
  return store.add("unembedding.weight", {vocabulary, config.model.width}, {Init::Kind::normal});
}

HeadInput Model::Impl::medusa_input(const ModelBatch& batch, const Tensor& hidden, const Head& head) const {
  return {.hidden = hidden, .tokens = batch.targets.slice(0, head.offset()), .plan = {}};
}

HeadInput Model::Impl::mtp_input(const ModelBatch& batch, const Tensor& hidden, size_t depth_index) const {
  // Row k - 1 of the targets is token i + k, what depth k reads.
  return {.hidden = hidden,
          .tokens = offset_row(batch.targets, static_cast<int64_t>(depth_index)),
          .plan = {batch.positions, batch.cu_seqlens, nullptr, batch.hints}};
}

void Model::Impl::loss(const Context& ctx, const Linear& matrix, const Tensor& hidden,
                       const ModelBatch& batch, size_t i, const Tensor& seed, Tensor loss_sums,
                       Tensor dhidden) const {
  const int64_t offset = losses[i].offset;
  vocabulary_loss(ctx, matrix, hidden, offset_row(batch.targets, offset), offset_row(batch.weights, offset),
                  seed, loss_sums.slice(static_cast<int64_t>(i), 1), dhidden);
}

// All depths forward, each from the last; then losses and backward from the deepest, which frees its memory.
void Model::Impl::train_mtp(const Context& ctx, const ModelBatch& batch, const Tensor& hidden,
                            const Tensor& seeds, kernels::Arena& saved, Tensor loss_sums, Tensor dhidden,
                            FinalGradients& final) const {
  struct Depth {
    HeadInput in;
    Tensor hidden;
    std::unique_ptr<HeadSaved> saved;
    size_t mark;
  };
  if (mtp.empty()) return;
  std::vector<Depth> depths;
  for (size_t k = 0; k < mtp.size(); ++k) {
    const size_t mark = saved.mark();
    const HeadInput in = mtp_input(batch, k == 0 ? hidden : depths.back().hidden, k);
    const Tensor out = saved.allocate("mtp hidden", hidden.dtype, hidden.shape);
    depths.push_back({in, out, mtp[k]->forward(ctx, in, out, saved), mark});
  }
  const kernels::ArenaScope scope(*ctx.scratch);
  Tensor d = ctx.scratch->allocate("mtp dhidden", hidden.dtype, hidden.shape);
  Tensor dprevious = ctx.scratch->allocate("mtp dprevious", hidden.dtype, hidden.shape);
  kernels::fill(ctx, d, 0.0f);
  for (size_t k = mtp.size(); k-- > 0;) {
    if (k > 0) kernels::fill(ctx, dprevious, 0.0f);
    loss(ctx, unembedding, depths[k].hidden, batch, mtp_loss(k), seed_of(seeds, mtp_loss(k)), loss_sums, d);
    mtp[k]->backward(ctx, depths[k].in, *depths[k].saved, d, k > 0 ? dprevious : dhidden);
    saved.release(depths[k].mark);
    final.from(begin(mtp[k]->first_parameter()));
    std::swap(d, dprevious);
  }
}

void Model::Impl::train_medusa(const Context& ctx, const ModelBatch& batch, const Tensor& hidden,
                               const Tensor& seeds, kernels::Arena& saved, Tensor loss_sums, Tensor dhidden,
                               FinalGradients& final) const {
  for (size_t i = medusa.size(); i-- > 0;) {
    const kernels::ArenaScope keep(saved), scope(*ctx.scratch);
    const Medusa& head = *medusa[i];
    const Tensor out = saved.allocate("medusa hidden", hidden.dtype, hidden.shape);
    const HeadInput in = medusa_input(batch, hidden, head);
    const auto activations = head.forward(ctx, in, out, saved);
    const Tensor d = ctx.scratch->allocate("medusa dhidden", hidden.dtype, hidden.shape);
    kernels::fill(ctx, d, 0.0f);
    loss(ctx, vocabulary_of(head), out, batch, 1 + i, seed_of(seeds, 1 + i), loss_sums, d);
    head.backward(ctx, in, *activations, d, dhidden);
    final.from(begin(head.first_parameter()));
  }
}

Model::Model(const configs::Config& config, int64_t vocabulary)
    : impl_(std::make_unique<Impl>(config, vocabulary)) {}
Model::~Model() = default;
ParameterStore& Model::parameters() { return impl_->store; }
const ParameterStore& Model::parameters() const { return impl_->store; }
const configs::Config& Model::config() const { return impl_->config; }
int64_t Model::vocabulary() const { return impl_->vocabulary; }
int64_t Model::width() const { return impl_->config.model.width; }
const std::vector<HeadLoss>& Model::losses() const { return impl_->losses; }

int64_t Model::offsets() const {
  int64_t furthest = 0;
  for (const HeadLoss& loss : impl_->losses) furthest = std::max(furthest, loss.offset);
  return 1 + furthest;
}

void Model::forward_backward(const Context& ctx, const ModelBatch& batch, const Tensor& seeds,
                             kernels::Arena& saved, Tensor loss_sums,
                             const GradientsFinal& gradients_final) const {
  const Impl& m = *impl_;
  FinalGradients final(m.store.elements(), gradients_final);
  const kernels::ArenaScope keep(saved), scope(*ctx.scratch);
  const Shape shape{batch.tokens.rows(), width()};
  const RowPlan plan{batch.positions, batch.cu_seqlens, nullptr, batch.hints};
  const Tensor hidden = saved.allocate("hidden", m.store.compute(), shape);
  Transformer::Saved trunk;
  m.trunk.forward(ctx, batch.tokens, plan, nullptr, hidden, m.frozen ? nullptr : &trunk, saved);

  Tensor dhidden;
  if (!m.frozen) {
    dhidden = ctx.scratch->allocate("dhidden", m.store.compute(), shape);
    kernels::fill(ctx, dhidden, 0.0f);
  }
  m.train_mtp(ctx, batch, hidden, seeds, saved, loss_sums, dhidden, final);
  m.train_medusa(ctx, batch, hidden, seeds, saved, loss_sums, dhidden, final);
  m.loss(ctx, m.unembedding, hidden, batch, 0, m.frozen ? Tensor{} : seed_of(seeds, 0), loss_sums, dhidden);
  if (m.frozen) return final.from(0);
  if (m.unembedding_id != m.trunk.embedding()) final.from(m.begin(m.unembedding_id));
  m.trunk.backward(ctx, batch.tokens, plan, trunk, dhidden, final);
}

void Model::evaluate(const Context& ctx, const ModelBatch& batch, kernels::Arena& saved,
                     Tensor loss_sums) const {
  const Impl& m = *impl_;
  const kernels::ArenaScope keep(saved);
  const Shape shape{batch.tokens.rows(), width()};
  const auto allocate = [&] { return saved.allocate("hidden", m.store.compute(), shape); };
  const Tensor hidden = allocate();
  m.trunk.forward(ctx, batch.tokens, {batch.positions, batch.cu_seqlens, nullptr, batch.hints}, nullptr,
                  hidden, nullptr, saved);
  m.loss(ctx, m.unembedding, hidden, batch, 0, {}, loss_sums, {});
  Tensor previous = hidden, next = allocate();
  for (size_t i = 0; i < m.medusa.size(); ++i) {
    const kernels::ArenaScope passing(saved);
    m.medusa[i]->forward(ctx, m.medusa_input(batch, hidden, *m.medusa[i]), next, saved);
    m.loss(ctx, m.vocabulary_of(*m.medusa[i]), next, batch, 1 + i, {}, loss_sums, {});
  }
  for (size_t k = 0; k < m.mtp.size(); ++k) {
    const kernels::ArenaScope passing(saved);
    m.mtp[k]->forward(ctx, m.mtp_input(batch, previous, k), next, saved);
    m.loss(ctx, m.unembedding, next, batch, m.mtp_loss(k), {}, loss_sums, {});
    std::swap(previous, next);
  }
}

void Model::prepare_decoding(const Context& ctx) {
  Impl& m = *impl_;
  m.panels = std::make_unique<kernels::Arena>("panels", ctx.device);
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) m.panels->place();
    m.trunk.pack(ctx, *m.panels);
    m.unembedding.pack(ctx, *m.panels);
    for (auto& head : m.medusa) head->pack(ctx, *m.panels);
    for (auto& head : m.mtp) head->pack(ctx, *m.panels);
  }
}

DecodeState Model::make_trunk_state(const Context& ctx, int64_t batch, int64_t capacity) const {
  DecodeState state(batch, capacity);
  state.layers() = impl_->trunk.make_states(ctx, batch, capacity);
  return state;
}

DecodeState Model::make_mtp_state(const Context& ctx, int64_t batch, int64_t capacity) const {
  DecodeState state(batch, capacity);
  state.layers().push_back(impl_->mtp.front()->make_state(ctx, batch, capacity));
  return state;
}

void Model::decode_trunk(const Context& ctx, const Tensor& tokens, const kernels::DecodeRows& rows,
                         DecodeState& state, Tensor hidden) const {
  impl_->trunk.forward(ctx, tokens, {rows.positions, {}, &rows}, &state.layers(), hidden, nullptr,
                       *ctx.scratch);
}

void Model::decode_mtp(const Context& ctx, int64_t depth, const Tensor& tokens, const Tensor& hidden_in,
                       const kernels::DecodeRows& rows, DecodeState& state, Tensor hidden_out) const {
  const auto& mtp = impl_->mtp;
  const size_t k = static_cast<size_t>(std::min<int64_t>(depth, static_cast<int64_t>(mtp.size()))) - 1;
  const kernels::ArenaScope scope(*ctx.scratch);
  Mtp::Saved passing;
  const HeadInput in{.hidden = hidden_in, .tokens = tokens, .plan = {rows.positions, {}, &rows}};
  mtp[k]->depth(ctx, in, state.layers()[0].get(), hidden_out, passing, *ctx.scratch);
}

void Model::medusa_hidden(const Context& ctx, int64_t head, const Tensor& hidden, const Tensor& tokens,
                          Tensor out) const {
  impl_->medusa[static_cast<size_t>(head)]->decode(ctx, hidden, tokens, out);
}

void Model::logits(const Context& ctx, const Tensor& hidden, Tensor logits, int64_t medusa_head) const {
  const Linear& matrix = medusa_head < 0
                             ? impl_->unembedding
                             : impl_->vocabulary_of(*impl_->medusa[static_cast<size_t>(medusa_head)]);
  matrix.forward(ctx, hidden, logits, true);
}

int64_t Model::decode_weight_bytes() const {
  return impl_->trunk.weight_bytes() + impl_->unembedding.bytes();
}

}  // namespace trainer
