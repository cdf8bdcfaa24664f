#pragma once
// A checkpoint's worth of tensors with odd shapes, made from a step number, and a folder of its own.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "checkpoints/checkpoint.h"
#include "tests/support/temporary_folder.h"

namespace checkpoint_test {

namespace fs = std::filesystem;
using checkpoints::NamedTensor;
using kernels::DType;
using kernels::Shape;
using kernels::Tensor;

struct Stored {
  std::string name;
  DType dtype;
  Shape shape;
  std::vector<std::byte> bytes;
  Tensor tensor() { return Tensor(bytes.data(), dtype, shape); }
};

class State {
 public:
  State(int64_t step, const std::vector<std::tuple<std::string, DType, Shape>>& layout, int64_t variant = 0)
      : step_(step) {
    std::mt19937_64 random(static_cast<uint64_t>(step + 1000 * variant) + 17);
    for (const auto& [name, dtype, shape] : layout) {
      Stored s{name, dtype, shape,
               std::vector<std::byte>(static_cast<size_t>(shape.numel()) * size_of(dtype))};
      for (std::byte& b : s.bytes) b = static_cast<std::byte>(random());
      stored_.push_back(std::move(s));
    }
    attributes_.text["config"] = "[model]\nlayers = 2\n";
    attributes_.text["tokenizer"] = std::string("long\0text", 9) + std::string(100000, 'x');
    attributes_.text["empty"] = "";
    attributes_.integers["step"] = step;
    attributes_.integers["tokens"] = -(int64_t{1} << 40) - step;
  }
  int64_t step() const { return step_; }
  const checkpoints::Attributes& attributes() const { return attributes_; }
  std::vector<Stored>& stored() { return stored_; }
  std::vector<NamedTensor> tensors() {
    std::vector<NamedTensor> list;
    for (Stored& s : stored_) list.push_back({s.name, s.tensor()});
    return list;
  }
  // Empty when the checkpoint holds exactly this state; else what differs.
  std::string compare(const fs::path& checkpoint) {
    const checkpoints::Reader reader(checkpoint);
    if (reader.step() != step_) return "step " + std::to_string(reader.step());
    if (reader.attributes().text != attributes_.text) return "text attributes";
    if (reader.attributes().integers != attributes_.integers) return "integer attributes";
    if (reader.names().size() != stored_.size()) return "number of tensors";
    for (const Stored& s : stored_) {
      if (reader.dtype(s.name) != s.dtype || !(reader.shape(s.name) == s.shape))
        return s.name + ": type or shape";
      std::vector<std::byte> bytes(s.bytes.size(), std::byte{0xa5});
      reader.read(s.name, Tensor(bytes.data(), s.dtype, s.shape));
      if (bytes != s.bytes) return s.name + ": bytes";
    }
    return "";
  }

 private:
  int64_t step_;
  std::vector<Stored> stored_;
  checkpoints::Attributes attributes_;
};

// A few KiB: for tests that save or read it hundreds of times.
inline State small_state(int64_t step, int64_t variant = 0) {
  return State(step,
               {{"master/blocks.0.q.weight", DType::f32, {7, 13}},
                {"master/norm", DType::f32, {31}},
                {"m/blocks.0.q.weight", DType::f64, {3, 2, 5, 1}},
                {"state/optimizer", DType::i64, {3}},
                {"state/bytes", DType::u8, {5}}},
               variant);
}

// Saves and commits; returns the checkpoint.
inline fs::path save(const fs::path& directory, State& state, int shards = 2) {
  checkpoints::Writer writer(directory, shards);
  writer.start(state.step(), state.attributes(), state.tensors());
  std::string reason;
  if (!writer.wait(reason)) throw std::runtime_error(reason);
  return writer.commit();
}

class CheckpointTest : public ::testing::Test {
 protected:
  // Names below the checkpoints folder, sorted, without `latest`.
  std::vector<std::string> listing() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(directory_))
      if (entry.path().filename() != "latest") names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  support::TemporaryFolder folder_;
  const fs::path root_ = folder_.path(), directory_ = root_ / "run" / "checkpoints";
};

inline std::string read_all(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_all(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

}  // namespace checkpoint_test
