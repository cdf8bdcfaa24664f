#include "tests/support/tiny_run.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoints/checkpoint.h"
#include "data/prepare.h"
#include "kernels/core/philox.h"

namespace support {

namespace fs = std::filesystem;

void write_tiny_text(const fs::path& folder, int documents) {
  static const char* const kWords[] = {"int", "value", "return", "count", "(", ")", ";\n",
                                       "{",   "}\n",   "size",   "const", "+", "="};
  fs::create_directories(folder);
  for (int d = 0; d < documents; ++d) {
    std::ofstream out(folder / ("document_" + std::to_string(d) + ".txt"));
    const auto draw = [&](uint64_t i) {
      return kernels::philox(7, kernels::Purpose::test, static_cast<uint64_t>(d) * 10000 + i)[0];
    };
    const uint32_t words = 5 + draw(0) % 60;
    for (uint32_t w = 0; w < words; ++w) out << kWords[draw(w + 1) % 13] << ' ';
    out << d << '\n';
  }
}

void prepare_tiny_data(const fs::path& folder) {
  write_tiny_text(folder / "text");
  data::PrepareParams params;
  params.inputs = {(folder / "text").string()};
  params.output = folder / "data";
  params.tokenizer = "bytes";
  params.validation_fraction = 0.2;
  data::prepare(params, [](const std::string&, double) {});
}

configs::Config tiny_config(const fs::path& folder) {
  configs::Config c;
  c.model.layers = 2;
  c.model.width = 32;
  c.model.heads = 2;
  c.model.kv_heads = 1;
  c.model.ffn_width = 64;
  c.model.context = 64;
  c.model.attention = "linear,softmax";
  c.model.embedding_norm = true;
  c.heads.medusa = 2;
  c.heads.medusa_sequential = true;
  c.heads.mtp = 1;
  c.data.path = (folder / "data").string();
  c.optim.lr = 3e-3;
  c.optim.warmup = 3;
  c.train.device = "cpu";  // wherever the tests run
  c.train.steps = 8;
  c.train.batch = 7;
  c.train.micro_batch = 2;
  c.checkpoint.every = 0;
  c.log.run = (folder / "run").string();
  return c;
}

std::map<std::string, std::vector<char>> stored_state(const fs::path& run) {
  const checkpoints::Reader reader(checkpoints::resolve(run, {}));
  std::map<std::string, std::vector<char>> all;
  for (const auto& name : reader.names()) {
    kernels::Tensor t(nullptr, reader.dtype(name), reader.shape(name));
    auto& bytes = all[name];
    bytes.resize(t.bytes());
    t.data = bytes.data();
    reader.read(name, t);
  }
  return all;
}

std::vector<double> metric(const fs::path& run, const std::string& key) {
  std::vector<double> values;
  std::ifstream in(run / "metrics.jsonl");
  std::string line;
  while (std::getline(in, line)) {
    if (in.eof()) break;  // a kill cuts the last line short
    const auto json = nlohmann::json::parse(line);
    if (!json.contains(key)) continue;
    values.push_back(json[key].is_boolean() ? (json[key].get<bool>() ? 1.0 : 0.0) : json[key].get<double>());
  }
  return values;
}

}  // namespace support
