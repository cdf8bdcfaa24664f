#pragma once
// Sums the gradients of all ranks in buckets while the backward still runs. The flat gradient buffer is cut
// into buckets from its end, since the backward finishes the last parameters first. The trainer calls
// ready(begin) whenever every gradient at or beyond element `begin` is final; buckets that have become whole
// are sent. progress() moves data along (MPI advances mostly inside its own calls), throws when the group has
// failed, and is called between layers and while waiting for a GPU; finish() sends what is left, waits for
// all and begins anew. With one rank nothing is sent.
//
// Sharded, the buffer is cut into equal shards, one for each rank in order, and only a shard's owner gets its
// sums: the reduce-scatter of ZeRO.
//
// What lies ahead of the first layer (embeddings) becomes final last and at once. A bucket that held some of
// it and some of the layers would keep those waiting, so buckets are cut there.
#include <memory>
#include <vector>

#include "comm/communicator.h"

namespace comm {

struct Buckets {
  size_t bytes;         // at least this much is sent at once; what would be left over joins its neighbour
  int64_t shard = 0;    // elements of a shard, where buckets end too; 0: not sharded
  int64_t last = 0;     // the first elements, which become final last
  bool joined = false;  // neighbours that become whole together are sent as one, as suits a GPU
};

class GradientReducer {
 public:
  // gradients: dense (P) fp32 or fp64, the same length on every rank.
  GradientReducer(Communicator& communicator, Tensor gradients, const Buckets& buckets);
  void ready(int64_t begin);
  void progress();
  void finish();
  // Elements [begin, end) of each bucket in the order they are sent; for tests and the plan.
  const std::vector<std::pair<int64_t, int64_t>>& buckets() const { return buckets_; }

 private:
  void send(int64_t begin, int64_t end);

  Communicator& communicator_;
  Tensor gradients_;
  int64_t shard_;
  bool joined_;
  std::vector<std::pair<int64_t, int64_t>> buckets_;
  std::vector<std::unique_ptr<Request>> in_flight_;
  size_t next_ = 0;
};

}  // namespace comm
