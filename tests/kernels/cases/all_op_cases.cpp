#include "tests/support/op_case.h"

namespace support {

std::vector<OpCase> all_op_cases() {
  std::vector<OpCase> all;
  for (auto family : {
           cast_cases,
           linear_cases,
           optimizer_cases,
       })
    for (auto& row : family()) all.push_back(std::move(row));
  return all;
}

}  // namespace support
