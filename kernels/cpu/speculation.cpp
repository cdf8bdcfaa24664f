#include "kernels/ops/speculation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/core/row_math.h"
#include "kernels/cpu/rows.h"
#include "kernels/ops/linear.h"

namespace kernels::cpu {

namespace {

// One sequence's rows: pointers to the first of them.
struct Tree {
  int first, count;
  const int32_t *parents, *tokens;
  Tree(const DraftRows& rows, int64_t sequence) {
    const auto* firsts = rows.first_row.as<int32_t>() + sequence;
    first = firsts[0];
    count = firsts[1] - first;
    parents = rows.parents.as<int32_t>() + first;
    tokens = rows.tokens.as<int32_t>() + first;
  }
};

class Rejection {
 public:
  Rejection(const DraftRows& rows, const Tensor& p, const Tensor& left, const Tree& tree)
      : tree_(tree),
        vocabulary_(p.cols()),
        accept_(rows.accept.as<float>() + tree.first),
        next_(rows.next.as<float>() + tree.first),
        q_(rows.q.as<int64_t>() + tree.first),
        p_(p.slice(tree.first, tree.count)),
        left_p_(row<float>(left, 0)),
        left_q_(row<float>(left, 1)) {}

  void run(int32_t* accepted) {
    int node = 0;
    while (true) {
      const float* p = row<float>(p_, node);
      const int child = accept_child(node, p);
      if (child < 0) {
        accepted[0] = node;
        accepted[1] = static_cast<int32_t>(row_draw(p, vocabulary_, next_[node]));
        return;
      }
      node = child;
    }
  }

 private:
  // The first accepted child of the node, or -1; p is left as the distribution the next token is drawn from.
  int accept_child(int node, const float*& p) {
    int32_t rejected = -1;
    const float* q = nullptr;
    for (int child = node + 1; child < tree_.count; ++child) {
      if (tree_.parents[child] != node) continue;
      const int32_t token = tree_.tokens[child];
      const auto* drawn_from = reinterpret_cast<const float*>(q_[child]);
      q = q == nullptr || drawn_from == nullptr ? drawn_from : without(q, rejected);
      const float proposal = q == nullptr ? 1.0f : q[token];
      if (accept_[child] * proposal < p[token]) return child;
      if (!reject(p, q, token)) return child;
      rejected = token;
    }
    return -1;
  }

  // p becomes what is left of the target after `token` was rejected. False when rounding alone rejected it: p
  // and q are equal, nothing is left, and the token stands.
  bool reject(const float*& p, const float* q, int32_t token) {
    if (q != nullptr) {
      row_subtract(p, q, left_p_, vocabulary_);
    } else {
      if (p != left_p_) std::copy_n(p, vocabulary_, left_p_);
      left_p_[token] = 0;
    }
    p = left_p_;
    return row_normalise(left_p_, vocabulary_);
  }

  // What is left of q after `token` was drawn from it.
  const float* without(const float* q, int32_t token) {
    if (q != left_q_) std::copy_n(q, vocabulary_, left_q_);
    left_q_[token] = 0;
    row_normalise(left_q_, vocabulary_);
    return left_q_;
  }

  const Tree& tree_;
  int64_t vocabulary_;
  const float *accept_, *next_;
  const int64_t* q_;
  Tensor p_;
  float *left_p_, *left_q_;
};

// H = log Z - E[l] with l = logits / temperature; log Z follows from any one token, here the likeliest.
double entropy(const float* logits, const float* p, int64_t count, double temperature) {
  const int64_t likeliest = row_argmax(p, count);
  const double mean = row_dot(p, logits, count);
  return (logits[likeliest] - mean) / temperature - std::log(static_cast<double>(p[likeliest]));
}

void typical(const Tree& tree, const Tensor& logits, const Tensor& p, const TypicalRule& rule,
             int32_t* accepted) {
  constexpr double kRejected = -std::numeric_limits<double>::infinity();
  double score[kMaxDecodeRows] = {};
  int depth[kMaxDecodeRows] = {}, best = 0;
  for (int node = 1; node < tree.count; ++node) {
    const int parent = tree.parents[node];
    const float* before = row<float>(p, tree.first + parent);
    const double probability = before[tree.tokens[node]];
    bool accept = score[parent] != kRejected && probability > 0;
    if (accept && probability <= rule.epsilon)
      accept = probability > rule.delta * std::exp(-entropy(row<float>(logits, tree.first + parent), before,
                                                            p.cols(), rule.temperature));
    score[node] = accept ? score[parent] + std::log(probability) : kRejected;
    depth[node] = depth[parent] + 1;
    if (accept && (depth[node] > depth[best] || (depth[node] == depth[best] && score[node] > score[best])))
      best = node;
  }
  accepted[0] = best;
  accepted[1] = static_cast<int32_t>(row_argmax(row<float>(p, tree.first + best), p.cols()));
}

// fn(b, tree) for every sequence that has rows.
template <typename Fn>
void for_sequences(const DraftRows& rows, int64_t sequences, const Fn& fn) {
  for (int64_t b = 0; b < sequences; ++b)
    if (const Tree tree(rows, b); tree.count > 0) fn(b, tree);
}

}  // namespace

void draw(const Context&, const Tensor& x, const Tensor& u, Tensor tokens) {
  std::vector<float> left;
  for (int64_t i = 0; i < x.rows(); ++i) {
    const float* weights = row<float>(x, i);
    auto* drawn = row<int32_t>(tokens, i);
    for (int64_t r = 0; r < tokens.cols(); ++r) {
      drawn[r] = static_cast<int32_t>(row_draw(weights, x.cols(), row<float>(u, i)[r]));
      if (!(weights[drawn[r]] > 0)) drawn[r] = -1;
      if (r + 1 == tokens.cols() || drawn[r] < 0) continue;
      if (r == 0) left.assign(weights, weights + x.cols());
      left[static_cast<size_t>(drawn[r])] = 0;
      weights = left.data();
    }
  }
}

void accept_rejection(const Context&, const DraftRows& rows, const Tensor& p, const Tensor& left,
                      Tensor accepted) {
  for_sequences(rows, accepted.rows(), [&](int64_t b, const Tree& tree) {
    Rejection(rows, p, left, tree).run(row<int32_t>(accepted, b));
  });
}

void accept_typical(const Context&, const DraftRows& rows, const Tensor& logits, const Tensor& p,
                    const TypicalRule& rule, Tensor accepted) {
  for_sequences(rows, accepted.rows(), [&](int64_t b, const Tree& tree) {
    typical(tree, logits, p, rule, row<int32_t>(accepted, b));
  });
}

}  // namespace kernels::cpu
