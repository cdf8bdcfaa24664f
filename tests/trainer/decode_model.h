#pragma once
// Tiny random models for the tests of decoding.
#include <cmath>
#include <memory>

#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "tests/support/tiny_model.h"
#include "trainer/model/model.h"

namespace trainer::decode_test {

struct TinyOptions {
  std::string attention = "linear,softmax", compute = "fp32", position = "rope", medusa_vocabulary = "shared";
  bool medusa_sequential = false;
  int64_t medusa = 3, mtp = 1, context = 256, vocabulary = 40, width = 32;
  double sharpness = 3;  // of the predictions
};

inline configs::Config tiny_config(const TinyOptions& options) {
  configs::Config config = support::tiny_config();
  config.model.width = options.width;
  config.model.ffn_width = 48;
  config.model.context = options.context;
  config.model.tie_embeddings = false;
  config.model.attention = options.attention;
  config.model.position = options.position;
  config.precision.compute = options.compute;
  config.heads.medusa = options.medusa;
  config.heads.medusa_vocabulary = options.medusa_vocabulary;
  config.heads.medusa_sequential = options.medusa_sequential;
  config.heads.mtp = options.mtp;
  return config;
}

// Weights large enough that predictions depend on the whole text: fresh models only repeat.
inline std::unique_ptr<Model> tiny_model(const TinyOptions& options) {
  auto model = std::make_unique<Model>(tiny_config(options), options.vocabulary);
  ParameterStore& store = model->parameters();
  kernels::Context ctx;
  kernels::set_threads(1);  // work this small only waits for other threads
  store.allocate({}, store.compute(), false);
  store.initialize(ctx, 5);
  for (size_t id = 0; id < store.parameters().size(); ++id) {
    const Tensor weight = store.weight(static_cast<int>(id));
    if (weight.shape.rank() < 2) continue;
    const bool unembedding = store.parameters()[id].name == "unembedding.weight";
    const double deviation =
        (unembedding ? options.sharpness : 3.0) / std::sqrt(static_cast<double>(weight.dim(1)));
    kernels::visit_dtype(weight.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t i = 0; i < weight.numel(); ++i)
        weight.as<T>()[i] = T(static_cast<float>(
            deviation * kernels::normal(17 + id, kernels::Purpose::test, static_cast<uint64_t>(i))));
    });
  }
  model->prepare_decoding(ctx);
  return model;
}

inline std::vector<int32_t> random_tokens(int64_t count, uint64_t seed, int64_t vocabulary = 40) {
  return support::random_tokens(count, vocabulary, seed);
}

}  // namespace trainer::decode_test
