#include <signal.h>
#include <sys/resource.h>

#include "tests/checkpoints/fixture.h"

namespace checkpoint_test {

using kernels::CheckpointError;

// Writes beyond this many bytes of a file fail, as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    handler_ = ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  sighandler_t handler_ = SIG_DFL;
};

class FullDisk : public CheckpointTest {};

TEST_F(FullDisk, AFailedSaveHasAReasonAndTheLastGoodOneStays) {
  // Small tensors lie in the library's caches until it closes the file; large ones fail on the way.
  State small = small_state(2),
        large(2, {{"master/x", DType::f32, {700001}}, {"m/x", DType::f64, {90001, 3}}});
  State good = small_state(1);
  const fs::path last = save(directory_, good);
  for (State* state : {&small, &large})
    for (rlim_t bytes : {rlim_t{0}, rlim_t{100}, rlim_t{3000}, rlim_t{1} << 20}) {
      if (state == &small && bytes > 3000) continue;
      checkpoints::Writer writer(directory_, 2);
      std::string reason;
      {
        const FileSizeLimit limit(bytes);
        writer.start(2, state->attributes(), state->tensors());
        EXPECT_FALSE(writer.wait(reason)) << bytes;
        EXPECT_FALSE(writer.written());
        EXPECT_THROW(writer.commit(), CheckpointError);
      }
      EXPECT_NE(reason.find("shard_00"), std::string::npos) << reason;
      EXPECT_EQ(listing(), std::vector<std::string>{"step_00000001"});
      EXPECT_EQ(good.compare(checkpoints::find_newest(directory_, true, {})), "");
      EXPECT_EQ(read_all(directory_ / "latest"), "step_00000001\n");
      // The same writer goes on once there is room again.
      writer.start(2, state->attributes(), state->tensors());
      ASSERT_TRUE(writer.wait(reason)) << reason;
      EXPECT_EQ(state->compare(writer.commit()), "");
      fs::remove_all(directory_ / "step_00000002");
      write_all(directory_ / "latest", "step_00000001\n");
    }
}

TEST_F(FullDisk, AManifestThatCannotBeWrittenDiscardsTheSave) {
  State good = small_state(1), next = small_state(2);
  save(directory_, good);
  checkpoints::Writer writer(directory_, 1);
  writer.start(2, next.attributes(), next.tensors());
  std::string reason;
  ASSERT_TRUE(writer.wait(reason)) << reason;
  {
    const FileSizeLimit limit(10);
    EXPECT_THROW(writer.commit(), CheckpointError);
  }
  EXPECT_EQ(listing(), std::vector<std::string>{"step_00000001"});
}

TEST_F(FullDisk, TooLittleSpaceIsKnownBefore) {
  State good = small_state(1);
  save(directory_, good);
  checkpoints::Writer writer(directory_, 1);
  // Never touched: the space is asked for before anything is copied.
  unsigned char byte = 1;
  const Tensor huge(&byte, DType::u8, {int64_t{1} << 60});
  try {
    writer.start(2, {}, {{"huge", huge}});
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("free"), std::string::npos) << error.what();
  }
  EXPECT_EQ(listing(), std::vector<std::string>{"step_00000001"});
}

TEST_F(FullDisk, AFolderThatCannotBeWrittenToIsNamed) {
  write_all(root_ / "run", "a file where the run directory should be");
  State state = small_state(1);
  checkpoints::Writer writer(directory_, 1);
  EXPECT_THROW(writer.start(1, state.attributes(), state.tensors()), CheckpointError);
}

}  // namespace checkpoint_test
