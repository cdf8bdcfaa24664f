#pragma once
// From files to a prepared folder: train_NNN.h5, validation_NNN.h5, tokenizer, dataset.json.
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace data {

struct PrepareParams {
  std::vector<std::string> inputs;  // files, folders, globs
  std::filesystem::path output;
  std::string tokenizer = "sentencepiece:2048";  // bytes | sentencepiece:N | FILE
  std::string text_key = "text";                 // of JSON lines
  double validation_fraction = 0.05;  // of documents, by a hash of the document: stable when files are added
  std::vector<std::string> validation_inputs;  // globs or folders whose files all go to validation instead
  int64_t max_bytes = 0;                       // stop after this much text; 0 takes all
  bool overwrite = false;
};

struct PrepareSummary {
  int64_t files = 0, documents = 0, duplicates = 0, skipped = 0;
  int64_t train_tokens = 0, validation_tokens = 0, train_bytes = 0, validation_bytes = 0, vocabulary = 0;
  std::vector<std::string> skipped_files;  // the first few, "path: reason"
};

// Writes into a temporary folder beside `output` and renames it when all is on disk: complete or absent.
// `progress` is called with a phase and a fraction.
PrepareSummary prepare(const PrepareParams& params,
                       const std::function<void(const std::string&, double)>& progress);

}  // namespace data
