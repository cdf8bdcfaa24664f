#include "trainer/model/attention/attention.h"

#include "trainer/model/attention/linear.h"
#include "trainer/model/attention/softmax.h"

namespace trainer {

const std::vector<AttentionKind>& attention_kinds() {
  static const std::vector<AttentionKind> kinds = {
      {"softmax", make_softmax_attention},
      {"linear", make_linear_attention},
  };
  return kinds;
}

}  // namespace trainer
