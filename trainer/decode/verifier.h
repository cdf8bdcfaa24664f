#pragma once
// Acceptance rules: from a draft tree and the target's predictions at its nodes to the accepted path and the
// token that follows it.
//
//   greedy     the path equal to the target's argmax; the next token is the argmax at its end
//   rejection  (Leviathan et al. 2023, Chen et al. 2023; siblings: Chen et al. 2024, Sequoia) for each
//   sibling x in
//              order: accept with min(1, p(x) / q(x)), otherwise p <- norm(max(p - q, 0)) and q <- q without
//              x, renormalised. No sibling left: the next token is drawn from p. A deterministic draft has q
//              = delta(x). The tokens are distributed exactly as by plain sampling.
//   typical    (Cai et al. 2024) a draft is accepted if p(x) > min(epsilon, delta exp(-H(p))); the longest
//   accepted
//              path, ties by likelihood; the next token is the argmax. Not lossless.
//
// Random numbers are keyed by (seed, position of the token decided), never by the order of calls: a position
// is decided once, whichever step decides it.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

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
  explicit Verifier(int64_t vocabulary);

  // choice(node): what the target writes after a node; asked for the nodes of the accepted path alone.
  void greedy(const DraftTree& tree, const std::function<int32_t(int)>& choice, AcceptedPath& accepted) const;
  // p (nodes, V): the target's distribution after each node. `position` is that of the root.
  void rejection(const DraftTree& tree, const float* p, const SamplingKey& key, int64_t position,
                 AcceptedPath& accepted);
  // logits (nodes, V) are those p was made of, at `temperature`.
  void typical(const DraftTree& tree, const float* logits, const float* p, double temperature, double epsilon,
               double delta, AcceptedPath& accepted);

 private:
  int accept_child(const DraftTree& tree, int node, const float*& p, const SamplingKey& key,
                   int64_t position);
  bool reject(const float*& p, const float* q, int32_t token);
  const float* without(const float* q, int32_t token);

  int64_t vocabulary_;
  std::vector<float> p_, q_;  // what is left after rejections
  std::vector<double> score_;
};

}  // namespace trainer
