#include "trainer/decode/step_rows.h"

#include <algorithm>

namespace trainer {

using kernels::kMaxDecodeRows;

StepRows::StepRows(kernels::Device device, int64_t batch)
    : device_(device), batch_(batch), memory_("decode rows", device) {
  for (auto* v : {&tokens_, &positions_}) v->reserve(kMaxDecodeRows);
  ancestors_.reserve(kMaxDecodeRows);
  first_row_.reserve(batch + 1);
  lengths_.reserve(batch);
  path_rows_.resize(batch * kMaxDecodeRows);
  path_counts_.resize(batch);
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    on_device_ = {memory_.allocate("tokens", DType::i32, {kMaxDecodeRows}),
                  memory_.allocate("first_row", DType::i32, {batch + 1}),
                  memory_.allocate("lengths", DType::i32, {batch}),
                  memory_.allocate("positions", DType::i32, {kMaxDecodeRows}),
                  memory_.allocate("ancestors", DType::i64, {kMaxDecodeRows}),
                  memory_.allocate("path_rows", DType::i32, {batch, kMaxDecodeRows}),
                  memory_.allocate("path_counts", DType::i32, {batch})};
  }
  clear();
}

void StepRows::clear() {
  tokens_.clear();
  positions_.clear();
  ancestors_.clear();
  lengths_.clear();
  first_row_.assign(1, 0);
  std::fill(path_counts_.begin(), path_counts_.end(), 0);
}

void StepRows::add_tree(int64_t length, const DraftTree& tree) {
  for (int node = 0; node < tree.size(); ++node) {
    tokens_.push_back(tree.token(node));
    positions_.push_back(static_cast<int32_t>(length + tree.depth(node)));
    ancestors_.push_back(static_cast<int64_t>(tree.ancestors(node)));
  }
  finish_sequence(length);
}

void StepRows::add_chain(int64_t length, std::span<const int32_t> tokens) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens_.push_back(tokens[i]);
    positions_.push_back(static_cast<int32_t>(length + static_cast<int64_t>(i)));
    ancestors_.push_back(static_cast<int64_t>(~uint64_t{0} >> (63 - i)));
  }
  finish_sequence(length);
}

void StepRows::finish_sequence(int64_t length) {
  if (size() > kMaxDecodeRows)
    throw kernels::ShapeError(
        "decoding step: more than 64 rows at once; use a smaller batch or fewer drafts");
  lengths_.push_back(static_cast<int32_t>(length));
  first_row_.push_back(static_cast<int32_t>(size()));
}

Tensor StepRows::place(Tensor device, const void* host, kernels::Shape shape) const {
  if (!device_.is_cuda()) return Tensor(const_cast<void*>(host), device.dtype, shape);
  const Tensor t(device.data, device.dtype, shape, device_);
  kernels::copy_bytes(t.data, device_, host, {}, t.bytes());
  return t;
}

Tensor StepRows::tokens() { return place(on_device_.tokens, tokens_.data(), {size()}); }

kernels::DecodeRows StepRows::rows() {
  return {place(on_device_.first_row, first_row_.data(), {batch_ + 1}),
          place(on_device_.lengths, lengths_.data(), {batch_}),
          place(on_device_.positions, positions_.data(), {size()}),
          place(on_device_.ancestors, ancestors_.data(), {size()})};
}

void StepRows::accept(int64_t sequence, std::span<const int32_t> rows) {
  std::copy(rows.begin(), rows.end(), path_rows_.begin() + sequence * kMaxDecodeRows);
  path_counts_[sequence] = static_cast<int32_t>(rows.size());
}

void StepRows::accept_first(int64_t sequence, int64_t count) {
  for (int64_t i = 0; i < count; ++i) path_rows_[sequence * kMaxDecodeRows + i] = static_cast<int32_t>(i);
  path_counts_[sequence] = static_cast<int32_t>(count);
}

kernels::CommitPath StepRows::path() {
  return {place(on_device_.path_rows, path_rows_.data(), {batch_, kMaxDecodeRows}),
          place(on_device_.path_counts, path_counts_.data(), {batch_}),
          place(on_device_.lengths, lengths_.data(), {batch_})};
}

}  // namespace trainer
