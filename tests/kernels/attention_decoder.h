#pragma once
// Decoding step by step, of softmax and linear attention, on any device; and what must hold of it everywhere.
#include <functional>
#include <optional>
#include <random>

#include "kernels/core/context.h"
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

Tree chain(const std::vector<Token>& tokens);
// A tree of `nodes` rows that goes at most `depth` deep; tokens are numbered from `token`.
Tree random_tree(std::mt19937& random, int nodes, int depth, Token token);
std::vector<int> path_to(const Tree& tree, int row);
std::vector<Token> tokens_of(const Tree& tree, const std::vector<int>& path);
std::vector<Token> tokens_from(Token first, int count);
// The values of q (which = 0), k (1) or v (2) of a token.
std::vector<double> values_of(Token token, int which, int64_t count);

// What a step of `count` rows reads and writes.
struct StepTensors {
  TensorBuffer q, k, v, o;
  TensorBuffer first, lengths, positions, masks;
  TensorBuffer accepted, accepted_counts;

  // padding: behind each row of q, k and v.
  StepTensors(Kind kind, Sizes s, DType dtype, int64_t count, int64_t sequences, kernels::Device device,
              int64_t padding = 0);
  kernels::DecodeRows rows() const { return {first, lengths, positions, masks}; }
  kernels::CommitPath path() const { return {accepted, accepted_counts, lengths}; }
};

// Decoding states of one kind for a batch of sequences, poisoned where nothing was written.
class Decoder {
 public:
  Decoder(Kind kind, Sizes s, DType dtype, size_t sequences = 1, kernels::Device device = {},
          int64_t capacity = 256);
  Decoder(const Decoder& other) { *this = other; }
  Decoder& operator=(const Decoder& other);

  // One step of every sequence: o of each row, sequence by sequence.
  std::vector<std::vector<Row>> step(const std::vector<Tree>& trees);
  // Accepts these rows of each sequence's last step.
  void commit(const std::vector<std::vector<int>>& accepted);
  // Plain decoding of one sequence: a step and a commit per token; the last token's o.
  Row plain(const std::vector<Token>& tokens);

  Kind kind() const { return kind_; }
  Sizes sizes() const { return s_; }
  DType dtype() const { return dtype_; }
  kernels::Device device() const { return device_; }
  int length(size_t b) const { return lengths_[b]; }
  // New tokens that may be computed at once: linear attention's state folds behind them.
  int room(size_t b) const;

 private:
  kernels::Context ctx() const { return {.device = device_, .stream = {}}; }
  void fill(const std::vector<Tree>& trees);
  void run();

  Kind kind_;
  Sizes s_;
  DType dtype_;
  kernels::Device device_;
  std::vector<int> lengths_;
  TensorBuffer k_, v_, sum_, z_;
  // Of the last step, and for the next one of as many rows: under compute-sanitizer memory is slow to get.
  std::optional<StepTensors> step_;
};

// Makes decoders of the kind and device under test.
using Maker = std::function<Decoder(Sizes, DType, size_t sequences)>;

// What a result may be off by beyond its own rounding to fp16 or bf16: `sums` units of the sums' type (fp32,
// or fp64) and `factors` roundings of what the values are multiplied by, both of the largest value.
struct Allowed {
  double sums, factors = 0;
};
// Against the definition on the same rounded inputs: token by token, or in chains of `at_once`.
void expect_definition(const Maker& make, Sizes s, DType dtype, int count, Allowed allowed, int at_once = 1);

// Chains, the longest that there is room for and in each further sample random ones, give the bits that
// single tokens give.
void expect_chains_equal_plain(const Maker& make, Sizes s, DType dtype, int count, int samples);

// Every node of a tree (about `checked` of them are looked at) has the bits of plain decoding of its path,
// and so have `after` tokens that follow an accepted path.
void expect_trees_equal_plain(const Maker& make, Sizes s, DType dtype, const std::vector<int>& prefixes,
                              int checked, int after);

// 64 sequences of different lengths and numbers of rows, some with none: each as if it were alone. Returns o
// of every sequence's tree and of the token after it.
std::vector<std::vector<Row>> expect_sequences_apart(const Maker& make, Sizes s, DType dtype);

// On a GPU: `step`, recorded once, then launched for each of `count` tokens, writes into o what a fresh
// decoder gives. What it reads of the sequence beyond its tensors is its own.
void expect_recorded_equals_eager(
    Decoder eager, int count, const std::function<void(const kernels::Context&, const StepTensors&)>& step);

}  // namespace decoding
