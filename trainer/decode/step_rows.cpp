#include "trainer/decode/step_rows.h"

#include <algorithm>
#include <numeric>

#include "kernels/core/error.h"

namespace trainer {

using kernels::kMaxDecodeRows;

StepRows::StepRows(kernels::Device device, int64_t batch)
    : device_(device), batch_(batch), memory_("decode rows", device) {
  constexpr size_t kNumber = sizeof(int32_t);
  const size_t most = kMaxDecodeRows, sequences = static_cast<size_t>(batch);
  first_rows_ = ancestors_ + most * sizeof(int64_t);
  lengths_ = first_rows_ + (sequences + 1) * kNumber;
  tokens_ = lengths_ + sequences * kNumber;
  positions_ = tokens_ + most * kNumber;
  path_rows_ = positions_ + most * kNumber;
  path_counts_ = path_rows_ + sequences * most * kNumber;
  end_ = path_counts_ + sequences * kNumber;
  constexpr int kSlots = 16;  // a drafter asks for several steps ahead of the device
  for (int i = 0; i < (device.is_cuda() ? kSlots : 1); ++i) {
    slots_.push_back(std::make_unique<Slot>(device, end_));
    std::fill_n(static_cast<char*>(slots_.back()->memory.data()), end_, char{0});
  }
  for (int pass = 0; device.is_cuda() && pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    block_ = memory_.allocate("rows", DType::i32, {static_cast<int64_t>(end_ / kNumber)});
  }
  clear();
}

void StepRows::clear() {
  slot_ = (slot_ + 1) % slots_.size();
  if (const kernels::Event& copied = slots_[slot_]->copied; !copied.done()) copied.synchronize();
  rows_ = sequences_ = 0;
  host<int32_t>(first_rows_)[0] = 0;
  std::fill_n(host<int32_t>(path_counts_), batch_, 0);
}

void StepRows::add_tree(int64_t length, const DraftTree& tree) {
  const int64_t first = begin_rows(tree.size());
  for (int node = 0; node < tree.size(); ++node) {
    host<int32_t>(tokens_)[first + node] = tree.token(node);
    host<int32_t>(positions_)[first + node] = static_cast<int32_t>(length + tree.depth(node));
    host<int64_t>(ancestors_)[first + node] = static_cast<int64_t>(tree.ancestors(node));
  }
  finish_sequence(length, tree.size());
}

void StepRows::add_chain(int64_t length, std::span<const int32_t> tokens) {
  const int64_t count = static_cast<int64_t>(tokens.size()), first = begin_rows(count);
  std::copy(tokens.begin(), tokens.end(), host<int32_t>(tokens_) + first);
  std::iota(host<int32_t>(positions_) + first, host<int32_t>(positions_) + first + count,
            static_cast<int32_t>(length));
  for (int64_t i = 0; i < count; ++i)
    host<int64_t>(ancestors_)[first + i] = static_cast<int64_t>(~uint64_t{0} >> (63 - i));
  finish_sequence(length, count);
}

int64_t StepRows::begin_rows(int64_t count) const {
  if (rows_ + count > kMaxDecodeRows || sequences_ >= batch_)
    throw kernels::ShapeError(
        "decoding step: more than 64 rows at once; use a smaller batch or fewer drafts");
  return rows_;
}

void StepRows::finish_sequence(int64_t length, int64_t count) {
  rows_ += count;
  host<int32_t>(lengths_)[sequences_] = static_cast<int32_t>(length);
  host<int32_t>(first_rows_)[++sequences_] = static_cast<int32_t>(rows_);
}

void StepRows::send(const Context& ctx, size_t begin, size_t end) {
  if (!device_.is_cuda()) return;
  kernels::copy_async(static_cast<char*>(block_.data) + begin, host<char>(begin), end - begin, device_,
                      ctx.stream);
  slots_[slot_]->copied.record(ctx.stream);
}

void StepRows::upload(const Context& ctx) { send(ctx, 0, path_rows_); }
void StepRows::upload_path(const Context& ctx) { send(ctx, path_rows_, end_); }

Tensor StepRows::view(size_t offset, DType dtype, Shape shape) const {
  void* data = device_.is_cuda() ? static_cast<char*>(block_.data) + offset : host<char>(offset);
  return Tensor(data, dtype, shape, device_);
}

kernels::DecodeRows StepRows::rows() const {
  return {view(first_rows_, DType::i32, {batch_ + 1}), view(lengths_, DType::i32, {batch_}),
          view(positions_, DType::i32, {rows_}), view(ancestors_, DType::i64, {rows_})};
}

void StepRows::accept(int64_t sequence, std::span<const int32_t> rows) {
  std::copy(rows.begin(), rows.end(), host<int32_t>(path_rows_) + sequence * kMaxDecodeRows);
  host<int32_t>(path_counts_)[sequence] = static_cast<int32_t>(rows.size());
}

void StepRows::accept_first(int64_t sequence, int64_t count) {
  int32_t* rows = host<int32_t>(path_rows_) + sequence * kMaxDecodeRows;
  std::iota(rows, rows + count, 0);
  host<int32_t>(path_counts_)[sequence] = static_cast<int32_t>(count);
}

kernels::CommitPath StepRows::path() const {
  return {view(path_rows_, DType::i32, {batch_, kMaxDecodeRows}), view(path_counts_, DType::i32, {batch_}),
          view(lengths_, DType::i32, {batch_})};
}

bool StepRows::path_matters() const {
  for (int64_t b = 0; b < batch_; ++b) {
    const int32_t* rows = host<int32_t>(path_rows_) + b * kMaxDecodeRows;
    const int32_t count = host<int32_t>(path_counts_)[b], length = host<int32_t>(lengths_)[b];
    if (count > 0 && (rows[count - 1] != count - 1 || (length + count) % kernels::kFold == 0)) return true;
  }
  return false;
}

}  // namespace trainer
