#include "tests/kernels/attention_decoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>

#include "kernels/core/stream.h"
#include "tests/support/rehearsed.h"

namespace decoding {

namespace {

uint64_t ancestors(const Tree& tree, size_t row) {
  uint64_t bits = 0;
  for (int i = static_cast<int>(row); i >= 0; i = tree[static_cast<size_t>(i)].parent)
    bits |= uint64_t{1} << i;
  return bits;
}

std::vector<int> first_rows(int count) {
  std::vector<int> rows;
  for (int i = 0; i < count; ++i) rows.push_back(i);
  return rows;
}

}  // namespace

Tree chain(const std::vector<Token>& tokens) {
  Tree tree;
  for (Token t : tokens) tree.push_back({t, static_cast<int>(tree.size()) - 1});
  return tree;
}

Tree random_tree(std::mt19937& random, int nodes, int depth, Token token) {
  Tree tree = {{token, -1}};
  while (static_cast<int>(tree.size()) < nodes) {
    const int parent = static_cast<int>(random() % tree.size());
    if (std::popcount(ancestors(tree, static_cast<size_t>(parent))) >= depth) continue;
    tree.push_back({token + static_cast<Token>(tree.size()), parent});
  }
  return tree;
}

std::vector<int> path_to(const Tree& tree, int row) {
  std::vector<int> path;
  for (int i = row; i >= 0; i = tree[static_cast<size_t>(i)].parent) path.insert(path.begin(), i);
  return path;
}

std::vector<Token> tokens_of(const Tree& tree, const std::vector<int>& path) {
  std::vector<Token> tokens;
  for (int i : path) tokens.push_back(tree[static_cast<size_t>(i)].token);
  return tokens;
}

std::vector<Token> tokens_from(Token first, int count) {
  std::vector<Token> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(first + i);
  return tokens;
}

std::vector<double> values_of(Token token, int which, int64_t count) {
  return support::normal_values(static_cast<size_t>(count),
                                static_cast<uint64_t>(token) * 3 + static_cast<uint64_t>(which) + 1);
}

StepTensors::StepTensors(Kind kind, Sizes s, DType dtype, int64_t count, int64_t sequences,
                         kernels::Device device, int64_t padding)
    : q(dtype, {count, s.heads, s.width}, device, padding),
      k(dtype, {count, s.key_heads, s.width}, device, padding),
      v(dtype, {count, s.key_heads, s.width}, device, padding),
      o(kind == Kind::linear_plain ? kernels::main_dtype(dtype) : dtype, {count, s.heads, s.width}, device),
      first(DType::i32, {sequences + 1}, device),
      lengths(DType::i32, {sequences}, device),
      positions(DType::i32, {count}, device),
      masks(DType::i64, {count}, device),
      accepted(DType::i32, {sequences, kernels::kMaxDecodeRows}, device),
      accepted_counts(DType::i32, {sequences}, device) {}

Decoder::Decoder(Kind kind, Sizes s, DType dtype, size_t sequences, kernels::Device device, int64_t capacity)
    : kind_(kind), s_(s), dtype_(dtype), device_(device), lengths_(sequences, 0) {
  const auto b = static_cast<int64_t>(sequences);
  const DType main = kernels::main_dtype(dtype);
  const int64_t slots = kind == Kind::softmax ? capacity : 2 * kFold;
  k_ = TensorBuffer(kind == Kind::softmax ? dtype : main, {b, slots, s.key_heads, s.width}, device);
  v_ = TensorBuffer(dtype, {b, slots, s.key_heads, s.width}, device);
  sum_ = TensorBuffer(main, {b, s.key_heads, s.width, s.width}, device);
  z_ = TensorBuffer(main, {b, s.key_heads, s.width}, device);
  sum_.set(std::vector<double>(static_cast<size_t>(sum_.tensor().numel())));
  z_.set(std::vector<double>(static_cast<size_t>(z_.tensor().numel())));
}

Decoder& Decoder::operator=(const Decoder& other) {
  kind_ = other.kind_, s_ = other.s_, dtype_ = other.dtype_, device_ = other.device_;
  lengths_ = other.lengths_;
  for (auto [to, from] :
       {std::pair{&k_, &other.k_}, {&v_, &other.v_}, {&sum_, &other.sum_}, {&z_, &other.z_}}) {
    *to = TensorBuffer(from->tensor().dtype, from->tensor().shape, device_);
    support::copy(*from, *to);
  }
  step_.reset();
  return *this;
}

std::vector<std::vector<Row>> Decoder::step(const std::vector<Tree>& trees) {
  fill(trees);
  run();
  const auto all = step_->o.values();
  std::vector<std::vector<Row>> result;
  auto at = all.begin();
  for (const Tree& tree : trees) {
    result.emplace_back();
    for (size_t i = 0; i < tree.size(); ++i, at += s_.heads * s_.width)
      result.back().emplace_back(at, at + s_.heads * s_.width);
  }
  return result;
}

void Decoder::fill(const std::vector<Tree>& trees) {
  std::vector<double> first = {0}, positions, inputs[3];
  std::vector<int64_t> masks;
  for (size_t b = 0; b < trees.size(); ++b) {
    for (size_t i = 0; i < trees[b].size(); ++i) {
      const uint64_t mask = ancestors(trees[b], i);
      positions.push_back(lengths_[b] + std::popcount(mask) - 1);
      masks.push_back(static_cast<int64_t>(mask));
      for (int which = 0; which < 3; ++which) {
        const auto x = values_of(trees[b][i].token, which, (which == 0 ? s_.heads : s_.key_heads) * s_.width);
        inputs[which].insert(inputs[which].end(), x.begin(), x.end());
      }
    }
    first.push_back(static_cast<double>(positions.size()));
  }
  const auto count = static_cast<int64_t>(positions.size()), sequences = static_cast<int64_t>(trees.size());
  if (!step_ || step_->q.tensor().dim(0) != count || step_->lengths.tensor().dim(0) != sequences)
    step_.emplace(kind_, s_, dtype_, count, sequences, device_, 8);
  else
    step_->o.poison();
  step_->q.set(inputs[0]), step_->k.set(inputs[1]), step_->v.set(inputs[2]);
  step_->first.set(first), step_->positions.set(positions);
  step_->lengths.set(std::vector<double>(lengths_.begin(), lengths_.end()));
  kernels::copy_bytes(step_->masks.tensor().data, device_, masks.data(), {}, step_->masks.tensor().bytes());
}

void Decoder::run() {
  if (kind_ == Kind::softmax) {
    const auto decode = [&](const kernels::Context& context) {
      kernels::softmax_attention_decode(context, step_->q, step_->k, step_->v, step_->rows(), k_, v_,
                                        step_->o);
    };
    support::run_rehearsed(device_, {}, decode);
  } else {
    kernels::LinearAttentionState state{sum_, z_, k_, v_};
    kernels::linear_attention_decode(ctx(), {.normalise = kind_ == Kind::linear}, step_->q, step_->k,
                                     step_->v, step_->rows(), state, step_->o);
  }
}

void Decoder::commit(const std::vector<std::vector<int>>& accepted) {
  constexpr double kNoRow = -1000000;  // never read
  std::vector<double> rows(accepted.size() * kernels::kMaxDecodeRows, kNoRow), counts;
  for (size_t i = 0; i < accepted.size(); ++i) {
    std::copy(accepted[i].begin(), accepted[i].end(),
              rows.begin() + static_cast<int64_t>(i) * kernels::kMaxDecodeRows);
    counts.push_back(static_cast<double>(accepted[i].size()));
    lengths_[i] += static_cast<int>(accepted[i].size());
  }
  step_->accepted.set(rows), step_->accepted_counts.set(counts);
  if (kind_ == Kind::softmax) {
    kernels::commit_rows(ctx(), step_->path(), false, k_);
    kernels::commit_rows(ctx(), step_->path(), false, v_);
  } else {
    kernels::LinearAttentionState state{sum_, z_, k_, v_};
    kernels::linear_attention_commit(ctx(), step_->path(), state);
  }
}

Row Decoder::plain(const std::vector<Token>& tokens) {
  Row last;
  for (Token t : tokens) {
    last = step({chain({t})})[0][0];
    commit({{0}});
  }
  return last;
}

int Decoder::room(size_t b) const {
  return kind_ == Kind::softmax ? static_cast<int>(kernels::kMaxDecodeRows)
                                : static_cast<int>(kFold - lengths_[b] % kFold);
}

void expect_definition(const Maker& make, Sizes s, DType dtype, int count, Allowed allowed, int at_once) {
  SCOPED_TRACE(std::string(name_of(dtype)) + ", head size " + std::to_string(s.width));
  std::vector<double> inputs[3];
  for (Token t = 0; t < count; ++t)
    for (int which = 0; which < 3; ++which) {
      TensorBuffer rounded(dtype, {(which == 0 ? s.heads : s.key_heads) * s.width});
      rounded.set(values_of(t, which, rounded.tensor().numel()));
      const auto x = rounded.values();
      inputs[which].insert(inputs[which].end(), x.begin(), x.end());
    }
  Decoder decoder = make(s, dtype, 1);
  const auto expected = oracle::attention(decoder.kind(), s, inputs[0], inputs[1], inputs[2], {0, count});
  double largest = 0;
  for (const auto& values : {expected, inputs[2]})
    for (double x : values) largest = std::max(largest, std::abs(x));
  const DType out = decoder.kind() == Kind::linear_plain ? kernels::main_dtype(dtype) : dtype;
  const auto unit_of = [](DType type) {
    return type == DType::f16 ? 0x1p-11 : type == DType::bf16 ? 0x1p-8 : 0;
  };
  const double unit = unit_of(out), main_unit = dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  // fp16's subnormal numbers are 2^-24 apart.
  const double fixed =
      (main_unit * allowed.sums + unit_of(dtype) * allowed.factors) * largest + (unit > 0 ? 0x1p-25 : 0);
  for (Token t = 0; t < count;) {
    const int taken = std::min({at_once, decoder.room(0), count - t});
    const auto rows = decoder.step({chain(tokens_from(t, taken))})[0];
    decoder.commit({first_rows(taken)});
    for (int row = 0; row < taken; ++row, ++t) {
      const Row& o = rows[static_cast<size_t>(row)];
      for (size_t i = 0; i < o.size(); ++i) {
        const double y = expected[static_cast<size_t>(t) * o.size() + i];
        ASSERT_NEAR(o[i], y, unit * std::abs(y) + fixed) << "token " << t;
      }
    }
  }
}

void expect_chains_equal_plain(const Maker& make, Sizes s, DType dtype, int count, int samples) {
  SCOPED_TRACE(std::string(name_of(dtype)) + ", head size " + std::to_string(s.width));
  std::mt19937 random(1);
  Decoder one = make(s, dtype, 1);
  std::vector<Row> expected;
  for (Token t = 0; t < count; ++t) expected.push_back(one.plain({t}));
  for (int sample = 0; sample < samples; ++sample) {
    Decoder many = make(s, dtype, 1);
    while (many.length(0) < count) {
      const int begin = many.length(0), most = std::min(many.room(0), count - begin);
      const int taken = sample == 0 ? most : 1 + static_cast<int>(random() % static_cast<unsigned>(most));
      const auto rows = many.step({chain(tokens_from(begin, taken))})[0];
      for (int i = 0; i < taken; ++i)
        ASSERT_EQ(rows[static_cast<size_t>(i)], expected[static_cast<size_t>(begin + i)])
            << begin << " + " << i;
      many.commit({first_rows(taken)});
    }
  }
}

void expect_trees_equal_plain(const Maker& make, Sizes s, DType dtype, const std::vector<int>& prefixes,
                              int checked, int after) {
  SCOPED_TRACE(std::string(name_of(dtype)) + ", head size " + std::to_string(s.width));
  std::mt19937 random(2);
  for (int prefix : prefixes) {
    Decoder before = make(s, dtype, 1);
    before.plain(tokens_from(0, prefix));
    for (int nodes : {2, 9, 31, 64}) {
      const int depth = std::min(before.room(0), nodes);
      const Tree tree = random_tree(random, depth == 1 ? 1 : nodes, depth, 1000);
      Decoder verify = before;
      const auto rows = verify.step({tree})[0];
      for (size_t i = 0; i < tree.size(); i += 1 + tree.size() / static_cast<size_t>(checked)) {
        Decoder alone = before;
        ASSERT_EQ(rows[i], alone.plain(tokens_of(tree, path_to(tree, static_cast<int>(i)))))
            << "prefix " << prefix << ", node " << i << " of " << tree.size();
      }
      const auto path = path_to(tree, static_cast<int>(random() % tree.size()));
      verify.commit({path});
      Decoder plain = before;
      plain.plain(tokens_of(tree, path));
      for (Token t = 2000; t < 2000 + after; ++t)
        ASSERT_EQ(verify.plain({t}), plain.plain({t})) << "prefix " << prefix << ", after the tree " << t;
    }
  }
}

namespace {

// A sequence of the batch: its committed tokens, then a tree of which the path to the last node is accepted.
struct Script {
  int prefix;
  Token first;
  Tree tree = {};
  std::vector<int> path = {};
};

// Brings every sequence to its prefix, each step with as many tokens as there is room for.
void prefill(Decoder& decoder, const std::vector<Script>& scripts) {
  for (bool left = true; left;) {
    left = false;
    std::vector<Tree> trees;
    std::vector<std::vector<int>> accepted;
    for (size_t b = 0; b < scripts.size(); ++b) {
      const int length = decoder.length(b), count = std::min(decoder.room(b), scripts[b].prefix - length);
      trees.push_back(chain(tokens_from(scripts[b].first + length, count)));
      accepted.push_back(first_rows(count));
      left = left || count > 0;
    }
    if (!left) return;
    decoder.step(trees);
    decoder.commit(accepted);
  }
}

// o of the sequences' trees, and of one token after each.
std::vector<std::vector<Row>> play(Decoder decoder, const std::vector<Script>& scripts) {
  prefill(decoder, scripts);
  std::vector<Tree> trees;
  std::vector<std::vector<int>> paths;
  for (const Script& script : scripts) {
    trees.push_back(script.tree);
    paths.push_back(script.path);
  }
  auto rows = decoder.step(trees);
  decoder.commit(paths);
  const auto after = decoder.step(std::vector<Tree>(scripts.size(), chain({77})));
  for (size_t b = 0; b < scripts.size(); ++b) rows[b].push_back(after[b][0]);
  return rows;
}

}  // namespace

std::vector<std::vector<Row>> expect_sequences_apart(const Maker& make, Sizes s, DType dtype) {
  std::mt19937 random(3);
  std::vector<Script> scripts;
  const bool folds = make(s, dtype, 1).kind() != Kind::softmax;
  for (int b = 0; b < 64; ++b) {
    Script script{.prefix = b * 37 % 131, .first = b * 1000};
    const int room = folds ? static_cast<int>(kFold) - script.prefix % static_cast<int>(kFold) : 64;
    if (b % 5 != 3) script.tree = random_tree(random, room == 1 ? 1 : 1 + b % 20, room, 900 + b);
    script.path = path_to(script.tree, static_cast<int>(script.tree.size()) - 1);
    scripts.push_back(script);
  }
  const auto together = play(make(s, dtype, scripts.size()), scripts);
  for (size_t b = 0; b < scripts.size(); b += 3)
    EXPECT_EQ(together[b], play(make(s, dtype, 1), {scripts[b]})[0]) << "sequence " << b;
  return together;
}

void expect_recorded_equals_eager(
    Decoder eager, int count, const std::function<void(const kernels::Context&, const StepTensors&)>& step) {
  const kernels::Device device = eager.device();
  const Sizes s = eager.sizes();
  StepTensors t(eager.kind(), s, eager.dtype(), 1, 1, device);
  t.first.set(std::vector<double>{0, 1});
  for (TensorBuffer* zero : {&t.lengths, &t.positions, &t.accepted})
    zero->set(std::vector<double>(static_cast<size_t>(zero->tensor().numel())));
  for (TensorBuffer* one : {&t.masks, &t.accepted_counts}) one->set(0, 1);
  const kernels::OwnedStream stream(device);
  const auto on_tensors = [&](const kernels::Context& ctx) { step(ctx, t); };
  const support::Rehearsed rehearsed(device, stream.get(), on_tensors);
  kernels::Graph graph;
  kernels::Graph::begin(stream.get());
  on_tensors(rehearsed.ctx);
  graph.end(stream.get());
  for (Token token = 0; token < count; ++token) {
    t.q.set(values_of(token, 0, t.q.tensor().numel()));
    t.k.set(values_of(token, 1, t.k.tensor().numel()));
    t.v.set(values_of(token, 2, t.v.tensor().numel()));
    for (TensorBuffer* place : {&t.lengths, &t.positions}) place->set(0, token);
    t.o.poison();
    graph.launch(stream.get());
    kernels::synchronize(device, stream.get());
    ASSERT_EQ(t.o.values(), eager.plain({token})) << token;
  }
}

}  // namespace decoding
