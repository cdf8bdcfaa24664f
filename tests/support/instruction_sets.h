#pragma once
// Code that Highway dispatches at run time, tested with what every supported machine has as well.
#include <hwy/targets.h>

namespace support {

// Runs fn(name) with AVX2 alone, then with everything the machine has.
template <typename Fn>
void with_each_instruction_set(Fn&& fn) {
  hwy::SetSupportedTargetsForTest(hwy::SupportedTargets() & ~(HWY_AVX2 - 1));
  hwy::GetChosenTarget().DeInit();
  fn("AVX2");
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
  fn("all");
}

}  // namespace support
