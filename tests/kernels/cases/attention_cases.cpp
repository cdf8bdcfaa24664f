#include "tests/kernels/cases/attention_cases.h"

namespace support {

OpCase attention_case(std::string operation, std::string name, const AttentionShape& s) {
  OpCase op{.operation = std::move(operation),
            .name = std::move(name),
            .inputs = {},
            .outputs = {{.name = "o", .shape = {s.rows(), s.heads, s.width}, .padding = s.padding}},
            .forward = {}};
  for (const char* input : {"q", "k", "v"})
    op.inputs.push_back({.name = input,
                         .shape = {s.rows(), *input == 'q' ? s.heads : s.key_heads, s.width},
                         .gradient = Gradient::written,
                         .padding = s.padding});
  op.inputs.push_back({.name = "cu_seqlens",
                       .shape = {static_cast<int64_t>(s.cu_seqlens.size())},
                       .type = Type::i32,
                       .values = s.cu_seqlens});
  return op;
}

}  // namespace support
