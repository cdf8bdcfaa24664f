#include <fmt/format.h>
#include <hdf5.h>

#include <fstream>

#include "checkpoints/hdf5.h"
#include "checkpoints/verify.h"
#include "tests/checkpoints/fixture.h"

namespace checkpoint_test {

using checkpoints::hdf5::Id;
using kernels::CheckpointError;

class Corruption : public CheckpointTest {
 protected:
  void SetUp() override {
    CheckpointTest::SetUp();
    State state = small_state(4);
    path_ = save(directory_, state);
    for (const auto& entry : fs::directory_iterator(path_)) files_.push_back(entry.path());
    ASSERT_EQ(files_.size(), 3u);  // two shards and the manifest
  }

  void expect_refused(const std::string& what) {
    try {
      const checkpoints::Reader reader(path_);
      ADD_FAILURE() << "accepted: " << what;
    } catch (const CheckpointError& error) {
      EXPECT_NE(std::string(error.what()).find("use an older checkpoint"), std::string::npos) << error.what();
    }
  }

  static void put(const fs::path& file, size_t at, char byte) {
    std::fstream(file, std::ios::binary | std::ios::in | std::ios::out)
        .seekp(static_cast<std::streamoff>(at))
        .put(byte);
  }

  fs::path path_;
  std::vector<fs::path> files_;
};

TEST_F(Corruption, OneFlippedBitAnywhereIsRefused) {
  for (const fs::path& file : files_) {
    const std::string whole = read_all(file);
    // Every byte of the manifest, about 250 of each shard, each with another bit.
    const size_t stride = file.extension() == ".json" ? 1 : std::max<size_t>(1, whole.size() / 250);
    for (size_t at = 0; at < whole.size(); at += stride) {
      put(file, at, static_cast<char>(whole[at] ^ (1 << (at / stride % 8))));
      expect_refused(fmt::format("{} with byte {} changed", file.filename().string(), at));
      put(file, at, whole[at]);
    }
  }
  EXPECT_NO_THROW(checkpoints::Reader{path_});
}

TEST_F(Corruption, TruncatedLongerMissingOrLinkedFilesAreRefused) {
  for (const fs::path& file : files_) {
    const std::string whole = read_all(file), name = file.filename().string();
    for (size_t size : {size_t{0}, size_t{1}, size_t{8}, whole.size() / 2, whole.size() - 1}) {
      write_all(file, whole.substr(0, size));
      expect_refused(fmt::format("{} of {} bytes", name, size));
    }
    write_all(file, whole + '\0');
    expect_refused(name + " with a byte more");
    fs::remove(file);
    expect_refused(name + " missing");
    write_all(root_ / "elsewhere", whole);
    fs::create_symlink(root_ / "elsewhere", file);
    expect_refused(name + " as a link");
    fs::remove(file);
    fs::create_directory(file);
    expect_refused(name + " as a folder");
    fs::remove(file);
    write_all(file, whole);
  }
  fs::rename(path_, directory_ / "step_00000009");
  path_ = directory_ / "step_00000009";
  expect_refused("a manifest of another step");
}

TEST_F(Corruption, TheMessageNamesTheFile) {
  std::string whole = read_all(path_ / "shard_001.h5");
  whole[whole.size() / 2] = static_cast<char>(whole[whole.size() / 2] ^ 16);
  write_all(path_ / "shard_001.h5", whole);
  try {
    const checkpoints::Reader reader(path_);
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("shard_001.h5"), std::string::npos) << error.what();
  }
}

// Files with sound checksums but hostile contents: the checks behind the checksums.
class Hostile : public CheckpointTest {
 protected:
  static constexpr int64_t kRows = 600;

  void SetUp() override {
    CheckpointTest::SetUp();
    path_ = root_ / "step_00000001";
    fs::create_directories(path_);
    checkpoints::hdf5::prepare_thread();
    data_.resize(kRows);
    for (size_t i = 0; i < data_.size(); ++i) data_[i] = static_cast<float>(i) + 0.25f;
    const checkpoints::Piece piece{0, 0, kRows, checkpoints::hash_bytes(std::as_bytes(std::span(data_)))};
    manifest_.step = 1;
    manifest_.tensors = {{"group/x", DType::f32, {kRows}, {piece}}};
  }

  // Dataset "group/x" with these properties, then whatever `more` adds; a manifest that fits the file.
  void write(const std::function<void(hid_t)>& properties, const std::function<void(hid_t)>& more,
             hsize_t rows = kRows, hid_t type = H5T_IEEE_F32LE) {
    const fs::path shard = path_ / "shard_000.h5";
    {
      const Id file(H5Fcreate(shard.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), H5Fclose, "file");
      const Id group(H5Gcreate2(file, "group", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Gclose, "group");
      const Id space(H5Screate_simple(1, &rows, nullptr), H5Sclose, "space");
      const Id create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "properties");
      properties(create);
      const Id set(H5Dcreate2(group, "x", type, space, H5P_DEFAULT, create, H5P_DEFAULT), H5Dclose,
                   "dataset");
      if (rows == kRows && H5Pget_layout(create) != H5D_VIRTUAL)
        checkpoints::hdf5::check(H5Dwrite(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, data_.data()),
                                 "write");
      more(file);
    }
    seal();
  }
  void seal() {
    const fs::path shard = path_ / "shard_000.h5";
    manifest_.files = {{checkpoints::regular_file_size(shard), checkpoints::hash_file(shard)}};
    write_all(path_ / "manifest.json", checkpoints::to_text(manifest_));
  }
  void expect_refused(const std::string& reason) {
    try {
      const checkpoints::Reader reader(path_);
      ADD_FAILURE() << "accepted; expected: " << reason;
    } catch (const CheckpointError& error) {
      EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
    }
  }

  static void nothing(hid_t) {}
  static void chunked(hid_t properties, hsize_t chunk) { H5Pset_chunk(properties, 1, &chunk); }

  fs::path path_;
  std::vector<float> data_;
  checkpoints::Manifest manifest_;
};

TEST_F(Hostile, APlainFileIsAccepted) {
  write(nothing, nothing);
  EXPECT_NO_THROW(checkpoints::Reader{path_});
  write([](hid_t p) { chunked(p, 256); }, nothing);
  EXPECT_NO_THROW(checkpoints::Reader{path_});
}

TEST_F(Hostile, LinksAndForeignStorage) {
  write(nothing, [](hid_t f) { H5Lcreate_soft("/group/x", f, "soft", H5P_DEFAULT, H5P_DEFAULT); });
  expect_refused("soft or external link");
  write(nothing,
        [](hid_t f) { H5Lcreate_external("/etc/passwd", "/x", f, "outside", H5P_DEFAULT, H5P_DEFAULT); });
  expect_refused("soft or external link");
  std::ofstream(root_ / "raw") << std::string(4 * kRows, 'x');
  write([&](hid_t p) { H5Pset_external(p, (root_ / "raw").c_str(), 0, 4 * kRows); }, nothing);
  expect_refused("stored in another file");
  write(
      [&](hid_t p) {
        const hsize_t rows = kRows;
        const Id space(H5Screate_simple(1, &rows, nullptr), H5Sclose, "space");
        H5Pset_virtual(p, space, "elsewhere.h5", "x", space);
      },
      nothing);
  expect_refused("stored in an unknown way");
}

TEST_F(Hostile, FiltersTypesAndUnexpectedObjects) {
  write(
      [](hid_t p) {
        chunked(p, 256);
        H5Pset_deflate(p, 1);
      },
      nothing);
  expect_refused("compressed or filtered");
  write(nothing, nothing, kRows, H5T_IEEE_F64LE);
  expect_refused("another element type");
  write(nothing, [](hid_t f) {
    const Id type(H5Tcopy(H5T_NATIVE_INT), H5Tclose, "type");
    H5Tcommit2(f, "named", type, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  });
  expect_refused("neither a group nor a dataset");
  write(nothing, [](hid_t f) { H5Lcreate_hard(f, "group/x", f, "again", H5P_DEFAULT, H5P_DEFAULT); });
  expect_refused("not in the manifest");
}

// Two groups that hold each other, twice: following every path would take 2^64 steps.
TEST_F(Hostile, RingsOfGroupsEnd) {
  write(nothing, [](hid_t f) {
    for (const char* name : {"group/a", "group/b"})
      H5Lcreate_hard(f, "group", f, name, H5P_DEFAULT, H5P_DEFAULT);
  });
  expect_refused("");
}

TEST_F(Hostile, DeclaredSizesFarBeyondTheFile) {
  // Chunks that were never written: a terabyte in a few KiB.
  constexpr int64_t kMany = int64_t{1} << 38;
  write([](hid_t p) { chunked(p, 256); }, nothing, static_cast<hsize_t>(kMany));
  expect_refused("another shape");
  manifest_.tensors[0].shape[0] = kMany;
  manifest_.tensors[0].pieces[0].end = kMany;
  seal();
  expect_refused("not whole");
  write([](hid_t p) { chunked(p, hsize_t{1} << 28); }, nothing, static_cast<hsize_t>(kMany));
  expect_refused("impossible chunks");
}

TEST_F(Hostile, ManifestsThatLie) {
  write(nothing, nothing);
  const checkpoints::Manifest good = manifest_;
  const auto refused = [&](const std::function<void(checkpoints::TensorEntry&)>& change, const char* reason) {
    manifest_ = good;
    change(manifest_.tensors[0]);
    seal();
    expect_refused(reason);
  };
  refused([](auto& t) { t.name = "../../etc/x"; }, "not plain");
  refused([](auto& t) { t.name = "group/absent"; }, "is missing");
  refused([](auto& t) { t.shape = {int64_t{1} << 40, int64_t{1} << 40}; }, "impossible shape");
  refused([](auto& t) { t.shape = {-600}; }, "impossible shape");
  refused([](auto& t) { t.shape = {601}; }, "do not cover its rows");
  refused([](auto& t) { t.pieces[0].file = 7; }, "do not cover its rows");
  refused([](auto& t) { t.pieces[0].file = -1; }, "do not cover its rows");
  refused([](auto& t) { t.pieces.clear(); }, "do not cover its rows");
  refused([](auto& t) { t.pieces[0].hash ^= 1; }, "the checksum of tensor group/x differs");
  refused([](auto& t) { t.dtype = DType::i32; }, "another element type");
  manifest_ = good;
  manifest_.tensors.push_back(manifest_.tensors[0]);
  seal();
  expect_refused("listed twice");
  manifest_ = good;
  write_all(path_ / "manifest.json", std::string(200000, '['));
  expect_refused("not the JSON");
  write_all(path_ / "manifest.json", "{\"format\": 3, \"xxh3\": []}");
  expect_refused("not the JSON");
}

}  // namespace checkpoint_test
