#include "configs/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "configs/options.h"
#include "kernels/core/error.h"
#include "tests/support/temporary_folder.h"

namespace configs {
namespace {

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    parse_config(text, "a.cfg", overrides);
  } catch (const kernels::ConfigError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "";
}

void expect_error(const std::string& text, const std::string& part,
                  const std::vector<std::string>& overrides = {}) {
  const std::string message = error_of(text, overrides);
  EXPECT_NE(message.find(part), std::string::npos) << "expected '" << part << "' in '" << message << "'";
}

TEST(Config, ReadsSectionsValuesAndComments) {
  const Config c = parse_config(
      "# a comment\n\n[model]\nlayers = 7   # of blocks\n  width=96\nheads = 6\nkv_heads = 3\ntie_embeddings "
      "= false\n"
      "[optim]\nlr = 2.5e-4\n[data]\npath = some folder/with = sign\r\n",
      "a.cfg");
  EXPECT_EQ(c.model.layers, 7);
  EXPECT_EQ(c.model.width, 96);
  EXPECT_FALSE(c.model.tie_embeddings);
  EXPECT_EQ(c.optim.lr, 2.5e-4);
  EXPECT_EQ(c.data.path, "some folder/with = sign");
  EXPECT_EQ(c.train.steps, Config{}.train.steps);
}

TEST(Config, OverridesApplyInOrderAfterTheFile) {
  const Config c = parse_config("[train]\nsteps = 5000\n", "a.cfg",
                                {"train.steps=600", "train.steps = 700", "data.path=x"});
  EXPECT_EQ(c.train.steps, 700);
  EXPECT_EQ(c.data.path, "x");
}

TEST(Config, ErrorsCarryFileAndLineAndTheNearestName) {
  expect_error("[model]\n\nlayer = 3\n", "a.cfg:3: unknown key 'model.layer'; did you mean 'model.layers'?");
  expect_error("[modle]\n", "a.cfg:1: unknown section [modle]; did you mean 'model'?");
  expect_error("[model]\nlr = 1\n", "did you mean 'optim.lr'?");
  expect_error("[model]\nzzzzzzzzzzzz = 1\n", "`foretell config list` shows all keys");
  expect_error("layers = 3\n", "a.cfg:1: 'layers' stands before the first [section]");
  expect_error("[model\n", "lacks its ']'");
  expect_error("[model]\nlayers\n", "a.cfg:2: 'layers' is neither");
  expect_error("[model]\nlayers = 3\nlayers = 4\n", "a.cfg:3: model.layers was already set in line 2");
  expect_error("[data]\npath = a#b\n", "a.cfg:2: a '#' inside a value");
}

TEST(Config, AbbreviationsAreOff) {
  expect_error("[model]\nattent = softmax\n", "unknown key 'model.attent'");
}

TEST(Config, TypesRangesAndChoices) {
  expect_error("[model]\nlayers = four\n", "a.cfg:2: model.layers 'four' is not a whole number");
  expect_error("[model]\nlayers = 2.5\n", "not a whole number");
  expect_error("[model]\nlayers =\n", "not a whole number");
  expect_error("[model]\nlayers = 0\n", "a.cfg:2: model.layers must be between 1 and 512, not 0");
  expect_error("[model]\nlayers = 99999999999999999999\n", "must be between");
  expect_error("[optim]\nlr = nan\n", "must be between");
  expect_error("[optim]\nlr = 1e999\n", "must be between");
  expect_error("[optim]\nlr = 0.1x\n", "not a number");
  expect_error("[optim]\nclip = 1e-50\n", "optim.clip 1e-50 is too small: fp32");
  expect_error("[model]\nnorm = rmsnorm\n", "model.norm must be one of rms, layer, not 'rmsnorm'");
  expect_error("[model]\ntie_embeddings = maybe\n", "must be true or false");
}

TEST(Config, OverrideErrorsNameTheOverride) {
  expect_error("", "--set model.layer=3: unknown key", {"model.layer=3"});
  expect_error("", "--set model.layers=x: model.layers 'x' is not", {"model.layers=x"});
  expect_error("", "write it as section.key=value", {"model.layers"});
  expect_error("", "holds a '#'", {"data.path=a # b"});
}

TEST(Config, RulesAcrossKeys) {
  expect_error("[model]\nwidth = 250\n", "a.cfg: model.width = 250 is not a multiple of model.heads = 4");
  expect_error("[model]\nkv_heads = 3\n", "not a multiple of model.kv_heads");
  expect_error("[model]\nwidth = 36\n", "must be even");
  EXPECT_EQ(error_of("[model]\nwidth = 36\nposition = learned\n"), "");
  expect_error("[model]\nattention = softmax,liner\n", "'liner' is not one of softmax, linear");
  expect_error("[model]\nattention = softmax,,linear\n", "'' is not one of");
  expect_error("[model]\nattention =\n", "model.attention is empty");
  expect_error("[train]\nsteps = 50\n", "optim.warmup = 100 is longer than train.steps = 50");
  expect_error("[train]\ntrainable = heads\n", "train.init_from");
  expect_error("[train]\ntrainable = heads\ninit_from = runs/a\n", "nothing to train");
  expect_error("[decode]\ndrafters = medusa\n", "needs heads.medusa above 0");
  expect_error("[decode]\ndrafters = ngram,medusa_tree\n", "needs heads.medusa above 0");
  expect_error("[heads]\nmedusa = 2\n[decode]\ndrafters = mtp\n", "needs heads.mtp above 0");
  expect_error("[decode]\ndrafters = oracle\n", "'oracle' is not one of medusa, medusa_tree, mtp, ngram");
  expect_error("[decode]\nacceptance = always\n", "decode.acceptance");
  expect_error("[decode]\ntemperature = 0,hot\n", "'hot' is not a number");
  expect_error("[decode]\ntemperature = 101\n", "decode.temperature: must be between 0 and 100, not 101");
  expect_error("[decode]\ntemperature = 1e-310\n", "decode.temperature: 1e-310 is too small");
  expect_error("[log]\nrun =\n", "log.run is empty");
}

TEST(Config, WhatCannotBeReadIsOneLine) {
  // The last is opened and cannot be read.
  for (const char* path : {"/nowhere/at/all.cfg", "/tmp", "/proc/self/mem"}) {
    try {
      load_config(path, {});
      FAIL() << path;
    } catch (const kernels::ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(path), std::string::npos);
    }
  }
}

TEST(Config, AnEmptyFileIsTheDefaults) {
  const support::TemporaryFolder folder;
  const auto file = folder.path() / "empty.cfg";
  std::ofstream(file).flush();
  EXPECT_EQ(to_ini(load_config(file, {})), to_ini(Config{}));
}

TEST(Config, RoundTripIsExact) {
  Config c;
  c.model.layers = 11;
  c.model.tie_embeddings = false;
  c.model.attention = "linear, softmax";
  c.optim.lr = std::nextafter(0.1, 1.0);
  c.optim.eps = 1.0 / 3 * 1e-9;
  c.optim.beta2 = std::nextafter(0.95, 0.0);
  c.train.seed = 8999999999999999;
  c.data.path = "a path/with spaces = and signs";
  c.comm.bucket_mb = 0.1 + 0.2;
  const std::string text = to_ini(c);
  const Config back = parse_config(text, "dump");
  EXPECT_EQ(to_ini(back), text);
  Config original = c, copy = back;
  const auto before = list_options(original), after = list_options(copy);
  ASSERT_EQ(before.size(), after.size());
  for (size_t i = 0; i < before.size(); ++i) EXPECT_EQ(before[i].get(), after[i].get()) << before[i].name();
  EXPECT_EQ(back.optim.lr, c.optim.lr);
  EXPECT_EQ(back.optim.eps, c.optim.eps);
  EXPECT_EQ(back.optim.beta2, c.optim.beta2);
  EXPECT_EQ(back.comm.bucket_mb, c.comm.bucket_mb);
}

TEST(Config, EveryOptionRefusesNonsenseAndTakesItsOwnDefault) {
  for (const OptionText& option : option_texts()) {
    EXPECT_FALSE(option.help.empty()) << option.name;
    EXPECT_EQ(error_of("", {option.name + "=" + option.default_value}), "") << option.name;
    if (option.accepts == "any") continue;
    EXPECT_NE(error_of("", {option.name + "=nonsense"}), "") << option.name;
  }
}

TEST(Config, DefaultsAreValid) { EXPECT_NO_THROW(validate(Config{})); }

TEST(Config, PresetsAreValid) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(FORETELL_SOURCE "/configs/presets")) {
    EXPECT_NO_THROW(load_config(entry.path(), {})) << entry.path();
    ++count;
  }
  EXPECT_GE(count, 2);
}

// New heads go on the trunk that the quickstart trains.
TEST(Config, ThePresetForNewHeadsHasTheQuickstartsTrunk) {
  const std::string presets = FORETELL_SOURCE "/configs/presets/";
  const Config trunk = load_config(presets + "quickstart.cfg", {});
  Config heads = load_config(presets + "medusa1.cfg", {});
  EXPECT_TRUE(heads.heads.medusa_sequential == trunk.heads.medusa_sequential);
  EXPECT_GE(heads.heads.mtp, trunk.heads.mtp);
  const auto model_of = [](Config c) {
    Config only;
    only.model = c.model;
    return to_ini(only);
  };
  EXPECT_EQ(model_of(heads), model_of(trunk));
}

TEST(Config, AttentionPatternRepeats) {
  ModelConfig model;
  model.layers = 5;
  model.attention = "linear, softmax";
  const std::vector<std::string> expected = {"linear", "softmax", "linear", "softmax", "linear"};
  EXPECT_EQ(attention_per_layer(model), expected);
}

TEST(Config, AutomaticDraftersFollowTheHeads) {
  Config c;
  EXPECT_EQ(drafters_to_evaluate(c), (std::vector<std::string>{"ngram"}));
  c.heads.mtp = 1;
  EXPECT_EQ(drafters_to_evaluate(c), (std::vector<std::string>{"mtp", "ngram"}));
  c.heads.medusa = 2;
  EXPECT_EQ(drafters_to_evaluate(c), (std::vector<std::string>{"medusa", "medusa_tree", "mtp", "ngram"}));
  c.decode.drafters = "mtp";
  EXPECT_EQ(drafters_to_evaluate(c), (std::vector<std::string>{"mtp"}));
}

TEST(Config, SplitList) {
  EXPECT_TRUE(split_list("").empty());
  EXPECT_TRUE(split_list("  ").empty());
  EXPECT_EQ(split_list(" a , b"), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(split_list("a,"), (std::vector<std::string>{"a", ""}));
}

}  // namespace
}  // namespace configs
