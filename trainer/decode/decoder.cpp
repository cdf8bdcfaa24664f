#include "trainer/decode/decoder.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <limits>
#include <numeric>

#include "kernels/ops/sampling.h"
#include "trainer/decode/repetition.h"
#include "trainer/decode/spread.h"

namespace trainer {

using kernels::kMaxDecodeRows;

namespace {

// Adds the time since the last call to one of the parts of a step.
class Stopwatch {
 public:
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

void DecodeRun::add(const DecodeRun& run) {
  steps += run.steps;
  sequence_steps += run.sequence_steps;
  tokens += run.tokens;
  prefill_seconds += run.prefill_seconds;
  times.draft += run.times.draft;
  times.verify += run.times.verify;
  times.sample += run.times.sample;
  times.commit += run.times.commit;
  const auto add_counts = [](std::vector<int64_t>& to, const std::vector<int64_t>& from) {
    to.resize(std::max(to.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i) to[i] += from[i];
  };
  add_counts(proposed, run.proposed);
  add_counts(reached, run.reached);
  add_counts(drafted, run.drafted);
  add_counts(accepted, run.accepted);
}

Decoder::Decoder(const Context& ctx, const Model& model, int64_t batch, int64_t capacity)
    : stream_(ctx.stream.handle ? kernels::Device{} : ctx.device),
      ctx_(ctx),
      model_(model),
      batch_(batch),
      capacity_(capacity),
      position_limit_(model.config().model.position == "learned" ? model.config().model.context
                                                                 : std::numeric_limits<int32_t>::max()),
      scratch_("decode scratch", ctx.device),
      memory_("decode", ctx.device),
      state_(model.make_trunk_state(ctx, batch, std::min(capacity + kMaxDecodeRows, position_limit_))),
      rows_(ctx.device, batch),
      verifier_(ctx.device, batch),
      argmax_(ctx.device, DType::i32, {kMaxDecodeRows}),
      replay_(model.config().train.graph),
      sequences_(batch),
      trees_(batch),
      views_(batch) {
  if (batch < 1 || batch > kMaxDecodeRows)
    throw kernels::ConfigError("a decoding batch holds 1 to 64 sequences");
  for (Sequence& sequence : sequences_) sequence.tokens.reserve(capacity + kMaxDecodeRows);
  path_.reserve(kMaxDecodeRows);
  allocate();
  kernels::synchronize(ctx_.device, ctx_.stream);
  if (stream_.get().handle) ctx_.stream = stream_.get();
}

// The scratch memory of everything a step may call is measured on the largest step.
void Decoder::allocate() {
  const DType compute = model_.parameters().compute();
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    hidden_ = memory_.allocate("hidden", compute, {kMaxDecodeRows, model_.width()});
    logits_ = memory_.allocate("logits", DType::f32, {kMaxDecodeRows, model_.vocabulary()});
    p_ = memory_.allocate("probabilities", DType::f32, {kMaxDecodeRows, model_.vocabulary()});
  }
  Context dry = ctx_;
  dry.rehearsal = true;
  dry.scratch = &scratch_;
  const std::vector<int32_t> zeros(kMaxDecodeRows);
  const auto rehearse = [&](int64_t sequences, const auto& call) {
    rows_.clear();
    rows_.add_chain(0, zeros);
    for (int64_t b = 1; b < sequences; ++b) rows_.add_none(0);
    call();
  };
  rehearse(batch_, [&] { model_.decode_trunk(dry, rows_.tokens(), rows_.rows(), state_, hidden_); });
  model_.logits(dry, hidden_, logits_);
  kernels::argmax(dry, logits_, argmax_.tensor());
  kernels::probabilities(dry, logits_, 1.0f, p_);
  for (DraftTree& tree : trees_) tree.clear(0);
  for (int64_t i = 0; i < kMaxDecodeRows - batch_; ++i) trees_[0].add(static_cast<int>(i), 0);
  for (const DraftTree& tree : trees_) verifier_.add_tree(tree, {}, 0);
  verifier_.rejection(dry, p_);
  verifier_.typical(dry, logits_, p_, {});
  for (int64_t k = 0; k < model_.config().heads.medusa; ++k) {
    // A rehearsal reads nothing: any memory will do.
    const Tensor between(argmax_.tensor().data, DType::i32, {kMaxDecodeRows, k + 1}, ctx_.device);
    model_.medusa_hidden(dry, k, hidden_, between, hidden_);
    model_.logits(dry, hidden_, logits_, k);
  }
  if (model_.config().heads.mtp > 0) {
    DecodeState state = model_.make_mtp_state(ctx_, 1, state_.capacity());
    StepRows rows(ctx_.device, 1);
    rows.add_chain(0, zeros);
    for (int64_t k = 1; k <= model_.config().heads.mtp; ++k)
      model_.decode_mtp(dry, k, rows.tokens(), hidden_, rows.rows(), state, hidden_);
  }
  scratch_.place();
  ctx_.scratch = &scratch_;
}

void Decoder::start(std::span<const std::vector<int32_t>> prompts, const DecodeSettings& settings) {
  if (static_cast<int64_t>(prompts.size()) > batch_)
    throw kernels::ShapeError("decoding: more prompts than sequences of the batch");
  settings_ = settings;
  state_.reset(ctx_);
  for (int64_t b = 0; b < batch_; ++b) {
    Sequence& sequence = sequences_[b];
    sequence.active = b < static_cast<int64_t>(prompts.size());
    if (!sequence.active) {
      sequence.tokens.assign(1, 0);
      continue;
    }
    sequence.tokens.assign(prompts[b].begin(), prompts[b].end());
    sequence.prompt = static_cast<int64_t>(prompts[b].size());
    if (sequence.prompt < 1 || sequence.prompt + settings.max_tokens > capacity_)
      throw kernels::ShapeError("decoding: a prompt is empty, or too long for the memory that was planned");
    if (sequence.prompt >= position_limit_)
      throw kernels::ConfigError("the prompt fills the model's context of " +
                                 std::to_string(position_limit_) + " learned positions: shorten it");
  }
}

SequenceView Decoder::view(int64_t b) const {
  const Sequence& sequence = sequences_[b];
  SequenceView view;
  view.tokens = sequence.tokens;
  view.key = {settings_.seed, static_cast<uint64_t>(b)};
  view.active = sequence.active;
  const int64_t length = committed(b);
  const int64_t wanted =
      sequence.prompt + settings_.max_tokens - static_cast<int64_t>(sequence.tokens.size());
  view.max_depth = std::max<int64_t>(
      0, std::min({rows_before_fold(length) - 1, position_limit_ - 1 - length, wanted - 1}));
  view.max_drafts = std::max<int64_t>(0, std::min(kMaxDecodeRows / batch_, state_.capacity() - length) - 1);
  return view;
}

void Decoder::prefill(int64_t b, Drafter* drafter, DecodeRun& run) {
  Stopwatch watch;
  Sequence& sequence = sequences_[b];
  for (int64_t at = 0; at < sequence.prompt;) {
    const int64_t n = std::min(rows_before_fold(at), sequence.prompt - at);
    const bool last = at + n == sequence.prompt;
    rows_.clear();
    for (int64_t s = 0; s < batch_; ++s) {
      if (s == b)
        rows_.add_chain(at, std::span(sequence.tokens).subspan(at, n));
      else
        rows_.add_none(s < b && sequences_[s].active ? committed(s) : 0);
    }
    rows_.upload(ctx_);
    replay_(ctx_, {n, -1, 0, 0},
            [&] { model_.decode_trunk(ctx_, rows_.tokens(), rows_.rows(), state_, hidden_.slice(0, n)); });
    rows_.accept_first(b, n);
    commit();
    if (last) {
      trees_[b].clear(sequence.tokens.back());
      verifier_.clear();
      for (int64_t s = 0; s < batch_; ++s) add_to_verifier(s, s == b);
      model_.logits(ctx_, hidden_.slice(n - 1, 1), logits_.slice(0, 1));
      predict(1);
      kernels::synchronize(ctx_.device, ctx_.stream);
      choose(b, 0);
      take(b, run.sequences[b]);
      run.prefill_seconds += watch.lap();
    }
    path_.resize(n);
    std::iota(path_.begin(), path_.end(), 0);
    if (drafter != nullptr) drafter->observe(ctx_, b, view(b), hidden_, path_, at);
    at += n;
  }
}

void Decoder::draft(Drafter* drafter) {
  for (int64_t b = 0; b < batch_; ++b) {
    trees_[b].clear(sequences_[b].tokens.back());
    views_[b] = view(b);
  }
  if (drafter == nullptr) return;
  DraftSettings drafting;
  drafting.sample = settings_.acceptance == Acceptance::rejection;
  drafting.temperature = settings_.temperature;
  drafter->propose(ctx_, views_, drafting, trees_);
}

void Decoder::add_to_verifier(int64_t b, bool has_rows) {
  if (settings_.acceptance == Acceptance::greedy) return;  // argmax alone decides
  if (has_rows)
    verifier_.add_tree(trees_[b], {settings_.seed, static_cast<uint64_t>(b)}, committed(b));
  else
    verifier_.add_none();
}

void Decoder::verify() {
  rows_.clear();
  verifier_.clear();
  for (int64_t b = 0; b < batch_; ++b) {
    if (sequences_[b].active)
      rows_.add_tree(committed(b), trees_[b]);
    else
      rows_.add_none(committed(b));
    add_to_verifier(b, sequences_[b].active);
  }
  rows_.upload(ctx_);
  const int64_t rows = rows_.size();
  const auto bits = [](double x) { return std::bit_cast<int64_t>(x); };
  const Replay::Key key = {rows, static_cast<int64_t>(settings_.acceptance), bits(settings_.temperature),
                           bits(settings_.typical_epsilon), bits(settings_.typical_delta)};
  replay_(ctx_, key, [&] {
    const Tensor hidden = hidden_.slice(0, rows);
    model_.decode_trunk(ctx_, rows_.tokens(), rows_.rows(), state_, hidden);
    model_.logits(ctx_, hidden, logits_.slice(0, rows));
    predict(rows);
  });
  kernels::synchronize(ctx_.device, ctx_.stream);
}

void Decoder::predict(int64_t rows) {
  const Tensor logits = logits_.slice(0, rows), p = p_.slice(0, rows);
  if (settings_.acceptance == Acceptance::greedy)
    return kernels::argmax(ctx_, logits, argmax_.tensor().slice(0, rows));
  kernels::probabilities(ctx_, logits, static_cast<float>(settings_.temperature), p);
  if (settings_.acceptance == Acceptance::rejection)
    verifier_.rejection(ctx_, p);
  else
    verifier_.typical(ctx_, logits, p,
                      {settings_.temperature, settings_.typical_epsilon, settings_.typical_delta});
}

// Most steps leave the state as it has to be: what is not accepted is written over.
void Decoder::commit() {
  if (!rows_.path_matters()) return;
  rows_.upload_path(ctx_);
  replay_(ctx_, {}, [&] { state_.commit(ctx_, rows_.path()); });
}

int32_t Decoder::choice(int64_t b, int64_t row, int node) {
  const int32_t largest = argmax_.data<int32_t>()[row + node];
  if (settings_.no_repeat == 0) return largest;
  const DraftTree& tree = trees_[b];
  text_.assign(sequences_[b].tokens.begin() + sequences_[b].prompt, sequences_[b].tokens.end());
  for (int i = 1; i <= node; ++i)
    if (tree.ancestors(node) >> i & 1) text_.push_back(tree.token(i));
  if (!repeats_run(text_, largest, settings_.no_repeat)) return largest;
  logits_host_.send(ctx_, logits_.slice(row + node, 1));
  kernels::synchronize(ctx_.device, ctx_.stream);
  return without_repeats(text_, {logits_host_.data<float>(), static_cast<size_t>(model_.vocabulary())},
                         largest, settings_.no_repeat);
}

void Decoder::choose(int64_t b, int64_t row) {
  AcceptedPath& accepted = sequences_[b].accepted;
  if (settings_.acceptance != Acceptance::greedy) return verifier_.read(b, trees_[b], accepted);
  Verifier::greedy(
      trees_[b], [&](int node) { return choice(b, row, node); }, accepted);
}

void Decoder::take(int64_t b, DecodedSequence& out) {
  Sequence& sequence = sequences_[b];
  const size_t before = sequence.tokens.size(),
               most = static_cast<size_t>(sequence.prompt + settings_.max_tokens);
  const auto append = [&](int32_t token) {
    if (!sequence.active) return;
    sequence.tokens.push_back(token);
    sequence.active =
        token != settings_.end_of_text && sequence.tokens.size() < most && committed(b) < position_limit_;
  };
  for (size_t i = 1; i < sequence.accepted.nodes.size(); ++i)
    append(trees_[b].token(sequence.accepted.nodes[i]));
  append(sequence.accepted.next);
  out.tokens.insert(out.tokens.end(), sequence.tokens.begin() + before, sequence.tokens.end());
  out.gained.push_back(static_cast<int64_t>(sequence.tokens.size() - before));
}

void Decoder::observe(int64_t b, std::span<const int32_t> path, int64_t first, Drafter* drafter) {
  path_.assign(path.begin(), path.end());
  for (int32_t& row : path_) row += static_cast<int32_t>(rows_.first_row(b));
  drafter->observe(ctx_, b, view(b), hidden_, path_, first);
}

void Decoder::count(int64_t b, DecodeRun& run) const {
  const std::vector<int32_t>& path = sequences_[b].accepted.nodes;
  const DraftTree& tree = trees_[b];
  const int64_t reached = static_cast<int64_t>(path.size()) - 1;
  bool below = false;
  for (int node = path.back() + 1; node < tree.size(); ++node)
    below = below || tree.parent(node) == path.back();
  for (int64_t d = 0; d < reached; ++d) ++run.reached[d];
  for (int64_t d = 0; d < reached + (below ? 1 : 0); ++d) ++run.proposed[d];
  for (int node = 1; node < tree.size(); ++node) ++run.drafted[tree.place(node)];
  for (size_t i = 1; i < path.size(); ++i) ++run.accepted[tree.place(path[i])];
  ++run.sequence_steps;
}

void Decoder::step(Drafter* drafter, DecodeRun& run) {
  Stopwatch watch;
  draft(drafter);
  run.times.draft += watch.lap();
  verify();
  run.times.verify += watch.lap();
  for (int64_t b = 0; b < batch_; ++b) {
    if (!sequences_[b].active) continue;
    choose(b, rows_.first_row(b));
    rows_.accept(b, sequences_[b].accepted.nodes);
  }
  run.times.sample += watch.lap();
  commit();
  run.times.commit += watch.lap();
  for (int64_t b = 0; b < batch_; ++b) {
    Sequence& sequence = sequences_[b];
    if (!sequence.active) continue;
    const int64_t first = committed(b);
    count(b, run);
    take(b, run.sequences[b]);
    run.tokens += run.sequences[b].gained.back();
    if (drafter != nullptr && sequence.active) observe(b, sequence.accepted.nodes, first, drafter);
  }
  run.times.draft += watch.lap();
  ++run.steps;
}

DecodeRun Decoder::run(std::span<const std::vector<int32_t>> prompts, const DecodeSettings& settings,
                       Drafter* drafter, const OnTokens& on_tokens) {
  DecodeRun run;
  run.sequences.resize(prompts.size());
  for (auto* counts : {&run.proposed, &run.reached, &run.drafted, &run.accepted})
    counts->resize(kMaxDecodeRows);
  for (DecodedSequence& sequence : run.sequences) {
    sequence.tokens.reserve(settings.max_tokens);
    sequence.gained.reserve(settings.max_tokens);
  }
  start(prompts, settings);
  if (drafter != nullptr) drafter->reset(ctx_);
  const int64_t count = static_cast<int64_t>(prompts.size());
  std::vector<size_t> reported(prompts.size());
  const auto report = [&] {
    for (int64_t b = 0; on_tokens && b < count; ++b) {
      const std::span<const int32_t> tokens = run.sequences[b].tokens;
      if (tokens.size() > reported[b]) on_tokens(b, tokens.subspan(reported[b]));
      reported[b] = tokens.size();
    }
  };
  for (int64_t b = 0; b < count; ++b) prefill(b, drafter, run);
  report();
  while (std::any_of(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return s.active; })) {
    step(drafter, run);
    report();
  }
  return run;
}

double Decoder::measure_step(int64_t rows, int64_t length, int64_t repeats, const DecodeSettings& settings) {
  start({}, settings);
  settings_.no_repeat = 0;  // the text of a measurement repeats itself
  sequences_[0].tokens.assign(length + 1, 0);
  sequences_[0].active = true;
  trees_[0].clear(0);
  for (int64_t i = 1; i < rows; ++i) trees_[0].add(static_cast<int>(i) - 1, 0);
  kernels::synchronize(ctx_.device, ctx_.stream);
  std::vector<double> seconds(repeats);
  for (double& taken : seconds) {
    Stopwatch watch;
    verify();
    choose(0, 0);
    rows_.accept_first(0, 1);
    commit();
    taken = watch.lap();
  }
  return spread_of(std::move(seconds)).median;
}

std::unique_ptr<Drafter> make_drafter(const Decoder& decoder, const std::string& name,
                                      const configs::DecodeConfig& config) {
  if (name == "none") return nullptr;
  DrafterParams params;
  params.batch = decoder.batch();
  params.capacity = std::min(decoder.capacity() + kMaxDecodeRows, decoder.position_limit());
  params.max_drafts = config.max_drafts;
  params.tree_nodes = config.tree_nodes;
  return find_drafter(name, decoder.model().config()).make(decoder.context(), decoder.model(), params);
}

}  // namespace trainer
