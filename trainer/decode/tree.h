#pragma once
// Draft trees: the tokens one step verifies. Node 0 is the root, the last token that is already accepted but
// not yet fed to the model; every other node is a draft for the token after its parent. Parents come first. A
// chain is a tree without siblings.
#include <cstdint>
#include <span>
#include <vector>

namespace trainer {

class DraftTree {
 public:
  DraftTree();
  // A tree of the root alone; keeps its memory.
  void clear(int32_t root);
  // Adds a draft below `parent` and returns its number. `q` is the distribution (V) the token was drawn from,
  // in the device's memory, or null when the draft is deterministic. Siblings are tried in order of their
  // numbers; siblings with a q are drawn from it without replacement, in that order. `place`: where it stands
  // among all drafts that its drafter might add, best first, from 0; its number less the root's where none is
  // given.
  int add(int parent, int32_t token, const float* q = nullptr, int place = -1);

  int size() const { return static_cast<int>(tokens_.size()); }
  int drafts() const { return size() - 1; }
  int32_t token(int node) const { return tokens_[node]; }
  int parent(int node) const { return parents_[node]; }
  int depth(int node) const { return depths_[node]; }
  int place(int node) const { return places_[node]; }
  const float* q(int node) const { return q_[node]; }
  // Bit j: node j is an ancestor of the node, or the node itself.
  uint64_t ancestors(int node) const { return ancestors_[node]; }
  int max_depth() const;

 private:
  std::vector<int32_t> tokens_, parents_, depths_, places_;
  std::vector<uint64_t> ancestors_;
  std::vector<const float*> q_;
};

// Which ranks of each level's candidates a tree holds: draft i (node i + 1 of a whole tree) takes candidate
// ranks[i] of level depths[i]. values[i] is the estimated probability that it is accepted.
struct TreeShape {
  std::vector<int32_t> parents;  // -1: below the root, otherwise a draft's number
  std::vector<int32_t> ranks, depths;
  std::vector<double> values;
  int size() const { return static_cast<int>(parents.size()); }
};

// The `nodes` drafts of the largest values, where acceptance[level][rank] estimates that the candidate of
// that rank continues an accepted path and a draft's value is the product along its path. Best first, so
// every prefix is the best tree of its size.
TreeShape best_tree(const std::vector<std::vector<double>>& acceptance, int nodes);

}  // namespace trainer
