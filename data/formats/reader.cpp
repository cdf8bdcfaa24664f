#include "data/formats/reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

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
    return ReadResult{{}, {fmt::format("{}: {}", path, reason)}};
  };
  if (content.empty()) return skip("empty");
  std::string name = path;
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  for (const Reader& reader : kReaders)
    if (reader.accepts(name, content)) return reader.read(path, content, options);
  return skip("of no known format");
}

}  // namespace data
