#include "trainer/decode/drafters/mtp.h"

#include <algorithm>
#include <array>
#include <bit>

#include "kernels/ops/sampling.h"
#include "kernels/ops/speculation.h"

namespace trainer {

using kernels::kFold;
using kernels::kMaxDecodeRows;

MtpDrafter::MtpDrafter(const Context& ctx, const Model& model, const DrafterParams& params)
    : model_(model),
      modules_(model.config().heads.mtp),
      max_drafts_(params.max_drafts),
      drafts_(params.max_drafts),
      memory_("drafter", ctx.device),
      rows_(ctx.device, 1),
      found_(ctx.device, DType::i32, {params.batch, params.max_drafts}),
      chances_(ctx.device, DType::f32, {params.batch, params.max_drafts}),
      replay_(model.config().train.graph) {
  const DType compute = model.parameters().compute();
  const int64_t width = model.width(), waiting = 2 * kMaxDecodeRows;
  sequences_.resize(params.batch);
  for (Sequence& sequence : sequences_)
    for (int64_t k = 0; k < modules_; ++k)
      sequence.depths.push_back({model.make_mtp_state(ctx, 1, params.capacity), {}, 0, 0});
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    for (Sequence& sequence : sequences_) {
      for (Depth& depth : sequence.depths)
        depth.inputs = memory_.allocate("mtp inputs", compute, {waiting, width});
      sequence.output = memory_.allocate("mtp output", compute, {1, width});
    }
    hidden_ = memory_.allocate("mtp hidden", compute, {kMaxDecodeRows, width});
    logits_ = memory_.allocate("mtp logits", DType::f32, {1, model.vocabulary()});
    q_ = memory_.allocate("mtp probabilities", DType::f32, {params.batch * max_drafts_, model.vocabulary()});
  }
  text_.reserve(params.capacity + max_drafts_);
}

void MtpDrafter::reset(const Context& ctx) {
  for (Sequence& sequence : sequences_)
    for (Depth& depth : sequence.depths) {
      depth.state.reset(ctx);
      depth.committed = depth.count = 0;
    }
}

void MtpDrafter::append(const Context& ctx, Depth& depth, int64_t at, const Tensor& hidden) {
  copy_on_device(ctx, hidden, depth.inputs.slice(at, hidden.rows()));
}

Tensor MtpDrafter::run(const Context& ctx, int64_t b, int64_t k, DecodeState& state, int64_t length,
                       int64_t first, int64_t count, const Tensor& inputs, const Tensor& last) {
  rows_.clear();
  rows_.add_chain(length, std::span(text_).subspan(first, count));
  rows_.upload(ctx);
  fill_in_drafts(ctx, b, first, count);
  const Tensor out = hidden_.slice(0, count);
  const auto address = [](const void* at) { return reinterpret_cast<int64_t>(at); };
  replay_(ctx, {2 * k + (last ? 1 : 0), count, address(&state), address(inputs.data)}, [&] {
    model_.decode_mtp(ctx, k, rows_.tokens(), inputs, rows_.rows(), state, out);
    if (last) copy_on_device(ctx, out.slice(count - 1, 1), last);
  });
  return out;
}

void MtpDrafter::fill_in_drafts(const Context& ctx, int64_t b, int64_t first, int64_t count) {
  const int64_t from = std::max(first, accepted_), drafts = first + count - from;
  if (!on_device_ || drafts <= 0) return;
  copy_on_device(ctx, found_.tensor().slice(b, 1).columns(from - accepted_, drafts),
                 rows_.tokens().slice(from - first, drafts));
}

void MtpDrafter::commit(const Context& ctx, DecodeState& state) {
  rows_.accept_first(0, rows_.size());
  if (!rows_.path_matters()) return;
  rows_.upload_path(ctx);
  state.commit(ctx, rows_.path());
}

void MtpDrafter::observe(const Context& ctx, int64_t b, const SequenceView& view, const Tensor& hidden,
                         std::span<const int32_t> rows, int64_t) {
  Sequence& sequence = sequences_[b];
  Depth& first = sequence.depths[0];
  const size_t count = rows.size();
  for (size_t i = 0, n = 0; i < count; i += n) {
    // Neighbours go in one copy.
    for (n = 1; i + n < count && rows[i + n] == rows[i] + static_cast<int32_t>(n);) ++n;
    append(ctx, first, first.count, hidden.slice(rows[i], static_cast<int64_t>(n)));
    first.count += static_cast<int64_t>(n);
  }
  catch_up(ctx, b, view.tokens);
}

// Runs every row whose token is accepted through every depth. What is left at depth k are the inputs of the
// rows that wait for a token, at most k - 1 of them.
void MtpDrafter::catch_up(const Context& ctx, int64_t b, std::span<const int32_t> tokens) {
  Sequence& sequence = sequences_[b];
  text_.assign(tokens.begin(), tokens.end());
  on_device_ = false;
  for (int64_t k = 1; k <= modules_; ++k) {
    Depth& depth = sequence.depths[k - 1];
    int64_t done = 0;
    while (true) {
      const int64_t known = static_cast<int64_t>(tokens.size()) - k - depth.committed;
      const int64_t n = std::min({depth.count - done, known, rows_before_fold(depth.committed)});
      if (n <= 0) break;
      const Tensor out = run(ctx, b, k, depth.state, depth.committed, depth.committed + k, n,
                             depth.inputs.slice(done, n), k == 1 ? sequence.output : Tensor{});
      commit(ctx, depth.state);
      depth.committed += n;
      done += n;
      if (k < modules_) {
        Depth& next = sequence.depths[k];
        append(ctx, next, next.count, out);
        next.count += n;
      }
    }
    for (int64_t i = 0; done > 0 && i < depth.count - done; ++i)
      append(ctx, depth, i, depth.inputs.slice(done + i, 1));
    depth.count -= done;
  }
}

// Depth k over the rows that rest on drafts, without committing them. False when they would cross a fold.
bool MtpDrafter::advance_drafted(const Context& ctx, int64_t b, int64_t k, int64_t root) {
  Sequence& sequence = sequences_[b];
  Depth& depth = sequence.depths[k - 1];
  const int64_t n = root - depth.committed;
  if ((root - 1) / kFold != depth.committed / kFold) return false;
  const Tensor out = run(ctx, b, k, depth.state, depth.committed, depth.committed + k, n,
                         depth.inputs.slice(0, n), sequence.output);
  if (k < modules_) append(ctx, sequence.depths[k], sequence.depths[k].count, out);
  return true;
}

// The last module on its own output. The row before is kept in the state without a fold, so the next catch_up
// writes over it.
bool MtpDrafter::advance_beyond(const Context& ctx, int64_t b, int64_t root, int64_t draft) {
  Sequence& sequence = sequences_[b];
  Depth& depth = sequence.depths.back();
  const int64_t position = root + draft - modules_ - 1;
  if (position / kFold != depth.committed / kFold) return false;
  if (position > depth.committed) commit(ctx, depth.state);
  run(ctx, b, modules_, depth.state, position, position + modules_, 1, sequence.output, sequence.output);
  return true;
}

void MtpDrafter::take_draft(const Context& ctx, int64_t b, int64_t draft, const DraftSettings& settings) {
  const float temperature = settings.sample ? static_cast<float>(settings.temperature) : 0;
  const Tensor found = found_.tensor().slice(b, 1).columns(draft - 1, 1), q = q_.slice(row_of(b, draft), 1);
  const Tensor chance = chances_.tensor().slice(b, 1).columns(draft - 1, 1);
  replay_(ctx, {0, -draft, std::bit_cast<int32_t>(temperature), b}, [&] {
    model_.logits(ctx, sequences_[b].output, logits_);
    if (!settings.sample) return kernels::argmax(ctx, logits_, found.view({1}));
    kernels::probabilities(ctx, logits_, temperature, q);
    kernels::draw(ctx, q, chance, found);
  });
}

int64_t MtpDrafter::propose_one(const Context& ctx, int64_t b, const SequenceView& view,
                                const DraftSettings& settings) {
  const int64_t root = view.root_position();
  const int64_t count = std::max<int64_t>(0, std::min({drafts_, view.max_depth, view.max_drafts}));
  text_.assign(view.tokens.begin(), view.tokens.end());
  accepted_ = static_cast<int64_t>(text_.size());
  on_device_ = true;
  for (int64_t draft = 1; draft <= count; ++draft)
    chances_.tensor().slice(b, 1).as<float>()[draft - 1] = view.key.draft(root + draft, 0);
  for (int64_t draft = 1; draft <= count; ++draft) {
    const bool advanced = draft == 1 || (draft > modules_ ? advance_beyond(ctx, b, root, draft)
                                                          : advance_drafted(ctx, b, draft, root));
    if (!advanced) return draft - 1;
    take_draft(ctx, b, draft, settings);
    text_.push_back(0);
  }
  return count;
}

void MtpDrafter::propose(const Context& ctx, std::span<const SequenceView> sequences,
                         const DraftSettings& settings, std::span<DraftTree> trees) {
  std::array<int64_t, kMaxDecodeRows> counts{};
  for (size_t b = 0; b < sequences.size(); ++b)
    if (sequences[b].active) counts[b] = propose_one(ctx, static_cast<int64_t>(b), sequences[b], settings);
  // The only wait: a draft goes from its logits to the rows of the next without the host.
  kernels::synchronize(ctx.device, ctx.stream);
  for (int64_t b = 0; b < static_cast<int64_t>(sequences.size()); ++b)
    for (int64_t draft = 1; draft <= counts[b]; ++draft) {
      const int32_t token = found_.data<int32_t>()[row_of(b, draft)];
      if (token < 0) break;  // nothing to draw from: the model says NaN
      const float* q = settings.sample ? q_.slice(row_of(b, draft), 1).as<float>() : nullptr;
      trees[b].add(static_cast<int>(draft) - 1, token, q);
    }
}

}  // namespace trainer
