#include "data/formats/reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "data/utf8.h"

namespace data {

namespace {

constexpr Reader kReaders[] = {
    {"json lines", accepts_json_lines, read_json_lines},
    {"text", accepts_text, read_text},
};

}  // namespace

std::span<const Reader> readers() { return kReaders; }

ReadResult read_documents(const std::string& path, std::string_view content, const ReaderOptions& options) {
  const auto skip = [&](std::string_view reason) {
    ReadResult result;
    result.skipped.push_back(fmt::format("{}: {}", path, reason));
    return result;
  };
  if (content.empty()) return skip("empty");
  if (content.find('\0') != std::string_view::npos) return skip("binary");
  if (!valid_utf8(content)) return skip("not UTF-8");
  std::string name = path;
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  for (const Reader& reader : kReaders)
    if (reader.accepts(name, content)) return reader.read(path, content, options);
  return skip("of no known format");
}

}  // namespace data
