#pragma once
// A head maps hidden rows to the hidden rows of a later token; the unembedding, which the heads may share,
// turns them into logits (heads/vocabulary.h). The language model's own head is the identity: it needs no
// class. A head registers its parameters when it is made, after the trunk's.
#include <memory>
#include <string>

#include "trainer/model/block.h"
#include "trainer/model/linear.h"
#include "trainer/model/parameters.h"

namespace trainer {

struct HeadInput {
  Tensor hidden;  // (N, C) the trunk's, or the previous depth's
  Tensor tokens;  // int32, negative past the end of a sequence. MTP: (N) token i + depth; sequential Medusa:
                  // (offset, N) row j holds token i + 1 + j
  RowPlan plan;   // MTP only
};

struct HeadSaved {
  virtual ~HeadSaved() = default;
};

class Head {
 public:
  Head(std::string name, int64_t offset) : name_(std::move(name)), offset_(offset) {}
  virtual ~Head() = default;
  const std::string& name() const { return name_; }
  int64_t offset() const { return offset_; }  // 0 is the next token

  // Writes out (N, C); what the backward needs is allocated from `arena`.
  virtual std::unique_ptr<HeadSaved> forward(const Context& ctx, const HeadInput& in, Tensor out,
                                             kernels::Arena& arena) const = 0;
  // d holds the gradient of `out` and is overwritten; dhidden, the gradient of in.hidden, is accumulated
  // (+=), or empty when it is not wanted.
  virtual void backward(const Context& ctx, const HeadInput& in, const HeadSaved& saved, Tensor d,
                        Tensor dhidden) const = 0;
  virtual int first_parameter() const = 0;
  // Null: the model's unembedding.
  virtual const Linear* own_vocabulary() const { return nullptr; }
  virtual void pack(const Context& ctx, kernels::Arena& panels) = 0;

 private:
  std::string name_;
  int64_t offset_;
};

}  // namespace trainer
