#include "data/tokenizer.h"

#include <fmt/format.h>

#include "data/checksum.h"
#include "data/files.h"
#include "data/sentencepiece.h"
#include "kernels/core/error.h"

namespace data {

namespace {

constexpr std::string_view kByteTokenizer = "foretell bytes 1\n";

class ByteTokenizer final : public Tokenizer {
 public:
  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> tokens;
    tokens.reserve(text.size());
    for (char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  }
  std::string decode(const std::vector<int32_t>& tokens) const override {
    std::string text;
    for (int32_t token : tokens)
      if (token >= 0 && token < 256) text += static_cast<char>(token);
    return text;
  }
  int64_t vocabulary() const override { return 257; }
  int32_t end_of_text() const override { return 256; }
  std::string serialized() const override { return std::string(kByteTokenizer); }
};

}  // namespace

std::string Tokenizer::hash() const { return checksum(serialized()).hex(); }

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return std::make_unique<ByteTokenizer>(); }

std::unique_ptr<Tokenizer> deserialize_tokenizer(std::string_view serialized) {
  if (serialized == kByteTokenizer) return make_byte_tokenizer();
  return make_sentencepiece(serialized);
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path) {
  const std::filesystem::path file = std::filesystem::is_directory(path) ? path / kTokenizerFile : path;
  const std::string serialized = read_file(file);
  try {
    return deserialize_tokenizer(serialized);
  } catch (const kernels::DataError& error) {
    throw kernels::DataError(fmt::format("{}: {}", file.string(), error.what()));
  }
}

}  // namespace data
