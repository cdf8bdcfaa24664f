#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include "data/segments.h"
#include "kernels/core/error.h"
#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "prepared.h"

namespace data {
namespace {

using data_test::message_of;
using data_test::sample_text;
using kernels::ConfigError;
using kernels::DataError;

std::string source_text() {
  std::string text;
  for (int i = 0; i < 60; ++i)
    text += "#include <vector>\n\n\tif (value_" + std::to_string(i % 9) + " == nullptr) {\n        return -" +
            std::to_string(i) + ";\r\n\t}\n" + sample_text(i, 2) + "// caf\u00e9 \u4e16\u754c\n";
  return text;
}

const Tokenizer& trained() {
  static const std::string text = source_text();
  static const auto tokenizer = train_sentencepiece({text}, 400);
  return *tokenizer;
}

std::vector<std::string> hard_texts() {
  std::vector<std::string> texts = {"",
                                    " ",
                                    "\n",
                                    "\t",
                                    "  \t \n\n   x",
                                    "a\r\nb\r\n",
                                    "trailing   ",
                                    "   leading",
                                    "\u2581",
                                    "a\u2581b \u2581\u2581 c",
                                    "\u2585 \uE009\uE00A\uE008",
                                    "\U0001F600\U0001F468\u200D\U0001F469 e\u0301 \uFEFF\u00A0\u3000",
                                    "<s></s><unk><0x41>",
                                    "\x01\x02\x7f\x1b[0m",
                                    std::string("nul \0 inside", 12),
                                    "broken \xff\xc3 \xe2\x96 utf-8 \xed\xa0\x80 \xf5",
                                    std::string(5000, 'x'),
                                    std::string(3000, ' '),
                                    std::string(700, '\n') + std::string(700, '\t'),
                                    source_text()};
  std::string every;
  for (int c = 1; c < 0x3000; ++c) {
    if (c < 0x80) {
      every += static_cast<char>(c);
    } else if (c < 0x800) {
      every += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
    } else {
      every += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63)),
                static_cast<char>(0x80 | (c & 63))};
    }
  }
  texts.push_back(every);
  return texts;
}

void expect_lossless(const Tokenizer& tokenizer) {
  for (const std::string& text : hard_texts()) {
    const auto tokens = tokenizer.encode(text);
    for (int32_t token : tokens) {
      ASSERT_GE(token, 0);
      ASSERT_LT(token, tokenizer.vocabulary());
      ASSERT_NE(token, tokenizer.end_of_text());
    }
    ASSERT_EQ(tokenizer.decode(tokens), text);
  }
  for (uint64_t seed = 0; seed < 200; ++seed) {
    std::string text;
    for (uint64_t i = 0; i < 60; ++i) {
      const auto r = kernels::philox(seed, kernels::Purpose::test, i);
      text += r[0] % 3 == 0 ? static_cast<char>(r[1]) : " \n\tab_({;0\xe2\x96\x81"[r[1] % 13];
    }
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << seed;
  }
}

TEST(Tokenizer, BytesAreLossless) { expect_lossless(*make_byte_tokenizer()); }
TEST(Tokenizer, SentencePieceIsLossless) { expect_lossless(trained()); }

TEST(Tokenizer, SentencePieceLearnsWhiteSpaceAndWords) {
  EXPECT_EQ(trained().vocabulary(), 400);
  const std::string text = source_text();
  EXPECT_LT(trained().encode(text).size() * 3, text.size());
  EXPECT_LE(trained().encode("\n        return").size(), 3u);
}

TEST(Tokenizer, EndOfTextDecodesToNothing) {
  const auto bytes = make_byte_tokenizer();
  for (const Tokenizer* tokenizer : {const_cast<const Tokenizer*>(bytes.get()), &trained()})
    EXPECT_EQ(
        tokenizer->decode({tokenizer->end_of_text(), -1, static_cast<int32_t>(tokenizer->vocabulary())}), "");
}

TEST(Tokenizer, SerializedIsTheSameTokenizer) {
  const std::string text = source_text();
  for (const std::string& serialized : {make_byte_tokenizer()->serialized(), trained().serialized()}) {
    const auto a = deserialize_tokenizer(serialized), b = deserialize_tokenizer(a->serialized());
    EXPECT_EQ(a->hash(), b->hash());
    EXPECT_EQ(a->encode(text), b->encode(text));
    EXPECT_EQ(a->end_of_text(), b->end_of_text());
  }
  EXPECT_NE(make_byte_tokenizer()->hash(), trained().hash());
}

TEST(Tokenizer, TrainingIsReproducibleAtAnyNumberOfThreads) {
  const std::string text = source_text(), more = sample_text(3, 30);
  const int before = kernels::threads();
  kernels::set_threads(1);
  const auto one = train_sentencepiece({text, more, text}, 350);
  kernels::set_threads(3);
  const auto three = train_sentencepiece({text, more, text}, 350);
  kernels::set_threads(before);
  EXPECT_EQ(one->serialized(), three->serialized());
}

TEST(Tokenizer, TinyAndForeignTextsTrain) {
  const auto tiny = train_sentencepiece({"ab ab"}, 2048);
  EXPECT_LE(tiny->vocabulary(), 2048);
  expect_lossless(*tiny);
  std::string chinese;
  for (int i = 0; i < 3000; ++i) {
    const int c = 0x4E00 + i * 37 % 5000;
    chinese += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63)),
                static_cast<char>(0x80 | (c & 63))};
  }
  expect_lossless(*train_sentencepiece({chinese}, 400));  // far more characters than pieces
}

TEST(Tokenizer, SegmentsJoinToTheText) {
  for (const std::string& text : hard_texts()) {
    std::string joined;
    for_each_segment(text, [&](std::string_view segment, bool plain) {
      ASSERT_FALSE(segment.empty());
      ASSERT_LE(segment.size(), kLongestSegment + 4);
      ASSERT_TRUE(!plain || valid_utf8(segment));
      joined += segment;
    });
    ASSERT_EQ(joined, text);
  }
}

TEST(Tokenizer, RefusesWhatItCannotUse) {
  EXPECT_THROW(train_sentencepiece({"abc"}, 10), ConfigError);
  EXPECT_THROW(train_sentencepiece({"abc"}, 2000000), ConfigError);
  EXPECT_THROW(train_sentencepiece({}, 300), DataError);
  EXPECT_THROW(train_sentencepiece({""}, 300), DataError);
  const data_test::Scratch scratch;
  const std::string garbage = scratch.write("garbage.model", sample_text(1, 3));
  EXPECT_NE(
      message_of<DataError>([&] { load_tokenizer(garbage); }).find(garbage + ": not a SentencePiece model"),
      std::string::npos);
  EXPECT_NE(message_of<DataError>([&] { load_tokenizer(scratch / "missing"); }).find("missing"),
            std::string::npos);
  const std::string cut = trained().serialized().substr(0, 2000);
  EXPECT_THROW(deserialize_tokenizer(cut), DataError);
}

}  // namespace
}  // namespace data
