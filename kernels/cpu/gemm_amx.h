#pragma once
// The matrix product of gemm.h on AMX units, for fp16 and bf16 operands.
//
// AMX multiplies bf16 and sums in fp32. An fp16 value has 11 significant bits and is therefore exactly the
// sum of two bf16 values, the nearest one and what remains: x = h + l with |l| <= 2^-9 |x|. A product of two
// fp16 values becomes three exact bf16 products, h h' + h l' + l h', summed in fp32 like every other product
// of this library. l l' is left out: at most 2^-18 of the product and, h being rounded to nearest, of either
// sign, which is less than fp32 sums of 64 terms may err. bf16 takes one. fp16's subnormals are normal in
// bf16, so nothing is flushed. An infinite operand gives NaN instead of infinity, which the overflow check
// treats alike.
#include "kernels/cpu/gemm.h"

namespace kernels::cpu {

// The processor has AMX-BF16 and AVX-512 and the kernel lets this process use them. Decided once.
bool amx_usable();
// Whether gemm_amx takes this product: 16-bit operands, and enough work for the packing to pay.
bool amx_suits(const Operand& a, const Operand& b, const Tensor& c);
void gemm_amx(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c);

}  // namespace kernels::cpu
