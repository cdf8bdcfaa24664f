#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tests/checkpoints/fixture.h"

namespace checkpoint_test {

using kernels::CheckpointError;

class RoundTrip : public CheckpointTest {};

TEST_F(RoundTrip, OddShapesAnyNumberOfShards) {
  // Larger than a chunk in rows, in a single row, in the last of four dimensions; empty; one element.
  State state(12, {{"master/wide", DType::f32, {3, 300001}},
                   {"master/tall", DType::f32, {100003, 7}},
                   {"m/four", DType::f64, {2, 3, 5, 20011}},
                   {"one", DType::i32, {1}},
                   {"empty/rows", DType::f32, {0, 4}},
                   {"empty/columns", DType::f32, {4, 0}},
                   {"v/flat", DType::f32, {1500007}},
                   {"state/counters", DType::i64, {17}}});
  for (int shards : {1, 2, 3, 8}) {
    const fs::path directory = directory_ / fmt::format("{}", shards);
    const fs::path path = save(directory, state, shards);
    EXPECT_EQ(path.filename(), "step_00000012");
    EXPECT_EQ(state.compare(path), "") << shards << " shards";
    size_t files = 0;
    uintmax_t largest = 0;
    for (const auto& entry : fs::directory_iterator(path))
      if (entry.path().extension() == ".h5") {
        ++files;
        largest = std::max(largest, entry.file_size());
      }
    EXPECT_EQ(files, static_cast<size_t>(shards));
    uintmax_t total = 0;
    for (const Stored& s : state.stored()) total += s.bytes.size();
    // A share, a row of the widest tensor, and chunks that are only partly filled.
    EXPECT_LT(largest, total / static_cast<unsigned>(shards) + (uintmax_t{6} << 20));
    EXPECT_EQ(read_all(directory / "latest"), "step_00000012\n");
  }
}

// Shapes of a transformer, of which few are whole slabs.
TEST_F(RoundTrip, FilesAreLittleLargerThanWhatTheyHold) {
  State state(1, {{"master/up", DType::f32, {3072, 768}},
                  {"master/down", DType::f32, {768, 3072}},
                  {"master/qkv", DType::f32, {2304, 768}},
                  {"master/embedding", DType::f32, {5003, 768}},
                  {"master/long_row", DType::f32, {2, 300001}},
                  {"v/flat", DType::f32, {1500007}}});
  const fs::path path = save(directory_, state, 1);
  uintmax_t total = 0;
  for (const Stored& s : state.stored()) total += s.bytes.size();
  EXPECT_LT(fs::file_size(path / "shard_000.h5"), total + total / 50);
}

// `latest` is a hint.
TEST_F(RoundTrip, ACheckpointIsWholeWhereTheHintCannotBeWritten) {
  fs::create_directories(directory_ / "latest" / "in the way");
  State state = small_state(3);
  EXPECT_EQ(state.compare(save(directory_, state, 1)), "");
  EXPECT_EQ(state.compare(checkpoints::find_newest(directory_, true, {})), "");
}

TEST_F(RoundTrip, OnlyLargeTensorsAreCut) {
  std::vector<float> data(700001, 1.5f);
  const Tensor small(data.data(), DType::f32, {1000, 100}), large(data.data(), DType::f32, {700001});
  checkpoints::Writer writer(directory_, 3);
  writer.start(1, {}, {{"a", small}, {"large", large}, {"z", small}});
  std::string reason;
  ASSERT_TRUE(writer.wait(reason)) << reason;
  const auto manifest = nlohmann::json::parse(read_all(writer.commit() / "manifest.json"));
  ASSERT_EQ(manifest["tensors"].size(), 3u);
  EXPECT_EQ(manifest["tensors"][0]["pieces"].size(), 1u);
  EXPECT_EQ(manifest["tensors"][1]["pieces"].size(), 3u);
  EXPECT_EQ(manifest["tensors"][2]["pieces"].size(), 1u);
}

TEST_F(RoundTrip, TextOfEveryLength) {
  checkpoints::Attributes attributes;
  for (size_t length : {1, 100, 30000, 32767, 32768, 32769, 65536, 1500000})
    attributes.text["text_" + std::to_string(length)] =
        std::string(length, static_cast<char>('a' + length % 26));
  for (int i = 0; i < 40; ++i) attributes.text["many_" + std::to_string(i)] = std::string(20000, 'm');
  attributes.text["newline"] = "\n";
  attributes.text["ends_in_zero"] = std::string("x\0", 2);
  std::vector<float> data(4, 1.5f);
  checkpoints::Writer writer(directory_, 1);
  writer.start(1, attributes, {{"a", Tensor(data.data(), DType::f32, {4})}});
  std::string reason;
  ASSERT_TRUE(writer.wait(reason)) << reason;
  EXPECT_EQ(checkpoints::Reader(writer.commit()).attributes().text, attributes.text);
}

TEST_F(RoundTrip, StridedRows) {
  std::vector<float> matrix(11 * 9);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<float>(i) + 0.5f;
  const Tensor whole(matrix.data(), DType::f32, {11, 9}), block = whole.columns(4, 3);
  checkpoints::Writer writer(directory_, 2);
  writer.start(1, {}, {{"k", block}});
  std::string reason;
  ASSERT_TRUE(writer.wait(reason)) << reason;
  const checkpoints::Reader reader(writer.commit());
  std::vector<float> other(11 * 9, -1.0f);
  reader.read("k", Tensor(other.data(), DType::f32, {11, 9}).columns(2, 3));
  for (size_t r = 0; r < 11; ++r)
    for (size_t c = 0; c < 9; ++c)
      EXPECT_EQ(other[r * 9 + c], c >= 2 && c < 5 ? matrix[r * 9 + c + 2] : -1.0f) << r << " " << c;
}

TEST_F(RoundTrip, TheSnapshotIsTakenBeforeStartReturns) {
  State state(3, {{"weights", DType::f32, {4000003}}});
  State changed = state;
  checkpoints::Writer writer(directory_, 2);
  writer.start(3, changed.attributes(), changed.tensors());
  const bool still_writing = writer.busy();
  for (Stored& s : changed.stored()) std::fill(s.bytes.begin(), s.bytes.end(), std::byte{1});
  EXPECT_TRUE(still_writing);  // 16 MB are written, synced and read back: longer than a return
  EXPECT_THROW(writer.start(4, changed.attributes(), changed.tensors()), CheckpointError);
  std::string reason;
  ASSERT_TRUE(writer.wait(reason)) << reason;
  EXPECT_TRUE(writer.written());
  EXPECT_FALSE(checkpoints::has_steps(directory_));  // nothing is visible before the commit
  EXPECT_FALSE(fs::exists(directory_ / "latest"));
  EXPECT_EQ(state.compare(writer.commit()), "");
  EXPECT_FALSE(writer.written());
}

TEST_F(RoundTrip, DiscardAndDestructionLeaveNothing) {
  State state = small_state(5);
  {
    checkpoints::Writer writer(directory_, 2);
    writer.start(5, state.attributes(), state.tensors());
    writer.discard();
    EXPECT_TRUE(listing().empty());
    writer.start(6, state.attributes(), state.tensors());
  }
  EXPECT_TRUE(listing().empty());
}

TEST_F(RoundTrip, SameStepIsReplaced) {
  State first = small_state(5), second(5, {{"other", DType::f32, {9}}});
  save(directory_, first);
  const fs::path path = save(directory_, second);
  EXPECT_EQ(second.compare(path), "");
  EXPECT_EQ(listing(), std::vector<std::string>{"step_00000005"});
}

TEST_F(RoundTrip, LeftoversOfAKilledSaveAreRemoved) {
  fs::create_directories(directory_ / ".tmp-step_00000007" / "sub");
  write_all(directory_ / ".tmp-step_00000007" / "shard_000.h5", "half");
  State state = small_state(8);
  save(directory_, state);
  EXPECT_EQ(listing(), std::vector<std::string>{"step_00000008"});
}

TEST_F(RoundTrip, WhatCannotBeStoredIsRefused) {
  std::vector<uint16_t> data(4);
  const Tensor half(data.data(), DType::bf16, {4});
  std::vector<float> floats(4, 1.0f);
  const Tensor good(floats.data(), DType::f32, {4});
  checkpoints::Writer writer(directory_, 1);
  EXPECT_THROW(writer.start(1, {}, {{"x", half}}), CheckpointError);
  for (const char* name : {"", "/x", "x/", "a//b", "../x", "a/../b", "a b", "attributes/x", "."})
    EXPECT_THROW(writer.start(1, {}, {{name, good}}), CheckpointError) << name;
  EXPECT_THROW(writer.start(1, {}, {{"x", good}, {"x", good}}), CheckpointError);
  EXPECT_THROW(writer.start(1, {{{"a/b", "text"}}, {}}, {{"x", good}}), CheckpointError);
  EXPECT_THROW(writer.start(1, {{{"a", "text"}}, {{"a", 1}}}, {{"x", good}}), CheckpointError);
  EXPECT_THROW(writer.commit(), CheckpointError);
  EXPECT_FALSE(fs::exists(directory_) && !listing().empty());
}

TEST_F(RoundTrip, AnotherArchitectureIsNamed) {
  State state = small_state(2);
  const checkpoints::Reader reader(save(directory_, state));
  std::vector<float> data(200);
  EXPECT_THROW(reader.read("master/norm", Tensor(data.data(), DType::f32, {32})), CheckpointError);
  EXPECT_THROW(reader.read("master/norm", Tensor(data.data(), DType::i32, {31})), CheckpointError);
  try {
    reader.read("master/absent", Tensor(data.data(), DType::f32, {3}));
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("master/absent"), std::string::npos) << error.what();
  }
}

}  // namespace checkpoint_test
