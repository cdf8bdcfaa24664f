#pragma once
// Acceptance rules: from a draft tree and the target's predictions at its nodes to the accepted path and the
// token that follows it.
//
//   greedy     the path equal to the target's argmax; the next token is the argmax at its end
//   rejection, typical     kernels/ops/speculation.h
//
// Random numbers are keyed by (seed, position of the token decided), never by the order of calls: a position
// is decided once, whichever step decides it.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/ops/speculation.h"
#include "trainer/decode/replay.h"
#include "trainer/decode/tree.h"

namespace trainer {

enum class Acceptance { greedy, rejection, typical };
// ConfigError for another word.
Acceptance parse_acceptance(const std::string& name);
std::string to_string(Acceptance acceptance);

// The random numbers of one sequence.
struct SamplingKey {
  uint64_t seed = 1;
  uint64_t sequence = 0;
  float next(int64_t position) const { return draw(position, 0); }  // the token itself
  float accept(int64_t position, int sibling) const { return draw(position, 1 + sibling); }
  float draft(int64_t position, int rank) const { return draw(position, 1024 + rank); }  // drawing a draft

 private:
  float draw(int64_t position, uint32_t lane) const;
};

// The seed of one text of an evaluation: others for what texts are for, for each round and each prompt, the
// same for every way of decoding, so that what is compared is the way and not its luck.
enum class TextUse { calibration, tuning, timing };
uint64_t text_seed(uint64_t seed, TextUse use, int64_t round, int64_t prompt);

struct AcceptedPath {
  std::vector<int32_t> nodes;  // ascending, the root first
  int32_t next = 0;            // the token after the path
};

class Verifier {
 public:
  Verifier(kernels::Device device, int64_t batch);

  // choice(node): what the target writes after a node; asked for the nodes of the accepted path alone.
  static void greedy(const DraftTree& tree, const std::function<int32_t(int)>& choice,
                     AcceptedPath& accepted);

  // The trees of a step, sequence by sequence, when the device has done what it was asked before. `position`
  // is that of the root. At most kMaxDecodeRows nodes together.
  void clear();
  void add_tree(const DraftTree& tree, const SamplingKey& key, int64_t position);
  void add_none();
  // Asks the device for what becomes of them; may be recorded. p (nodes, V): the target's distribution after
  // each node; logits (nodes, V) are those p was made of.
  void rejection(const kernels::Context& ctx, const kernels::Tensor& p);
  void typical(const kernels::Context& ctx, const kernels::Tensor& logits, const kernels::Tensor& p,
               const kernels::TypicalRule& rule);
  // The accepted path of a sequence, once the device has been waited for.
  void read(int64_t sequence, const DraftTree& tree, AcceptedPath& accepted) const;

 private:
  kernels::DraftRows drafts() const;
  int64_t batch_, sequences_ = 0, rows_ = 0;
  SharedResult first_row_, parents_, tokens_, accept_, next_, q_, accepted_;
};

}  // namespace trainer
