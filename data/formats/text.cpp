#include "data/formats/reader.h"

namespace data {

bool accepts_text(std::string_view, std::string_view) { return true; }

ReadResult read_text(const std::string& path, std::string_view content, const ReaderOptions&) {
  ReadResult result;
  result.documents.push_back({.name = path, .text = std::string(content)});
  return result;
}

}  // namespace data
