#include "tests/support/tiny_model.h"

#include "kernels/core/philox.h"
#include "kernels/ops/cast.h"

namespace support {

using kernels::DType;
using kernels::Tensor;

configs::Config tiny_config() {
  configs::Config config;
  config.model.layers = 2;
  config.model.width = 16;
  config.model.heads = 4;
  config.model.kv_heads = 2;
  config.model.ffn_width = 24;
  config.model.context = 32;
  return config;
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocabulary, uint64_t seed) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<int32_t>(
        kernels::philox(seed, kernels::Purpose::test, static_cast<uint64_t>(i))[0] % vocabulary));
  return tokens;
}

PackedBatch::PackedBatch(const std::vector<std::vector<int32_t>>& sequences, int64_t offsets, int64_t padding)
    : offsets(offsets), cu_seqlens{0} {
  std::vector<std::vector<int32_t>> all = sequences;
  if (padding > 0) all.emplace_back(static_cast<size_t>(padding) + 1, 0);
  // The last token of a sequence is only a target.
  for (const auto& sequence : all) {
    for (size_t i = 0; i + 1 < sequence.size(); ++i) {
      tokens.push_back(sequence[i]);
      positions.push_back(static_cast<int32_t>(i));
    }
    cu_seqlens.push_back(static_cast<int32_t>(tokens.size()));
  }
  for (size_t k = 0; k < static_cast<size_t>(offsets); ++k)
    for (size_t s = 0; s < all.size(); ++s)
      for (size_t i = 0; i + 1 < all[s].size(); ++i) {
        const bool inside = i + k + 1 < all[s].size() && s < sequences.size();
        targets.push_back(inside ? all[s][i + k + 1] : -1);
        weights.push_back(inside ? 0.5f + 0.25f * static_cast<float>((i + s) % 3) : 0.0f);
      }
}

namespace {
template <typename T>
Tensor view_of(const std::vector<T>& values, kernels::Shape shape) {
  return Tensor(const_cast<T*>(values.data()), kernels::dtype_of<T>(), shape);
}
}  // namespace

trainer::ModelBatch PackedBatch::view() const {
  return {view_of(tokens, {rows()}), view_of(positions, {rows()}),
          view_of(cu_seqlens, {static_cast<int64_t>(cu_seqlens.size())}), view_of(targets, {offsets, rows()}),
          view_of(weights, {offsets, rows()})};
}

TinyModel::TinyModel(const configs::Config& config, DType compute, bool training)
    : model_(std::make_unique<trainer::Model>(config, kVocabulary)) {
  auto& store = parameters();
  store.allocate({}, compute, training);
  for (size_t i = 0; i < store.parameters().size(); ++i) {
    const trainer::Parameter& p = store.parameters()[i];
    std::vector<double> values(static_cast<size_t>(p.shape.numel()));
    const double base = p.init.kind == trainer::Init::Kind::ones ? 1.0 : 0.0;
    for (size_t e = 0; e < values.size(); ++e)
      values[e] = static_cast<float>(
          kernels::f16(base + 0.25 * kernels::normal(i, kernels::Purpose::test, static_cast<uint64_t>(e))));
    const std::vector<float> narrow(values.begin(), values.end());
    store.assign(static_cast<int>(i),
                 compute == DType::f64 ? view_of(values, p.shape) : view_of(narrow, p.shape));
  }
}

TensorBuffer TinyModel::seeds(float scale) const {
  TensorBuffer seeds(DType::f32, {static_cast<int64_t>(model_->losses().size())});
  for (size_t i = 0; i < model_->losses().size(); ++i) seeds.set(i, scale * model_->losses()[i].weight);
  return seeds;
}

double TinyModel::total(const std::vector<double>& losses) const {
  double sum = 0;
  const std::vector<double> weights = seeds().values();
  for (size_t i = 0; i < losses.size(); ++i) sum += weights[i] * losses[i];
  return sum;
}

void TinyModel::rehearse(const PackedBatch& batch, kernels::Arena& saved, kernels::Arena& scratch) {
  const kernels::Context dry{{}, {}, &scratch, true};
  std::vector<double> losses(model_->losses().size());
  const Tensor sums = view_of(losses, {static_cast<int64_t>(losses.size())});
  if (parameters().buffers().gradients) model_->forward_backward(dry, batch.view(), seeds(), saved, sums, {});
  model_->evaluate(dry, batch.view(), saved, sums);
}

std::vector<double> TinyModel::train(const PackedBatch& batch, const trainer::GradientsFinal& gradients_final,
                                     float scale, bool clear) {
  kernels::Arena saved("saved", {}), scratch("scratch", {});
  rehearse(batch, saved, scratch);
  saved.place();
  scratch.place();
  const kernels::Context ctx{{}, {}, &scratch, false};
  if (clear) kernels::fill(ctx, parameters().buffers().gradients, 0.0f);
  std::vector<double> losses(model_->losses().size());
  model_->forward_backward(ctx, batch.view(), seeds(scale), saved,
                           view_of(losses, {static_cast<int64_t>(losses.size())}), gradients_final);
  return losses;
}

std::vector<double> TinyModel::evaluate(const PackedBatch& batch) {
  kernels::Arena saved("saved", {}), scratch("scratch", {});
  rehearse(batch, saved, scratch);
  saved.place();
  scratch.place();
  std::vector<double> losses(model_->losses().size());
  model_->evaluate({{}, {}, &scratch, false}, batch.view(), saved,
                   view_of(losses, {static_cast<int64_t>(losses.size())}));
  return losses;
}

std::vector<double> TinyModel::gradient(int id) const {
  return to_doubles(model_->parameters().gradient(id));
}
std::vector<double> TinyModel::gradients() const {
  return to_doubles(model_->parameters().buffers().gradients);
}

std::vector<double> to_doubles(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  kernels::visit_dtype(t.dtype, [&](auto tag) {
    const auto* data = t.as<decltype(tag)>();
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(data[i]);
  });
  return values;
}

}  // namespace support
