#pragma once
// What the rows of training attention's kinds share.
#include "tests/support/op_case.h"

namespace support {

struct AttentionShape {
  int64_t heads, key_heads, width;
  std::vector<double> cu_seqlens;
  int64_t padding = 0;
  int64_t outside = 0;  // rows behind the last sequence
  int64_t rows() const { return static_cast<int64_t>(cu_seqlens.back()) + outside; }
};

// A row with q, k, v, cu_seqlens and the output o.
OpCase attention_case(std::string operation, std::string name, const AttentionShape& s);

}  // namespace support
