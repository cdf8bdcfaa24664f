#include <fmt/format.h>

#include "data/formats/reader.h"
#include "data/utf8.h"

namespace data {

bool accepts_text(std::string_view, std::string_view) { return true; }

ReadResult read_text(const std::string& path, std::string_view content, const ReaderOptions&) {
  const bool binary = content.find('\0') != std::string_view::npos;
  if (binary || !valid_utf8(content))
    return {{}, {fmt::format("{}: {}", path, binary ? "binary" : "not UTF-8")}};
  return {{{.name = path, .text = std::string(content)}}, {}};
}

}  // namespace data
