#pragma once
// Matrix products through cuBLASLt, sums in fp32 (fp32 operands: no TF32).
//   c (M, N) = epilogue(op(a) op(b) + addend), or c += op(a) op(b)     op(a) (M, K), op(b) (K, N)
// a and b of one type (fp16, bf16, fp32); c of that type or fp32. Rows may be strided.
//
// Which of the library's kernels computes a product is decided at its first use in the process, per device,
// sizes, strides, alignment, types and epilogue, and remembered: by timing the candidates, or, inside a graph
// capture and where measure_products(false) was said, by taking the library's first suggestion. Products of
// one device share a workspace: they go to one stream, or to streams that wait for one another.
#include <optional>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels::cuda {

enum class Epilogue {
  none,
  bias,  // + bias (N), of c's type
  gelu,  // c = gelu(the product, + bias where there is one); what went in is written to aux, where there is
         // one
  gelu_gradient,  // c = the product * gelu'(aux)
  column_sums     // with a transposed a, on the side: bias (M), of c's type, = the sums of a's columns
};

struct Product {
  Tensor a, b, c;
  bool transposed_a = false, transposed_b = false;
  bool accumulate = false;  // with no epilogue, or with column_sums
  Epilogue epilogue = Epilogue::none;
  Tensor bias = {}, aux = {};  // aux (M, N) of c's type
  Tensor addend = {};          // (M, N) of c's type, other memory than c: added to the product before a gelu
};

// False, and nothing done, when the library has no kernel for it: only a product with an epilogue or an
// addend can lack one.
bool multiply(const Context& ctx, const Product& product);
// What the product took when its kernel was chosen; nothing where nothing was measured.
std::optional<float> measured_milliseconds(const Context& ctx, const Product& product);
// fp32 memory of a device for sums of columns, which the next product or sum may overwrite.
inline constexpr int64_t kColumnSums = int64_t{1} << 18;
float* column_sums_memory(const Context& ctx);

}  // namespace kernels::cuda
