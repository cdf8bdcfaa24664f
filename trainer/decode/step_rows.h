#pragma once
// The rows of one decoding step, gathered on the host and described to the model: kernels::DecodeRows and
// kernels::CommitPath over memory that is allocated once.
#include <span>
#include <vector>

#include "kernels/ops/decode_rows.h"
#include "kernels/ops/linear.h"
#include "trainer/decode/tree.h"
#include "trainer/model/model.h"

namespace trainer {

// How many rows may follow at this length, so that all of them lie before the next fold.
inline int64_t rows_before_fold(int64_t length) { return kernels::kFold - length % kernels::kFold; }

// What the host reads of a device tensor: the memory itself on the CPU, a copy in `mirror` otherwise.
template <typename T>
const T* on_host(const Tensor& t, std::vector<T>& mirror) {
  if (!t.device.is_cuda()) return t.as<T>();
  mirror.resize(static_cast<size_t>(t.numel()));
  kernels::copy_bytes(mirror.data(), {}, t.as<T>(), t.device, t.bytes());
  return mirror.data();
}

class StepRows {
 public:
  StepRows(kernels::Device device, int64_t batch);

  void clear();
  // The rows of the next sequence, one call each in order; `length` tokens of it are committed. Every
  // sequence's row count, and their sum, is at most kMaxDecodeRows.
  void add_tree(int64_t length, const DraftTree& tree);
  void add_chain(int64_t length, std::span<const int32_t> tokens);
  void add_none(int64_t length) { add_chain(length, {}); }

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t first_row(int64_t sequence) const { return first_row_[sequence]; }
  int64_t count(int64_t sequence) const { return first_row_[sequence + 1] - first_row_[sequence]; }
  // Valid until the next clear().
  Tensor tokens();
  kernels::DecodeRows rows();

  // The accepted rows of a sequence, counted from its first. Sequences that are not named roll back.
  void accept(int64_t sequence, std::span<const int32_t> rows);
  void accept_first(int64_t sequence, int64_t count);
  kernels::CommitPath path();

 private:
  void finish_sequence(int64_t length);
  Tensor place(Tensor device, const void* host, kernels::Shape shape) const;

  kernels::Device device_;
  int64_t batch_;
  std::vector<int32_t> tokens_, first_row_, lengths_, positions_, path_rows_, path_counts_;
  std::vector<int64_t> ancestors_;
  kernels::Arena memory_;
  struct DeviceMemory {
    Tensor tokens, first_row, lengths, positions, ancestors, path_rows, path_counts;
  } on_device_;
};

}  // namespace trainer
