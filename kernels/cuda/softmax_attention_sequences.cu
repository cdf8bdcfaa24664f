// What packed sequences need besides attention itself: tables for ragged tensors, zeros outside.
#include "kernels/cuda/check.h"
#include "kernels/cuda/softmax_attention.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 256;

struct Cleared {
  char* data;
  int64_t row_bytes, stride_bytes;
};
struct Arguments {
  const int32_t* cu;
  int64_t sequences, rows;
  int32_t* lengths;
  int64_t* offsets;
  int64_t strides[9];
  int tables;
  Cleared cleared[3];
};

// Every block clears its share of the rows outside, which are few; the first writes the tables too.
__global__ void ragged_tables_kernel(const Arguments a) {
  const int64_t first = a.cu[0], last = a.cu[a.sequences], inside = last - first;
  for (int64_t i = blockIdx.x; i < a.rows - inside; i += gridDim.x) {
    const int64_t row = i < first ? i : i + inside;
    for (const Cleared& c : a.cleared)
      for (int64_t at = threadIdx.x; at < c.row_bytes; at += kThreads) c.data[row * c.stride_bytes + at] = 0;
  }
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, step = int64_t{gridDim.x} * kThreads;
  for (int64_t s = thread; s <= a.sequences; s += step) {
    const int64_t begin = a.cu[s];
    if (s < a.sequences) a.lengths[s] = static_cast<int32_t>(a.cu[s + 1] - begin);
    for (int t = 0; t < a.tables; ++t) a.offsets[t * (a.sequences + 1) + s] = begin * a.strides[t];
  }
}

}  // namespace

void make_ragged_tables(const Context& ctx, const Tensor& cu_seqlens, int64_t rows, const RaggedTables& to) {
  Arguments a{.cu = cu_seqlens.as<int32_t>(),
              .sequences = cu_seqlens.rows() - 1,
              .rows = rows,
              .lengths = to.lengths,
              .offsets = to.offsets,
              .strides = {},
              .tables = to.tables,
              .cleared = {}};
  for (int t = 0; t < to.tables; ++t) a.strides[t] = to.strides[static_cast<size_t>(t)];
  for (size_t i = 0; i < 3; ++i) {
    const Tensor& x = to.cleared[i];
    const auto element = static_cast<int64_t>(size_of(x.dtype));
    if (x.data) a.cleared[i] = {static_cast<char*>(x.data), x.cols() * element, x.row_stride * element};
  }
  ragged_tables_kernel<<<64, kThreads, 0, stream_of(ctx)>>>(a);
  check_launch("softmax_attention");
}

}  // namespace kernels::cuda
