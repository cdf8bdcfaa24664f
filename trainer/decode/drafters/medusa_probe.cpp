#include <algorithm>

#include "kernels/ops/linear.h"
#include "kernels/ops/sampling.h"
#include "trainer/decode/drafters/medusa.h"

namespace trainer {

MedusaProbe::MedusaProbe(const Context& ctx, const Model& model)
    : model_(model),
      heads_(model.config().heads.medusa),
      ranks_(std::min(kRanks, model.vocabulary())),
      memory_("probe", ctx.device),
      tokens_(ctx.device, DType::i32, {kernels::kMaxDecodeRows * heads_}),
      hits_(heads_, std::vector<double>(ranks_)),
      rows_seen_(heads_) {
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    for (Tensor* t : {&rows_, &hidden_})
      *t = memory_.allocate("rows", model.parameters().compute(), {kernels::kMaxDecodeRows, model.width()});
    logits_ = memory_.allocate("logits", DType::f32, {kernels::kMaxDecodeRows, model.vocabulary()});
    top_ = memory_.allocate("candidates", DType::i32, {kernels::kMaxDecodeRows, ranks_});
  }
}

void MedusaProbe::observe(const Context& ctx, int64_t, const SequenceView& view, const Tensor& hidden,
                          std::span<const int32_t> rows, int64_t first) {
  // The row at a position has the root after it.
  const int64_t skipped = std::max<int64_t>(0, from_ - 1 - first);
  if (skipped >= static_cast<int64_t>(rows.size())) return;
  rows = rows.subspan(skipped);
  first += skipped;
  const int64_t n = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < n; ++i) copy_on_device(ctx, hidden.slice(rows[i], 1), rows_.slice(i, 1));
  for (int64_t k = 0; k < heads_; ++k) {
    const Tensor head = hidden_.slice(0, n), logits = logits_.slice(0, n), top = top_.slice(0, n);
    const Tensor after = tokens_.tensor().slice(0, n * (k + 1)).view({n, k + 1});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0, at = first + i + 1; j <= k; ++j, ++at)
        after.as<int32_t>()[i * (k + 1) + j] =
            at < static_cast<int64_t>(view.tokens.size()) ? view.tokens[at] : -1;
    model_.medusa_hidden(ctx, k, rows_.slice(0, n), after, head);
    model_.logits(ctx, head, logits, k);
    kernels::top_k(ctx, logits, top);
    top_host_.send(ctx, top);
    kernels::synchronize(ctx.device, ctx.stream);
    const int32_t* candidates = top_host_.data<int32_t>();
    for (int64_t i = 0; i < n && first + i + k + 2 < static_cast<int64_t>(view.tokens.size()); ++i) {
      rows_seen_[k] += 1;
      for (int64_t r = 0; r < ranks_; ++r)
        if (candidates[i * ranks_ + r] == view.tokens[first + i + k + 2]) hits_[k][r] += 1;
    }
  }
}

std::vector<std::vector<double>> MedusaProbe::acceptance() const {
  auto acceptance = hits_;
  for (int64_t k = 0; k < heads_; ++k)
    for (double& a : acceptance[k]) a /= std::max(rows_seen_[k], 1.0);
  return acceptance;
}

}  // namespace trainer
