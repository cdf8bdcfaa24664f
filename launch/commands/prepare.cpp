#include "data/prepare.h"

#include <fmt/format.h>

#include "launch/command_line.h"
#include "launch/console.h"

namespace launch {
namespace {

CommandLine command_line() {
  CommandLine line;
  line.usage = "prepare --input PATH... --output DIR [options]";
  line.description =
      "Reads text files and JSON lines (.jsonl), drops exact duplicates, trains or loads a tokenizer, and "
      "writes\n"
      "token shards for training and validation into DIR. Files that are binary or not UTF-8 are skipped "
      "and\n"
      "named. DIR appears only when everything is on disk.";
  line.examples =
      "  foretell prepare --input my_texts --output prepared/mine\n"
      "  foretell prepare --input 'src/*.cpp' docs --tokenizer sentencepiece:4096 --output prepared/code\n"
      "  foretell prepare --input books --validation-input books/held_out --output prepared/books";
  line.flags.add_options()                                                                              //
      ("input", repeatable()->multitoken(), "files, folders (with all below them) or globs; required")  //
      ("output", text(), "folder to write; required")                                                   //
      ("tokenizer", text()->default_value("sentencepiece:2048"),
       "bytes, sentencepiece:N (trained, N tokens) or FILE (a SentencePiece model or a prepared folder)")  //
      ("val-fraction", po::value<double>()->default_value(0.05, "0.05"),
       "part of the documents kept for validation, chosen by their content")  //
      ("validation-input", repeatable()->multitoken(),
       "folders or globs whose files all go to validation; then --val-fraction is not used")  //
      ("text-key", text()->default_value("text"),
       "key of the text in JSON lines; prompt+completion joins two, and the first is not learned")     //
      ("max-bytes", po::value<int64_t>()->default_value(0), "stop after this much text; 0 takes all")  //
      ("overwrite", "replace the prepared data in DIR");
  return line;
}

data::PrepareParams params_of(const CommandLine& line, const po::variables_map& values) {
  for (const char* name : {"input", "output"})
    if (!values.count(name)) line.wrong_use(fmt::format("--{} is missing", name));
  const double fraction = value<double>(values, "val-fraction");
  if (!(fraction >= 0 && fraction < 1))
    line.wrong_use(fmt::format("--val-fraction {} is not between 0 and 1", fraction));
  const int64_t max_bytes = value<int64_t>(values, "max-bytes");
  if (max_bytes < 0) line.wrong_use("--max-bytes is negative");
  data::PrepareParams params;
  params.inputs = list(values, "input");
  params.output = value<std::string>(values, "output");
  params.tokenizer = value<std::string>(values, "tokenizer");
  params.text_key = value<std::string>(values, "text-key");
  params.validation_inputs = list(values, "validation-input");
  params.validation_fraction = fraction;
  params.max_bytes = max_bytes;
  params.overwrite = values.count("overwrite") > 0;
  return params;
}

void print_split(const char* name, int64_t tokens, int64_t bytes) {
  fmt::print("  {:<11} {:>14} tokens, {} of text\n", name, count_text(tokens),
             bytes_text(static_cast<double>(bytes)));
}

void print_summary(const data::PrepareSummary& summary, const data::PrepareParams& params, double seconds) {
  fmt::print("{} files, {} documents, {} exact duplicates dropped, vocabulary {}\n",
             count_text(summary.files), count_text(summary.documents), count_text(summary.duplicates),
             summary.vocabulary);
  print_split("training", summary.train_tokens, summary.train_bytes);
  print_split("validation", summary.validation_tokens, summary.validation_bytes);
  if (summary.skipped > 0) {
    fmt::print("{} files skipped:\n", count_text(summary.skipped));
    for (const std::string& file : summary.skipped_files) fmt::print("  {}\n", file);
    const int64_t unnamed = summary.skipped - static_cast<int64_t>(summary.skipped_files.size());
    if (unnamed > 0) fmt::print("  and {} more\n", count_text(unnamed));
  }
  fmt::print("{} is ready after {}; next: foretell train CONFIG --set data.path={}\n", params.output.string(),
             time_text(seconds), params.output.string());
}

}  // namespace

int prepare_command(const Arguments& arguments, Job& job) {
  CommandLine line = command_line();
  const auto values = line.parse(arguments);
  if (!values) return 0;
  const data::PrepareParams params = params_of(line, *values);
  job.join_alone("prepare");
  Stopwatch watch;
  data::PrepareSummary summary;
  {
    Progress progress;
    summary = data::prepare(
        params, [&](const std::string& phase, double fraction) { progress.show(phase, fraction); });
  }
  print_summary(summary, params, watch.seconds());
  return 0;
}

}  // namespace launch
