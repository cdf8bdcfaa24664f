#pragma once
// Element-wise kernels: out = op(in), element by element, over rows that may be strided. Loads and stores are
// 16 bytes wide where addresses allow it. An output may be one of the inputs.
#include <algorithm>
#include <array>
#include <bit>

#include "kernels/core/tensor.h"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/launch.h"

namespace kernels::cuda {

inline constexpr int kMapThreads = 256;

// Op: kInputs, kOutputs and operator()(const float (&in)[], float (&out)[]); X is the inputs' type, Y the
// outputs'.
template <class Op, typename X, typename Y>
struct MapArguments {
  const X* in[std::max(Op::kInputs, 1)];
  int64_t in_stride[std::max(Op::kInputs, 1)];
  Y* out[Op::kOutputs];
  int64_t out_stride[Op::kOutputs];
  int64_t rows, columns;
  unsigned across, strips;  // threads of a block along a row, a power of two; blocks along a row
};

template <class Op, typename X, typename Y, int N>
__device__ __forceinline__ void map_vector(const Op& op, const Vector<X, N> (&x)[std::max(Op::kInputs, 1)],
                                           Vector<Y, N> (&y)[Op::kOutputs]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float in[std::max(Op::kInputs, 1)] = {}, out[Op::kOutputs];
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) in[i] = to_float(x[i].at[j]);
    op(in, out);
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) y[o].at[j] = from_float<Y>(out[o]);
  }
}

// Vectors of a thread: all are loaded before the first is used.
template <class Op>
inline constexpr int kMapVectors = Op::kInputs > 2 ? 2 : 4;

// Behind the last whole vector of a row.
template <class Op, typename X, typename Y>
__device__ __forceinline__ void map_rest(const MapArguments<Op, X, Y>& a, const Op& op, int64_t row,
                                         int64_t first) {
  for (int64_t e = first; e < a.columns; e += a.across) {
    Vector<X, 1> x[std::max(Op::kInputs, 1)];
    Vector<Y, 1> y[Op::kOutputs];
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) x[i].at[0] = a.in[i][row * a.in_stride[i] + e];
    map_vector<Op, X, Y, 1>(op, x, y);
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) a.out[o][row * a.out_stride[o] + e] = y[o].at[0];
  }
}

template <class Op, typename X, typename Y, int N>
__global__ void __launch_bounds__(kMapThreads) map_kernel(const MapArguments<Op, X, Y> a, const Op op) {
  constexpr int kVectors = kMapVectors<Op>;
  const unsigned lane = threadIdx.x & (a.across - 1), in_block = threadIdx.x / a.across;
  const unsigned strip = blockIdx.x % a.strips;
  const int64_t row = int64_t{blockIdx.x / a.strips} * (kMapThreads / a.across) + in_block;
  const int64_t first = (int64_t{strip} * kVectors * a.across + lane) * N;
  let_next_start();
  wait_for_previous();
  if (row >= a.rows) return;
  Vector<X, N> x[kVectors][std::max(Op::kInputs, 1)];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = first + int64_t{v} * a.across * N;
    if (c + N > a.columns) continue;
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) x[v][i] = load_vector<X, N>(a.in[i] + row * a.in_stride[i] + c);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = first + int64_t{v} * a.across * N;
    if (c + N > a.columns) continue;
    Vector<Y, N> y[Op::kOutputs];
    map_vector<Op, X, Y, N>(op, x[v], y);
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) store_global(a.out[o] + row * a.out_stride[o] + c, y[o]);
  }
  if (N > 1 && strip + 1 == a.strips) map_rest(a, op, row, a.columns / N * N + lane);
}

template <class Op, typename X, typename Y = X>
void map_rows(const Context& ctx, const char* name, const std::array<Tensor, Op::kInputs>& in,
              const std::array<Tensor, Op::kOutputs>& out, const Op& op = {}) {
  constexpr int kWide = 16 / static_cast<int>(std::max(sizeof(X), sizeof(Y)));
  MapArguments<Op, X, Y> a{};
  bool dense = true, wide = true;
  const auto take = [&](const Tensor& t, auto& pointer, int64_t& stride) {
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(t.data);
    stride = t.row_stride;
    dense = dense && t.dense();
  };
  for (int i = 0; i < Op::kInputs; ++i) take(in[i], a.in[i], a.in_stride[i]);
  for (int o = 0; o < Op::kOutputs; ++o) take(out[o], a.out[o], a.out_stride[o]);
  // A dense tensor is one long row.
  a.rows = dense ? 1 : out[0].rows();
  a.columns = dense ? out[0].numel() : out[0].cols();
  const auto check_wide = [&](const Tensor& t) {
    wide = wide && rows_aligned(dense ? t.view({1, t.numel()}) : t, kWide * size_of(t.dtype));
  };
  std::for_each(in.begin(), in.end(), check_wide);
  std::for_each(out.begin(), out.end(), check_wide);
  if (a.rows == 0 || a.columns == 0) return;
  const int64_t per_thread = int64_t{kMapVectors<Op>} * (wide ? kWide : 1);
  const int64_t threads = (a.columns + per_thread - 1) / per_thread;
  a.across =
      static_cast<unsigned>(std::min<uint64_t>(kMapThreads, std::bit_ceil(static_cast<uint64_t>(threads))));
  a.strips = static_cast<unsigned>((threads + a.across - 1) / a.across);
  const int64_t rows_per_block = kMapThreads / a.across,
                row_blocks = (a.rows + rows_per_block - 1) / rows_per_block;
  const auto blocks = static_cast<unsigned>(row_blocks * a.strips);
  launch(ctx, name, {.grid = blocks, .block = kMapThreads, .dependent = starts_early(blocks)},
         wide ? map_kernel<Op, X, Y, kWide> : map_kernel<Op, X, Y, 1>, a, op);
}

}  // namespace kernels::cuda
