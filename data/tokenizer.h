#pragma once
// Text to tokens and back. Decoding the tokens of a text gives the text back, byte for byte, for any bytes.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace data {

inline constexpr const char* kTokenizerFile = "tokenizer.model";  // in a prepared folder

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;  // without the end-of-text token
  virtual std::string decode(const std::vector<int32_t>& tokens) const = 0;
  virtual int64_t vocabulary() const = 0;
  virtual int32_t end_of_text() const = 0;
  virtual std::string serialized() const = 0;  // what `load` reads; its XXH3-128 is the tokenizer's hash
  std::string hash() const;
};

std::unique_ptr<Tokenizer> make_byte_tokenizer();  // 256 bytes and end-of-text
// The tokenizer of a prepared folder, or a SentencePiece model file. DataError names what is wrong.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);
std::unique_ptr<Tokenizer> deserialize_tokenizer(std::string_view serialized);
// Trains SentencePiece BPE with byte fall-back on the given texts, loss-less (no normalisation, spaces kept).
// Merges stay inside a word with the white space before it (see sentencepiece.cpp). The vocabulary counts
// everything; it comes out smaller where the texts do not fill it. ConfigError beyond these.
inline constexpr int64_t kSmallestVocabulary = 288, kLargestVocabulary = 1000000;
std::unique_ptr<Tokenizer> train_sentencepiece(const std::vector<std::string_view>& texts,
                                               int64_t vocabulary);

}  // namespace data
