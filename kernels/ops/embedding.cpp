#include "kernels/ops/embedding.h"

namespace kernels {

namespace {
// rows (N, C) against tokens (N) and a table (V, C); the same for positions where there is a position table.
void check_lookup(const char* operation, const char* rows_name, const Tensor& rows, const Tensor& indices,
                  const char* indices_name, const Tensor& table, const char* table_name, DType table_dtype) {
  check_shape(operation, indices_name, indices, Shape{rows.rows()});
  check_dtype(operation, indices_name, indices, DType::i32);
  check_shape(operation, table_name, table, Shape{table.rows(), rows.cols()});
  check_dtype(operation, table_name, table, table_dtype);
  check_shape(operation, rows_name, rows, Shape{rows.rows(), table.cols()});
}
}  // namespace

void embedding(const Context& ctx, const Tensor& tokens, const Tensor& table, const Tensor& positions,
               const Tensor& position_table, Tensor y) {
  check_lookup("embedding", "y", y, tokens, "tokens", table, "table", y.dtype);
  if (position_table)
    check_lookup("embedding", "y", y, positions, "positions", position_table, "position_table", y.dtype);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::embedding(ctx, tokens, table, positions, position_table, y);
  return cpu::embedding(ctx, tokens, table, positions, position_table, y);
}

void embedding_backward(const Context& ctx, const Tensor& dy, const Tensor& tokens, Tensor dtable,
                        const Tensor& positions, Tensor dposition_table) {
  constexpr auto kName = "embedding_backward";
  const DType main = main_dtype(dy.dtype);
  check_lookup(kName, "dy", dy, tokens, "tokens", dtable, "dtable", main);
  if (dposition_table)
    check_lookup(kName, "dy", dy, positions, "positions", dposition_table, "dposition_table", main);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda())
      return cuda::embedding_backward(ctx, dy, tokens, dtable, positions, dposition_table);
  if (ctx.rehearsal) return;
  return cpu::embedding_backward(ctx, dy, tokens, dtable, positions, dposition_table);
}

}  // namespace kernels
