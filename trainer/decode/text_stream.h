#pragma once
// Tokens to text while they arrive. Characters are held back until all their bytes are there.
#include <span>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace trainer {

class TextStream {
 public:
  // `prompt` is what the text continues; it is not repeated.
  TextStream(const data::Tokenizer& tokenizer, std::span<const int32_t> prompt);
  // The text that `tokens` add; end-of-text adds none.
  std::string add(std::span<const int32_t> tokens);
  // What was held back.
  std::string finish();

 private:
  const data::Tokenizer& tokenizer_;
  std::vector<int32_t> window_;  // the latest tokens: some tokens' text depends on the ones before
  std::string held_;
};

}  // namespace trainer
