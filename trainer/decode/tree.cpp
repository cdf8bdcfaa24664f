#include "trainer/decode/tree.h"

#include <algorithm>
#include <queue>

#include "kernels/core/error.h"
#include "kernels/ops/linear.h"

namespace trainer {

DraftTree::DraftTree() {
  tokens_.reserve(kernels::kMaxDecodeRows);
  parents_.reserve(kernels::kMaxDecodeRows);
  depths_.reserve(kernels::kMaxDecodeRows);
  places_.reserve(kernels::kMaxDecodeRows);
  ancestors_.reserve(kernels::kMaxDecodeRows);
  q_.reserve(kernels::kMaxDecodeRows);
}

void DraftTree::clear(int32_t root) {
  tokens_.assign(1, root);
  parents_.assign(1, -1);
  depths_.assign(1, 0);
  places_.assign(1, -1);
  ancestors_.assign(1, 1);
  q_.assign(1, nullptr);
}

int DraftTree::add(int parent, int32_t token, const float* q, int place) {
  const int node = size();
  if (node >= kernels::kMaxDecodeRows || parent < 0 || parent >= node)
    throw kernels::ShapeError("draft tree: more than 64 nodes, or a parent that does not come first");
  tokens_.push_back(token);
  parents_.push_back(parent);
  depths_.push_back(depths_[parent] + 1);
  places_.push_back(place < 0 ? node - 1 : place);
  ancestors_.push_back(ancestors_[parent] | (uint64_t{1} << node));
  q_.push_back(q);
  return node;
}

int DraftTree::max_depth() const { return *std::max_element(depths_.begin(), depths_.end()); }

TreeShape best_tree(const std::vector<std::vector<double>>& acceptance, int nodes) {
  struct Candidate {
    double value, parent_value;
    int parent, level, rank;
    bool operator<(const Candidate& other) const { return value < other.value; }
  };
  TreeShape shape;
  std::priority_queue<Candidate> heap;
  const auto push = [&](double parent_value, int parent, int level, int rank) {
    if (level < static_cast<int>(acceptance.size()) && rank < static_cast<int>(acceptance[level].size()))
      heap.push({parent_value * acceptance[level][rank], parent_value, parent, level, rank});
  };
  push(1.0, -1, 0, 0);
  while (!heap.empty() && shape.size() < nodes) {
    const Candidate best = heap.top();
    heap.pop();
    const int number = shape.size();
    shape.parents.push_back(best.parent);
    shape.ranks.push_back(best.rank);
    shape.depths.push_back(best.level + 1);
    shape.values.push_back(best.value);
    push(best.parent_value, best.parent, best.level, best.rank + 1);
    push(best.value, number, best.level + 1, 0);
  }
  return shape;
}

}  // namespace trainer
