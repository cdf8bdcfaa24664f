#include "data/dataset_description.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "data/checksum.h"
#include "data/files.h"
#include "data/tokenizer.h"
#include "kernels/core/error.h"

namespace data {

namespace {

using Json = nlohmann::json;
using kernels::DataError;

std::string plain_name(const Json& name) {
  const std::string text = name.get<std::string>();
  if (text.empty() || text[0] == '.' || text.find('/') != std::string::npos)
    throw DataError("a shard's name is not a plain file name");
  return text;
}

DatasetDescription parse(const std::string& content) {
  Json json = Json::parse(content);
  if (json.at("format") != "foretell dataset 1") throw DataError("of another version");
  const std::string expected = json.at("checksum");
  json.erase("checksum");
  if (checksum(json.dump()).hex() != expected) throw DataError("damaged (its checksum differs)");
  DatasetDescription description;
  description.tokenizer_hash = json.at("tokenizer").at("hash");
  description.vocabulary = json.at("tokenizer").at("vocabulary");
  for (const auto& [name, value] : json.at("splits").items()) {
    DatasetDescription::Split split;
    for (const Json& shard : value.at("shards")) split.shards.push_back(plain_name(shard));
    split.documents = value.at("documents");
    split.tokens = value.at("tokens");
    split.bytes = value.at("bytes");
    description.splits[name] = split;
  }
  return description;
}

}  // namespace

std::string write_description(const DatasetDescription& description) {
  Json json;
  json["format"] = "foretell dataset 1";
  json["tokenizer"] = {
      {"file", kTokenizerFile}, {"hash", description.tokenizer_hash}, {"vocabulary", description.vocabulary}};
  json["splits"] = Json::object();
  for (const auto& [name, split] : description.splits)
    json["splits"][name] = {{"shards", split.shards},
                            {"documents", split.documents},
                            {"tokens", split.tokens},
                            {"bytes", split.bytes}};
  json["checksum"] = checksum(json.dump()).hex();
  return json.dump(2) + "\n";
}

DatasetDescription read_description(const std::filesystem::path& prepared) {
  const std::filesystem::path file = prepared / kDescriptionFile;
  if (!std::filesystem::exists(file))
    throw DataError(fmt::format("{}: not a prepared folder (no {}); make one with foretell prepare",
                                prepared.string(), kDescriptionFile));
  DatasetDescription description;
  try {
    description = parse(read_file(file));
  } catch (const Json::exception&) {
    throw DataError(fmt::format("{}: damaged; run foretell prepare again", file.string()));
  } catch (const DataError& error) {
    throw DataError(fmt::format("{}: {}; run foretell prepare again", file.string(), error.what()));
  }
  const std::filesystem::path tokenizer = prepared / kTokenizerFile;
  if (checksum(read_file(tokenizer)).hex() != description.tokenizer_hash)
    throw DataError(
        fmt::format("{}: damaged, or another tokenizer than the data was prepared with; run foretell "
                    "prepare again",
                    tokenizer.string()));
  return description;
}

}  // namespace data
