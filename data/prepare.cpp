#include "data/prepare.h"

#include <fmt/format.h>

#include <atomic>
#include <charconv>
#include <cmath>

#include "data/collect.h"
#include "data/dataset_description.h"
#include "data/files.h"
#include "data/formats/shard.h"
#include "data/tokenizer.h"
#include "kernels/core/error.h"
#include "kernels/core/parallel.h"

namespace data {

namespace {

using kernels::ConfigError;
using kernels::DataError;
using Progress = std::function<void(const std::string&, double)>;

// Tokens of one shard before the next begins; a longer document has a shard of its own.
constexpr int64_t kShardBytes = int64_t{64} << 20;
// What HDF5's own structures, names and offsets may add to the tokens of a document.
constexpr int64_t kDocumentOverhead = 512, kFolderOverhead = int64_t{1} << 20;
constexpr std::string_view kSentencePiecePrefix = "sentencepiece:";

struct Encoded {
  std::vector<int32_t> tokens;
  int64_t prompt_tokens = 0, first_bytes = 0;  // bytes of the first token
};

void check_params(const PrepareParams& params) {
  if (params.inputs.empty()) throw ConfigError("no input; give files, folders or globs");
  if (params.output.empty()) throw ConfigError("no output folder; give one");
  if (!(params.validation_fraction >= 0 && params.validation_fraction < 1))
    throw ConfigError(fmt::format("a validation fraction of {}: it must be at least 0 and below 1",
                                  params.validation_fraction));
  if (params.max_bytes < 0) throw ConfigError("the most bytes to take must be at least 0");
}

// The vocabulary in "sentencepiece:N", 0 if `tokenizer` is something else.
int64_t trained_vocabulary(const std::string& tokenizer) {
  if (!tokenizer.starts_with(kSentencePiecePrefix)) return 0;
  int64_t size = 0;
  const char* end = tokenizer.data() + tokenizer.size();
  const auto [stop, error] = std::from_chars(tokenizer.data() + kSentencePiecePrefix.size(), end, size);
  if (error != std::errc() || stop != end || size < kSmallestVocabulary || size > kLargestVocabulary)
    throw ConfigError(fmt::format("tokenizer {}: expected sentencepiece:N with N between {} and {}",
                                  tokenizer, kSmallestVocabulary, kLargestVocabulary));
  return size;
}

// Nothing where it is to be trained.
std::unique_ptr<Tokenizer> given_tokenizer(const std::string& choice) {
  if (choice == "bytes") return make_byte_tokenizer();
  if (trained_vocabulary(choice) > 0) return nullptr;
  if (!std::filesystem::exists(choice))
    throw DataError(
        fmt::format("tokenizer {}: no such file or folder; bytes and sentencepiece:N need none", choice));
  return load_tokenizer(choice);
}

std::unique_ptr<Tokenizer> train_tokenizer(const std::string& choice, const std::vector<Document>& train) {
  std::vector<std::string_view> texts;
  for (const Document& document : train) texts.push_back(document.text);
  return train_sentencepiece(texts, trained_vocabulary(choice));
}

Encoded encode_document(const Tokenizer& tokenizer, const Document& document) {
  const std::string_view text = document.text;
  Encoded encoded;
  encoded.tokens = tokenizer.encode(text.substr(0, static_cast<size_t>(document.prompt)));
  encoded.prompt_tokens = static_cast<int64_t>(encoded.tokens.size());
  const auto rest = tokenizer.encode(text.substr(static_cast<size_t>(document.prompt)));
  encoded.tokens.insert(encoded.tokens.end(), rest.begin(), rest.end());
  encoded.first_bytes = static_cast<int64_t>(tokenizer.decode({encoded.tokens.front()}).size());
  encoded.tokens.push_back(tokenizer.end_of_text());
  return encoded;
}

std::vector<Encoded> encode(const Tokenizer& tokenizer, const std::vector<Document>& documents,
                            const Progress& progress) {
  std::vector<Encoded> encoded(documents.size());
  std::atomic<size_t> next = 0;
  kernels::parallel_region([&](int thread, int) {
    for (size_t i = next++; i < documents.size(); i = next++) {
      encoded[i] = encode_document(tokenizer, documents[i]);
      if (thread == 0 && progress)
        progress("encode", static_cast<double>(i) / static_cast<double>(documents.size()));
    }
  });
  return encoded;
}

class SplitWriter {
 public:
  SplitWriter(const std::filesystem::path& folder, const std::string& split, const Tokenizer& tokenizer,
              bool weighted)
      : folder_(folder), split_(split), weighted_(weighted) {
    empty_.info.tokenizer_hash = tokenizer.hash();
    empty_.info.vocabulary = tokenizer.vocabulary();
    content_ = empty_;
  }
  void add(const Document& document, const Encoded& encoded) {
    const auto held = static_cast<int64_t>(content_.tokens.size() + encoded.tokens.size());
    if (!content_.tokens.empty() && held * shard_token_bytes(empty_.info.vocabulary) > kShardBytes) flush();
    const auto bytes = static_cast<int64_t>(document.text.size());
    content_.tokens.insert(content_.tokens.end(), encoded.tokens.begin(), encoded.tokens.end());
    content_.documents.push_back(static_cast<int64_t>(content_.tokens.size()));
    content_.names.push_back(document.name);
    if (weighted_) {
      content_.weights.resize(content_.tokens.size(), 1.0f);
      const auto first = content_.weights.end() - static_cast<int64_t>(encoded.tokens.size());
      std::fill(first, first + encoded.prompt_tokens, 0.0f);
    }
    content_.info.bytes += bytes;
    content_.info.predicted_bytes += bytes - encoded.first_bytes;
    described_.documents += 1;
    described_.tokens += static_cast<int64_t>(encoded.tokens.size());
    described_.bytes += bytes;
  }
  DatasetDescription::Split finish() {
    if (!content_.tokens.empty()) flush();
    return described_;
  }

 private:
  void flush() {
    described_.shards.push_back(fmt::format("{}_{:03}.h5", split_, described_.shards.size()));
    write_shard(folder_ / described_.shards.back(), content_);
    content_ = empty_;
  }
  std::filesystem::path folder_;
  std::string split_;
  bool weighted_;
  ShardContent empty_, content_;
  DatasetDescription::Split described_;
};

int64_t bytes_needed(const std::vector<Encoded>& encoded, int64_t vocabulary, bool weighted) {
  int64_t bytes = kFolderOverhead;
  for (const Encoded& document : encoded)
    bytes +=
        static_cast<int64_t>(document.tokens.size()) * (shard_token_bytes(vocabulary) + (weighted ? 4 : 0)) +
        kDocumentOverhead;
  return bytes;
}

// The least that the shards can take, before the tokens are known: no piece is longer than 16 characters.
int64_t least_bytes(const Collection& documents) {
  int64_t text = 0;
  for (const auto* split : {&documents.train, &documents.validation})
    for (const Document& document : *split) text += static_cast<int64_t>(document.text.size());
  return text / 16 + kFolderOverhead;
}

bool weighted(const std::vector<Document>& documents) {
  return std::any_of(documents.begin(), documents.end(), [](const Document& d) { return d.weighted; });
}

// Whether a file has a name that SplitWriter gives.
bool is_shard_name(std::string_view name) {
  constexpr std::string_view kEnd = ".h5";
  for (const std::string_view split : {"train_", "validation_"}) {
    if (!name.starts_with(split) || !name.ends_with(kEnd)) continue;
    const std::string_view number = name.substr(split.size(), name.size() - split.size() - kEnd.size());
    return number.size() >= 3 && number.find_first_not_of("0123456789") == std::string_view::npos;
  }
  return false;
}

// Whether a folder holds prepared data, and nothing that would be lost with it.
bool replaceable(const std::filesystem::path& folder) {
  if (!std::filesystem::exists(folder / kDescriptionFile)) return false;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const bool written = is_shard_name(name) || name == kDescriptionFile || name == kTokenizerFile;
    if (!written || !entry.is_regular_file())
      throw DataError(
          fmt::format("{}: is no prepared data and would be lost with its folder; move it, or "
                      "choose another folder",
                      entry.path().string()));
  }
  return true;
}

}  // namespace

PrepareSummary prepare(const PrepareParams& params, const Progress& progress) {
  check_params(params);
  std::unique_ptr<Tokenizer> tokenizer = given_tokenizer(params.tokenizer);
  const auto report = [&](const char* phase, double fraction) {
    if (progress) progress(phase, fraction);
  };
  NewFolder folder(params.output, [&](const std::filesystem::path& existing) {
    return params.overwrite && replaceable(existing);
  });
  PrepareSummary summary;
  const Collection documents = collect_documents(params, summary, progress);
  check_free_space(folder.path().parent_path(), least_bytes(documents));
  report("tokenizer", 0);
  if (!tokenizer) tokenizer = train_tokenizer(params.tokenizer, documents.train);
  DatasetDescription description{tokenizer->hash(), tokenizer->vocabulary(), {}};
  std::vector<std::pair<std::string, const std::vector<Document>*>> splits = {
      {"train", &documents.train}, {"validation", &documents.validation}};
  for (const auto& [split, texts] : splits) {
    const std::vector<Encoded> encoded = encode(*tokenizer, *texts, progress);
    report("write", 0);
    check_free_space(folder.path().parent_path(),
                     bytes_needed(encoded, tokenizer->vocabulary(), weighted(*texts)));
    SplitWriter writer(folder.path(), split, *tokenizer, weighted(*texts));
    for (size_t i = 0; i < texts->size(); ++i) writer.add((*texts)[i], encoded[i]);
    description.splits[split] = writer.finish();
  }
  write_file(folder.path() / kTokenizerFile, {tokenizer->serialized()});
  write_file(folder.path() / kDescriptionFile, {write_description(description)});
  folder.commit();
  report("write", 1);
  summary.vocabulary = tokenizer->vocabulary();
  summary.train_tokens = description.splits["train"].tokens;
  summary.train_bytes = description.splits["train"].bytes;
  summary.validation_tokens = description.splits["validation"].tokens;
  summary.validation_bytes = description.splits["validation"].bytes;
  return summary;
}

}  // namespace data
