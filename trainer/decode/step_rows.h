#pragma once
// The rows of one decoding step, gathered on the host and described to the model: kernels::DecodeRows and
// kernels::CommitPath over memory that is allocated once.
#include <memory>
#include <span>
#include <vector>

#include "kernels/ops/decode_rows.h"
#include "kernels/ops/linear.h"
#include "trainer/decode/replay.h"
#include "trainer/decode/tree.h"
#include "trainer/model/model.h"

namespace trainer {

// How many rows may follow at this length, so that all of them lie before the next fold.
inline int64_t rows_before_fold(int64_t length) { return kernels::kFold - length % kernels::kFold; }

// On a GPU what was added becomes visible to the device with upload(), what was accepted with upload_path():
// one copy each, from page-locked memory, to addresses that never change. On the CPU both do nothing.
class StepRows {
 public:
  StepRows(kernels::Device device, int64_t batch);

  void clear();
  // The rows of the next sequence, one call each in order; `length` tokens of it are committed. Every
  // sequence's row count, and their sum, is at most kMaxDecodeRows.
  void add_tree(int64_t length, const DraftTree& tree);
  void add_chain(int64_t length, std::span<const int32_t> tokens);
  void add_none(int64_t length) { add_chain(length, {}); }
  void upload(const Context& ctx);

  int64_t size() const { return rows_; }
  int64_t first_row(int64_t sequence) const { return host<int32_t>(first_rows_)[sequence]; }
  int64_t count(int64_t sequence) const { return first_row(sequence + 1) - first_row(sequence); }
  // Valid until the next clear().
  Tensor tokens() const { return view(tokens_, DType::i32, {rows_}); }
  kernels::DecodeRows rows() const;

  // The accepted rows of a sequence, counted from its first. Sequences that are not named roll back.
  void accept(int64_t sequence, std::span<const int32_t> rows);
  void accept_first(int64_t sequence, int64_t count);
  void upload_path(const Context& ctx);
  kernels::CommitPath path() const;
  // Whether committing the path changes anything in a state: rows have to move, or a fold is reached.
  bool path_matters() const;

 private:
  struct Slot {
    Slot(kernels::Device device, size_t bytes) : memory(device, bytes), copied(device) {}
    kernels::PinnedBuffer memory;
    kernels::Event copied;
  };
  int64_t begin_rows(int64_t count) const;
  void finish_sequence(int64_t length, int64_t count);
  void send(const Context& ctx, size_t begin, size_t end);
  template <typename T>
  T* host(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(slots_[slot_]->memory.data()) + offset);
  }
  Tensor view(size_t offset, DType dtype, Shape shape) const;

  kernels::Device device_;
  int64_t batch_, rows_ = 0, sequences_ = 0;
  // Where the parts of a step lie in its memory, in bytes.
  size_t ancestors_ = 0, first_rows_, lengths_, tokens_, positions_, path_rows_, path_counts_, end_;
  std::vector<std::unique_ptr<Slot>> slots_;  // filled in turn: the device may still read the one before
  size_t slot_ = 0;
  kernels::Arena memory_;
  Tensor block_;  // on a GPU: what the slots are copied to
};

}  // namespace trainer
