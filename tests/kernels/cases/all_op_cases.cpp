#include "tests/support/op_case.h"

namespace support {

std::vector<OpCase> all_op_cases() {
  std::vector<OpCase> all;
  for (auto family : {
           activation_cases,
           cast_cases,
           cross_entropy_cases,
           embedding_cases,
           linear_attention_cases,
           linear_cases,
           norm_cases,
           optimizer_cases,
           rotary_cases,
           sampling_cases,
           softmax_attention_cases,
           speculation_cases,
       })
    for (auto& row : family()) all.push_back(std::move(row));
  return all;
}

}  // namespace support
