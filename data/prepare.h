#pragma once
// From files to a prepared folder: train_NNN.h5, validation_NNN.h5, tokenizer.model, dataset.json.
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace data {

struct PrepareParams {
  std::vector<std::string> inputs;  // files, folders (recursive, hidden entries left out), globs
  std::filesystem::path output;
  std::string tokenizer = "sentencepiece:2048";  // bytes | sentencepiece:N | FILE
  // Of JSON lines. "prompt+completion" joins two texts; the tokens of the first get loss weight 0, so that
  // fine-tuning does not learn prompts.
  std::string text_key = "text";
  // Of documents, by a hash of the content: stable when files are added. With so few documents that one split
  // would be empty, the document with the lowest hash is held out; of a single one, its last part.
  double validation_fraction = 0.05;
  // Files, folders or globs that all go to validation, whether `inputs` has them or not; then the fraction is
  // not used.
  std::vector<std::string> validation_inputs;
  // Stop before the document that would exceed this much text of `inputs` (the first one is cut); 0 takes
  // all.
  int64_t max_bytes = 0;
  bool overwrite = false;  // replace `output` if it is a prepared folder; anything else is never removed
};

struct PrepareSummary {
  int64_t files = 0, documents = 0, duplicates = 0, skipped = 0;
  int64_t train_tokens = 0, validation_tokens = 0, train_bytes = 0, validation_bytes = 0, vocabulary = 0;
  std::vector<std::string> skipped_files;  // the first few, "path: reason"
};

// Writes into a temporary folder beside `output` and renames it when all is on disk: complete or absent.
// Documents with the same content are kept once, in validation if they are in both. Each document ends with
// the end-of-text token. DataError for unusable input and no space, ConfigError for parameters out of range.
// `progress` (may be empty) is called with a phase and a fraction.
PrepareSummary prepare(const PrepareParams& params,
                       const std::function<void(const std::string&, double)>& progress);

}  // namespace data
