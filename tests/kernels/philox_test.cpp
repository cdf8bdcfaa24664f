// Random numbers are part of what a checkpoint and a seed promise.
#include "kernels/core/philox.h"

#include <gtest/gtest.h>

namespace {

using kernels::Purpose;
using Numbers = std::array<uint32_t, 4>;

// Known answers of Philox4x32-10 from its authors' library (Random123, kat_vectors).
TEST(Philox, IsTheAuthors) {
  EXPECT_EQ(kernels::philox(0, Purpose{0}, 0, 0), (Numbers{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(kernels::philox(~uint64_t{0}, Purpose{~0u}, ~uint64_t{0}, ~0u),
            (Numbers{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

}  // namespace
