#pragma once
#include <memory>
#include <string_view>

#include "data/tokenizer.h"

namespace data {

// From the bytes of a SentencePiece model. DataError if it is none, or if it loses text.
std::unique_ptr<Tokenizer> make_sentencepiece(std::string_view model);

}  // namespace data
