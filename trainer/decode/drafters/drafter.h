#pragma once
// A drafter proposes the tokens the next step verifies. It may be wrong at no cost but time: the verifier
// decides.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "trainer/decode/tree.h"
#include "trainer/decode/verifier.h"
#include "trainer/model/model.h"

namespace trainer {

// One sequence, as a drafter sees it.
struct SequenceView {
  std::span<const int32_t>
      tokens;              // prompt and accepted tokens; the last is the root, not yet fed to the model
  int64_t max_depth = 0;   // deepest draft that may be proposed in this step
  int64_t max_drafts = 0;  // most drafts, over all depths
  SamplingKey key;
  bool active = true;  // false: finished, propose nothing
  int64_t root_position() const { return static_cast<int64_t>(tokens.size()) - 1; }
};

struct DraftSettings {
  bool sample = false;     // draw drafts from the drafter's distribution, and say which it was (DraftTree::q)
  double temperature = 1;  // of that distribution
};

class Drafter {
 public:
  virtual ~Drafter() = default;
  // New sequences begin.
  virtual void reset(const Context& ctx) = 0;
  // Rows of one sequence were committed: row rows[i] of `hidden` (the trunk's, (N, C)) belongs to position
  // first + i. view.tokens already holds the token after the last of them.
  virtual void observe(const Context& ctx, int64_t sequence, const SequenceView& view, const Tensor& hidden,
                       std::span<const int32_t> rows, int64_t first) = 0;
  // Adds drafts below the roots of the trees (one per sequence).
  virtual void propose(const Context& ctx, std::span<const SequenceView> sequences,
                       const DraftSettings& settings, std::span<DraftTree> trees) = 0;
  // Most drafts of a step: the length of a chain, the nodes of a tree. 0 makes every step a plain one.
  virtual void set_drafts(int64_t count) = 0;
  virtual int64_t max_drafts() const = 0;
  // acceptance[level][rank] measured on text (tree.h, best_tree); drafters that propose chains ignore it.
  virtual void calibrate(const std::vector<std::vector<double>>&) {}
  // Estimated probability that each draft of a whole tree is accepted, best first; empty for chains.
  virtual std::vector<double> node_values() const { return {}; }
};

struct DrafterParams {
  int64_t batch = 1;
  int64_t capacity = 0;    // of the trunk's state: longest sequence and the rows of a step, in tokens
  int64_t max_drafts = 4;  // longest chain
  int64_t tree_nodes = 6;  // largest tree
};

struct DrafterKind {
  const char* name;
  const char* shape;  // chain | tree
  const char* about;
  // Empty, or what the model lacks ("heads.medusa is 0").
  std::function<std::string(const configs::Config&)> lacks;
  std::function<std::unique_ptr<Drafter>(const Context&, const Model&, const DrafterParams&)> make;
};
// The table of drafters: add one here.
const std::vector<DrafterKind>& drafters();
// ConfigError for an unknown name, or for one whose heads the model lacks.
const DrafterKind& find_drafter(const std::string& name, const configs::Config& config);

}  // namespace trainer
