#include "data/ngram.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "kernels/core/error.h"

namespace data {

namespace {

// What is known of one string of bytes g: how often it occurred, and what followed it.
struct Gram {
  uint64_t key = 0;
  uint32_t count = 0, followed = 0, types = 0;  // count 0: an empty slot
};

// Open addressing with linear probing; the bytes of a gram fit its key.
class GramTable {
 public:
  explicit GramTable(int64_t max_grams)
      : max_grams_(static_cast<size_t>(max_grams)), slots_(size_t{1} << 12) {}

  const Gram* find(uint64_t key) const {
    const Gram& gram = slots_[slot(key)];
    return gram.count > 0 ? &gram : nullptr;
  }
  // nullptr if the gram is new and the table full.
  Gram* add(uint64_t key) {
    size_t at = slot(key);
    if (slots_[at].count == 0) {
      if (size_ >= max_grams_) return nullptr;
      if (4 * (size_ + 1) > 3 * slots_.size()) {
        grow();
        at = slot(key);
      }
      slots_[at].key = key;
      ++size_;
    }
    ++slots_[at].count;
    return &slots_[at];
  }

 private:
  size_t slot(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    uint64_t mixed = (key ^ key >> 29) * 0x9E3779B97F4A7C15u;
    size_t at = (mixed ^ mixed >> 32) & mask;
    while (slots_[at].count > 0 && slots_[at].key != key) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    std::vector<Gram> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Gram& gram : old)
      if (gram.count > 0) slots_[slot(gram.key)] = gram;
  }
  size_t max_grams_, size_ = 0;
  std::vector<Gram> slots_;
};

uint64_t last_bytes(uint64_t history, int count) {
  return count == 8 ? history : history & ((uint64_t{1} << (8 * count)) - 1);
}

class NgramModel {
 public:
  NgramModel(int order, int64_t max_grams) : order_(order) {
    for (int n = 1; n <= order; ++n) tables_.emplace_back(max_grams);
  }

  void train(std::string_view text) {
    uint64_t history = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const uint64_t next = history << 8 | static_cast<unsigned char>(text[i]);
      const int longest = std::min<int>(order_, static_cast<int>(std::min<size_t>(i + 1, 8)));
      Gram* context = &empty_;
      for (int n = 1; n <= longest && context != nullptr; ++n) {
        Gram* gram = tables_[n - 1].add(last_bytes(next, n));
        if (gram == nullptr) break;
        ++context->followed;
        context->types += gram->count == 1;
        context = n < longest ? find_context(history, n) : nullptr;
      }
      history = next;
    }
  }

  // bits[n - 1] += -log2 p_n of each byte of the text.
  void score(std::string_view text, std::vector<double>& bits) const {
    uint64_t history = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const uint64_t next = history << 8 | static_cast<unsigned char>(text[i]);
      double p = 1.0 / 256;
      const Gram* context = &empty_;
      for (int n = 1; n <= order_; ++n) {
        if (context != nullptr && context->followed > 0) {
          const Gram* gram = tables_[n - 1].find(last_bytes(next, n));
          const double count = gram == nullptr ? 0.0 : gram->count;
          p = (count + context->types * p) / (static_cast<double>(context->followed) + context->types);
        }
        bits[n - 1] -= std::log2(p);
        context = context != nullptr && static_cast<size_t>(n) <= i && n < order_
                      ? tables_[n - 1].find(last_bytes(history, n))
                      : nullptr;
      }
      history = next;
    }
  }

 private:
  Gram* find_context(uint64_t history, int n) {
    return const_cast<Gram*>(tables_[n - 1].find(last_bytes(history, n)));
  }
  int order_;
  std::vector<GramTable> tables_;
  Gram empty_;  // the context of order 1
};

}  // namespace

std::vector<std::string> document_texts(const TokenDataset& dataset, const Tokenizer& tokenizer,
                                        int64_t max_bytes) {
  std::vector<std::string> texts;
  int64_t bytes = 0;
  for (int64_t d = 0; d < dataset.documents() && (max_bytes == 0 || bytes < max_bytes); ++d) {
    texts.push_back(tokenizer.decode(dataset.document(d)));
    if (max_bytes > 0 && bytes + static_cast<int64_t>(texts.back().size()) > max_bytes)
      texts.back().resize(static_cast<size_t>(max_bytes - bytes));
    bytes += static_cast<int64_t>(texts.back().size());
  }
  return texts;
}

std::vector<NgramScore> ngram_bits_per_byte(std::span<const std::string> train,
                                            std::span<const std::string> validation,
                                            const std::vector<int>& orders, int64_t max_grams) {
  if (orders.empty() || orders.front() < 1 || orders.back() > 8 ||
      !std::is_sorted(orders.begin(), orders.end()))
    throw kernels::ConfigError("n-gram orders: expected ascending numbers from 1 to 8");
  NgramModel model(orders.back(), max_grams);
  for (const std::string& text : train) model.train(text);
  std::vector<double> bits(static_cast<size_t>(orders.back()), 0.0);
  int64_t bytes = 0;
  for (const std::string& text : validation) {
    model.score(text, bits);
    bytes += static_cast<int64_t>(text.size());
  }
  if (bytes == 0) throw kernels::DataError("no validation text to measure n-gram models on");
  std::vector<NgramScore> scores;
  for (int order : orders)
    scores.push_back({order, bits[static_cast<size_t>(order - 1)] / static_cast<double>(bytes)});
  return scores;
}

}  // namespace data
