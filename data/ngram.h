#pragma once
// Byte-level n-gram models, the scale that a model's bits per byte are read against.
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.h"

namespace data {

// The text of the split's documents in storage order, the last one cut where `max_bytes` is reached; 0 takes
// all.
std::vector<std::string> document_texts(const TokenDataset& dataset, const Tokenizer& tokenizer,
                                        int64_t max_bytes = 0);

struct NgramScore {
  int order = 0;
  double bits_per_byte = 0;
};

// A model of order n predicts a byte c from the n - 1 bytes h before it (fewer at a document's start), with
// Witten-Bell interpolation down to the uniform distribution over 256 bytes:
//   p_n(c | h) = (count(h c) + types(h) p_{n-1}(c | h')) / (count(h) + types(h)),   p_0 = 1 / 256,
// where count(h) sums over the bytes that followed h, types(h) is how many different ones did, h' drops the
// oldest byte of h, and p_n = p_{n-1} where h was never seen. (Witten and Bell, "The zero-frequency problem",
// 1991; Chen and Goodman, 1998.)
// Orders from 1 to 8, ascending. An order keeps at most `max_grams` different n-grams (24 bytes each, in a
// table between three eighths and three quarters full); later ones are not added. ConfigError for other
// orders, DataError without validation text.
std::vector<NgramScore> ngram_bits_per_byte(std::span<const std::string> train,
                                            std::span<const std::string> validation,
                                            const std::vector<int>& orders,
                                            int64_t max_grams = int64_t{12} << 20);

}  // namespace data
