#include "data/dataset.h"

#include <fmt/format.h>

#include <algorithm>

#include "data/dataset_description.h"
#include "data/formats/shard.h"
#include "kernels/core/error.h"

namespace data {

using kernels::ConfigError;
using kernels::DataError;

struct TokenDataset::Impl {
  int64_t context = 0, tokens = 0, bytes = 0;
  std::vector<std::unique_ptr<ShardReader>> shards;
  struct Place {
    const ShardReader* shard;
    int64_t begin, end, number;  // tokens in the shard; the document's number there
  };
  std::vector<Place> places;
  std::vector<int64_t> first_sample = {0};  // (D + 1)

  void add(const std::filesystem::path& path, const DatasetDescription& description) {
    shards.push_back(std::make_unique<ShardReader>(path));
    const ShardReader& shard = *shards.back();
    if (shard.info().tokenizer_hash != description.tokenizer_hash ||
        shard.info().vocabulary != description.vocabulary)
      throw DataError(fmt::format(
          "{}: written with another tokenizer than its folder's; run foretell prepare again", path.string()));
    tokens += shard.info().tokens;
    bytes += shard.info().predicted_bytes;
    const auto& offsets = shard.documents();
    for (int64_t d = 0; d < shard.info().documents; ++d) {
      const int64_t length = offsets[d + 1] - offsets[d];
      places.push_back({&shard, offsets[d], offsets[d + 1], d});
      first_sample.push_back(first_sample.back() + (length - 1 + context - 1) / context);
    }
  }

  const Place& document(int64_t d) const {
    if (d < 0 || d >= static_cast<int64_t>(places.size()))
      throw DataError(fmt::format("document {} of {}: no such document", d, places.size()));
    return places[d];
  }

  struct Range {
    const ShardReader* shard;
    int64_t begin, end;
  };
  Range range(int64_t sample) const {
    if (sample < 0 || sample >= first_sample.back())
      throw DataError(fmt::format("sample {} of {}: no such sample", sample, first_sample.back()));
    const auto after = std::upper_bound(first_sample.begin(), first_sample.end(), sample);
    const int64_t d = after - first_sample.begin() - 1;
    const int64_t begin = places[d].begin + (sample - first_sample[d]) * context;
    return {places[d].shard, begin, std::min(begin + context + 1, places[d].end)};
  }
};

TokenDataset::TokenDataset(const std::filesystem::path& prepared, const std::string& split, int64_t context)
    : impl_(std::make_unique<Impl>()) {
  if (context < 1) throw ConfigError(fmt::format("a context of {} tokens: it must be at least 1", context));
  const DatasetDescription description = read_description(prepared);
  const auto found = description.splits.find(split);
  if (found == description.splits.end())
    throw DataError(
        fmt::format("{}: has no split \"{}\"; run foretell prepare again", prepared.string(), split));
  impl_->context = context;
  for (const std::string& shard : found->second.shards) impl_->add(prepared / shard, description);
  if (impl_->tokens != found->second.tokens || documents() != found->second.documents)
    throw DataError(fmt::format("{}: its shards do not hold what {} says; run foretell prepare again",
                                prepared.string(), kDescriptionFile));
}
TokenDataset::~TokenDataset() = default;

int64_t TokenDataset::samples() const { return impl_->first_sample.back(); }
int64_t TokenDataset::tokens() const { return impl_->tokens; }
int64_t TokenDataset::bytes() const { return impl_->bytes; }
int64_t TokenDataset::documents() const { return static_cast<int64_t>(impl_->places.size()); }

int64_t TokenDataset::length(int64_t sample) const {
  const auto range = impl_->range(sample);
  return range.end - range.begin;
}
std::vector<int32_t> TokenDataset::sample(int64_t sample) const {
  const auto range = impl_->range(sample);
  return range.shard->tokens(range.begin, range.end);
}
std::vector<float> TokenDataset::weights(int64_t sample) const {
  const auto range = impl_->range(sample);
  return range.shard->weights(range.begin, range.end);
}
std::vector<int32_t> TokenDataset::document(int64_t document) const {
  const auto& place = impl_->document(document);
  return place.shard->tokens(place.begin, place.end);
}
std::string TokenDataset::document_name(int64_t document) const {
  const auto& place = impl_->document(document);
  return place.shard->name(place.number);
}

DatasetInfo read_dataset_info(const std::filesystem::path& prepared) {
  const DatasetDescription description = read_description(prepared);
  DatasetInfo info;
  info.tokenizer_hash = description.tokenizer_hash;
  info.vocabulary = description.vocabulary;
  if (const auto train = description.splits.find("train"); train != description.splits.end()) {
    info.train_tokens = train->second.tokens;
    info.train_bytes = train->second.bytes;
  }
  if (const auto validation = description.splits.find("validation"); validation != description.splits.end()) {
    info.validation_tokens = validation->second.tokens;
    info.validation_bytes = validation->second.bytes;
  }
  return info;
}

}  // namespace data
