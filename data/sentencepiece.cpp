#include "data/sentencepiece.h"

#include <fmt/format.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "data/segments.h"
#include "kernels/core/error.h"
#include "kernels/core/parallel.h"

namespace data {

namespace {

using kernels::ConfigError;
using kernels::DataError;

// Encoded segments, shared by threads. Text repeats itself: nearly every segment is found here.
class SegmentCache {
 public:
  bool find(std::string_view segment, std::vector<int32_t>& tokens) const {
    const Part& part = part_of(segment);
    const std::shared_lock lock(part.mutex);
    const auto found = part.entries.find(segment);
    if (found == part.entries.end()) return false;
    tokens.insert(tokens.end(), found->second.begin(), found->second.end());
    return true;
  }
  void insert(std::string_view segment, const std::vector<int>& tokens) {
    Part& part = const_cast<Part&>(part_of(segment));
    const std::unique_lock lock(part.mutex);
    if (part.entries.size() < kEntries && segment.size() <= kLongest) part.entries.emplace(segment, tokens);
  }

 private:
  static constexpr size_t kParts = 64, kEntries = 16384, kLongest = 64;
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  struct Part {
    mutable std::shared_mutex mutex;
    std::unordered_map<std::string, std::vector<int>, Hash, std::equal_to<>> entries;
  };
  const Part& part_of(std::string_view segment) const {
    return parts_[std::hash<std::string_view>()(segment) * 0x9E3779B97F4A7C15u >> 58];
  }
  std::array<Part, kParts> parts_;
};

class SentencePiece final : public Tokenizer {
 public:
  explicit SentencePiece(std::string_view model) : model_(model) {
    if (!processor_.LoadFromSerializedProto({model.data(), model.size()}).ok())
      throw DataError("not a SentencePiece model");
    find_byte_pieces();
    has_stand_ins_ = knows(kTabStandIn) && knows(kNewlineStandIn);
    for (int id = 0; id < processor_.GetPieceSize(); ++id) pieces_.push_back(text_of(id));
    end_of_text_ = processor_.eos_id();
    if (end_of_text_ < 0)
      throw DataError("the SentencePiece model has no end-of-sentence piece; train it with one");
    check_lossless();
  }

  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> tokens;
    for_each_segment(text, [&](std::string_view segment, bool plain) {
      if (!plain) {
        for (char c : segment) tokens.push_back(byte_ids_[static_cast<unsigned char>(c)]);
      } else if (!cache_.find(segment, tokens)) {
        const std::vector<int> ids =
            processor_.EncodeAsIds(has_stand_ins_ ? with_stand_ins(segment) : std::string(segment));
        tokens.insert(tokens.end(), ids.begin(), ids.end());
        cache_.insert(segment, ids);
      }
    });
    return tokens;
  }
  std::string decode(const std::vector<int32_t>& tokens) const override {
    std::string text;
    for (int32_t token : tokens)
      if (token >= 0 && token < vocabulary()) text += pieces_[static_cast<size_t>(token)];
    return text;
  }
  int64_t vocabulary() const override { return static_cast<int64_t>(pieces_.size()); }
  int32_t end_of_text() const override { return end_of_text_; }
  std::string serialized() const override { return model_; }

 private:
  bool knows(std::string_view piece) const {
    return !processor_.IsUnknown(processor_.PieceToId({piece.data(), piece.size()}));
  }

  void find_byte_pieces() {
    byte_ids_.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      const int id = processor_.PieceToId(fmt::format("<0x{:02X}>", byte));
      if (!processor_.IsByte(id))
        throw DataError("the SentencePiece model has no byte pieces; train it with --byte_fallback=true");
      byte_ids_[static_cast<size_t>(byte)] = id;
    }
  }

  std::string text_of(int id) const {
    if (processor_.IsByte(id)) {
      const auto found = std::find(byte_ids_.begin(), byte_ids_.end(), id);
      return std::string(1, static_cast<char>(found - byte_ids_.begin()));
    }
    if (processor_.IsControl(id) || processor_.IsUnknown(id)) return {};
    return without_stand_ins(processor_.IdToPiece(id), has_stand_ins_);
  }

  // A model from elsewhere may normalise, add a space in front or drop some: then it is of no use here.
  void check_lossless() const {
    for (const std::string& probe :
         {std::string("a"), std::string(" a  b \t\n\r\n  c "), std::string("\uFB01 \u00C5 A\u030A \u3000x"),
          std::string("<s></s><unk><0x41> \u2581 \U0001F600\u200D")})
      if (decode(encode(probe)) != probe)
        throw DataError(
            "the SentencePiece model loses text; train it with --normalization_rule_name=identity "
            "--add_dummy_prefix=false --remove_extra_whitespaces=false");
  }

  std::string model_;
  sentencepiece::SentencePieceProcessor processor_;
  std::array<int32_t, 256> byte_ids_;
  bool has_stand_ins_ = false;
  std::vector<std::string> pieces_;
  int32_t end_of_text_ = -1;
  mutable SegmentCache cache_;
};

using Counts = std::unordered_map<std::string_view, int64_t>;
using Counted = std::vector<std::pair<std::string_view, int64_t>>;

// Most frequent first; ties by text, so that the order is that of the content alone.
Counted by_frequency(const Counts& counts) {
  Counted sorted(counts.begin(), counts.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  });
  return sorted;
}

Counted count_segments(const std::vector<std::string_view>& texts) {
  std::vector<Counts> counts(static_cast<size_t>(kernels::threads()));
  kernels::parallel_region([&](int thread, int count) {
    for (size_t i = static_cast<size_t>(thread); i < texts.size(); i += static_cast<size_t>(count))
      for_each_segment(texts[i], [&](std::string_view segment, bool plain) {
        if (plain) ++counts[static_cast<size_t>(thread)][segment];
      });
  });
  for (size_t t = 1; t < counts.size(); ++t)
    for (const auto& [segment, count] : counts[t]) counts[0][segment] += count;
  return by_frequency(counts[0]);
}

// Characters worth a piece of their own: those that make up 99.95% of the text, in at most half of the pieces
// that are not bytes. The others are written as bytes.
Counts frequent_characters(const Counted& segments, int64_t most) {
  Counts counts;
  int64_t total = 0, covered = 0;
  for (const auto& [segment, count] : segments)
    for (std::string_view rest = segment; !rest.empty();) {
      const auto length = static_cast<size_t>(utf8_length(rest));
      counts[rest.substr(0, length)] += count;
      total += count;
      rest.remove_prefix(length);
    }
  Counts kept;
  for (const auto& [character, count] : by_frequency(counts)) {
    if (static_cast<int64_t>(kept.size()) >= most ||
        static_cast<double>(covered) > 0.9995 * static_cast<double>(total))
      break;
    kept[character] = count;
    covered += count;
  }
  return kept;
}

// "segment <tab> count" lines, cut at characters that are not kept.
class CountedSegments final : public sentencepiece::SentenceIterator {
 public:
  CountedSegments(const Counted& segments, const Counts& characters) {
    for (const auto& [segment, count] : segments) {
      std::string_view rest = segment;
      std::string part;
      while (!rest.empty()) {
        const auto length = static_cast<size_t>(utf8_length(rest));
        if (characters.contains(rest.substr(0, length))) {
          part += rest.substr(0, length);
        } else {
          add(part, count);
        }
        rest.remove_prefix(length);
      }
      add(part, count);
    }
    // Every model of ours has pieces for white space, whatever its text was: without them the stand-ins would
    // come back as they are.
    std::string white = " \t\n";
    if (!lines_.empty()) add(white, 1);
  }
  bool done() const override { return at_ == lines_.size(); }
  void Next() override { ++at_; }
  const std::string& value() const override { return lines_[at_]; }
  sentencepiece::util::Status status() const override { return {}; }
  bool empty() const { return lines_.empty(); }

 private:
  void add(std::string& part, int64_t count) {
    if (!part.empty()) lines_.push_back(fmt::format("{}\t{}", with_stand_ins(part), count));
    part.clear();
  }
  std::vector<std::string> lines_;
  size_t at_ = 0;
};

// Unique segments that training looks at; rarer ones change no merge at the vocabularies of interest.
constexpr size_t kTrainingSegments = 200000;

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece(std::string_view model) {
  return std::make_unique<SentencePiece>(model);
}

std::unique_ptr<Tokenizer> train_sentencepiece(const std::vector<std::string_view>& texts,
                                               int64_t vocabulary) {
  if (vocabulary < kSmallestVocabulary || vocabulary > kLargestVocabulary)
    throw ConfigError(fmt::format("sentencepiece:{}: the vocabulary must be between {} and {}", vocabulary,
                                  kSmallestVocabulary, kLargestVocabulary));
  Counted segments = count_segments(texts);
  const Counts characters = frequent_characters(segments, (vocabulary - 258) / 2);
  if (segments.size() > kTrainingSegments) segments.resize(kTrainingSegments);
  CountedSegments lines(segments, characters);
  if (lines.empty()) throw DataError("no text to train a tokenizer on");
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train({{"model_type", "bpe"},
                                                                  {"vocab_size", std::to_string(vocabulary)},
                                                                  {"hard_vocab_limit", "false"},
                                                                  {"byte_fallback", "true"},
                                                                  {"character_coverage", "1.0"},
                                                                  {"normalization_rule_name", "identity"},
                                                                  {"add_dummy_prefix", "false"},
                                                                  {"remove_extra_whitespaces", "false"},
                                                                  {"split_by_whitespace", "false"},
                                                                  {"split_by_unicode_script", "false"},
                                                                  {"split_by_number", "false"},
                                                                  {"max_sentencepiece_length", "16"},
                                                                  {"max_sentence_length", "100000"},
                                                                  {"input_format", "tsv"},
                                                                  {"unk_id", "0"},
                                                                  {"eos_id", "1"},
                                                                  {"bos_id", "-1"},
                                                                  {"pad_id", "-1"},
                                                                  {"num_threads", "1"},
                                                                  {"minloglevel", "2"}},
                                                                 &lines, &model);
  if (!status.ok())
    throw DataError(fmt::format("cannot train a tokenizer of {} pieces: {}", vocabulary, status.ToString()));
  return make_sentencepiece(model);
}

}  // namespace data
