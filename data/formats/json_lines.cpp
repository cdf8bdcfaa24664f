#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "data/formats/reader.h"
#include "data/utf8.h"

namespace data {

namespace {

using Json = nlohmann::json;

// The string behind a key; otherwise sets `reason`.
std::string string_at(const Json& record, const std::string& key, std::string& reason) {
  const auto found = record.find(key);
  if (found == record.end()) {
    reason = fmt::format("no key \"{}\"", key);
  } else if (!found->is_string()) {
    reason = fmt::format("\"{}\" is not a string", key);
  } else {
    return found->get<std::string>();
  }
  return {};
}

Document parse_record(std::string_view line, const std::string& key, std::string& reason) {
  Document document;
  if (!valid_utf8(line)) {
    reason = "not UTF-8";
    return document;
  }
  const Json record = Json::parse(line.begin(), line.end(), nullptr, false);
  if (!record.is_object()) {
    reason = "not a JSON object";
    return document;
  }
  const size_t plus = key.find('+');
  if (plus != std::string::npos) {
    document.weighted = true;
    document.text = string_at(record, key.substr(0, plus), reason);
    document.prompt = static_cast<int64_t>(document.text.size());
    if (reason.empty()) document.text += string_at(record, key.substr(plus + 1), reason);
  } else {
    document.text = string_at(record, key, reason);
  }
  if (reason.empty() && document.text.empty()) reason = "empty text";
  if (document.text.find('\0') != std::string::npos) reason = "text holds a NUL";
  return document;
}

}  // namespace

bool accepts_json_lines(std::string_view name, std::string_view) {
  return name.ends_with(".jsonl") || name.ends_with(".ndjson");
}

ReadResult read_json_lines(const std::string& path, std::string_view content, const ReaderOptions& options) {
  ReadResult result;
  for (int64_t number = 1; !content.empty(); ++number) {
    const size_t end = std::min(content.find('\n'), content.size());
    const std::string_view line = content.substr(0, end);
    content.remove_prefix(std::min(end + 1, content.size()));
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    std::string reason;
    Document document = parse_record(line, options.text_key, reason);
    document.name = fmt::format("{}:{}", path, number);
    if (reason.empty()) {
      result.documents.push_back(std::move(document));
    } else {
      result.skipped.push_back(fmt::format("{}: {}", document.name, reason));
    }
  }
  return result;
}

}  // namespace data
