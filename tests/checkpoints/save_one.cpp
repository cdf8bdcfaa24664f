// save_one DIRECTORY STEP VARIANT: saves and commits one small checkpoint, then keeps the newest two. Killed
// at any moment by kill_test.
#include <cstdio>

#include "tests/checkpoints/fixture.h"

int main(int, char** argv) {
  try {
    checkpoint_test::State state = checkpoint_test::small_state(std::atoll(argv[2]), std::atoll(argv[3]));
    checkpoint_test::save(argv[1], state);
    checkpoints::retain(argv[1], 2, 0, -1);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 74;
  }
}
