#include "checkpoints/manifest.h"

#include <fmt/format.h>

#include <array>
#include <cctype>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/core/error.h"

namespace checkpoints {
namespace {

using kernels::CheckpointError;
using kernels::DType;
using nlohmann::json;

constexpr const char* kFormat = "foretell checkpoint 1";
constexpr std::array kStoredTypes{DType::f32, DType::f64, DType::i32, DType::i64, DType::u8};

uint64_t from_hex(const std::string& text) {
  size_t used = 0;
  const uint64_t hash = std::stoull(text, &used, 16);
  if (to_hex(hash) != text) throw CheckpointError(fmt::format("{} is not a checksum", text));
  return hash;
}

DType dtype_from(const std::string& name) {
  for (DType dtype : kStoredTypes)
    if (name_of(dtype) == name) return dtype;
  throw CheckpointError(fmt::format("element type {} is unknown", name));
}

json to_json(const TensorEntry& tensor) {
  json shape = json::array(), pieces = json::array();
  for (int i = 0; i < tensor.shape.rank(); ++i) shape.push_back(tensor.shape[i]);
  for (const Piece& piece : tensor.pieces)
    pieces.push_back(
        {{"file", piece.file}, {"rows", {piece.begin, piece.end}}, {"xxh3", to_hex(piece.hash)}});
  return {{"name", tensor.name}, {"dtype", name_of(tensor.dtype)}, {"shape", shape}, {"pieces", pieces}};
}

TensorEntry tensor_from(const json& entry) {
  TensorEntry tensor;
  tensor.name = entry.at("name").get<std::string>();
  if (!plain_name(tensor.name)) throw CheckpointError("a tensor's name is not plain");
  tensor.dtype = dtype_from(entry.at("dtype").get<std::string>());
  const auto dims = entry.at("shape").get<std::vector<int64_t>>();
  if (dims.empty() || dims.size() > kernels::Shape::kMaxRank)
    throw CheckpointError(fmt::format("tensor {} has {} dimensions", tensor.name, dims.size()));
  if (dims.size() == 1) tensor.shape = {dims[0]};
  if (dims.size() == 2) tensor.shape = {dims[0], dims[1]};
  if (dims.size() == 3) tensor.shape = {dims[0], dims[1], dims[2]};
  if (dims.size() == 4) tensor.shape = {dims[0], dims[1], dims[2], dims[3]};
  checked_bytes(tensor.name, tensor.dtype, tensor.shape);
  for (const json& part : entry.at("pieces")) {
    const json& rows = part.at("rows");
    tensor.pieces.push_back({part.at("file").get<int>(), rows.at(0).get<int64_t>(), rows.at(1).get<int64_t>(),
                             from_hex(part.at("xxh3").get<std::string>())});
  }
  return tensor;
}

void check_pieces(const TensorEntry& tensor, size_t files) {
  int64_t row = 0;
  int last_file = -1;
  bool sound = !tensor.pieces.empty();
  for (const Piece& piece : tensor.pieces) {
    sound = sound && piece.file > last_file && static_cast<size_t>(piece.file) < files &&
            piece.begin == row && (piece.end > row || tensor.shape.numel() == 0);
    last_file = piece.file;
    row = piece.end;
  }
  if (!sound || row != tensor.shape[0])
    throw CheckpointError(fmt::format("the pieces of tensor {} do not cover its rows", tensor.name));
}

json body_of(const Manifest& manifest) {
  json files = json::array(), tensors = json::array();
  for (size_t i = 0; i < manifest.files.size(); ++i)
    files.push_back({{"name", shard_name(static_cast<int>(i))},
                     {"bytes", manifest.files[i].bytes},
                     {"xxh3", to_hex(manifest.files[i].hash)}});
  for (const TensorEntry& tensor : manifest.tensors) tensors.push_back(to_json(tensor));
  return {{"format", kFormat}, {"step", manifest.step}, {"files", files}, {"tensors", tensors}};
}

Manifest from_json(const json& body) {
  if (body.at("format").get<std::string>() != kFormat)
    throw CheckpointError("it was written in another format");
  Manifest manifest;
  manifest.step = body.at("step").get<int64_t>();
  if (manifest.step < 0) throw CheckpointError("its step is negative");
  for (const json& file : body.at("files"))
    manifest.files.push_back(
        {file.at("bytes").get<uint64_t>(), from_hex(file.at("xxh3").get<std::string>())});
  if (manifest.files.empty()) throw CheckpointError("it names no file");
  std::set<std::string> names;
  for (const json& entry : body.at("tensors")) {
    manifest.tensors.push_back(tensor_from(entry));
    check_pieces(manifest.tensors.back(), manifest.files.size());
    if (!names.insert(manifest.tensors.back().name).second)
      throw CheckpointError(fmt::format("tensor {} is listed twice", manifest.tensors.back().name));
  }
  return manifest;
}

}  // namespace

int64_t TensorEntry::row_bytes() const {
  int64_t bytes = static_cast<int64_t>(kernels::size_of(dtype));
  for (int i = 1; i < shape.rank(); ++i) bytes *= shape[i];
  return bytes;
}

std::string shard_name(int index) { return fmt::format("shard_{:03}.h5", index); }

bool plain_name(const std::string& name) {
  constexpr size_t kLongest = 512;
  if (name.empty() || name.size() > kLongest || name.back() == '/') return false;
  bool first = true;
  for (size_t begin = 0; begin < name.size();) {
    const size_t end = std::min(name.find('/', begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    if (part.empty() || part == "." || part == ".." || (first && part == kAttributeGroup)) return false;
    for (unsigned char c : part)
      if (!std::isalnum(c) && c != '.' && c != '_' && c != '-') return false;
    first = false;
    begin = end + 1;
  }
  return true;
}

int64_t checked_bytes(const std::string& name, DType dtype, const kernels::Shape& shape) {
  int64_t bytes = static_cast<int64_t>(kernels::size_of(dtype));
  bool sound = true, empty = false;
  for (int i = 0; i < shape.rank(); ++i) {
    sound = sound && shape[i] >= 0;
    if (shape[i] == 0)
      empty = true;
    else
      sound = sound && !__builtin_mul_overflow(bytes, shape[i], &bytes);
  }
  if (!sound)
    throw CheckpointError(fmt::format("tensor {} has the impossible shape {}", name, to_string(shape)));
  return empty ? 0 : bytes;
}

std::string to_text(const Manifest& manifest) {
  json body = body_of(manifest);
  const std::string covered = body.dump(1);
  body["xxh3"] = to_hex(hash_bytes(std::as_bytes(std::span(covered))));
  return body.dump(1) + "\n";
}

Manifest parse_manifest(const std::string& text) {
  try {
    Manifest manifest = from_json(json::parse(text));
    if (to_text(manifest) != text) throw CheckpointError("its checksum differs");
    return manifest;
  } catch (const std::logic_error& error) {  // stoull
    throw CheckpointError("a checksum in it is not a number");
  } catch (const json::exception& error) {
    throw CheckpointError("it is not the JSON that a checkpoint has");
  }
}

}  // namespace checkpoints
