#include "trainer/decode/text_stream.h"

#include <algorithm>

namespace trainer {

namespace {

constexpr size_t kWindow = 8;

// Bytes at the end that begin a character whose other bytes are missing.
size_t incomplete_bytes(const std::string& text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xC0u) == 0x80u) continue;
    const size_t needed = byte >= 0xF0u ? 4 : byte >= 0xE0u ? 3 : byte >= 0xC0u ? 2 : 1;
    return needed > back ? back : 0;
  }
  return 0;
}

}  // namespace

TextStream::TextStream(const data::Tokenizer& tokenizer, std::span<const int32_t> prompt)
    : tokenizer_(tokenizer), window_(prompt.end() - std::min(kWindow, prompt.size()), prompt.end()) {
  std::erase(window_, tokenizer.end_of_text());
}

std::string TextStream::add(std::span<const int32_t> tokens) {
  const size_t before = tokenizer_.decode(window_).size();
  for (const int32_t token : tokens)
    if (token != tokenizer_.end_of_text()) window_.push_back(token);
  held_ += tokenizer_.decode(window_).substr(before);
  if (window_.size() > kWindow) window_.erase(window_.begin(), window_.end() - kWindow);
  const size_t ready = held_.size() - incomplete_bytes(held_);
  const std::string text = held_.substr(0, ready);
  held_.erase(0, ready);
  return text;
}

std::string TextStream::finish() {
  std::string text;
  std::swap(text, held_);
  return text;
}

}  // namespace trainer
