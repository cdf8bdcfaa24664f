#include "trainer/decode/verifier.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/error.h"
#include "kernels/core/philox.h"
#include "kernels/core/row_math.h"
#include "kernels/ops/linear.h"

namespace trainer {

Acceptance parse_acceptance(const std::string& name) {
  for (const Acceptance rule : {Acceptance::greedy, Acceptance::rejection, Acceptance::typical})
    if (to_string(rule) == name) return rule;
  throw kernels::ConfigError("unknown acceptance rule \"" + name + "\": use greedy, rejection or typical");
}

std::string to_string(Acceptance acceptance) {
  constexpr const char* kNames[] = {"greedy", "rejection", "typical"};
  return kNames[static_cast<int>(acceptance)];
}

float SamplingKey::draw(int64_t position, uint32_t lane) const {
  return kernels::uniform(seed, kernels::Purpose::sampling,
                          (sequence << 40) | static_cast<uint64_t>(position), lane);
}

uint64_t text_seed(uint64_t seed, TextUse use, int64_t round, int64_t prompt) {
  // Lanes that no token of a text draws from.
  const uint32_t lane = 1u << 31 | static_cast<uint32_t>(use) << 16 | static_cast<uint32_t>(round);
  const auto random = kernels::philox(seed, kernels::Purpose::sampling, static_cast<uint64_t>(prompt), lane);
  return uint64_t{random[1]} << 32 | random[0];
}

Verifier::Verifier(int64_t vocabulary)
    : vocabulary_(vocabulary), p_(vocabulary), q_(vocabulary), score_(kernels::kMaxDecodeRows) {}

void Verifier::greedy(const DraftTree& tree, const std::function<int32_t(int)>& choice,
                      AcceptedPath& accepted) const {
  accepted.nodes.assign(1, 0);
  accepted.next = choice(0);
  for (int child = 1; child < tree.size(); ++child) {
    if (tree.parent(child) != accepted.nodes.back() || tree.token(child) != accepted.next) continue;
    accepted.nodes.push_back(child);
    accepted.next = choice(child);
  }
}

// p becomes what is left of the target after `token` was rejected. False when rounding alone rejected it: p
// and q are equal, nothing is left, and the token stands.
bool Verifier::reject(const float*& p, const float* q, int32_t token) {
  if (q != nullptr) {
    kernels::row_subtract(p, q, p_.data(), vocabulary_);
  } else {
    if (p != p_.data()) std::copy_n(p, vocabulary_, p_.data());
    p_[token] = 0;
  }
  p = p_.data();
  return kernels::row_normalise(p_.data(), vocabulary_);
}

// What is left of q after `token` was drawn from it.
const float* Verifier::without(const float* q, int32_t token) {
  if (q != q_.data()) std::copy_n(q, vocabulary_, q_.data());
  q_[token] = 0;
  kernels::row_normalise(q_.data(), vocabulary_);
  return q_.data();
}

// The first accepted child of the node, or -1; p is left as the distribution the next token is drawn from.
int Verifier::accept_child(const DraftTree& tree, int node, const float*& p, const SamplingKey& key,
                           int64_t position) {
  int sibling = 0;
  int32_t rejected = -1;
  const float* q = nullptr;
  for (int child = node + 1; child < tree.size(); ++child) {
    if (tree.parent(child) != node) continue;
    const int32_t token = tree.token(child);
    const float* drawn_from = tree.q(child);
    q = q == nullptr || drawn_from == nullptr ? drawn_from : without(q, rejected);
    const float proposal = q == nullptr ? 1.0f : q[token];
    if (key.accept(position, sibling) * proposal < p[token]) return child;
    if (!reject(p, q, token)) return child;
    rejected = token;
    ++sibling;
  }
  return -1;
}

void Verifier::rejection(const DraftTree& tree, const float* p, const SamplingKey& key, int64_t position,
                         AcceptedPath& accepted) {
  accepted.nodes.assign(1, 0);
  int node = 0;
  while (true) {
    const float* left = p + node * vocabulary_;
    const int64_t decided = position + tree.depth(node) + 1;
    const int child = accept_child(tree, node, left, key, decided);
    if (child < 0) {
      accepted.next = static_cast<int32_t>(kernels::row_draw(left, vocabulary_, key.next(decided)));
      return;
    }
    node = child;
    accepted.nodes.push_back(node);
  }
}

namespace {

// H = log Z - E[l] with l = logits / temperature; log Z follows from any one token, here the likeliest.
double entropy(const float* logits, const float* p, int64_t count, double temperature) {
  const int64_t likeliest = kernels::row_argmax(p, count);
  const double mean = kernels::row_dot(p, logits, count);
  return (logits[likeliest] - mean) / temperature - std::log(static_cast<double>(p[likeliest]));
}

}  // namespace

void Verifier::typical(const DraftTree& tree, const float* logits, const float* p, double temperature,
                       double epsilon, double delta, AcceptedPath& accepted) {
  constexpr double kRejected = -std::numeric_limits<double>::infinity();
  score_[0] = 0;
  int best = 0;
  for (int node = 1; node < tree.size(); ++node) {
    const int parent = tree.parent(node);
    const double probability = p[parent * vocabulary_ + tree.token(node)];
    bool accept = score_[parent] != kRejected && probability > 0;
    if (accept && probability <= epsilon)
      accept = probability > delta * std::exp(-entropy(logits + parent * vocabulary_,
                                                       p + parent * vocabulary_, vocabulary_, temperature));
    score_[node] = accept ? score_[parent] + std::log(probability) : kRejected;
    const bool longer = tree.depth(node) > tree.depth(best);
    if (accept && (longer || (tree.depth(node) == tree.depth(best) && score_[node] > score_[best])))
      best = node;
  }
  accepted.nodes.clear();
  for (int node = best; node >= 0; node = tree.parent(node)) accepted.nodes.push_back(node);
  std::reverse(accepted.nodes.begin(), accepted.nodes.end());
  const float* row = p + best * vocabulary_;
  accepted.next = static_cast<int32_t>(kernels::row_argmax(row, vocabulary_));
}

}  // namespace trainer
