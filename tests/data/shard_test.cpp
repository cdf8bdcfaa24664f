#include "data/formats/shard.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/file.h>

#include "data/checksum.h"
#include "data/dataset.h"
#include "data/formats/shard_layout.h"
#include "kernels/core/error.h"
#include "kernels/core/philox.h"
#include "prepared.h"

namespace data {
namespace {

using data_test::message_of;
using data_test::Scratch;
using kernels::DataError;

ShardContent example(int64_t vocabulary, bool weighted) {
  ShardContent content;
  content.info = {
      .tokenizer_hash = std::string(32, 'a'), .vocabulary = vocabulary, .bytes = 900, .predicted_bytes = 890};
  for (int d = 0; d < 5; ++d) {
    for (int i = 0; i <= d * 3; ++i)
      content.tokens.push_back(static_cast<int32_t>((d * 977 + i * 131) % vocabulary));
    content.documents.push_back(static_cast<int64_t>(content.tokens.size()));
    content.names.push_back("file_" + std::to_string(d));
  }
  content.tokens.back() = static_cast<int32_t>(vocabulary - 1);
  if (weighted)
    for (size_t i = 0; i < content.tokens.size(); ++i) content.weights.push_back(static_cast<float>(i % 2));
  return content;
}

TEST(Shard, ReadsWhatWasWritten) {
  const Scratch scratch;
  int number = 0;
  for (int64_t vocabulary : {257, 65536, 65537, 200000})
    for (bool weighted : {false, true}) {
      const auto path = scratch / (std::to_string(number++) + ".h5");
      const ShardContent content = example(vocabulary, weighted);
      write_shard(path, content);
      const ShardReader shard(path);
      EXPECT_EQ(shard.info().vocabulary, vocabulary);
      EXPECT_EQ(shard.info().tokenizer_hash, content.info.tokenizer_hash);
      EXPECT_EQ(shard.info().bytes, 900);
      EXPECT_EQ(shard.info().predicted_bytes, 890);
      EXPECT_EQ(shard.info().documents, 5);
      EXPECT_EQ(shard.info().weighted, weighted);
      EXPECT_EQ(shard.documents(), content.documents);
      const auto count = static_cast<int64_t>(content.tokens.size());
      EXPECT_EQ(shard.info().tokens, count);
      EXPECT_EQ(shard.tokens(0, count), content.tokens);
      EXPECT_EQ(shard.tokens(3, 7),
                std::vector<int32_t>(content.tokens.begin() + 3, content.tokens.begin() + 7));
      EXPECT_EQ(shard.weights(0, count), content.weights);
      for (int d = 0; d < 5; ++d) EXPECT_EQ(shard.name(d), content.names[d]);
    }
}

TEST(Shard, EveryFlippedByteAndEveryTruncationIsFound) {
  const Scratch scratch;
  const auto path = scratch / "whole.h5";
  write_shard(path, example(257, true));
  const std::string whole = read_file(path);
  for (uint64_t trial = 0; trial < 200; ++trial) {
    const auto r = kernels::philox(1, kernels::Purpose::test, trial);
    std::string broken = whole;
    if (trial % 4 == 0) {
      broken.resize(r[0] % whole.size());
    } else if (trial % 4 == 1) {
      broken += std::string(1 + r[0] % 600, static_cast<char>(r[1]));
    } else {
      broken[r[0] % whole.size()] ^= static_cast<char>(1 << r[1] % 8);
    }
    const std::string name = scratch.write("broken.h5", broken);
    const std::string message = message_of<DataError>([&] { ShardReader shard(name); });
    EXPECT_NE(message.find(name), std::string::npos) << "trial " << trial << " was not noticed";
    EXPECT_NE(message.find("run foretell prepare again"), std::string::npos) << message;
  }
}

// A file whose own line is right but whose HDF5 part is not a shard's.
std::string with_header(const std::string& body) {
  return shard_header(kShardHeaderBytes + body.size(), checksum(body).hex()) + body;
}

TEST(Shard, RefusesForeignFilesWithARightChecksum) {
  const Scratch scratch;
  const auto refused = [&](const std::string& content) {
    const std::string name = scratch.write("foreign.h5", content);
    EXPECT_FALSE(message_of<DataError>([&] { ShardReader shard(name); }).empty());
  };
  refused("");
  refused("just some text");
  refused(std::string(2000, 'x'));
  refused(with_header("no HDF5 in here"));
  refused(with_header(""));
}

// HDF5 files made with the C API: datasets of another type, chunked, external or linked elsewhere.
class ForeignShard : public ::testing::Test {
 protected:
  using Make = std::function<void(hid_t file)>;
  std::string message(const Make& make) {
    const auto raw = scratch_ / "raw.h5";
    const hid_t file = H5Fcreate(raw.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    make(file);
    H5Fclose(file);
    const std::string name = scratch_.write("shard.h5", with_header(read_file(raw)));
    return message_of<DataError>([&] { ShardReader shard(name); });
  }
  static void dataset(hid_t file, const char* name, hid_t type, std::vector<hsize_t> shape,
                      hid_t properties = H5P_DEFAULT) {
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
    const std::vector<char> zeros(4096, 0);
    if (properties == H5P_DEFAULT) H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros.data());
    H5Dclose(set);
    H5Sclose(space);
  }
  Scratch scratch_;
};

TEST_F(ForeignShard, MissingDatasets) {
  EXPECT_NE(message([](hid_t) {}).find("/tokens"), std::string::npos);
}

TEST_F(ForeignShard, WrongTypeOrShape) {
  EXPECT_NE(message([](hid_t f) { dataset(f, "tokens", H5T_IEEE_F64LE, {4}); }).find("/tokens"),
            std::string::npos);
  EXPECT_NE(message([](hid_t f) {
              dataset(f, "tokens", H5T_STD_U16LE, {4, 4});
            }).find("/tokens"),
            std::string::npos);
  EXPECT_NE(message([](hid_t f) {
              dataset(f, "tokens", H5T_STD_U16LE, {4});
              dataset(f, "documents", H5T_STD_I32LE, {2});
            }).find("/documents"),
            std::string::npos);
}

TEST_F(ForeignShard, ChunkedExternalOrUnwrittenStorage) {
  EXPECT_NE(message([](hid_t f) {
              const hid_t p = H5Pcreate(H5P_DATASET_CREATE);
              const hsize_t chunk = 4;
              H5Pset_chunk(p, 1, &chunk);
              H5Pset_fletcher32(p);
              dataset(f, "tokens", H5T_STD_U16LE, {4}, p);
              H5Pclose(p);
            }).find("/tokens"),
            std::string::npos);
  EXPECT_NE(message([](hid_t f) {
              const hid_t p = H5Pcreate(H5P_DATASET_CREATE);
              H5Pset_external(p, "/etc/passwd", 0, 8);
              dataset(f, "tokens", H5T_STD_U16LE, {4}, p);
              H5Pclose(p);
            }).find("/tokens"),
            std::string::npos);
  EXPECT_NE(message([](hid_t f) {
              const hid_t p = H5Pcreate(H5P_DATASET_CREATE);
              dataset(f, "tokens", H5T_STD_U16LE, {hsize_t{1} << 40}, p);
              H5Pclose(p);
            }).find("/tokens"),
            std::string::npos);
}

TEST_F(ForeignShard, Links) {
  EXPECT_NE(message([](hid_t f) {
              H5Lcreate_external("/etc/passwd", "/x", f, "tokens", H5P_DEFAULT, H5P_DEFAULT);
            }).find("/tokens"),
            std::string::npos);
  EXPECT_NE(message([](hid_t f) {
              dataset(f, "elsewhere", H5T_STD_U16LE, {4});
              H5Lcreate_soft("/elsewhere", f, "tokens", H5P_DEFAULT, H5P_DEFAULT);
            }).find("/tokens"),
            std::string::npos);
}

// Network file systems may have no locks, and a lock of somebody else's is no reason not to read.
TEST(Shard, AsksForNoLock) {
  const Scratch scratch;
  data_test::prepare_bytes(scratch, 5);
  const int fd = ::open((scratch / "out/train_000.h5").c_str(), O_RDONLY);
  ASSERT_EQ(::flock(fd, LOCK_EX | LOCK_NB), 0);
  EXPECT_GT(TokenDataset(scratch / "out", "train", 8).tokens(), 0);
  ::close(fd);
}

TEST(Shard, TheFolderIsCheckedAsAWhole) {
  const Scratch scratch;
  data_test::prepare_bytes(scratch, 12);
  const auto open = [&] {
    return message_of<DataError>([&] { TokenDataset dataset(scratch / "out", "train", 16); });
  };
  EXPECT_EQ(open(), "");
  const std::string description = read_file(scratch / "out/dataset.json");
  for (size_t at = 0; at < description.size(); at += 7) {
    std::string broken = description;
    broken[at] ^= 4;
    scratch.write("out/dataset.json", broken);
    // White space between values may change without a change of meaning.
    if (!std::isspace(static_cast<unsigned char>(description[at]))) {
      EXPECT_NE(open().find("dataset.json"), std::string::npos) << at;
    }
  }
  scratch.write("out/dataset.json", description);
  scratch.write("out/tokenizer.model", "foretell bytes 2\n");
  EXPECT_NE(open().find("tokenizer.model"), std::string::npos);
  scratch.write("out/tokenizer.model", "foretell bytes 1\n");
  EXPECT_EQ(open(), "");
  EXPECT_NE(
      message_of<DataError>([&] { TokenDataset dataset(scratch / "out", "test", 16); }).find("no split"),
      std::string::npos);
  std::filesystem::copy_file(scratch / "out/validation_000.h5", scratch / "out/train_000.h5",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_NE(open().find("dataset.json"), std::string::npos);
  std::filesystem::remove(scratch / "out/train_000.h5");
  EXPECT_NE(open().find("train_000.h5"), std::string::npos);
  EXPECT_NE(message_of<DataError>([&] {
              TokenDataset dataset(scratch / "nowhere", "train", 16);
            }).find("foretell prepare"),
            std::string::npos);
}

}  // namespace
}  // namespace data
