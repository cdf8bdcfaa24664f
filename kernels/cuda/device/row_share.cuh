#pragma once
// A row of numbers shared out over the warps of a cluster, in order, so that a running sum can be followed to
// where it exceeds a bound. Sums have one order, whatever else a kernel does.
#include <cstdint>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace kernels::cuda {

// Blocks of kShareWarps warps, at most kShareBlocks to a cluster.
inline constexpr int kShareWarps = 16, kShareThreads = kShareWarps * 32, kShareBlocks = 8;

// What the warps of a cluster tell each other: two numbers each, two rounds in turn. Who writes for the next
// round but one is behind the barrier of the next, and so nobody reads this one any more.
struct WarpNumbers {
  float2 of_warp[2][kShareWarps];
};

class RowShare {
 public:
  // of this warp: [begin, end)
  int begin, end;

  __device__ RowShare(WarpNumbers& shared, int columns) : shared_(shared) {
    const int first = static_cast<int>(cluster_rank()) * kShareWarps;
    lane_ = static_cast<int>(threadIdx.x) % 32;
    warp_ = first + static_cast<int>(threadIdx.x) / 32;
    warps_ = static_cast<int>(cluster_size()) * kShareWarps;
    const int each = ((columns + 31) / 32 + warps_ - 1) / warps_ * 32;
    begin = min(warp_ * each, columns);
    end = min(begin + each, columns);
  }
  __device__ __forceinline__ int lane() const { return lane_; }
  __device__ __forceinline__ bool first_thread() const { return warp_ == 0 && lane_ == 0; }
  __device__ __forceinline__ bool holds(int i) const { return begin <= i && i < end; }

  // Sums over all threads of the cluster, the same in each. All call it.
  __device__ float2 sum(float2 x) {
    tell({warp_reduce<Sum>(x.x), warp_reduce<Sum>(x.y)});
    float2 all{0, 0};
    for (int i = 0; i < kEach; ++i) {
      const float2 of_warp = told(lane_ * kEach + i);
      all.x += of_warp.x;
      all.y += of_warp.y;
    }
    return {warp_reduce<Sum>(all.x), warp_reduce<Sum>(all.y)};
  }

  // The first index at which the running sum of value(i), none negative, exceeds u times the whole sum; -1
  // where all are 0. `mine`: the sum of this warp's. The same in every thread; all call it.
  template <typename Value>
  __device__ int find(float mine, float u, const Value& value) {
    tell({mine, 0});
    const Place place = where(u);
    if (place.warp < 0) return -1;
    int found = 0;
    if (place.warp == warp_) found = search(place, value);
    tell({__int_as_float(found), 0});
    // By exchanging it every thread has it before the cluster may leave.
    return __shfl_sync(0xffffffffu, lane_ == 0 ? __float_as_int(told(place.warp).x) : 0, 0);
  }

 private:
  static constexpr int kEach = kShareBlocks * kShareWarps / 32;  // warps of whose numbers a lane looks at
  struct Place {
    int warp;  // that holds the index; -1: none
    float before, target;
  };

  // Lane 0's numbers to everyone.
  __device__ void tell(float2 numbers) {
    round_ ^= 1;
    if (lane_ == 0) shared_.of_warp[round_][warp_ % kShareWarps] = numbers;
    cluster_sync();
  }
  __device__ __forceinline__ float2 told(int warp) const {
    if (warp >= warps_) return {0, 0};
    return *cluster_shared(shared_.of_warp[round_] + warp % kShareWarps,
                           static_cast<uint32_t>(warp / kShareWarps));
  }
  // Inclusive, of the lanes up to this one.
  __device__ __forceinline__ float running(float x) const {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, x, offset);
      if (lane_ >= offset) x += other;
    }
    return x;
  }

  // The first warp whose sum, with those ahead of it, exceeds u times the whole; where rounding leaves none,
  // the last that has something.
  __device__ Place where(float u) const {
    float sums[kEach], here = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) here += sums[i] = told(lane_ * kEach + i).x;
    const float up_to = running(here), target = u * __shfl_sync(0xffffffffu, up_to, 31);
    int chosen = -1, last = -1;
    float before = up_to - here, chosen_before = 0, last_before = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (sums[i] > 0) {
        last = lane_ * kEach + i;
        last_before = before;
        if (chosen < 0 && before + sums[i] > target) chosen = last, chosen_before = before;
      }
      before += sums[i];
    }
    const unsigned some = __ballot_sync(0xffffffffu, chosen >= 0),
                   any = __ballot_sync(0xffffffffu, last >= 0);
    if (any == 0) return {-1, 0, 0};
    const int from = some != 0 ? __ffs(static_cast<int>(some)) - 1 : 31 - __clz(static_cast<int>(any));
    return {__shfl_sync(0xffffffffu, some != 0 ? chosen : last, from),
            __shfl_sync(0xffffffffu, some != 0 ? chosen_before : last_before, from), target};
  }

  template <typename Value>
  __device__ int search(Place place, const Value& value) const {
    int last = begin;
    for (int tile = begin; tile < end; tile += 32) {
      const int i = tile + lane_;
      const float x = i < end ? value(i) : 0, up_to = running(x);
      const unsigned over = __ballot_sync(0xffffffffu, x > 0 && place.before + up_to > place.target);
      if (over != 0) return tile + __ffs(static_cast<int>(over)) - 1;
      const unsigned some = __ballot_sync(0xffffffffu, x > 0);
      if (some != 0) last = tile + 31 - __clz(static_cast<int>(some));
      place.before += __shfl_sync(0xffffffffu, up_to, 31);
    }
    return last;
  }

  WarpNumbers& shared_;
  int lane_, warp_, warps_, round_ = 0;
};

}  // namespace kernels::cuda
