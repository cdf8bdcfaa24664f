// Evaluation of a tiny trained run: the report's fields, the page, the table, and generate.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "data/prepare.h"
#include "kernels/core/error.h"
#include "kernels/core/parallel.h"
#include "tests/support/tiny_run.h"
#include "trainer/decode/charts.h"
#include "trainer/decode/evaluate.h"
#include "trainer/decode/perplexity.h"
#include "trainer/decode/report.h"
#include "trainer/decode/text_stream.h"
#include "trainer/train/loop.h"

namespace trainer {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string read(const fs::path& file) {
  std::ifstream in(file);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

void train_alone(const configs::Config& config) {
  const auto ranks = comm::make_local_communicator();
  trainer::train(config, *ranks, kernels::Context{}, {});
}

// Evaluates and gives report.json back, and the lines of progress where they are wanted.
Json evaluated(LoadedModel& loaded, const fs::path& output, std::vector<std::string>* lines = nullptr) {
  evaluate(kernels::Context{}, loaded, output, output, [&](const std::string& line) {
    if (lines != nullptr) lines->push_back(line);
  });
  return Json::parse(read(output / "report.json"));
}

// One run for all tests: training it takes a second.
class Evaluate : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    kernels::set_threads(1);
    folder_ = new support::TemporaryFolder();
    support::prepare_tiny_data(folder_->path());
    configs::Config config = support::tiny_config(folder_->path());
    config.train.steps = 40;
    train_alone(config);
  }
  static void TearDownTestSuite() { delete folder_; }

  static fs::path run() { return folder_->path() / "run"; }
  static LoadedModel load() {
    return load_model(kernels::Context{}, run(),
                      {"decode.prompts=3", "decode.prompt_tokens=20", "decode.max_tokens=30",
                       "decode.repeats=3", "decode.max_drafts=3", "decode.tree_nodes=5"});
  }
  // A run whose learned positions end at 32 tokens.
  static LoadedModel load_learned_positions() {
    configs::Config config = support::tiny_config(folder_->path());
    config.model.position = "learned";
    config.model.context = 32;
    config.train.steps = 4;
    config.log.run = (folder_->path() / "learned").string();
    if (!fs::exists(config.log.run)) train_alone(config);
    return load_model(kernels::Context{}, config.log.run,
                      {"decode.prompts=2", "decode.prompt_tokens=20", "decode.max_tokens=30",
                       "decode.repeats=1", "decode.max_drafts=3"});
  }
  static support::TemporaryFolder* folder_;
};
support::TemporaryFolder* Evaluate::folder_ = nullptr;

void expect_result(const Json& r) {
  for (const char* key : {"temperature", "batch", "tokens_per_second", "speedup", "mean_accepted_length",
                          "time_to_first_token_ms", "distinct_4", "predicted_speedup", "drafts"})
    EXPECT_TRUE(r.at(key).is_number()) << key;
  EXPECT_TRUE(r.at("shape") == "chain" || r.at("shape") == "tree");
  EXPECT_EQ(r.at("tokens_per_second_spread").size(), 2u);
  EXPECT_LE(r.at("tokens_per_second_spread")[0], r.at("tokens_per_second"));
  EXPECT_GE(r.at("tokens_per_second_spread")[1], r.at("tokens_per_second"));
  EXPECT_GT(r.at("tokens_per_second"), 0);
  EXPECT_GE(r.at("mean_accepted_length"), 1);
  EXPECT_LE(r.at("mean_accepted_length"), 6);
  for (const char* phase : {"draft", "verify", "sample", "commit"})
    EXPECT_GE(r.at("time_ms").at(phase), 0) << phase;
  for (const Json& share : r.at("acceptance_by_position")) {
    EXPECT_GE(share, 0);
    EXPECT_LE(share, 1);
  }
  if (r.at("acceptance") == "greedy")
    EXPECT_EQ(r.at("identical_to_baseline"), true) << r.at("drafter");
  else
    EXPECT_TRUE(r.at("identical_to_baseline").is_null());
}

TEST_F(Evaluate, WritesTheReport) {
  LoadedModel loaded = load();
  const fs::path output = folder_->path() / "report";
  std::vector<std::string> lines;
  evaluate(kernels::Context{}, loaded, run(), output,
           [&](const std::string& line) { lines.push_back(line); });
  EXPECT_GT(lines.size(), 5u);

  const Json json = Json::parse(read(output / "report.json"));
  EXPECT_TRUE(json.at("checkpoint").is_string());
  EXPECT_TRUE(json.at("device").is_string());
  const double perplexity = json.at("validation_perplexity"), bits = json.at("validation_bits_per_byte");
  // The tokenizer is one of bytes: both say the same, apart from the end of each document, which is no byte.
  EXPECT_GT(perplexity, 1.5);
  EXPECT_LT(perplexity, 257);
  EXPECT_NEAR(bits, std::log2(perplexity), 0.05 * bits);
  EXPECT_GT(json.at("baseline").at("tokens_per_second"), 0);
  EXPECT_NEAR(json.at("baseline").at("ms_per_token").get<double>() *
                  json.at("baseline").at("tokens_per_second").get<double>(),
              1000, 1e-6);
  EXPECT_GT(json.at("step_cost_ms").size(), 5u);

  ASSERT_EQ(json.at("anchors").size(), 4u);
  EXPECT_EQ(json.at("anchors")[2].at("model"), "order 3");
  for (const Json& anchor : json.at("anchors")) EXPECT_GT(anchor.at("bits_per_byte"), 0.5);

  // Plain at two temperatures, then four drafters: greedy, and two rules at temperature 1.
  const Json& results = json.at("results");
  ASSERT_EQ(results.size(), 2u + 4u * 3u);
  for (const Json& r : results) expect_result(r);
  EXPECT_EQ(results[0].at("drafter"), "none");
  EXPECT_EQ(results[0].at("speedup"), 1);
  EXPECT_EQ(results[0].at("mean_accepted_length"), 1);

  const std::string page = read(output / "report.html");
  for (const char* part : {"<!DOCTYPE html>", "Acceptance by position", "Training: loss scale", "</html>",
                           "<svg", "prefers-color-scheme"})
    EXPECT_NE(page.find(part), std::string::npos) << part;
  for (const char* outside : {"<script", "http://", "https://", "src=", "nan", "inf'"})
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  for (const auto& entry : fs::directory_iterator(output)) EXPECT_NE(entry.path().extension(), ".tmp");

  const std::string table = report_table(output / "report.json");
  for (const char* word : {"medusa_tree", "ngram", "rejection", "tokens/s", "yes"})
    EXPECT_NE(table.find(word), std::string::npos) << word;
}

// Texts end where learned positions do, also those that are read to learn what Medusa heads get right.
TEST_F(Evaluate, LearnedPositionsThatEndBeforeTheTexts) {
  LoadedModel loaded = load_learned_positions();
  const Json json = evaluated(loaded, folder_->path() / "learned_report");
  ASSERT_EQ(json.at("results").size(), 2u + 4u * 3u);
  for (const Json& r : json.at("results")) expect_result(r);
}

TEST_F(Evaluate, TreesOfMoreNodesThanThereAreLearnedPositions) {
  LoadedModel loaded = load_learned_positions();
  loaded.config.decode.tree_nodes = 40;
  loaded.config.decode.drafters = "medusa_tree";
  loaded.config.decode.max_tokens = 8;
  const Json json = evaluated(loaded, folder_->path() / "wide_report");
  EXPECT_EQ(json.at("step_cost_ms").size(), 32u);
  for (const Json& r : json.at("results")) EXPECT_LE(r.at("drafts"), 31);
  GenerateOptions options;
  options.prompt = "int";
  options.max_tokens = 8;
  const std::string plain = generate(kernels::Context{}, loaded, options, {}).text;
  options.drafter = "medusa_tree";
  EXPECT_EQ(generate(kernels::Context{}, loaded, options, {}).text, plain);
}

// Of prompts and completions only the latter are learned: their loss says nothing of all bytes.
TEST_F(Evaluate, BitsPerByteAreLeftOutWhereSomeTokensAreNotLearned) {
  const fs::path folder = folder_->path() / "weighted";
  fs::create_directories(folder);
  std::ofstream text(folder / "pairs.jsonl");
  for (int i = 0; i < 40; ++i)
    text << Json{{"prompt", "what follows after number " + std::to_string(i) + "? "},
                 {"completion", "number " + std::to_string(i + 1) + " and all those beyond it"}}
                .dump()
         << '\n';
  text.close();
  data::PrepareParams params;
  params.inputs = {(folder / "pairs.jsonl").string()};
  params.output = folder / "data";
  params.tokenizer = "bytes";
  params.text_key = "prompt+completion";
  params.validation_fraction = 0.2;
  data::prepare(params, {});
  LoadedModel loaded = load();
  loaded.config.data.path = params.output.string();
  loaded.config.decode.drafters = "ngram";
  const data::TokenDataset validation(params.output, "validation", loaded.config.model.context);
  const Perplexity found = measure_perplexity(kernels::Context{}, loaded, validation, 0);
  EXPECT_LT(found.tokens, validation.tokens() - validation.documents());
  EXPECT_FALSE(found.bits_per_byte.has_value());

  std::vector<std::string> lines;
  const Json json = evaluated(loaded, folder / "report", &lines);
  EXPECT_GT(json.at("validation_perplexity"), 1);
  EXPECT_FALSE(json.contains("validation_bits_per_byte"));
  EXPECT_FALSE(json.contains("anchors"));
  EXPECT_EQ(json.at("no_bits_per_byte"), kNoBitsPerByte);
  EXPECT_EQ(std::count(lines.begin(), lines.end(), kNoBitsPerByte), 1);
  EXPECT_NE(report_table(folder / "report" / "report.json").find(kNoBitsPerByte), std::string::npos);
  const std::string page = read(folder / "report" / "report.html");
  EXPECT_NE(page.find(kNoBitsPerByte), std::string::npos);
  EXPECT_EQ(page.find("bits per byte on held-out text"), std::string::npos);
}

TEST_F(Evaluate, PerplexityIsThatOfTheLossWhateverTheBatches) {
  LoadedModel loaded = load();
  const data::TokenDataset validation(loaded.config.data.path, "validation", loaded.config.model.context);
  const Perplexity two = measure_perplexity(kernels::Context{}, loaded, validation, 0);
  EXPECT_EQ(two.tokens, validation.tokens() - validation.documents());
  loaded.config.train.micro_batch = 5;
  const Perplexity five = measure_perplexity(kernels::Context{}, loaded, validation, 0);
  EXPECT_EQ(five.tokens, two.tokens);
  // Rows of other batches are summed in another order in fp16 products: relative 2^-11 for each of a few
  // layers.
  EXPECT_NEAR(five.loss, two.loss, 4 * two.loss / 2048);
  ASSERT_EQ(two.losses.size(), 4u);
  EXPECT_EQ(two.losses[0], two.loss);
  EXPECT_LT(measure_perplexity(kernels::Context{}, loaded, validation, 1).tokens, two.tokens);
}

TEST_F(Evaluate, PerplexityOfAFewBatchesIsOfSamplesOfAllLengths) {
  LoadedModel loaded = load();
  loaded.config.train.micro_batch = 1;  // a batch is a sample
  const data::TokenDataset validation(loaded.config.data.path, "validation", loaded.config.model.context);
  const Perplexity all = measure_perplexity(kernels::Context{}, loaded, validation, 0),
                   some = measure_perplexity(kernels::Context{}, loaded, validation, 6);
  const double mean = static_cast<double>(all.tokens) / static_cast<double>(validation.samples());
  ASSERT_GT(validation.samples(), 18);
  EXPECT_NEAR(static_cast<double>(some.tokens) / 6, mean, mean / 4);
}

TEST_F(Evaluate, GenerateGivesTheSameTextWithEveryDrafter) {
  LoadedModel loaded = load();
  GenerateOptions options;
  options.prompt = "int value = ";
  options.max_tokens = 60;
  std::string streamed;
  const Generated plain = generate(kernels::Context{}, loaded, options,
                                   [&](const std::string& text, int64_t) { streamed += text; });
  EXPECT_EQ(streamed, plain.text);
  EXPECT_GT(plain.text.size(), 0u);
  for (const DrafterKind& kind : drafters()) {
    options.drafter = kind.name;
    const Generated fast = generate(kernels::Context{}, loaded, options, {});
    EXPECT_EQ(fast.text, plain.text) << kind.name;
    EXPECT_LE(fast.steps, plain.steps);
    int64_t gained = 0;
    for (const int64_t g : fast.accepted) gained += g;
    EXPECT_EQ(gained, fast.tokens);
  }
  options.temperature = 1;
  EXPECT_NE(generate(kernels::Context{}, loaded, options, {}).text, plain.text);
  options.prompt = "";
  EXPECT_NO_THROW(generate(kernels::Context{}, loaded, options, {}));
}

TEST_F(Evaluate, BadOptionsAreExplained) {
  LoadedModel loaded = load();
  GenerateOptions options;
  options.drafter = "crystal_ball";
  EXPECT_THROW(generate(kernels::Context{}, loaded, options, {}), kernels::ConfigError);
  options.drafter = "none";
  options.acceptance = "always";
  EXPECT_THROW(generate(kernels::Context{}, loaded, options, {}), kernels::ConfigError);
  loaded.config.decode.prompt_tokens = 100000;
  EXPECT_THROW(evaluate(kernels::Context{}, loaded, run(), folder_->path() / "no", [](const std::string&) {}),
               kernels::DataError);
  EXPECT_FALSE(fs::exists(folder_->path() / "no"));
  EXPECT_THROW(report_table(folder_->path() / "absent.json"), kernels::DataError);
}

TEST_F(Evaluate, OutputThatCannotBeWrittenIsRefusedBeforeAnythingIsMeasured) {
  LoadedModel loaded = load();
  const fs::path file = folder_->path() / "file";
  std::ofstream(file) << "kept";
  for (const fs::path& output : {file, file / "below"}) {
    std::vector<std::string> lines;
    EXPECT_THROW(evaluated(loaded, output, &lines), kernels::DataError);
    EXPECT_TRUE(lines.empty()) << lines.front();
  }
  EXPECT_EQ(read(file), "kept");
  const fs::path fresh = folder_->path() / "fresh";
  check_writable(fresh / "folder");
  EXPECT_FALSE(fs::exists(fresh));
}

TEST(Report, SpreadAndDistinct4) {
  EXPECT_EQ(spread_of({3, 1, 2}).median, 2);
  EXPECT_EQ(spread_of({4, 1, 2, 3}).median, 2.5);
  EXPECT_EQ(spread_of({4, 1, 2, 3}).high, 4);
  DecodedSequence loop, fresh;
  loop.tokens = {1, 2, 1, 2, 1, 2, 1};  // 4 windows, 2 different
  fresh.tokens = {1, 2, 3, 4, 5, 6, 7};
  EXPECT_DOUBLE_EQ(distinct_4(std::vector<DecodedSequence>{loop}), 0.5);
  EXPECT_DOUBLE_EQ(distinct_4({loop, fresh}), 0.75);
}

TEST_F(Evaluate, GuardRepeatsAsMuchAsTheText) {
  const LoadedModel loaded = load();
  const kernels::Context ctx;
  Decoder decoder(ctx, *loaded.model, 1, 256);
  const data::TokenDataset validation(loaded.config.data.path, "validation", loaded.config.model.context);
  std::vector<std::vector<int32_t>> prompts;
  for (const Prompt& prompt : choose_prompts(validation, 3, 20, 30)) {
    EXPECT_EQ(prompt.tokens.size(), 20u);
    EXPECT_EQ(prompt.continuation.size(), 30u);
    prompts.push_back(prompt.tokens);
  }
  DecodeSettings settings;
  settings.max_tokens = 100;
  const auto greedy_distinct_4 = [&](int64_t length) {
    settings.no_repeat = length;
    std::vector<DecodedSequence> texts;
    for (const auto& prompt : prompts) texts.push_back(decoder.run({&prompt, 1}, settings).sequences[0]);
    return distinct_4(texts);
  };
  EXPECT_EQ(choose_no_repeat(decoder, prompts, settings, 0), 0) << "nothing is asked of the text";
  const double eight = greedy_distinct_4(8), twelve = greedy_distinct_4(12);
  ASSERT_LT(twelve, eight) << "a model of 40 steps loops";
  EXPECT_EQ(choose_no_repeat(decoder, prompts, settings, eight), 8);
  EXPECT_EQ(choose_no_repeat(decoder, prompts, settings, twelve), 12);
  EXPECT_EQ(choose_no_repeat(decoder, prompts, settings, 1), 4);
}

// At a temperature where the model has no say, texts are as different as the random numbers they are drawn
// with.
TEST_F(Evaluate, EveryPromptAndRoundHasRandomNumbersOfItsOwn) {
  const LoadedModel loaded = load();
  const kernels::Context ctx;
  Decoder decoder(ctx, *loaded.model, 1, 256);
  const std::vector<std::vector<int32_t>> prompts = {{65, 66, 67}, {65, 66, 67}, {97, 98}};
  const auto trial = [&](double temperature) {
    Trial t;
    t.drafter = "none";
    t.settings.temperature = temperature;
    t.settings.acceptance = temperature > 0 ? Acceptance::rejection : Acceptance::greedy;
    t.settings.max_tokens = 12;
    return t;
  };
  std::vector<Trial> trials;
  trials.push_back(trial(0));
  trials.push_back(trial(1e6));
  // A drafter that proposes nothing draws what plain decoding draws.
  trials.push_back(trial(1e6));
  trials.back().engine = make_drafter(decoder, "medusa", loaded.config.decode);
  trials.back().engine->set_drafts(0);
  run_trials(decoder, trials, prompts, 2, [](const std::string&) {});
  std::set<std::vector<int32_t>> greedy, drawn;
  for (size_t i = 0; i < 6; ++i) {
    greedy.insert(trials[0].texts.at(i).tokens);
    drawn.insert(trials[1].texts.at(i).tokens);
    EXPECT_EQ(trials[2].texts.at(i).tokens, trials[1].texts[i].tokens) << "text " << i;
  }
  EXPECT_LE(greedy.size(), 2u) << "greedy texts follow from the prompt alone";
  EXPECT_EQ(drawn.size(), 6u);
  EXPECT_TRUE(trials[0].identical);
}

TEST_F(Evaluate, AGuardThatIsNotNeededIsNotCalledOne) {
  LoadedModel loaded = load();
  loaded.config.decode.no_repeat = -1;
  loaded.config.decode.drafters = "ngram";
  loaded.config.decode.max_tokens = 3;  // too short to repeat anything, as is the text
  std::vector<std::string> lines;
  const Json json = evaluated(loaded, folder_->path() / "short_report", &lines);
  EXPECT_EQ(json.at("prompts").at("no_repeat"), 0);
  const std::string line =
      "guard against loops: none, without one greedy text repeats itself as much as the held-out text "
      "(distinct-4 1.00)";
  EXPECT_EQ(std::count(lines.begin(), lines.end(), line), 1);
}

TEST(Report, ShortNumbers) {
  EXPECT_EQ(short_number(0.2134), "0.213");
  EXPECT_EQ(short_number(999.4), "999");
  EXPECT_EQ(short_number(999.5), "1,000");
  EXPECT_EQ(short_number(-999.9), "-1,000");
  EXPECT_EQ(short_number(5300), "5,300");
  EXPECT_EQ(short_number(999999.4), "999,999");
  EXPECT_EQ(short_number(999999.5), "1M");
  EXPECT_EQ(short_number(1.25e6), "1.25M");
  EXPECT_EQ(short_number(1e9), "1,000M");
}

TEST(Report, TextIsEscaped) {
  EXPECT_EQ(escape_html("<a href=\"x\">&'\x01"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
  Report report;
  report.step_cost_ms = {1};
  report.validation_bits_per_byte = 2;
  report.sample_prompt = "#include <vector>";
  report.sample = {{"x < y && y > z", 3}};
  const std::string page = report_html(report);
  EXPECT_NE(page.find("#include &lt;vector&gt;"), std::string::npos);
  EXPECT_NE(page.find("title='3 tokens in one step'>x &lt; y &amp;&amp; y &gt; z"), std::string::npos);
  EXPECT_NE(page.find("n-gram models count sequences of bytes"), std::string::npos);
}

// Characters of several bytes arrive whole, whatever the steps.
TEST(TextStream, HoldsBackHalfCharacters) {
  const auto tokenizer = data::make_byte_tokenizer();
  const std::string text = "a\u00e9\u20ac\U0001F600b";
  const std::vector<int32_t> tokens = tokenizer->encode(text);
  for (size_t chunk = 1; chunk <= 4; ++chunk) {
    TextStream stream(*tokenizer, {});
    std::string all;
    for (size_t at = 0; at < tokens.size(); at += chunk) {
      const std::string piece =
          stream.add(std::span(tokens).subspan(at, std::min(chunk, tokens.size() - at)));
      EXPECT_TRUE(piece.empty() || (static_cast<unsigned char>(piece[0]) & 0xC0u) != 0x80u);
      all += piece;
    }
    EXPECT_EQ(all + stream.finish(), text);
  }
  TextStream broken(*tokenizer, {});
  const std::vector<int32_t> half = {0xE2, 256};
  EXPECT_EQ(broken.add(half), "");
  EXPECT_EQ(broken.finish(), "\xE2");
}

}  // namespace
}  // namespace trainer
