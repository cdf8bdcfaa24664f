#pragma once
// Decoding step by step, of softmax and linear attention, on any device.
#include <bit>
#include <random>

#include "kernels/core/arena.h"
#include "kernels/ops/linear.h"
#include "kernels/ops/linear_attention.h"
#include "kernels/ops/softmax_attention.h"
#include "tests/kernels/attention_oracle.h"
#include "tests/support/tensor_buffer.h"

namespace decoding {

using kernels::DType;
using kernels::kFold;
using oracle::Kind;
using oracle::Sizes;
using support::TensorBuffer;

// A token of a test: its number decides q, k and v.
using Token = int;
struct Node {
  Token token;
  int parent = -1;  // row of the same step; -1: the last committed token
};
using Tree = std::vector<Node>;
using Row = std::vector<double>;  // o of one row

inline Tree chain(const std::vector<Token>& tokens) {
  Tree tree;
  for (Token t : tokens) tree.push_back({t, static_cast<int>(tree.size()) - 1});
  return tree;
}

inline uint64_t ancestors(const Tree& tree, size_t row) {
  uint64_t bits = 0;
  for (int i = static_cast<int>(row); i >= 0; i = tree[static_cast<size_t>(i)].parent)
    bits |= uint64_t{1} << i;
  return bits;
}

// The values of q (which = 0), k (1) or v (2) of a token.
inline std::vector<double> values_of(Token token, int which, int64_t count) {
  return support::normal_values(static_cast<size_t>(count),
                                static_cast<uint64_t>(token) * 3 + static_cast<uint64_t>(which) + 1);
}

// Decoding states of one kind for a batch of sequences, poisoned where nothing was written.
class Decoder {
 public:
  Decoder(Kind kind, Sizes s, DType dtype, std::vector<int> lengths, int64_t capacity = 256,
          kernels::Device device = {})
      : kind_(kind), s_(s), dtype_(dtype), device_(device), lengths_(std::move(lengths)) {
    const auto b = static_cast<int64_t>(lengths_.size());
    const DType main = kernels::main_dtype(dtype);
    const int64_t slots = kind == Kind::softmax ? capacity : 2 * kFold;
    k_ = TensorBuffer(kind == Kind::softmax ? dtype : main, {b, slots, s.key_heads, s.width}, device);
    v_ = TensorBuffer(dtype, {b, slots, s.key_heads, s.width}, device);
    sum_ = TensorBuffer(main, {b, s.key_heads, s.width, s.width}, device);
    z_ = TensorBuffer(main, {b, s.key_heads, s.width}, device);
    sum_.set(std::vector<double>(static_cast<size_t>(sum_.tensor().numel())));
    z_.set(std::vector<double>(static_cast<size_t>(z_.tensor().numel())));
  }
  Decoder(const Decoder& other) { *this = other; }
  Decoder& operator=(const Decoder& other) {
    kind_ = other.kind_, s_ = other.s_, dtype_ = other.dtype_, device_ = other.device_;
    lengths_ = other.lengths_, working_memory = other.working_memory;
    for (auto [to, from] :
         {std::pair{&k_, &other.k_}, {&v_, &other.v_}, {&sum_, &other.sum_}, {&z_, &other.z_}}) {
      *to = TensorBuffer(from->tensor().dtype, from->tensor().shape, device_);
      to->set(from->values());
    }
    return *this;
  }

  // One step of every sequence: o of each row, sequence by sequence.
  std::vector<std::vector<Row>> step(const std::vector<Tree>& trees) {
    std::vector<double> first = {0}, positions, bits, inputs[3];
    for (size_t b = 0; b < trees.size(); ++b) {
      for (size_t i = 0; i < trees[b].size(); ++i) {
        const uint64_t mask = ancestors(trees[b], i);
        positions.push_back(lengths_[b] + std::popcount(mask) - 1);
        masks_.push_back(static_cast<int64_t>(mask));
        for (int which = 0; which < 3; ++which) {
          const auto x =
              values_of(trees[b][i].token, which, (which == 0 ? s_.heads : s_.key_heads) * s_.width);
          inputs[which].insert(inputs[which].end(), x.begin(), x.end());
        }
      }
      first.push_back(static_cast<double>(positions.size()));
    }
    return run(trees, first, positions, inputs);
  }

  // Accepts these rows of each sequence's last step.
  void commit(const std::vector<std::vector<int>>& accepted) {
    const auto b = static_cast<int64_t>(accepted.size());
    TensorBuffer rows(DType::i32, {b, kernels::kMaxDecodeRows}, device_), counts(DType::i32, {b}, device_),
        lengths = ints(lengths_);
    for (size_t i = 0; i < accepted.size(); ++i) {
      counts.set(i, static_cast<double>(accepted[i].size()));
      for (size_t j = 0; j < accepted[i].size(); ++j)
        rows.set(i * kernels::kMaxDecodeRows + j, accepted[i][j]);
      lengths_[i] += static_cast<int>(accepted[i].size());
    }
    const kernels::CommitPath path{rows, counts, lengths};
    if (kind_ == Kind::softmax) {
      kernels::commit_rows(ctx(), path, false, k_);
      kernels::commit_rows(ctx(), path, false, v_);
    } else {
      kernels::LinearAttentionState state{sum_, z_, k_, v_};
      kernels::linear_attention_commit(ctx(), path, state);
    }
  }

  // Plain decoding of one sequence: a step and a commit per token; the last token's o.
  Row plain(const std::vector<Token>& tokens) {
    Row last;
    for (Token t : tokens) {
      last = step({chain({t})})[0][0];
      commit({{0}});
    }
    return last;
  }
  int length(size_t b) const { return lengths_[b]; }
  // Softmax: whether steps are given scratch memory.
  bool working_memory = true;
  // New tokens that may be computed at once before the state folds.
  int room(size_t b) const { return static_cast<int>(kFold - lengths_[b] % kFold); }

 private:
  kernels::Context ctx() const { return {.device = device_, .stream = {}}; }
  TensorBuffer ints(const std::vector<int>& x) {
    TensorBuffer buffer(DType::i32, {static_cast<int64_t>(x.size())}, device_);
    buffer.set(std::vector<double>(x.begin(), x.end()));
    return buffer;
  }

  std::vector<std::vector<Row>> run(const std::vector<Tree>& trees, const std::vector<double>& first,
                                    const std::vector<double>& positions,
                                    const std::vector<double> (&inputs)[3]) {
    const auto n = static_cast<int64_t>(positions.size());
    TensorBuffer q(dtype_, {n, s_.heads, s_.width}, device_, 8),
        k(dtype_, {n, s_.key_heads, s_.width}, device_, 8),
        v(dtype_, {n, s_.key_heads, s_.width}, device_, 8),
        first_row(DType::i32, {static_cast<int64_t>(first.size())}, device_),
        position(DType::i32, {n}, device_), masks(DType::i64, {n}, device_), lengths = ints(lengths_);
    TensorBuffer o(kind_ == Kind::linear_plain ? kernels::main_dtype(dtype_) : dtype_,
                   {n, s_.heads, s_.width}, device_);
    q.set(inputs[0]), k.set(inputs[1]), v.set(inputs[2]), first_row.set(first), position.set(positions);
    kernels::copy_bytes(masks.tensor().data, device_, masks_.data(), {}, masks.tensor().bytes());
    const kernels::DecodeRows rows{first_row, lengths, position, masks};
    if (kind_ == Kind::softmax) {
      kernels::Arena scratch("scratch", device_);
      kernels::Context context = ctx();
      const auto decode = [&] { kernels::softmax_attention_decode(context, q, k, v, rows, k_, v_, o); };
      if (working_memory) {
        context.scratch = &scratch;
        context.rehearsal = true;
        decode();
        scratch.place();
        context.rehearsal = false;
      }
      decode();
    } else {
      kernels::LinearAttentionState state{sum_, z_, k_, v_};
      kernels::linear_attention_decode(ctx(), {.normalise = kind_ == Kind::linear}, q, k, v, rows, state, o);
    }
    masks_.clear();
    const auto all = o.values();
    std::vector<std::vector<Row>> result;
    auto at = all.begin();
    for (const Tree& tree : trees) {
      result.emplace_back();
      for (size_t i = 0; i < tree.size(); ++i, at += s_.heads * s_.width)
        result.back().emplace_back(at, at + s_.heads * s_.width);
    }
    return result;
  }

  Kind kind_;
  Sizes s_;
  DType dtype_;
  kernels::Device device_;
  std::vector<int> lengths_;
  TensorBuffer k_, v_, sum_, z_;
  std::vector<int64_t> masks_;
};

inline std::vector<Token> tokens_from(Token first, int count) {
  std::vector<Token> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(first + i);
  return tokens;
}

// A tree of `nodes` rows that goes at most `depth` deep; tokens are numbered from `token`.
inline Tree random_tree(std::mt19937& random, int nodes, int depth, Token token) {
  Tree tree = {{token, -1}};
  while (static_cast<int>(tree.size()) < nodes) {
    const int parent = static_cast<int>(random() % tree.size());
    if (std::popcount(ancestors(tree, static_cast<size_t>(parent))) >= depth) continue;
    tree.push_back({token + static_cast<Token>(tree.size()), parent});
  }
  return tree;
}

inline std::vector<int> path_to(const Tree& tree, int row) {
  std::vector<int> path;
  for (int i = row; i >= 0; i = tree[static_cast<size_t>(i)].parent) path.insert(path.begin(), i);
  return path;
}

inline std::vector<Token> tokens_of(const Tree& tree, const std::vector<int>& path) {
  std::vector<Token> tokens;
  for (int i : path) tokens.push_back(tree[static_cast<size_t>(i)].token);
  return tokens;
}

}  // namespace decoding
