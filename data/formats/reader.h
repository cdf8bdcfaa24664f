#pragma once
// Input formats: a visible table. A reader turns the bytes of one file into documents.
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace data {

struct Document {
  std::string name;       // path, or path:line
  std::string text;       // valid UTF-8 without NUL
  int64_t prompt = 0;     // leading bytes whose tokens get loss weight 0
  bool weighted = false;  // has a prompt at all, even an empty one
};

struct ReaderOptions {
  std::string text_key = "text";  // of JSON lines; "prompt+completion" joins two
};

struct ReadResult {
  std::vector<Document> documents;
  std::vector<std::string> skipped;  // "where: reason"
};

struct Reader {
  const char* name;
  // By the file's name (lower case) and content.
  bool (*accepts)(std::string_view name, std::string_view content);
  ReadResult (*read)(const std::string& path, std::string_view content, const ReaderOptions& options);
};

// In the order they are asked; the last accepts anything.
std::span<const Reader> readers();

// Sniffs and reads one file. What is empty, binary or not UTF-8 is skipped with the reason: a text whole, of
// JSON lines each for itself.
ReadResult read_documents(const std::string& path, std::string_view content, const ReaderOptions& options);

bool accepts_json_lines(std::string_view name, std::string_view content);
ReadResult read_json_lines(const std::string& path, std::string_view content, const ReaderOptions& options);
bool accepts_text(std::string_view name, std::string_view content);
ReadResult read_text(const std::string& path, std::string_view content, const ReaderOptions& options);

}  // namespace data
