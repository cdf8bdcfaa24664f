// Decoding against training, and speculative steps against plain ones: the same rows, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>

#include "kernels/core/philox.h"
#include "kernels/ops/linear.h"
#include "tests/support/tensor_buffer.h"
#include "tests/support/tiny_model.h"

namespace {

using kernels::DType;
using kernels::Tensor;
using support::PackedBatch;
using support::TensorBuffer;
using support::TinyModel;
using Bytes = std::vector<char>;

constexpr int64_t kCapacity = 320;

struct Variant {
  const char* name;
  const char* normaliser = "sum";
  bool sequential = false;
};
void PrintTo(const Variant& v, std::ostream* out) { *out << v.name; }

configs::Config decode_config(const Variant& variant = {"sum"}) {
  configs::Config config = support::tiny_config();
  config.model.layers = 3;
  config.model.width = 32;
  config.model.ffn_width = 40;
  config.model.context = 256;
  config.model.attention = "linear,softmax,linear";
  config.attention.linear_normaliser = variant.normaliser;
  config.heads.medusa = 2;
  config.heads.medusa_sequential = variant.sequential;
  config.heads.mtp = 2;
  return config;
}

// New tokens of one sequence: row i hangs on row parents[i], -1 is the committed end.
struct Rows {
  std::vector<int32_t> tokens;
  std::vector<int> parents;
  static Rows chain(std::vector<int32_t> tokens) {
    Rows rows{std::move(tokens), {}};
    for (size_t i = 0; i < rows.tokens.size(); ++i) rows.parents.push_back(static_cast<int>(i) - 1);
    return rows;
  }
};

template <typename T>
Tensor view(std::vector<T>& values) {
  return Tensor(values.data(), kernels::dtype_of<T>(), {static_cast<int64_t>(values.size())});
}

// The state of one trunk (or one MTP depth) for a batch of sequences, and the steps made with it.
class Decoder {
 public:
  // depth 0: the trunk.
  Decoder(TinyModel& tiny, int64_t batch, int64_t depth = 0)
      : tiny_(tiny),
        depth_(depth),
        lengths_(static_cast<size_t>(batch)),
        state_(depth == 0 ? tiny.model().make_trunk_state({}, batch, kCapacity)
                          : tiny.model().make_mtp_state({}, batch, kCapacity)) {}

  // Hidden rows of a step; `hidden_in` for an MTP depth. Nothing is committed.
  TensorBuffer step(const std::vector<Rows>& sequences, const Tensor& hidden_in = {}) {
    std::vector<int32_t> tokens, first{0}, positions;
    std::vector<int64_t> ancestors;
    for (size_t b = 0; b < sequences.size(); ++b) {
      std::vector<int32_t> depth;
      std::vector<int64_t> seen;
      for (size_t i = 0; i < sequences[b].tokens.size(); ++i) {
        const int parent = sequences[b].parents[i];
        depth.push_back(parent < 0 ? 0 : depth[static_cast<size_t>(parent)] + 1);
        seen.push_back((parent < 0 ? 0 : seen[static_cast<size_t>(parent)]) | int64_t{1} << i);
        tokens.push_back(sequences[b].tokens[i]);
        positions.push_back(lengths_[b] + depth.back());
        ancestors.push_back(seen.back());
      }
      first.push_back(static_cast<int32_t>(tokens.size()));
    }
    const kernels::DecodeRows rows{view(first), view(lengths_), view(positions), view(ancestors)};
    TensorBuffer hidden(tiny_.parameters().compute(),
                        {static_cast<int64_t>(tokens.size()), tiny_.model().width()});
    kernels::Arena scratch("scratch", {});
    for (const bool rehearsal : {true, false}) {
      if (!rehearsal) scratch.place();
      const kernels::Context ctx{{}, {}, &scratch, rehearsal};
      if (depth_ == 0)
        tiny_.model().decode_trunk(ctx, view(tokens), rows, state_, hidden);
      else
        tiny_.model().decode_mtp(ctx, depth_, view(tokens), hidden_in, rows, state_, hidden);
      EXPECT_EQ(scratch.mark(), 0u);
    }
    return hidden;
  }

  // Keeps these rows of the last step.
  void commit(const std::vector<std::vector<int>>& paths) {
    std::vector<int32_t> rows(paths.size() * kernels::kMaxDecodeRows), counts;
    for (size_t b = 0; b < paths.size(); ++b) {
      std::copy(paths[b].begin(), paths[b].end(),
                rows.begin() + static_cast<int64_t>(b) * kernels::kMaxDecodeRows);
      counts.push_back(static_cast<int32_t>(paths[b].size()));
    }
    Tensor row_table = view(rows).view({static_cast<int64_t>(paths.size()), kernels::kMaxDecodeRows});
    state_.commit({}, {row_table, view(counts), view(lengths_)});
    for (size_t b = 0; b < paths.size(); ++b) lengths_[b] += counts[b];
  }

  // A chain for one sequence, all of it kept.
  TensorBuffer append(const std::vector<int32_t>& tokens, const Tensor& hidden_in = {}) {
    const TensorBuffer hidden = step({Rows::chain(tokens)}, hidden_in);
    std::vector<int> all;
    for (size_t i = 0; i < tokens.size(); ++i) all.push_back(static_cast<int>(i));
    commit({all});
    return hidden;
  }
  int32_t length(size_t b = 0) const { return lengths_[b]; }
  void reset() {
    state_.reset({});
    std::fill(lengths_.begin(), lengths_.end(), 0);
  }

 private:
  TinyModel& tiny_;
  int64_t depth_;
  std::vector<int32_t> lengths_;
  trainer::DecodeState state_;
};

Bytes row(const TensorBuffer& hidden, int64_t i) {
  const Tensor r = hidden.tensor().slice(i, 1);
  const char* data = static_cast<const char*>(r.data);
  return Bytes(data, data + r.bytes());
}

// Plain decoding, one token at a time: the hidden row of every token.
std::vector<Bytes> plain(TinyModel& tiny, const std::vector<int32_t>& tokens) {
  Decoder decoder(tiny, 1);
  std::vector<Bytes> rows;
  for (const int32_t token : tokens) rows.push_back(row(decoder.append({token}), 0));
  return rows;
}

// Prefill in chunks that end at the fold positions, the last `singles` tokens one by one.
std::vector<TensorBuffer> prefill(Decoder& decoder, const std::vector<int32_t>& tokens, size_t singles,
                                  const std::vector<TensorBuffer>& hidden_in = {}) {
  std::vector<TensorBuffer> parts;
  for (size_t begin = 0; begin < tokens.size();) {
    size_t end = std::min(tokens.size(), (begin / kernels::kFold + 1) * kernels::kFold);
    if (begin < tokens.size() - singles) end = std::min(end, tokens.size() - singles);
    if (begin >= tokens.size() - singles) end = begin + 1;
    const Tensor in = hidden_in.empty() ? Tensor{} : hidden_in[parts.size()].tensor();
    parts.push_back(decoder.append(
        {tokens.begin() + static_cast<int64_t>(begin), tokens.begin() + static_cast<int64_t>(end)}, in));
    begin = end;
  }
  return parts;
}

// What Medusa head `head` reads beside hidden rows that begin at token `at`: the head + 1 tokens after each.
std::vector<int32_t> tokens_after(const std::vector<int32_t>& tokens, size_t at, int64_t rows, int64_t head) {
  std::vector<int32_t> after;
  for (int64_t i = 0; i < rows; ++i)
    for (size_t j = at + static_cast<size_t>(i) + 1; j <= at + static_cast<size_t>(i + head) + 1; ++j)
      after.push_back(j < tokens.size() ? tokens[j] : -1);
  return after;
}

// Logits of hidden rows; of a Medusa head when medusa_head >= 0.
TensorBuffer logits_of(TinyModel& tiny, const Tensor& hidden, int64_t medusa_head = -1,
                       std::vector<int32_t> after = {}) {
  TensorBuffer logits(kernels::main_dtype(hidden.dtype), {hidden.rows(), TinyModel::kVocabulary});
  TensorBuffer out(hidden.dtype, hidden.shape);
  kernels::Arena scratch("scratch", {});
  for (const bool rehearsal : {true, false}) {
    if (!rehearsal) scratch.place();
    const kernels::Context ctx{{}, {}, &scratch, rehearsal};
    if (medusa_head >= 0) tiny.model().medusa_hidden(ctx, medusa_head, hidden, view(after), out);
    tiny.model().logits(ctx, medusa_head >= 0 ? out.tensor() : hidden, logits, medusa_head);
  }
  return logits;
}

// Token losses of head rows, from logits; `offset` as in HeadLoss.
std::vector<double> token_losses(TinyModel& tiny, const std::vector<TensorBuffer>& parts,
                                 const std::vector<int32_t>& tokens, size_t offset,
                                 int64_t medusa_head = -1) {
  std::vector<double> losses;
  for (const TensorBuffer& hidden : parts) {
    const int64_t n = hidden.tensor().rows();
    const std::vector<double> values =
        logits_of(tiny, hidden, medusa_head, tokens_after(tokens, losses.size(), n, medusa_head)).values();
    for (int64_t i = 0; i < n && losses.size() + offset + 1 < tokens.size(); ++i) {
      const double* x = values.data() + i * TinyModel::kVocabulary;
      double sum = 0;
      for (int64_t v = 0; v < TinyModel::kVocabulary; ++v) sum += std::exp(x[v]);
      losses.push_back(std::log(sum) - x[tokens[losses.size() + offset + 1]]);
    }
  }
  return losses;
}

// What evaluate() makes of every kSampled-th of the same tokens.
constexpr size_t kSampled = 9;
std::vector<double> training_losses(TinyModel& tiny, const std::vector<int32_t>& tokens, size_t loss) {
  PackedBatch batch({tokens}, tiny.model().offsets());
  const size_t offset = static_cast<size_t>(tiny.model().losses()[loss].offset);
  std::vector<double> losses;
  for (size_t i = 0; i + offset + 1 < tokens.size(); i += kSampled) {
    std::fill(batch.weights.begin(), batch.weights.end(), 0.0f);
    batch.weights[offset * batch.tokens.size() + i] = 1;
    losses.push_back(tiny.evaluate(batch)[loss]);
  }
  return losses;
}

void expect_near(const std::vector<double>& all, const std::vector<double>& sampled, double tolerance) {
  ASSERT_EQ((all.size() + kSampled - 1) / kSampled, sampled.size());
  for (size_t i = 0; i < sampled.size(); ++i)
    EXPECT_NEAR(all[i * kSampled], sampled[i], tolerance) << "row " << i * kSampled;
}

class ModelDecode : public testing::TestWithParam<Variant> {
 protected:
  TinyModel make(DType compute) const {
    TinyModel tiny(decode_config(GetParam()), compute, false);
    tiny.model().prepare_decoding({});
    return tiny;
  }
};

TEST_P(ModelDecode, EqualsTrainingInFp64) {
  TinyModel tiny = make(DType::f64);
  const std::vector<int32_t> tokens = support::random_tokens(85, TinyModel::kVocabulary, 9);
  Decoder trunk(tiny, 1);
  const std::vector<TensorBuffer> hidden = prefill(trunk, tokens, 6);
  // The same function summed in another order: fp64 rounding, with room for fp32 constants in neither.
  constexpr double tolerance = 1e-9;
  expect_near(token_losses(tiny, hidden, tokens, 0), training_losses(tiny, tokens, 0), tolerance);
  expect_near(token_losses(tiny, hidden, tokens, 1, 0), training_losses(tiny, tokens, 1), tolerance);
  expect_near(token_losses(tiny, hidden, tokens, 2, 1), training_losses(tiny, tokens, 2), tolerance);
  // Depth k reads token i + k beside hidden row i: the last rows read a token that training has too.
  std::vector<TensorBuffer> previous = hidden;
  std::vector<int32_t> shifted = tokens;
  for (int64_t k = 1; k <= 2; ++k) {
    std::rotate(shifted.begin(), shifted.begin() + 1, shifted.end());
    Decoder depth(tiny, 1, k);
    previous = prefill(depth, shifted, 6, previous);
    expect_near(token_losses(tiny, previous, tokens, static_cast<size_t>(k)),
                training_losses(tiny, tokens, static_cast<size_t>(2 + k)), tolerance);
  }
}

TEST_P(ModelDecode, ChunksAndBatchesEqualSingleTokensBitwise) {
  for (const DType compute : {DType::f16, DType::f32}) {
    TinyModel tiny = make(compute);
    const auto a = support::random_tokens(90, TinyModel::kVocabulary, 1);
    const auto b = support::random_tokens(30, TinyModel::kVocabulary, 2);
    const auto expected_a = plain(tiny, a), expected_b = plain(tiny, b);
    Decoder alone(tiny, 1);
    size_t at = 0;
    for (const TensorBuffer& part : prefill(alone, a, 3))
      for (int64_t i = 0; i < part.tensor().rows(); ++i) EXPECT_EQ(row(part, i), expected_a[at++]);
    // Two sequences of different lengths, one ahead of the other; 70 rows in a step.
    Decoder both(tiny, 2);
    const Rows first = Rows::chain({a.begin(), a.begin() + 50}),
               second = Rows::chain({b.begin(), b.begin() + 20});
    const TensorBuffer hidden = both.step({first, second});
    for (int64_t i = 0; i < 50; ++i) EXPECT_EQ(row(hidden, i), expected_a[static_cast<size_t>(i)]);
    for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(row(hidden, 50 + i), expected_b[static_cast<size_t>(i)]);
  }
}

TEST_P(ModelDecode, TreeRowsEqualTheirPathsBitwise) {
  TinyModel tiny = make(DType::f16);
  const auto prompt = support::random_tokens(70, TinyModel::kVocabulary, 3);
  const Rows tree{support::random_tokens(9, TinyModel::kVocabulary, 4), {-1, 0, 0, 1, 1, 2, 3, 3, 5}};
  Decoder decoder(tiny, 1);
  prefill(decoder, prompt, 0);
  const TensorBuffer hidden = decoder.step({tree});
  for (size_t i = 0; i < tree.tokens.size(); ++i) {
    std::vector<int32_t> path;
    for (int r = static_cast<int>(i); r >= 0; r = tree.parents[static_cast<size_t>(r)])
      path.insert(path.begin(), tree.tokens[static_cast<size_t>(r)]);
    std::vector<int32_t> tokens = prompt;
    tokens.insert(tokens.end(), path.begin(), path.end());
    EXPECT_EQ(row(hidden, static_cast<int64_t>(i)), plain(tiny, tokens).back()) << "node " << i;
  }
}

// Steps of random trees that hold the true continuation on a random path of random length, also none of it,
// over several folds; after each step the accepted rows must be those of plain decoding.
TEST_P(ModelDecode, SpeculationEqualsPlainDecodingBitwise) {
  for (const DType compute : {DType::f16, DType::bf16, DType::f32}) {
    TinyModel tiny = make(compute);
    const auto tokens = support::random_tokens(200, TinyModel::kVocabulary, 5);
    const std::vector<Bytes> expected = plain(tiny, tokens);
    Decoder decoder(tiny, 1);
    for (uint64_t round = 0; decoder.length() < 190; ++round) {
      const auto random = kernels::philox(round, kernels::Purpose::test, 0);
      const size_t at = static_cast<size_t>(decoder.length());
      const size_t to_fold = kernels::kFold - at % kernels::kFold;
      // Each level: a wrong branch first (in rounds of an even number), then the true token.
      const size_t levels = std::min<size_t>(to_fold, 1 + random[0] % 6);
      Rows rows;
      std::vector<int> path;
      int parent = -1;
      for (size_t level = 0; level < levels; ++level) {
        if (random[1] >> level & 1) {
          rows.tokens.push_back((tokens[at + level] + 1) % TinyModel::kVocabulary);
          rows.parents.push_back(parent);
        }
        path.push_back(static_cast<int>(rows.tokens.size()));
        rows.tokens.push_back(tokens[at + level]);
        rows.parents.push_back(parent);
        parent = path.back();
      }
      const TensorBuffer hidden = decoder.step({rows});
      for (size_t i = 0; i < path.size(); ++i)
        EXPECT_EQ(row(hidden, path[i]), expected[at + i]) << name_of(compute) << " token " << at + i;
      path.resize(random[2] % (path.size() + 1));  // 0: the whole step is rolled back
      decoder.commit({path});
    }
  }
}

TEST_P(ModelDecode, RowsOfHeadsStandAlone) {
  for (const DType compute : {DType::f16, DType::f32}) {
    TinyModel tiny = make(compute);
    const auto tokens = support::random_tokens(11, TinyModel::kVocabulary, 8);
    Decoder trunk(tiny, 1), together(tiny, 1, 1), alone(tiny, 1, 1);
    const TensorBuffer hidden = trunk.append(tokens), depth = together.append(tokens, hidden);
    const TensorBuffer logits[] = {logits_of(tiny, hidden),
                                   logits_of(tiny, hidden, 1, tokens_after(tokens, 0, 11, 1))};
    for (int64_t i = 0; i < 11; ++i) {
      const Tensor one = hidden.tensor().slice(i, 1);
      EXPECT_EQ(row(logits_of(tiny, one), 0), row(logits[0], i));
      EXPECT_EQ(row(logits_of(tiny, one, 1, tokens_after(tokens, static_cast<size_t>(i), 1, 1)), 0),
                row(logits[1], i));
      EXPECT_EQ(row(alone.append({tokens[static_cast<size_t>(i)]}, one), 0), row(depth, i));
    }
  }
}

TEST_P(ModelDecode, ResetForgetsEverything) {
  TinyModel tiny = make(DType::f16);
  const auto tokens = support::random_tokens(70, TinyModel::kVocabulary, 6);
  Decoder decoder(tiny, 1);
  prefill(decoder, support::random_tokens(130, TinyModel::kVocabulary, 7), 0);
  decoder.reset();
  const auto parts = prefill(decoder, tokens, 0);
  EXPECT_EQ(row(parts.back(), parts.back().tensor().rows() - 1), plain(tiny, tokens).back());
}

INSTANTIATE_TEST_SUITE_P(Variants, ModelDecode,
                         testing::Values(Variant{"sum"}, Variant{"norm", "norm"},
                                         Variant{"sequential_heads", "sum", true}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(ModelDecoding, LearnedPositionsEndAtTheContext) {
  configs::Config config = decode_config();
  config.model.position = "learned";
  TinyModel tiny(config, DType::f16, false);
  EXPECT_THROW(tiny.model().make_trunk_state({}, 1, 257), kernels::ConfigError);
  tiny.model().make_trunk_state({}, 1, 256);
}

TEST(ModelDecoding, CountsTheWeightsOfAStep) {
  configs::Config config = decode_config();
  TinyModel tiny(config, DType::f16, false);
  // q and o 32 x 32, k and v 16 x 32, gate, up and down 32 x 40; the tied unembedding.
  EXPECT_EQ(tiny.model().decode_weight_bytes(),
            2 * (3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 40) + 32 * TinyModel::kVocabulary));
}

}  // namespace
