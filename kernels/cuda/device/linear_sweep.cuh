#pragma once
// What linear attention's training kernels share. The forward and its three gradients are one computation, a
// causal sweep over the rows of a sequence
//   y_i = sum_{j <= i} (a_i . b_j) c_j,      state = sum_j b_j c_j^T
// in ascending order (forward, dq) or descending order, j >= i (dk, dv). With phi = elu + 1,
// dn = do / denominator and dd = -(do . o) / denominator (without normaliser dn = do, dd = 0):
//              a            b            c
//   forward    phi(q)       phi(k)       [v, 1]     makes [numerator, denominator]
//   dq         [dn, dd]     [v, 1]       phi(k)     times phi'(q)
//   dk         [v, 1]       [dn, dd]     phi(q)     times phi'(k)
//   dv         phi(k)       phi(q)       dn
// A long sequence is cut into segments that are swept side by side: a first launch makes the state of each
// segment alone, the second one starts every segment from the sum of those before it.
#include <cstdint>

namespace kernels::cuda {

enum class Sweep { forward, dq, dk, dv };
constexpr bool ascending(Sweep sweep) { return sweep == Sweep::forward || sweep == Sweep::dq; }

// An array (N, heads, width): row i begins at data + i * stride.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

struct SweepTask {
  Rows q, k, v, dout, out;
  float* denominator = nullptr;  // written by the forward; null without normaliser
  int64_t denominator_stride = 0;
  const float* dd = nullptr;  // (N, H)
  const int32_t* cu_seqlens = nullptr;
  int sequences = 0, rows = 0, heads = 0, key_heads = 0, width = 0;
  int segment_rows = 0;     // a multiple of the chunk
  float* states = nullptr;  // of the segments that others continue
  float eps = 0;
};

__device__ __forceinline__ float phi(float x) { return x > 0 ? x + 1 : expf(x); }

// Rows [first, last) of a sequence, its `index`th segment of `count`. State slots base .. base + count - 2
// belong to the sequence; a segment is empty when first == last.
struct Segment {
  int first = 0, last = 0, index = 0, count = 0, base = 0;
};

// Boundaries come from the device alone, so segments are found by search. Those of sequence s have the slots
// from cu[s] / length + s on, their states the slots from cu[s] / length on, one less: the last segment (the
// first one of a descending sweep) is continued by nobody. Neither range reaches the next sequence's.
template <bool kStates, bool kUp>
__device__ Segment find_segment(const SweepTask& t, int slot) {
  const int length = t.segment_rows;
  const auto boundary = [&](int s) { return min(max(t.cu_seqlens[s], 0), t.rows); };
  int low = 0, high = t.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (boundary(middle) / length + (kStates ? 0 : middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int begin = boundary(low), end = boundary(low + 1);
  Segment segment;
  segment.base = begin / length;
  segment.count = (max(end - begin, 0) + length - 1) / length;
  segment.index = slot - segment.base - (kStates ? 0 : low);
  if (segment.index < 0 || segment.index >= segment.count - (kStates ? 1 : 0)) return segment;
  if (kStates && !kUp) ++segment.index;
  segment.first = begin + segment.index * length;
  segment.last = min(segment.first + length, end);
  return segment;
}

}  // namespace kernels::cuda
