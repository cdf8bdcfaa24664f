#pragma once
// Cosines and sines of the rotary angles position * theta^(-d / half), d < half, computed in fp64 and rounded
// to A. Tables are kept for the life of the process and grow in powers of two; a table that was handed out
// stays valid while it is held.
#include <cstdint>
#include <memory>
#include <vector>

namespace kernels::cpu {

template <typename A>
struct RotaryTable {
  int64_t positions = 0, half = 0;
  std::vector<A> values;  // (positions, 2, half): cosines, then sines

  const A* cosines(int64_t position) const { return values.data() + position * 2 * half; }
  const A* sines(int64_t position) const { return cosines(position) + half; }
};

// A table of at least `positions` positions; A is float or double.
template <typename A>
std::shared_ptr<const RotaryTable<A>> rotary_table(float theta, int64_t half, int64_t positions);

}  // namespace kernels::cpu
