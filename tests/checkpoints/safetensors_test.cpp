#include "checkpoints/safetensors.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>

#include "kernels/core/error.h"
#include "tests/support/safetensors_file.h"
#include "tests/support/temporary_folder.h"

namespace {

using checkpoints::SafetensorsReader;
using kernels::DType;
using support::write_safetensors;

class Safetensors : public testing::Test {
 protected:
  std::filesystem::path file() const { return folder_.path() / "weights.safetensors"; }
  std::string refusal() const {
    try {
      const SafetensorsReader reader(file());
      for (const auto& name : reader.names()) reader.read(name);
    } catch (const kernels::CheckpointError& e) {
      return e.what();
    }
    return "accepted";
  }
  void write_raw(const std::string& header, const std::string& data, int64_t length = -1) const {
    std::ofstream out(file(), std::ios::binary);
    const uint64_t bytes = length < 0 ? header.size() : static_cast<uint64_t>(length);
    out.write(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
    out << header << data;
  }

  support::TemporaryFolder folder_;
};

TEST_F(Safetensors, GivesShapesAndValuesOfEveryType) {
  // Values that all three types hold exactly.
  write_safetensors(file(), {{"a.weight", {2, 3}, {1, -2, 0.5f, 4, 0, -0.25f}, DType::f32},
                             {"b", {2}, {3, -1.5f}, DType::f16},
                             {"c", {1, 2, 2}, {8, 0.125f, -16, 2}, DType::bf16}});
  const SafetensorsReader reader(file());
  EXPECT_EQ(reader.names(), (std::vector<std::string>{"a.weight", "b", "c"}));
  EXPECT_EQ(reader.shape("a.weight"), (kernels::Shape{2, 3}));
  EXPECT_EQ(reader.read("a.weight"), (std::vector<float>{1, -2, 0.5f, 4, 0, -0.25f}));
  EXPECT_EQ(reader.read("b"), (std::vector<float>{3, -1.5f}));
  EXPECT_EQ(reader.shape("c"), (kernels::Shape{1, 2, 2}));
  EXPECT_EQ(reader.read("c"), (std::vector<float>{8, 0.125f, -16, 2}));
  EXPECT_THROW(reader.read("d"), kernels::CheckpointError);
}

TEST_F(Safetensors, RefusesWhatIsDamagedOrCutShort) {
  EXPECT_NE(refusal().find("cannot read"), std::string::npos) << "a file that is not there";
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  write_raw(good, std::string(8, '\0'));
  EXPECT_EQ(refusal(), "accepted");
  write_raw(good, std::string(7, '\0'));
  EXPECT_NE(refusal().find("'a' lies outside"), std::string::npos) << refusal();
  write_raw(good, "", int64_t{1} << 60);
  EXPECT_NE(refusal().find("cut short"), std::string::npos) << refusal();
  write_raw(good.substr(1), std::string(8, '\0'));
  EXPECT_NE(refusal().find("header is damaged"), std::string::npos) << refusal();
  for (const char* bad : {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})",
                          R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}})",
                          R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})",
                          R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})",
                          R"({"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})",
                          R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
                          R"({"a":{"dtype":"F32","shape":"2","data_offsets":[0,8]}})", R"({"a":5})"}) {
    write_raw(bad, std::string(8, '\0'));
    EXPECT_NE(refusal(), "accepted") << bad;
  }
}

TEST_F(Safetensors, RefusesTensorsThatDoNotFillTheFile) {
  const auto tensor = [](const char* name, const char* shape, const char* offsets) {
    return fmt::format(R"("{}":{{"dtype":"F32","shape":[{}],"data_offsets":[{}]}})", name, shape, offsets);
  };
  const std::string a = tensor("a", "2", "0,8"), b = tensor("b", "1", "8,12");
  const std::pair<std::string, const char*> cases[] = {
      {a + "," + b, "accepted"},
      {b + "," + a, "accepted"},  // in any order
      {a + "," + b + "," + tensor("none", "0,3", "8,8"), "accepted"},
      // Sizes that the file could not hold, but for the 0.
      {a + "," + b + "," + tensor("none", "1000000,0", "12,12"), "accepted"},
      {a + "," + b + "," + tensor("none", "0,1000000", "12,12"), "accepted"},
      {a + "," + b + "," + tensor("none", "0,3", "8,12"), "tensor 'none' lies outside of the file"},
      {a + "," + b + "," + tensor("none", "0", "13,13"), "tensor 'none' lies outside of the file"},
      {a + "," + b + "," + tensor("none", "9223372036854775808,0", "8,8"), "tensor 'none' is too large"},
      {a + "," + b + "," + tensor("none", "4294967296,4294967296,0", "8,8"), "tensor 'none' is too large"},
      {a + "," + tensor("b", "18446744073709551616", "8,12"), "tensor 'b' has 1.8446744073709552e+19 in its"},
      {a + "," + tensor("b", "2", "8,16"), "tensor 'b' lies outside of the file"},
      {a + "," + tensor("b", "1", "4294967304,4294967308"), "tensor 'b' lies outside of the file"},
      {a + "," + tensor("b", "1", "4,8"), "tensor 'b' overlaps another"},
      {b, "tensor 'b' has a gap ahead of it"},
      {a, "4 bytes belong to no tensor"},
      {a + "," + tensor("a", "1", "8,12"), "two tensors are named 'a'"},
      {a + "," + tensor("b", "1.5", "8,12"), "tensor 'b' has 1.5 in its header"},
      {a + "," + tensor("b", "-1", "8,12"), "tensor 'b' has -1 in its header"},
      {a + "," + tensor("b", "1", "8.5,12.5"), "tensor 'b' has 8.5 in its header"},
      {a + "," + tensor("b", "4294967296,1073741824", "8,8"), "tensor 'b' is larger than the file"},
  };
  for (const auto& [tensors, what] : cases) {
    write_raw("{" + tensors + "}", std::string(12, '\0'));
    EXPECT_NE(refusal().find(what), std::string::npos) << tensors << "\n" << refusal();
  }
  // Sizes whose product leaves 64 bits, in a file that holds each of them.
  write_raw("{" + tensor("a", "4294967296,1073741824", "0,0") + "}", "");
  std::filesystem::resize_file(file(), uint64_t{1} << 33);
  EXPECT_NE(refusal().find("tensor 'a' is larger than the file"), std::string::npos) << refusal();
}

}  // namespace
