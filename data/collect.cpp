#include "data/collect.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "data/checksum.h"
#include "data/files.h"
#include "data/sorting.h"
#include "kernels/core/error.h"

namespace data {

namespace {

using kernels::DataError;
using Progress = std::function<void(const std::string&, double)>;

constexpr size_t kNamedSkips = 10;

// Whether a byte of UTF-8 continues a character.
bool in_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

void note_skips(PrepareSummary& summary, const std::vector<std::string>& skipped) {
  for (const std::string& line : skipped) {
    ++summary.skipped;
    if (summary.skipped_files.size() < kNamedSkips) summary.skipped_files.push_back(line);
  }
}

// Keeps at most `size` bytes, in whole characters.
void cut_text(Document& document, size_t size) {
  while (size > 0 && size < document.text.size() && in_character(document.text[size])) --size;
  document.text.resize(std::min(size, document.text.size()));
  document.prompt = std::min(document.prompt, static_cast<int64_t>(document.text.size()));
}

std::vector<Document> read_files(const std::vector<std::filesystem::path>& files, const PrepareParams& params,
                                 int64_t max_bytes, PrepareSummary& summary, const Progress& progress) {
  std::vector<Document> documents;
  int64_t bytes = 0;
  for (size_t i = 0; i < files.size() && (max_bytes == 0 || bytes < max_bytes); ++i) {
    ++summary.files;
    ReadResult result;
    try {
      result = read_documents(files[i].string(), read_file(files[i]), {params.text_key});
    } catch (const DataError& error) {
      result.skipped.push_back(error.what());
    }
    note_skips(summary, result.skipped);
    for (Document& document : result.documents) {
      const auto left = static_cast<size_t>(max_bytes - bytes);
      if (max_bytes > 0 && document.text.size() > left) {
        bytes = max_bytes;
        if (!documents.empty()) break;
        cut_text(document, left);
      } else {
        bytes += static_cast<int64_t>(document.text.size());
      }
      if (!document.text.empty()) documents.push_back(std::move(document));
      if (bytes == max_bytes && max_bytes > 0) break;
    }
    if (progress && i % 64 == 0) progress("read", static_cast<double>(i) / static_cast<double>(files.size()));
  }
  return documents;
}

Checksum identity(const Document& document) {
  Checksum sum = checksum(document.text);
  if (document.weighted) sum.high ^= static_cast<uint64_t>(document.prompt + 1) * 0x9E3779B97F4A7C15u;
  return sum;
}

// Documents, and the identity of each.
struct Identified {
  std::vector<Document> documents;
  std::vector<Checksum> sums;
};

// Keeps the first document of each content.
Identified drop_duplicates(std::vector<Document> documents, PrepareSummary& summary) {
  const auto count = static_cast<int64_t>(documents.size());
  std::vector<Checksum> sums;
  for (const Document& document : documents) sums.push_back(identity(document));
  const auto order = bucket_sort(count, [&](int64_t i) { return sums[i].high; });
  std::vector<bool> duplicate(documents.size(), false);
  for (int64_t i = 0, run = 0; i < count; ++i) {
    if (sums[order[i]].high != sums[order[run]].high) run = i;
    for (int64_t j = run; j < i && !duplicate[order[i]]; ++j)
      duplicate[order[i]] = sums[order[j]] == sums[order[i]];
  }
  Identified kept;
  for (int64_t i = 0; i < count; ++i) {
    if (duplicate[i]) {
      ++summary.duplicates;
    } else {
      kept.documents.push_back(std::move(documents[i]));
      kept.sums.push_back(sums[i]);
    }
  }
  return kept;
}

// The last part of a lone document, cut at a line's end where there is one.
void split_document(Collection& collection, double fraction) {
  Document& whole = collection.train.front();
  const auto size = static_cast<double>(whole.text.size());
  size_t cut = static_cast<size_t>(size * (1 - fraction));
  const size_t line = whole.text.find('\n', cut);
  if (line != std::string::npos && line + 1 < whole.text.size()) {
    cut = line + 1;
  } else {
    while (cut > 0 && in_character(whole.text[cut])) --cut;
  }
  if (cut == 0 || cut >= whole.text.size() || whole.weighted) return;
  collection.validation.push_back({.name = whole.name + " (end)", .text = whole.text.substr(cut)});
  whole.text.resize(cut);
}

Collection split_by_hash(Identified all, double fraction) {
  Collection collection;
  if (fraction == 0) return {std::move(all.documents), {}};
  const auto lowest = std::min_element(all.sums.begin(), all.sums.end(),
                                       [](const Checksum& a, const Checksum& b) { return a.low < b.low; });
  const auto highest = std::max_element(all.sums.begin(), all.sums.end(),
                                        [](const Checksum& a, const Checksum& b) { return a.low < b.low; });
  const auto held_out = [&](size_t i) {
    if (all.sums.size() == 1) return false;
    if (i == static_cast<size_t>(lowest - all.sums.begin())) return true;
    if (i == static_cast<size_t>(highest - all.sums.begin())) return false;
    return static_cast<double>(all.sums[i].low) * 0x1.0p-64 < fraction;
  };
  for (size_t i = 0; i < all.sums.size(); ++i)
    (held_out(i) ? collection.validation : collection.train).push_back(std::move(all.documents[i]));
  if (all.sums.size() == 1) split_document(collection, fraction);
  return collection;
}

[[noreturn]] void nothing_usable(const PrepareSummary& summary, std::string_view split) {
  std::string reasons;
  for (size_t i = 0; i < std::min<size_t>(summary.skipped_files.size(), 3); ++i)
    reasons += (i == 0 ? " (" : ", ") + summary.skipped_files[i];
  if (!reasons.empty()) reasons += summary.skipped > 3 ? ", ...)" : ")";
  throw DataError(
      fmt::format("no usable text for {} among {} files, {} skipped{}; give UTF-8 text or JSON lines", split,
                  summary.files, summary.skipped, reasons));
}

}  // namespace

Collection collect_documents(const PrepareParams& params, PrepareSummary& summary, const Progress& progress) {
  auto files = expand_inputs(params.inputs);
  const auto held_out = expand_inputs(params.validation_inputs);
  std::set<std::string> held_out_paths;
  for (const auto& file : held_out) held_out_paths.insert(std::filesystem::weakly_canonical(file).string());
  if (!held_out.empty())
    std::erase_if(files, [&](const auto& file) {
      return held_out_paths.contains(std::filesystem::weakly_canonical(file).string());
    });
  // Validation documents come first, so that a duplicate in the training text is the one that is dropped.
  auto documents = read_files(held_out, params, 0, summary, {});
  const size_t held_out_documents = documents.size();
  std::set<std::string> held_out_names;
  for (const Document& document : documents) held_out_names.insert(document.name);
  for (Document& document : read_files(files, params, params.max_bytes, summary, progress))
    documents.push_back(std::move(document));
  Identified all = drop_duplicates(std::move(documents), summary);
  Collection collection;
  if (params.validation_inputs.empty()) {
    collection = split_by_hash(std::move(all), params.validation_fraction);
  } else {
    if (held_out_documents == 0) nothing_usable(summary, "validation");
    for (Document& document : all.documents)
      (held_out_names.contains(document.name) ? collection.validation : collection.train)
          .push_back(std::move(document));
  }
  if (collection.train.empty()) nothing_usable(summary, "training");
  summary.documents = static_cast<int64_t>(collection.train.size() + collection.validation.size());
  return collection;
}

}  // namespace data
