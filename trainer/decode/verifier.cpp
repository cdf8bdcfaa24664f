#include "trainer/decode/verifier.h"

#include <algorithm>

#include "kernels/core/error.h"
#include "kernels/core/philox.h"
#include "kernels/ops/linear.h"

namespace trainer {

using kernels::DType;
using kernels::kMaxDecodeRows;

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

Verifier::Verifier(kernels::Device device, int64_t batch)
    : batch_(batch),
      first_row_(device, DType::i32, {batch + 1}),
      parents_(device, DType::i32, {kMaxDecodeRows}),
      tokens_(device, DType::i32, {kMaxDecodeRows}),
      accept_(device, DType::f32, {kMaxDecodeRows}),
      next_(device, DType::f32, {kMaxDecodeRows}),
      q_(device, DType::i64, {kMaxDecodeRows}),
      accepted_(device, DType::i32, {batch, 2}) {
  clear();
}

void Verifier::greedy(const DraftTree& tree, const std::function<int32_t(int)>& choice,
                      AcceptedPath& accepted) {
  accepted.nodes.assign(1, 0);
  accepted.next = choice(0);
  for (int child = 1; child < tree.size(); ++child) {
    if (tree.parent(child) != accepted.nodes.back() || tree.token(child) != accepted.next) continue;
    accepted.nodes.push_back(child);
    accepted.next = choice(child);
  }
}

void Verifier::clear() {
  rows_ = sequences_ = 0;
  first_row_.tensor().as<int32_t>()[0] = 0;
}

void Verifier::add_tree(const DraftTree& tree, const SamplingKey& key, int64_t position) {
  if (rows_ + tree.size() > kMaxDecodeRows || sequences_ >= batch_)
    throw kernels::ShapeError("drafts: more than 64 rows at once, or more trees than sequences");
  int siblings[kMaxDecodeRows] = {};
  for (int node = 0; node < tree.size(); ++node) {
    const int64_t row = rows_ + node, decided = position + tree.depth(node);
    parents_.tensor().as<int32_t>()[row] = tree.parent(node);
    tokens_.tensor().as<int32_t>()[row] = tree.token(node);
    q_.tensor().as<int64_t>()[row] = reinterpret_cast<int64_t>(tree.q(node));
    next_.tensor().as<float>()[row] = key.next(decided + 1);
    accept_.tensor().as<float>()[row] = node == 0 ? 0 : key.accept(decided, siblings[tree.parent(node)]++);
  }
  rows_ += tree.size();
  add_none();
}

void Verifier::add_none() { first_row_.tensor().as<int32_t>()[++sequences_] = static_cast<int32_t>(rows_); }

kernels::DraftRows Verifier::drafts() const {
  return {.first_row = first_row_.tensor().slice(0, sequences_ + 1),
          .parents = parents_.tensor().slice(0, rows_),
          .tokens = tokens_.tensor().slice(0, rows_),
          .accept = accept_.tensor().slice(0, rows_),
          .next = next_.tensor().slice(0, rows_),
          .q = q_.tensor().slice(0, rows_)};
}

void Verifier::rejection(const kernels::Context& ctx, const kernels::Tensor& p) {
  kernels::accept_rejection(ctx, drafts(), p, accepted_.tensor().slice(0, sequences_));
}

void Verifier::typical(const kernels::Context& ctx, const kernels::Tensor& logits, const kernels::Tensor& p,
                       const kernels::TypicalRule& rule) {
  kernels::accept_typical(ctx, drafts(), logits, p, rule, accepted_.tensor().slice(0, sequences_));
}

void Verifier::read(int64_t sequence, const DraftTree& tree, AcceptedPath& accepted) const {
  const int32_t* found = accepted_.data<int32_t>() + 2 * sequence;
  accepted.nodes.clear();
  for (int node = found[0]; node >= 0; node = tree.parent(node)) accepted.nodes.push_back(node);
  std::reverse(accepted.nodes.begin(), accepted.nodes.end());
  accepted.next = found[1];
}

}  // namespace trainer
