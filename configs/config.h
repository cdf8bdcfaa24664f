#pragma once
// The whole configuration. Each section is a plain struct whose options() names every member once: key, range
// or choices, help. That one line feeds parsing, --set, validation, help, `foretell config`, the resolved
// dump and the checkpoint. Defaults are the members' initial values.
//
// A file is INI: `[section]`, `key = value`, blank lines. A comment starts with `#` at the beginning of a
// line or after white space; a `#` inside a value is an error, since the rest would be lost silently.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace configs {

// Bounds of a numeric option, inclusive.
struct Range {
  double low, high;
};
// The accepted words of a text option; empty accepts any.
using Choices = std::vector<std::string>;

struct ModelConfig {
  int64_t layers = 4, width = 256, heads = 4, kv_heads = 4, ffn_width = 704, context = 256;
  std::string norm = "rms", position = "rope", mlp = "swiglu", attention = "softmax";
  double norm_eps = 1e-5, rope_theta = 10000;
  bool tie_embeddings = true, embedding_norm = false, bias = false;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(layers, "layers", Range{1, 512}, "transformer blocks");
    v(width, "width", Range{8, 65536}, "channels of the residual stream; a multiple of heads");
    v(heads, "heads", Range{1, 1024}, "query heads");
    v(kv_heads, "kv_heads", Range{1, 1024}, "key/value heads; divides heads");
    v(ffn_width, "ffn_width", Range{8, 1 << 20}, "hidden channels of the feed-forward layer");
    v(context, "context", Range{8, 1 << 20}, "longest training sequence, in tokens");
    v(norm, "norm", Choices{"rms", "layer"}, "normalisation");
    v(norm_eps, "norm_eps", Range{1e-12, 1e-1}, "epsilon of the normalisation");
    v(position, "position", Choices{"rope", "learned", "none"}, "how positions enter");
    v(rope_theta, "rope_theta", Range{10, 1e9}, "base of the rotary angles");
    v(mlp, "mlp", Choices{"swiglu", "gelu"}, "feed-forward layer");
    v(attention, "attention", Choices{},
      "attention kind per layer, a comma-separated pattern repeated over the layers");
    v(tie_embeddings, "tie_embeddings", "use the token embedding as the unembedding too");
    v(embedding_norm, "embedding_norm",
      "normalise the embeddings before the first layer: small models learn much faster with them at full "
      "size");
    v(bias, "bias", "biases in the linear layers of attention and feed-forward, as GPT-2");
  }
};

struct AttentionConfig {
  std::string linear_normaliser = "sum";
  double linear_eps = 1e-6;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(linear_normaliser, "linear_normaliser", Choices{"sum", "norm"},
      "linear attention: divide by the sum of the weights, or leave sums and normalise each head (RMSNorm)");
    v(linear_eps, "linear_eps", Range{1e-12, 1e-1}, "added to the sum of the weights");
  }
};

struct HeadsConfig {
  int64_t medusa = 0, mtp = 0, medusa_layers = 1;
  std::string medusa_vocabulary = "shared";
  bool medusa_sequential = false;
  double loss_weight = 0.2, loss_decay = 0.8;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(medusa, "medusa", Range{0, 16}, "Medusa heads; head i predicts the token i + 2 ahead, counting from 0");
    v(medusa_layers, "medusa_layers", Range{1, 8}, "residual layers of a Medusa head");
    v(medusa_vocabulary, "medusa_vocabulary", Choices{"shared", "own"}, "unembedding of the Medusa heads");
    v(medusa_sequential, "medusa_sequential",
      "Medusa heads also read the tokens between: the one the model chose and the drafts before theirs "
      "(Hydra)");
    v(mtp, "mtp", Range{0, 8}, "multi-token prediction depths (DeepSeek-V3)");
    v(loss_weight, "loss_weight", Range{0, 10},
      "weight of the extra heads' losses; the language model's is 1");
    v(loss_decay, "loss_decay", Range{0, 1}, "factor from one head's weight to the next further ahead");
  }
};

struct PrecisionConfig {
  std::string compute = "fp16", hysteresis = "none";
  double loss_scale_initial = 65536;
  int64_t loss_scale_growth_interval = 2000, hysteresis_steps = 2, max_consecutive_skips = 50;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(compute, "compute", Choices{"fp16", "bf16", "fp32"},
      "type of weights and activations; masters stay fp32");
    v(loss_scale_initial, "loss_scale_initial", Range{1, 4294967296.0}, "first loss scale (fp16 only)");
    v(loss_scale_growth_interval, "loss_scale_growth_interval", Range{1, 1e9},
      "clean steps before the scale doubles");
    v(hysteresis, "hysteresis", Choices{"none", "until_growth", "consecutive"},
      "when tolerated overflows are refilled");
    v(hysteresis_steps, "hysteresis_steps", Range{1, 1000},
      "overflows before the scale halves, with hysteresis");
    v(max_consecutive_skips, "max_consecutive_skips", Range{1, 1e6},
      "skipped steps in a row before training stops");
  }
};

struct DataConfig {
  std::string path;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(path, "path", Choices{}, "the folder that `foretell prepare` wrote");
  }
};

struct OptimConfig {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1.0, lr_floor = 0.1,
         decay_fraction = 0.2;
  int64_t warmup = 100;
  std::string schedule = "cosine";
  template <typename Visitor>
  void options(Visitor&& v) {
    v(lr, "lr", Range{0, 10}, "peak learning rate");
    v(warmup, "warmup", Range{0, 1e9}, "updates of linear warm-up");
    v(schedule, "schedule", Choices{"constant", "cosine", "linear", "warmup_stable_decay"},
      "after the warm-up");
    v(lr_floor, "lr_floor", Range{0, 1}, "last learning rate as a fraction of the peak");
    v(decay_fraction, "decay_fraction", Range{0, 1}, "warmup_stable_decay: the final part that decays");
    v(beta1, "beta1", Range{0, 0.99999}, "AdamW first-moment decay");
    v(beta2, "beta2", Range{0, 0.9999999}, "AdamW second-moment decay");
    v(eps, "eps", Range{1e-20, 1}, "AdamW epsilon");
    v(weight_decay, "weight_decay", Range{0, 10}, "decoupled weight decay, matrices only");
    v(clip, "clip", Range{0, 1e9}, "largest gradient norm; 0 does not clip");
  }
};

struct TrainConfig {
  int64_t steps = 1000, batch = 32, micro_batch = 8, seed = 1, threads = 0, validate_every = 0,
          validate_batches = 8;
  std::string device = "auto", init_from, trainable = "all";
  bool graph = true, deterministic = true;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(steps, "steps", Range{1, 1e12}, "steps to train, skipped ones included");
    v(batch, "batch", Range{1, 1e7}, "sequences in a step, over all ranks");
    v(micro_batch, "micro_batch", Range{1, 1e6}, "sequences a rank computes at once");
    v(seed, "seed", Range{0, 9e15}, "seed of initial weights and data order");
    v(device, "device", Choices{"auto", "cpu", "cuda"},
      "where to compute; auto: on GPUs where every rank of a host can have one");
    v(deterministic, "deterministic",
      "on a GPU, the same bits in every run; false lets some gradients be summed in any order and takes the "
      "products' kernels that were fastest when timed, which is faster");
    v(graph, "graph", "on a GPU, replay each step as a CUDA graph");
    v(threads, "threads", Range{0, 4096},
      "CPU threads of a rank; 0 shares the cores among the ranks of a host");
    v(init_from, "init_from", Choices{},
      "checkpoint or .safetensors file to take weights from (fine-tuning); missing heads start fresh");
    v(trainable, "trainable", Choices{"all", "heads"}, "heads: the trunk stays frozen (Medusa-1)");
    v(validate_every, "validate_every", Range{0, 1e12}, "steps between validation losses; 0 never");
    v(validate_batches, "validate_batches", Range{1, 1e9}, "micro-batches in a validation during training");
  }
};

struct CommConfig {
  int64_t zero = 0;
  double bucket_mb = 0;
  int64_t deadline_seconds = 600;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(zero, "zero", Range{0, 1},
      "ZeRO stage: 1 spreads the optimizer's state (masters and moments) over the ranks, 0 keeps all of it "
      "on "
      "every rank");
    v(bucket_mb, "bucket_mb", Range{0, 4096},
      "MiB of gradients, or of sharded weights, sent at once; 0: 4 on CPU cores, 64 on GPUs");
    v(deadline_seconds, "deadline_seconds", Range{1, 1e6},
      "longest wait for other ranks before the job is ended");
  }
};

struct CheckpointConfig {
  int64_t every = 500, keep = 2, keep_every = 0, shards = 1;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(every, "every", Range{0, 1e12}, "steps between checkpoints; 0 only at the end");
    v(keep, "keep", Range{2, 1e6}, "latest checkpoints kept");
    v(keep_every, "keep_every", Range{0, 1e12},
      "also keep every checkpoint at a multiple of this many steps; 0 none");
    v(shards, "shards", Range{1, 4096}, "HDF5 files of a checkpoint");
  }
};

struct DecodeConfig {
  std::string drafters = "auto", acceptance = "greedy,rejection,typical", temperature = "0,1";
  int64_t max_tokens = 128, prompts = 8, prompt_tokens = 64, repeats = 3, max_drafts = 4, tree_nodes = 6,
          no_repeat = 0, seed = 1, batches = 0;
  double typical_epsilon = 0.09, typical_delta = 0.3;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(drafters, "drafters", Choices{},
      "drafters to evaluate, comma-separated: medusa, medusa_tree, mtp, ngram; auto: all that have their "
      "heads");
    v(acceptance, "acceptance", Choices{}, "acceptance rules to evaluate: greedy, rejection, typical");
    v(temperature, "temperature", Choices{},
      "temperatures to evaluate, comma-separated; greedy acceptance uses 0");
    v(max_tokens, "max_tokens", Range{1, 1e6}, "tokens generated for a prompt");
    v(prompts, "prompts", Range{1, 1e6}, "held-out prompts");
    v(prompt_tokens, "prompt_tokens", Range{1, 1e6}, "tokens of a prompt");
    v(repeats, "repeats", Range{1, 1000}, "timed repetitions; medians are reported");
    v(max_drafts, "max_drafts", Range{1, 32},
      "longest chain of drafts; the length used is chosen from measured costs");
    v(tree_nodes, "tree_nodes", Range{1, 63}, "draft nodes of a tree, the root apart");
    v(no_repeat, "no_repeat", Range{-1, 1000},
      "greedy decoding writes no run of this many tokens twice, which keeps small models out of loops; 0 "
      "allows it; -1: the length with which greedy text repeats itself as much as held-out text (evaluate), "
      "6 "
      "(generate)");
    v(typical_epsilon, "typical_epsilon", Range{0, 1}, "typical acceptance: hard threshold");
    v(typical_delta, "typical_delta", Range{0, 1}, "typical acceptance: factor of exp(-entropy)");
    v(seed, "seed", Range{0, 9e15}, "seed of sampling");
    v(batches, "batches", Range{0, 1e9}, "validation micro-batches for the perplexity; 0 all");
  }
};

struct LogConfig {
  std::string run = "runs/run";
  int64_t every = 10;
  template <typename Visitor>
  void options(Visitor&& v) {
    v(run, "run", Choices{}, "run directory");
    v(every, "every", Range{1, 1e9}, "steps between printed lines");
  }
};

struct Config {
  ModelConfig model;
  AttentionConfig attention;
  HeadsConfig heads;
  PrecisionConfig precision;
  DataConfig data;
  OptimConfig optim;
  TrainConfig train;
  CommConfig comm;
  CheckpointConfig checkpoint;
  DecodeConfig decode;
  LogConfig log;

  template <typename Visitor>
  void sections(Visitor&& v) {
    v("model", model);
    v("attention", attention);
    v("heads", heads);
    v("precision", precision);
    v("data", data);
    v("optim", optim);
    v("train", train);
    v("comm", comm);
    v("checkpoint", checkpoint);
    v("decode", decode);
    v("log", log);
  }
};

// The attention kinds a pattern may name: the rows of trainer's attention table.
const std::vector<std::string>& attention_kind_names();
// The drafters, each with the heads it drafts from (a [heads] key that must be above 0; empty: none needed):
// the rows of trainer's table of drafters.
struct DrafterName {
  std::string name, heads;
};
const std::vector<DrafterName>& drafter_names();
// The acceptance rules of speculative decoding.
const std::vector<std::string>& acceptance_names();

// Reads an INI file, applies "section.key=value" overrides in order, checks every range and the rules across
// keys. ConfigError: one line with file and line number; an unknown key names the nearest known one.
Config load_config(const std::filesystem::path& file, const std::vector<std::string>& overrides);
// The same from text (a checkpoint's resolved configuration); `name` stands for the file in messages.
Config parse_config(std::string_view text, const std::string& name,
                    const std::vector<std::string>& overrides = {});
// Rules across keys: sizes that must divide, known attention kinds, drafters that have their heads.
void validate(const Config& config);
// Every key with its value, in the order of declaration; parse_config(to_ini(c)) == c, bit for bit.
std::string to_ini(const Config& config);
// "linear,softmax" over 4 layers -> {linear, softmax, linear, softmax}.
std::vector<std::string> attention_per_layer(const ModelConfig& model);
// decode.drafters as a list; "auto" becomes every drafter whose heads are there.
std::vector<std::string> drafters_to_evaluate(const Config& config);
// A temperature as it is written, from 0 to 100; ConfigError with the reason alone.
double parse_temperature(const std::string& text);
// Items without surrounding white space; an empty text has none.
std::vector<std::string> split_list(std::string_view comma_separated);

// One option as a person reads it.
struct OptionText {
  std::string name;  // "model.layers"
  std::string kind;  // "whole number", "number", "text", "true or false"
  std::string default_value, accepts, help;
};
std::vector<OptionText> option_texts();
// The candidate with the smallest edit distance to `word`; empty when none is near.
std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace configs
