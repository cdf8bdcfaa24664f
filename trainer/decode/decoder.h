#pragma once
// The decoding engine: prefill, then steps of draft, verify, accept, commit. Plain decoding is the same path
// with no drafts, so what is compared is speculation alone.
#include <functional>
#include <memory>
#include <optional>

#include "trainer/decode/drafters/drafter.h"
#include "trainer/decode/step_rows.h"
#include "trainer/decode/verifier.h"

namespace trainer {

struct DecodeSettings {
  Acceptance acceptance = Acceptance::greedy;
  double temperature = 0;  // > 0 for rejection and typical
  double typical_epsilon = 0.09, typical_delta = 0.3;
  uint64_t seed = 1;
  int32_t end_of_text = -1;  // -1: none
  int64_t max_tokens = 128;
  int64_t no_repeat = 0;  // greedy: write no run of this many tokens twice after the prompt; 0 allows it
};

// Wall-clock time of the parts of a step, in seconds. verify: the model, and what it predicts until the host
// can read it, above temperature 0 which drafts it accepts; sample: what the host does with that; commit: on
// a GPU only what it takes to ask for it.
struct PhaseTimes {
  double draft = 0, verify = 0, sample = 0, commit = 0;
  double total() const { return draft + verify + sample + commit; }
};

struct DecodedSequence {
  std::vector<int32_t> tokens;  // generated, the end-of-text token included
  std::vector<int64_t> gained;  // tokens of each step, the prefill's one first
};

// What a run did. Counts are over steps after the prefill.
struct DecodeRun {
  std::vector<DecodedSequence> sequences;
  int64_t steps = 0;           // of the batch: calls of the model
  int64_t sequence_steps = 0;  // of single sequences
  int64_t tokens = 0;          // generated after the prefill's one
  PhaseTimes times;            // of those steps
  double prefill_seconds = 0;  // to the first token
  std::vector<int64_t>
      proposed;  // [d]: steps with a draft at depth d + 1 below an accepted draft (or the root)
  std::vector<int64_t> reached;            // [d]: steps that accepted at least d + 1 drafts
  std::vector<int64_t> drafted, accepted;  // [d]: steps with the draft at place d (tree.h), that accepted it
  double seconds() const { return times.total(); }
  // Adds counts and times of another run.
  void add(const DecodeRun& run);
};

class Decoder {
 public:
  // Room for `batch` sequences of `capacity` tokens each. The model must be ready for decoding.
  Decoder(const Context& ctx, const Model& model, int64_t batch, int64_t capacity);

  // Decodes one continuation per prompt (at most `batch`, none empty), with drafts from `drafter` where there
  // is one. `on_tokens(sequence, tokens)` is called after every step with what the sequence gained.
  using OnTokens = std::function<void(int64_t, std::span<const int32_t>)>;
  DecodeRun run(std::span<const std::vector<int32_t>> prompts, const DecodeSettings& settings,
                Drafter* drafter = nullptr, const OnTokens& on_tokens = {});

  // Seconds that one step over `rows` rows of one sequence takes, without drafting: verifying, choosing
  // tokens, committing. The median of `repeats` (at least 1) on a state of `length` tokens.
  double measure_step(int64_t rows, int64_t length, int64_t repeats, const DecodeSettings& settings);

  const Context& context() const { return ctx_; }
  const Model& model() const { return model_; }
  int64_t batch() const { return batch_; }
  int64_t capacity() const { return capacity_; }
  // Positions the model knows; learned ones end at its context.
  int64_t position_limit() const { return position_limit_; }
  bool captured() const { return replay_.recorded() > 0; }  // some work runs as a graph

 private:
  struct Sequence {
    std::vector<int32_t> tokens;  // prompt and generated; the last is the root
    int64_t prompt = 0;
    bool active = false;
    AcceptedPath accepted;
  };

  void allocate();
  void start(std::span<const std::vector<int32_t>> prompts, const DecodeSettings& settings);
  void prefill(int64_t b, Drafter* drafter, DecodeRun& run);
  void step(Drafter* drafter, DecodeRun& run);
  void draft(Drafter* drafter);
  void add_to_verifier(int64_t b, bool has_rows);
  // The model over the step's rows, up to predictions that the host can read.
  void verify();
  // What the target makes of the trees whose rows the first `rows` of logits_ are: with the greedy rule the
  // tokens of the largest logits, otherwise the accepted paths.
  void predict(int64_t rows);
  void commit();
  // Greedy: what the target writes after a node of a sequence's tree, whose predictions start at `row`. The
  // node's other logits are fetched only where the guard against loops refuses the largest.
  int32_t choice(int64_t b, int64_t row, int node);
  // The accepted path of a sequence whose predictions start at `row`, once the device has been waited for.
  void choose(int64_t b, int64_t row);
  // Appends the accepted path and the token after it, cut at the end of the text.
  void take(int64_t b, DecodedSequence& out);
  void observe(int64_t b, std::span<const int32_t> path, int64_t first, Drafter* drafter);
  void count(int64_t b, DecodeRun& run) const;
  SequenceView view(int64_t b) const;
  int64_t committed(int64_t b) const { return static_cast<int64_t>(sequences_[b].tokens.size()) - 1; }

  kernels::OwnedStream stream_;  // where the context has none: work of the default stream is never recorded
  Context ctx_;
  const Model& model_;
  int64_t batch_, capacity_, position_limit_;
  kernels::Arena scratch_, memory_;
  DecodeState state_;
  StepRows rows_;
  Verifier verifier_;
  Tensor hidden_, logits_, p_;  // (64, C), (64, V), (64, V)
  SharedResult argmax_;         // (64)
  HostCopy logits_host_;
  std::vector<int32_t> text_;
  Replay replay_;

  DecodeSettings settings_;
  OnTokens on_tokens_;
  std::vector<Sequence> sequences_;
  std::vector<DraftTree> trees_;
  std::vector<SequenceView> views_;
  std::vector<int32_t> path_;
};

// A drafter for this decoder's batch and capacity; null for "none".
std::unique_ptr<Drafter> make_drafter(const Decoder& decoder, const std::string& name,
                                      const configs::DecodeConfig& config);

}  // namespace trainer
