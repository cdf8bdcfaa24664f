// Models back from checkpoints, and checkpoints that do not fit.
#include <gtest/gtest.h>

#include <filesystem>

#include "checkpoints/checkpoint.h"
#include "data/tokenizer.h"
#include "kernels/ops/cast.h"
#include "tests/support/safetensors_file.h"
#include "tests/support/tiny_model.h"
#include "tests/support/tiny_run.h"
#include "trainer/model/load.h"

namespace {

using kernels::DType;
using support::to_doubles;
using trainer::Model;

class ModelLoad : public testing::Test {
 protected:
  static configs::Config config() {
    configs::Config config = support::tiny_config();
    config.model.attention = "linear,softmax";
    return config;
  }
  std::unique_ptr<Model> make(const configs::Config& config, uint64_t seed = 3) const {
    auto model = std::make_unique<Model>(config, tokenizer_->vocabulary());
    model->parameters().allocate({}, DType::f16, true);
    model->parameters().initialize({}, seed);
    return model;
  }
  // Saves a model; `skip` leaves one tensor out, `extra` adds one.
  std::filesystem::path save(const Model& model, const std::string& skip = "",
                             const std::string& extra = "") {
    std::vector<checkpoints::NamedTensor> tensors;
    const auto& store = model.parameters();
    for (size_t i = 0; i < store.parameters().size(); ++i)
      if (store.parameters()[i].name != skip)
        tensors.push_back({"master/" + store.parameters()[i].name, store.master(static_cast<int>(i))});
    if (!extra.empty()) tensors.push_back({"master/" + extra, store.master(0)});
    checkpoints::Attributes attributes;
    attributes.text = {{"config", configs::to_ini(model.config())},
                       {"tokenizer", tokenizer_->serialized()},
                       {"tokenizer_hash", tokenizer_->hash()}};
    attributes.integers = {{"step", 5}, {"vocabulary", model.vocabulary()}};
    checkpoints::Writer writer(folder_.path(), 1);
    writer.start(5, attributes, tensors);
    std::string reason;
    EXPECT_TRUE(writer.wait(reason)) << reason;
    return writer.commit();
  }
  // The message of the CheckpointError that taking over the weights ends in.
  std::string refusal(const std::filesystem::path& checkpoint, const configs::Config& config) {
    try {
      trainer::load_weights(checkpoint, *make(config));
    } catch (const kernels::CheckpointError& e) {
      return e.what();
    }
    return "accepted";
  }

  support::TemporaryFolder folder_;
  std::unique_ptr<data::Tokenizer> tokenizer_ = data::make_byte_tokenizer();
};

TEST_F(ModelLoad, GivesTheSavedWeights) {
  const auto model = make(config());
  const trainer::LoadedModel loaded = trainer::load_model({}, save(*model), {"decode.max_tokens=9"});
  EXPECT_EQ(loaded.step, 5);
  EXPECT_EQ(loaded.config.decode.max_tokens, 9);
  EXPECT_EQ(loaded.tokenizer->hash(), tokenizer_->hash());
  EXPECT_EQ(to_doubles(loaded.model->parameters().buffers().weights),
            to_doubles(model->parameters().buffers().weights));
}

TEST_F(ModelLoad, ATrainedCheckpointKeepsItsArchitecture) {
  const auto checkpoint = save(*make(config()));
  EXPECT_THROW(trainer::load_model({}, checkpoint, {"model.width=32"}), kernels::ConfigError);
}

TEST_F(ModelLoad, NewHeadsStartFreshAndCopyTheLoadedVocabulary) {
  const auto source = make(config(), 3);
  const auto checkpoint = save(*source);
  configs::Config with_heads = config();
  with_heads.heads.medusa = 1;
  with_heads.heads.medusa_vocabulary = "own";
  with_heads.heads.mtp = 1;
  const auto model = make(with_heads, 4);
  const auto fresh = trainer::load_weights(checkpoint, *model);
  const auto& store = model->parameters();
  const auto& before = source->parameters();
  EXPECT_EQ(fresh.front(), "medusa.0.layers.0.weight");
  EXPECT_EQ(fresh.size(), store.parameters().size() - before.parameters().size());
  const auto embedding = to_doubles(before.master(before.find("embedding.weight")));
  EXPECT_EQ(to_doubles(store.master(store.find("embedding.weight"))), embedding);
  EXPECT_EQ(to_doubles(store.master(store.find("medusa.0.vocabulary.weight"))), embedding);
  EXPECT_EQ(to_doubles(store.weight(store.find("blocks.1.mlp.up.weight"))),
            to_doubles(before.weight(before.find("blocks.1.mlp.up.weight"))));
}

// Sequential heads take over plain ones: what they add starts at 0 and is named.
TEST_F(ModelLoad, MedusaHeadsBecomeSequential) {
  configs::Config plain = config();
  plain.heads.medusa = 2;
  const auto source = make(plain, 3);
  kernels::fill({}, source->parameters().buffers().master, 0.25f);
  const auto checkpoint = save(*source);
  configs::Config sequential = plain;
  sequential.heads.medusa_sequential = true;
  const auto model = make(sequential, 4);
  EXPECT_EQ(trainer::load_weights(checkpoint, *model),
            (std::vector<std::string>{"medusa.0.tokens.weight", "medusa.0.tokens.norm.weight",
                                      "medusa.1.tokens.weight", "medusa.1.tokens.norm.weight"}));
  const auto& store = model->parameters();
  for (const double v : to_doubles(store.master(store.find("medusa.1.tokens.weight")))) EXPECT_EQ(v, 0);
  for (const double v : to_doubles(store.master(store.find("medusa.1.layers.0.weight")))) EXPECT_EQ(v, 0.25);
  EXPECT_NE(
      refusal(save(*model), plain).find("'medusa.0.tokens.norm.weight', which this model has no place for"),
      std::string::npos);
}

TEST_F(ModelLoad, RefusesAnotherArchitectureByKey) {
  const auto checkpoint = save(*make(config()));
  configs::Config other = config();
  other.model.width = 32;
  EXPECT_NE(refusal(checkpoint, other).find("model.width = 16"), std::string::npos);
  other = config();
  other.model.attention = "softmax";
  EXPECT_NE(refusal(checkpoint, other).find("model.attention = linear,softmax"), std::string::npos);
  other = config();
  other.model.rope_theta = 500;
  EXPECT_NE(refusal(checkpoint, other).find("model.rope_theta"), std::string::npos);
  other = config();
  other.model.context = 64;  // rotary positions have no end
  EXPECT_EQ(refusal(checkpoint, other), "accepted");
}

TEST_F(ModelLoad, RefusesMissingAndUnknownTensorsByName) {
  const auto model = make(config());
  EXPECT_NE(refusal(save(*model, "blocks.0.mlp.up.weight"), config()).find("'blocks.0.mlp.up.weight'"),
            std::string::npos);
  EXPECT_NE(
      refusal(save(*model, "", "medusa.0.layers.0.weight"), config()).find("'medusa.0.layers.0.weight'"),
      std::string::npos);
  // A head that is there in part is not a fresh head.
  configs::Config with_head = config();
  with_head.heads.medusa = 1;
  EXPECT_NE(
      refusal(save(*make(with_head), "medusa.0.layers.0.bias"), with_head).find("medusa.0.layers.0.bias"),
      std::string::npos);
}

TEST_F(ModelLoad, TakesWeightsOfAnotherProgram) {
  configs::Config with_biases = config();
  with_biases.model.bias = true;
  with_biases.model.norm = "layer";
  with_biases.model.mlp = "gelu";
  const auto source = make(with_biases, 3);
  const auto& before = source->parameters();
  std::vector<support::SafetensorsEntry> entries;
  for (size_t i = 0; i < before.parameters().size(); ++i) {
    const trainer::Parameter& p = before.parameters()[i];
    support::SafetensorsEntry entry{p.name, {}, {}, DType::f32};
    for (int d = 0; d < p.shape.rank(); ++d) entry.shape.push_back(p.shape[d]);
    for (const double v : to_doubles(before.master(static_cast<int>(i))))
      entry.values.push_back(static_cast<float>(v));
    entries.push_back(entry);
  }
  const auto file = folder_.path() / "weights.safetensors";
  support::write_safetensors(file, entries);
  const auto model = make(with_biases, 4);
  EXPECT_TRUE(trainer::load_weights(file, *model, "a tokenizer's hash is not compared").empty());
  EXPECT_EQ(to_doubles(model->parameters().buffers().master), to_doubles(before.buffers().master));
  EXPECT_EQ(to_doubles(model->parameters().buffers().weights), to_doubles(before.buffers().weights));

  EXPECT_NE(refusal(file, config()).find("has no place for"), std::string::npos) << "no biases there";
  entries.front().shape = {entries.front().shape[1], entries.front().shape[0]};
  support::write_safetensors(file, entries);
  EXPECT_NE(refusal(file, with_biases).find("'embedding.weight' is"), std::string::npos);
}

TEST_F(ModelLoad, RefusesAnotherVocabulary) {
  const auto checkpoint = save(*make(config()));
  Model other(config(), tokenizer_->vocabulary() + 1);
  other.parameters().allocate({}, DType::f16, true);
  EXPECT_THROW(trainer::load_weights(checkpoint, other), kernels::CheckpointError);
}

}  // namespace
