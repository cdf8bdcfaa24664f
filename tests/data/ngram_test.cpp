#include "data/ngram.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "kernels/core/error.h"
#include "kernels/core/philox.h"
#include "prepared.h"

namespace data {
namespace {

// Straight from the definition, with maps of strings.
struct Oracle {
  std::map<std::string, std::map<char, int>> next;  // context -> what followed
  void train(const std::string& text, int order) {
    for (size_t i = 0; i < text.size(); ++i)
      for (int n = 1; n <= order && n <= static_cast<int>(i) + 1; ++n)
        ++next[text.substr(i - n + 1, n - 1)][text[i]];
  }
  double p(const std::string& text, size_t i, int order) const {
    if (order == 0) return 1.0 / 256;
    const double lower = p(text, i, order - 1);
    if (static_cast<int>(i) < order - 1) return lower;
    const auto found = next.find(text.substr(i - order + 1, order - 1));
    if (found == next.end()) return lower;
    double total = 0;
    for (const auto& [c, count] : found->second) total += count;
    const auto c = found->second.find(text[i]);
    const auto types = static_cast<double>(found->second.size());
    return ((c == found->second.end() ? 0 : c->second) + types * lower) / (total + types);
  }
};

std::string random_text(uint64_t seed, int length) {
  std::string text;
  for (int i = 0; i < length; ++i) {
    const float u = kernels::uniform(seed, kernels::Purpose::test, static_cast<uint64_t>(i));
    // Skewed, with a dependence on the byte before, and a few bytes above 127.
    text += i > 0 && u < 0.5f ? static_cast<char>(text.back() ^ 1)
                              : static_cast<char>(250 + static_cast<int>(u * u * 12));
  }
  return text;
}

TEST(Ngram, MatchesTheDefinition) {
  const std::vector<std::string> train = {random_text(1, 700), "", random_text(2, 3), random_text(3, 400)};
  const std::vector<std::string> validation = {random_text(4, 300), random_text(5, 2),
                                               std::string("unseen \0 bytes", 14)};
  for (int order = 1; order <= 8; ++order) {
    Oracle oracle;
    for (const auto& text : train) oracle.train(text, order);
    double bits = 0, bytes = 0;
    for (const auto& text : validation)
      for (size_t i = 0; i < text.size(); ++i, ++bytes) bits -= std::log2(oracle.p(text, i, order));
    // The same sums in the same order of magnitude: rounding of some hundred terms only.
    EXPECT_NEAR(ngram_bits_per_byte(train, validation, {order})[0].bits_per_byte, bits / bytes, 1e-10)
        << order;
  }
}

TEST(Ngram, ProbabilitiesSumToOne) {
  const std::vector<std::string> train = {random_text(1, 500)};
  const std::string context = train[0].substr(100, 4);
  for (int order : {1, 2, 5}) {
    double sum = 0;
    for (int c = 0; c < 256; ++c) {
      const std::string longer = context + static_cast<char>(c);
      const double with =
          ngram_bits_per_byte(train, std::vector<std::string>{longer}, {order})[0].bits_per_byte * 5;
      const double without =
          ngram_bits_per_byte(train, std::vector<std::string>{context}, {order})[0].bits_per_byte * 4;
      sum += std::exp2(without - with);
    }
    EXPECT_NEAR(sum, 1.0, 1e-9) << order;
  }
}

TEST(Ngram, HigherOrdersPredictRepetitiveTextBetter) {
  const std::vector<std::string> train = {data_test::sample_text(1, 300)},
                                 validation = {data_test::sample_text(1, 40)};
  const auto scores = ngram_bits_per_byte(train, validation, {1, 2, 3, 5});
  ASSERT_EQ(scores.size(), 4u);
  EXPECT_EQ(scores[3].order, 5);
  for (size_t i = 1; i < scores.size(); ++i) EXPECT_LT(scores[i].bits_per_byte, scores[i - 1].bits_per_byte);
}

TEST(Ngram, FullTablesStillGiveAProbability) {
  const std::vector<std::string> train = {random_text(1, 5000)}, validation = {random_text(2, 500)};
  const auto scores = ngram_bits_per_byte(train, validation, {1, 4}, 40);
  EXPECT_TRUE(std::isfinite(scores[1].bits_per_byte));
  EXPECT_LT(scores[1].bits_per_byte, 9.0);
}

TEST(Ngram, TextsComeFromTheDataset) {
  const data_test::Scratch scratch;
  data_test::prepare_bytes(scratch, 12);
  const TokenDataset dataset(scratch / "out", "train", 16);
  const auto tokenizer = load_tokenizer(scratch / "out");
  const auto texts = document_texts(dataset, *tokenizer);
  ASSERT_EQ(static_cast<int64_t>(texts.size()), dataset.documents());
  for (int64_t d = 0; d < dataset.documents(); ++d) EXPECT_EQ(texts[d], read_file(dataset.document_name(d)));
  const auto some = document_texts(dataset, *tokenizer, 100);
  int64_t bytes = 0;
  for (const auto& text : some) bytes += static_cast<int64_t>(text.size());
  EXPECT_EQ(bytes, 100);
}

TEST(Ngram, RefusesBadArguments) {
  const std::vector<std::string> text = {"abc"};
  EXPECT_THROW(ngram_bits_per_byte(text, text, {}), kernels::ConfigError);
  EXPECT_THROW(ngram_bits_per_byte(text, text, {0, 2}), kernels::ConfigError);
  EXPECT_THROW(ngram_bits_per_byte(text, text, {9}), kernels::ConfigError);
  EXPECT_THROW(ngram_bits_per_byte(text, text, {3, 2}), kernels::ConfigError);
  EXPECT_THROW(ngram_bits_per_byte(text, {}, {2}), kernels::DataError);
}

}  // namespace
}  // namespace data
