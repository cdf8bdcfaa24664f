#include "data/prepare.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <map>
#include <set>

#include "data/dataset.h"
#include "data/formats/reader.h"
#include "kernels/core/error.h"
#include "prepared.h"

namespace data {
namespace {

using data_test::message_of;
using data_test::sample_text;
using data_test::Scratch;
using kernels::DataError;

PrepareParams bytes_params(const Scratch& scratch, std::vector<std::string> inputs) {
  PrepareParams params;
  params.inputs = std::move(inputs);
  params.output = scratch / "out";
  params.tokenizer = "bytes";
  return params;
}

std::map<std::string, std::string> texts(const Scratch& scratch, const std::string& split) {
  const TokenDataset dataset(scratch / "out", split, 32);
  const auto tokenizer = load_tokenizer(scratch / "out");
  std::map<std::string, std::string> found;
  for (int64_t d = 0; d < dataset.documents(); ++d) {
    const auto tokens = dataset.document(d);
    EXPECT_EQ(tokens.back(), tokenizer->end_of_text());
    found[dataset.document_name(d)] = tokenizer->decode(tokens);
  }
  return found;
}

TEST(Prepare, KeepsEveryDocumentExactly) {
  const Scratch scratch;
  const auto summary = data_test::prepare_bytes(scratch, 30);
  EXPECT_EQ(summary.files, 30);
  EXPECT_EQ(summary.documents, 30);
  EXPECT_EQ(summary.skipped, 0);
  auto all = texts(scratch, "train");
  const auto validation = texts(scratch, "validation");
  EXPECT_GT(validation.size(), 0u);
  EXPECT_EQ(all.size() + validation.size(), 30u);
  all.insert(validation.begin(), validation.end());
  int64_t bytes = 0;
  for (const auto& [name, text] : all) {
    EXPECT_EQ(text, read_file(name));
    bytes += static_cast<int64_t>(text.size());
  }
  EXPECT_EQ(summary.train_bytes + summary.validation_bytes, bytes);
  EXPECT_EQ(summary.train_tokens + summary.validation_tokens, bytes + 30);
  const DatasetInfo info = read_dataset_info(scratch / "out");
  EXPECT_EQ(info.vocabulary, 257);
  EXPECT_EQ(info.train_tokens, summary.train_tokens);
  EXPECT_EQ(info.validation_bytes, summary.validation_bytes);
  EXPECT_EQ(info.tokenizer_hash, make_byte_tokenizer()->hash());
}

TEST(Prepare, SamplesPredictEveryTokenButTheFirstOnce) {
  const Scratch scratch;
  data_test::prepare_bytes(scratch, 20);
  for (int64_t context : {1, 7, 32, 1000}) {
    const TokenDataset dataset(scratch / "out", "train", context);
    int64_t sample = 0, bytes = 0;
    for (int64_t d = 0; d < dataset.documents(); ++d) {
      const auto document = dataset.document(d);
      const auto length = static_cast<int64_t>(document.size());
      bytes += length - 2;  // neither the first byte nor the end of text
      std::vector<int32_t> joined = {document[0]};
      for (int64_t part = 0; part < (length - 1 + context - 1) / context; ++part, ++sample) {
        const auto tokens = dataset.sample(sample);
        ASSERT_EQ(static_cast<int64_t>(tokens.size()), dataset.length(sample));
        ASSERT_GE(tokens.size(), 2u);
        ASSERT_LE(static_cast<int64_t>(tokens.size()), context + 1);
        EXPECT_EQ(tokens[0], joined.back());
        joined.insert(joined.end(), tokens.begin() + 1, tokens.end());
      }
      EXPECT_EQ(joined, document);
    }
    EXPECT_EQ(sample, dataset.samples());
    EXPECT_EQ(bytes, dataset.bytes());
  }
}

TEST(Prepare, SkipsAndNamesWhatIsNotText) {
  const Scratch scratch;
  scratch.write("in/a.txt", "plain text\n");
  scratch.write("in/b.bin", std::string("\x7f"
                                        "ELF\0\1",
                                        6));
  scratch.write("in/c.txt", "caf\xe9 in latin-1\n");
  scratch.write("in/d.txt", "");
  scratch.write("in/e.txt", "other text\n");
  scratch.write("in/.hidden/f.txt", "hidden text\n");
  const auto summary = prepare(bytes_params(scratch, {(scratch / "in").string()}), {});
  EXPECT_EQ(summary.documents, 2);
  EXPECT_EQ(summary.skipped, 3);
  EXPECT_EQ(summary.skipped_files, (std::vector<std::string>{(scratch / "in/b.bin").string() + ": binary",
                                                             (scratch / "in/c.txt").string() + ": not UTF-8",
                                                             (scratch / "in/d.txt").string() + ": empty"}));
}

TEST(Prepare, ReadsFilesFoldersAndGlobsOnce) {
  const Scratch scratch;
  scratch.write("in/a.txt", "first\n");
  scratch.write("in/deep/er/b.txt", "second\n");
  scratch.write("c.md", "third\n");
  scratch.write("d.md", "fourth\n");
  auto params = bytes_params(
      scratch, {(scratch / "in").string(), (scratch / "in/a.txt").string(), (scratch / "*.md").string()});
  EXPECT_EQ(prepare(params, {}).files, 4);
  params.overwrite = true;
  params.inputs = {(scratch / "missing").string()};
  EXPECT_NE(message_of<DataError>([&] { prepare(params, {}); }).find("no such file"), std::string::npos);
  params.inputs = {(scratch / "*.missing").string()};
  EXPECT_NE(message_of<DataError>([&] { prepare(params, {}); }).find("no file matches"), std::string::npos);
  EXPECT_EQ(texts(scratch, "train").size() + texts(scratch, "validation").size(), 4u);
}

TEST(Prepare, ReadsJsonLinesAndNamesBadOnes) {
  const Scratch scratch;
  const std::string file =
      scratch.write("x.jsonl",
                    "{\"body\":\"one \\u00e9\\n\"}\n\n{\"body\":2}\r\n{\"text\":\"x\"}\nnot json\n"
                    "{\"body\":\"\"}\n{\"body\":\"a\\u0000b\"}\n{\"body\":\"caf\xe9 \"}\n{\"body\":\"two\"}");
  auto params = bytes_params(scratch, {file});
  params.text_key = "body";
  params.validation_fraction = 0;
  const auto summary = prepare(params, {});
  EXPECT_EQ(summary.skipped_files,
            (std::vector<std::string>{file + ":3: \"body\" is not a string", file + ":4: no key \"body\"",
                                      file + ":5: not a JSON object", file + ":6: empty text",
                                      file + ":7: text holds a NUL", file + ":8: not UTF-8"}));
  EXPECT_EQ(texts(scratch, "train"),
            (std::map<std::string, std::string>{{file + ":1", "one \u00e9\n"}, {file + ":9", "two"}}));
}

TEST(Prepare, EveryReaderOfTheTableReads) {
  const std::map<std::string, std::pair<std::string, std::string>> examples = {
      {"json lines", {"a.JSONL", "{\"text\":\"abc\"}\n"}}, {"text", {"a.c", "abc"}}};
  for (const Reader& reader : readers()) {
    ASSERT_TRUE(examples.contains(reader.name)) << "add an example for " << reader.name;
    const auto& [path, content] = examples.at(reader.name);
    const ReadResult result = read_documents(path, content, {});
    ASSERT_EQ(result.documents.size(), 1u) << reader.name;
    EXPECT_EQ(result.documents[0].text, "abc");
  }
}

TEST(Prepare, DropsExactDuplicates) {
  const Scratch scratch;
  for (int i = 0; i < 20; ++i) scratch.write("in/" + std::to_string(i), sample_text(i % 7, 4));
  const auto summary = prepare(bytes_params(scratch, {(scratch / "in").string()}), {});
  EXPECT_EQ(summary.documents, 7);
  EXPECT_EQ(summary.duplicates, 13);
}

TEST(Prepare, ValidationSplitIsStableWhenFilesAreAdded) {
  const Scratch scratch;
  data_test::prepare_bytes(scratch, 60);
  const auto before = texts(scratch, "validation");
  EXPECT_GT(before.size(), 2u);
  EXPECT_LT(before.size(), 25u);
  std::filesystem::remove_all(scratch / "out");
  data_test::prepare_bytes(scratch, 90);
  const auto after = texts(scratch, "validation");
  for (const auto& [name, text] : before) EXPECT_TRUE(after.contains(name)) << name;
}

TEST(Prepare, ValidationInputsWinOverTraining) {
  const Scratch scratch;
  for (int i = 0; i < 6; ++i) scratch.write("in/" + std::to_string(i), sample_text(i, 3));
  scratch.write("held/x", sample_text(2, 3));
  auto params = bytes_params(scratch, {(scratch / "in").string()});
  params.validation_inputs = {(scratch / "held").string(), (scratch / "in/5").string()};
  const auto summary = prepare(params, {});
  EXPECT_EQ(summary.duplicates, 1);
  const auto validation = texts(scratch, "validation"), train = texts(scratch, "train");
  EXPECT_EQ(validation.size(), 2u);
  EXPECT_TRUE(validation.contains((scratch / "held/x").string()));
  EXPECT_TRUE(validation.contains((scratch / "in/5").string()));
  EXPECT_EQ(train.size(), 4u);
  EXPECT_FALSE(train.contains((scratch / "in/2").string()));
}

TEST(Prepare, SmallInputsStillHaveBothSplits) {
  const Scratch scratch;
  const std::string one = scratch.write("one", sample_text(1, 100)),
                    two = scratch.write("two", sample_text(2, 3));
  auto params = bytes_params(scratch, {one});
  params.overwrite = true;
  prepare(params, {});
  const auto train = texts(scratch, "train"), validation = texts(scratch, "validation");
  ASSERT_EQ(train.size(), 1u);
  ASSERT_EQ(validation.size(), 1u);
  EXPECT_EQ(train.begin()->second + validation.begin()->second, sample_text(1, 100));
  EXPECT_EQ(train.begin()->second.back(), '\n');
  EXPECT_NEAR(static_cast<double>(validation.begin()->second.size()), 0.05 * sample_text(1, 100).size(), 40);
  params.inputs = {one, two};
  prepare(params, {});
  EXPECT_EQ(texts(scratch, "train").size(), 1u);
  EXPECT_EQ(texts(scratch, "validation").size(), 1u);
}

TEST(Prepare, StopsAfterMaxBytes) {
  const Scratch scratch;
  for (int i = 0; i < 10; ++i)
    scratch.write("in/" + std::to_string(i), std::string(1000, static_cast<char>('a' + i)));
  auto params = bytes_params(scratch, {(scratch / "in").string()});
  params.max_bytes = 3500;
  const auto summary = prepare(params, {});
  EXPECT_EQ(summary.train_bytes + summary.validation_bytes, 3000);
  params.overwrite = true;
  params.max_bytes = 301;
  params.inputs = {scratch.write("long.txt", "\u00e9" + std::string(600, 'x') + "\n")};
  const auto cut = prepare(params, {});
  EXPECT_EQ(cut.train_bytes + cut.validation_bytes, 301);
}

TEST(Prepare, IsReproducible) {
  const Scratch a, b;
  const std::string file = a.write("x.txt", sample_text(3, 50));
  for (const Scratch* scratch : {&a, &b}) prepare(bytes_params(*scratch, {file}), {});
  for (const char* name : {"train_000.h5", "validation_000.h5", "dataset.json", "tokenizer.model"})
    EXPECT_EQ(read_file(a / "out" / name), read_file(b / "out" / name)) << name;
}

TEST(Prepare, RefusesWithOneLineAndLeavesNothing) {
  const Scratch scratch;
  scratch.write("in/b.bin", std::string(10, '\0'));
  scratch.write("empty/.keep", "");
  const std::string good = scratch.write("good.txt", sample_text(1, 5));
  auto params = bytes_params(scratch, {(scratch / "in").string()});
  std::string last_phase;
  const auto refused = [&](const std::string& part) {
    const std::string message = message_of<kernels::Error>(
        [&] { prepare(params, [&](const std::string& phase, double) { last_phase = phase; }); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
    EXPECT_EQ(scratch.names(), (std::vector<std::string>{"empty", "good.txt", "in"}));
  };
  refused("1 skipped (" + (scratch / "in/b.bin").string() + ": binary)");
  params.inputs = {(scratch / "empty").string()};
  refused("0 files");
  params.inputs = {good};
  last_phase.clear();
  params.tokenizer = "sentencepiece:10";
  refused("between 288 and 1000000");
  params.tokenizer = "sentencepiece:1000001";
  refused("between 288 and 1000000");
  params.tokenizer = "sentencepiece:many";
  refused("expected sentencepiece:N");
  params.tokenizer = (scratch / "missing.model").string();
  refused("missing.model");
  params.tokenizer = good;
  refused("not a SentencePiece model");
  EXPECT_EQ(last_phase, "");  // what is wrong with a tokenizer is said before anything is read
  params.tokenizer = "bytes";
  params.validation_fraction = 1.0;
  refused("validation fraction");
  params.validation_fraction = 0.1;
  params.inputs = {};
  refused("no input");
}

TEST(Prepare, ReplacesOnlyPreparedFoldersWhenAsked) {
  const Scratch scratch;
  const std::string good = scratch.write("good.txt", sample_text(1, 5));
  auto params = bytes_params(scratch, {good});
  scratch.write("out/precious", "mine");
  params.overwrite = true;
  EXPECT_NE(message_of<DataError>([&] { prepare(params, {}); }).find("exists already"), std::string::npos);
  EXPECT_EQ(read_file(scratch / "out/precious"), "mine");
  std::filesystem::remove(scratch / "out/precious");
  params.overwrite = false;
  prepare(params, {});  // into an empty folder
  EXPECT_NE(message_of<DataError>([&] { prepare(params, {}); }).find("exists already"), std::string::npos);
  params.overwrite = true;
  scratch.write("good.txt", sample_text(2, 9));
  prepare(params, {});
  EXPECT_EQ(texts(scratch, "train").begin()->second.substr(0, 18), sample_text(2, 9).substr(0, 18));
  EXPECT_EQ(scratch.names(), (std::vector<std::string>{"good.txt", "out"}));
  for (const char* foreign : {"metrics.jsonl", "train_images.h5", "train_1.h5", "train_.h5",
                              "train_000.h5.bak", "old_train_000.h5", "train_001.h5/notes"}) {
    const std::string file = scratch.write(std::string("out/") + foreign, "mine");
    const std::string entry = file.substr(0, file.find("/notes"));
    EXPECT_EQ(message_of<DataError>([&] { prepare(params, {}); }).find(entry + ": is no prepared data"), 0u)
        << foreign;
    EXPECT_EQ(read_file(file), "mine");
    std::filesystem::remove_all(entry);
  }
}

// What comes to the folder's name while the texts are read.
TEST(Prepare, ReplacesNothingThatCameMeanwhile) {
  const Scratch scratch;
  auto params = bytes_params(scratch, {scratch.write("good.txt", sample_text(1, 5))});
  const auto meanwhile = [&](const std::string& phase, double fraction) {
    if (phase == "write" && fraction == 0) scratch.write("out/metrics.jsonl", "mine");
  };
  EXPECT_NE(message_of<DataError>([&] { prepare(params, meanwhile); }).find("exists already"),
            std::string::npos);
  EXPECT_EQ(read_file(scratch / "out/metrics.jsonl"), "mine");
  std::filesystem::remove_all(scratch / "out");
  prepare(params, {});
  params.overwrite = true;
  EXPECT_NE(message_of<DataError>([&] { prepare(params, meanwhile); }).find("metrics.jsonl: is no prepared"),
            std::string::npos);
  EXPECT_EQ(read_file(scratch / "out/metrics.jsonl"), "mine");
  EXPECT_EQ(scratch.names(), (std::vector<std::string>{"good.txt", "out"}));
}

// Where two names cannot be exchanged there is a moment without either.
TEST(Prepare, TakesBackWhatAnEndedOneHadMovedAway) {
  const Scratch scratch;
  auto params = bytes_params(scratch, {scratch.write("good.txt", sample_text(1, 5))});
  prepare(params, {});
  const auto before = texts(scratch, "train");
  // No process has the first number; this one has the second, as programs in containers often have the same.
  for (const pid_t number : {999999999, ::getpid()}) {
    const std::string ended = ".out.new-" + std::to_string(number);
    std::filesystem::rename(scratch / "out", scratch / (ended + ".old"));
    std::filesystem::create_directory(scratch / ended);
    EXPECT_NE(message_of<DataError>([&] { prepare(params, {}); }).find("exists already"), std::string::npos);
    EXPECT_EQ(texts(scratch, "train"), before);
    EXPECT_EQ(scratch.names(), (std::vector<std::string>{"good.txt", "out"}));
  }
}

// A write that fails half-way (here at a size limit, which stands for a full disk).
TEST(Prepare, FailedWriteLeavesNothing) {
  const Scratch scratch;
  std::string text;
  for (int i = 0; i < 4000; ++i) text += sample_text(i, 2);
  const std::string file = scratch.write("big.txt", text);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const rlimit small = {100000, old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message = message_of<DataError>([&] { prepare(bytes_params(scratch, {file}), {}); });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(message.find("cannot write"), std::string::npos) << message;
  EXPECT_NE(message.find("free some space"), std::string::npos) << message;
  EXPECT_EQ(scratch.names(), (std::vector<std::string>{"big.txt"}));
}

TEST(Prepare, ChecksFreeSpaceFirst) {
  const Scratch scratch;
  EXPECT_NO_THROW(check_free_space(scratch / "", 1));
  const std::string message =
      message_of<DataError>([&] { check_free_space(scratch / "", int64_t{1} << 60); });
  EXPECT_NE(message.find("MiB are needed"), std::string::npos) << message;
}

TEST(Prepare, RemovesWhatAKilledRunLeft) {
  const Scratch scratch;
  const std::string good = scratch.write("good.txt", sample_text(1, 5));
  // No process has this number: it is above the kernel's limit.
  scratch.write(".out.new-99999999/train_000.h5", "half");
  prepare(bytes_params(scratch, {good}), {});
  EXPECT_EQ(scratch.names(), (std::vector<std::string>{"good.txt", "out"}));
}

}  // namespace
}  // namespace data
