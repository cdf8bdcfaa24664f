#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "checkpoints/checkpoint.h"
#include "data/dataset.h"
#include "data/files.h"
#include "kernels/core/error.h"
#include "launch/command_line.h"
#include "launch/console.h"
#include "launch/run_directory.h"
#include "trainer/decode/evaluate.h"

namespace launch {
namespace {

namespace fs = std::filesystem;

bool is_checkpoint(const fs::path& path) { return path.filename().string().starts_with("step_"); }

// Opening a checkpoint verifies all of it.
void inspect_checkpoint(const fs::path& path, bool) {
  const checkpoints::Reader reader(path);
  fmt::print("{}: checkpoint of step {}, whole\n", path.string(), reader.step());
  for (const auto& [name, number] : reader.attributes().integers) fmt::print("  {:<28} {}\n", name, number);
  for (const auto& [name, text] : reader.attributes().text)
    fmt::print("  {:<28} {}\n", name,
               text.size() <= 60 && text.find('\n') == std::string::npos
                   ? text
                   : fmt::format("({})", bytes_text(static_cast<double>(text.size()))));
  int64_t elements = 0;
  for (const std::string& name : reader.names()) {
    const kernels::Shape shape = reader.shape(name);
    elements += shape.numel();
    fmt::print("  {:<52} {:>5}  {}\n", name, kernels::name_of(reader.dtype(name)), kernels::to_string(shape));
  }
  fmt::print("  {} tensors, {} elements\n", reader.names().size(), count_text(elements));
}

void inspect_prepared(const fs::path& path, bool verify) {
  const data::DatasetInfo info = data::read_dataset_info(path);
  fmt::print("{}: prepared data\n  vocabulary  {}\n  tokenizer   {}\n", path.string(), info.vocabulary,
             info.tokenizer_hash);
  fmt::print("  training    {} tokens, {} of text\n", count_text(info.train_tokens),
             bytes_text(static_cast<double>(info.train_bytes)));
  fmt::print("  validation  {} tokens, {} of text\n", count_text(info.validation_tokens),
             bytes_text(static_cast<double>(info.validation_bytes)));
  if (!verify) return;
  constexpr int64_t kContext = 256;
  for (const char* split : {"train", "validation"}) {
    const data::TokenDataset dataset(path, split, kContext);
    fmt::print("  {}: {} documents, whole\n", split, count_text(dataset.documents()));
  }
}

void inspect_run(const fs::path& path, bool verify) {
  fmt::print("{}: run\n", path.string());
  if (fs::exists(path / "status.json")) {
    const auto status = nlohmann::json::parse(data::read_file(path / "status.json"), nullptr, false);
    if (!status.is_object())
      fmt::print("  state       not known: status.json is damaged\n");
    else
      for (const auto& [name, entry] : status.items())
        if (entry != "")
          fmt::print("  {:<11} {}\n", name, entry.is_string() ? entry.get<std::string>() : entry.dump());
  }
  fmt::print("  last logged step {}\n", last_logged_step(path));
  std::vector<fs::path> saved;
  if (fs::is_directory(path / "checkpoints"))
    for (const auto& entry : fs::directory_iterator(path / "checkpoints"))
      if (is_checkpoint(entry.path()) && entry.is_directory()) saved.push_back(entry.path());
  std::sort(saved.begin(), saved.end());
  if (saved.empty()) fmt::print("  no checkpoints\n");
  for (const fs::path& checkpoint : saved) {
    if (verify) checkpoints::Reader reader(checkpoint);
    fmt::print("  {}{}\n", checkpoint.string(), verify ? ", whole" : "");
  }
  if (fs::exists(path / "report.json"))
    fmt::print("\n{}\nreport: {}\n", trainer::report_table(path / "report.json"),
               (path / "report.html").string());
}

// What `path` is, by what lies in it; a shard is looked at together with the folder it belongs to.
struct Kind {
  const char* marker;
  void (*inspect)(const fs::path&, bool);
};
constexpr Kind kKinds[] = {{"dataset.json", inspect_prepared},
                           {"config.resolved.cfg", inspect_run},
                           {"checkpoints", inspect_run},
                           {"manifest.json", inspect_checkpoint}};

void inspect(fs::path path, bool verify) {
  if (!fs::exists(path))
    throw kernels::DataError(fmt::format("{} does not exist; check the path", path.string()));
  path = fs::canonical(path);
  const bool shard = fs::is_regular_file(path);
  const fs::path folder = shard ? path.parent_path() : path;
  if (shard) fmt::print("{} belongs to:\n", path.string());
  if (is_checkpoint(folder)) return inspect_checkpoint(folder, verify);
  for (const Kind& kind : kKinds)
    if (fs::exists(folder / kind.marker)) return kind.inspect(folder, verify || shard);
  throw kernels::DataError(
      fmt::format("{} is not a run, a checkpoint, prepared data or a part of one", path.string()));
}

}  // namespace

int inspect_command(const Arguments& arguments, Job& job) {
  CommandLine line;
  line.usage = "inspect PATH [--verify]";
  line.description =
      "Says what PATH holds: a run, a checkpoint, a prepared folder, or a shard of one of them. With "
      "--verify every\n"
      "checksum is checked; exit code 74 when something is damaged.";
  line.examples =
      "  foretell inspect runs/mine --verify\n"
      "  foretell inspect runs/mine/checkpoints/step_00000600\n"
      "  foretell inspect prepared/mine --verify";
  line.arguments = {"PATH"};
  line.flags.add_options()("verify", "read everything and check it");
  const auto values = line.parse(arguments);
  if (!values) return 0;
  job.join_alone("inspect");
  inspect(value<std::string>(*values, "PATH"), values->count("verify") > 0);
  return 0;
}

}  // namespace launch
