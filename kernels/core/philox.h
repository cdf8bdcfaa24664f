#pragma once
// Counter-based random numbers (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011). A number depends on (seed, purpose, index) alone: never on the rank, the thread or the order of
// calls.
#include <array>
#include <cmath>
#include <cstdint>

namespace kernels {

// What a stream of numbers is for; values are part of the checkpoint contract and never reused.
enum class Purpose : uint32_t { init = 1, shuffle = 2, sampling = 3, features = 4, split = 5, test = 6 };

inline std::array<uint32_t, 4> philox(uint64_t seed, Purpose purpose, uint64_t index, uint32_t lane = 0) {
  std::array<uint32_t, 4> c = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                               static_cast<uint32_t>(purpose), lane};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// In [0, 1), 24 bits.
inline float uniform(uint64_t seed, Purpose purpose, uint64_t index, uint32_t lane = 0) {
  return static_cast<float>(philox(seed, purpose, index, lane)[0] >> 8) * 0x1.0p-24f;
}

// Standard normal (Box-Muller).
inline float normal(uint64_t seed, Purpose purpose, uint64_t index, uint32_t lane = 0) {
  const auto r = philox(seed, purpose, index, lane);
  const double u = (r[0] + 0.5) * 0x1.0p-32, v = (r[1] + 0.5) * 0x1.0p-32;
  return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v));
}

}  // namespace kernels
