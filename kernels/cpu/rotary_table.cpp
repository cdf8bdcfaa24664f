#include "kernels/cpu/rotary_table.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

namespace kernels::cpu {

namespace {

constexpr int64_t kSmallestTable = 1024;

template <typename A>
std::shared_ptr<const RotaryTable<A>> make_table(float theta, int64_t half, int64_t positions) {
  auto table = std::make_shared<RotaryTable<A>>();
  table->positions =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(kSmallestTable, positions))));
  table->half = half;
  table->values.resize(static_cast<size_t>(table->positions * 2 * half));
  for (int64_t d = 0; d < half; ++d) {
    const double rate =
        std::pow(static_cast<double>(theta), -static_cast<double>(d) / static_cast<double>(half));
    for (int64_t p = 0; p < table->positions; ++p) {
      const double angle = static_cast<double>(p) * rate;
      table->values[static_cast<size_t>(p * 2 * half + d)] = static_cast<A>(std::cos(angle));
      table->values[static_cast<size_t>((p * 2 + 1) * half + d)] = static_cast<A>(std::sin(angle));
    }
  }
  return table;
}

}  // namespace

template <typename A>
std::shared_ptr<const RotaryTable<A>> rotary_table(float theta, int64_t half, int64_t positions) {
  static std::mutex mutex;
  static std::map<std::pair<float, int64_t>, std::shared_ptr<const RotaryTable<A>>> tables;
  const std::lock_guard lock(mutex);
  auto& table = tables[{theta, half}];
  if (!table || table->positions < positions) table = make_table<A>(theta, half, positions);
  return table;
}

template std::shared_ptr<const RotaryTable<float>> rotary_table<float>(float, int64_t, int64_t);
template std::shared_ptr<const RotaryTable<double>> rotary_table<double>(float, int64_t, int64_t);

}  // namespace kernels::cpu
