#pragma once
// Sums the gradients of all ranks in buckets while the backward still runs. The trainer says beforehand in
// which order parts of the flat gradient buffer become final, and calls ready() for one after the other;
// buckets that have become whole are sent. progress() moves data along (MPI advances mostly inside its own
// calls), throws when the group has failed, and is called between layers and while waiting for a GPU;
// finish() sends what is left, waits for all and begins anew. With one rank nothing is sent.
//
// Buckets and their order follow from the parts alone, not from when they are announced: ranks agree on them
// even where one of them had nothing to compute. A part that does not end where the one ahead of it begins
// starts a new bucket: what the backward leaves for its end keeps nothing else waiting.
//
// Sharded, the buffer is cut into stripes, a stripe into a part for each rank, and only its owner gets the
// sums of a part: the reduce-scatter of ZeRO. A stripe is sent when all of it is final.
#include <memory>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace comm {

// Elements [first, second) of the gradient buffer.
using GradientRange = std::pair<int64_t, int64_t>;

struct Buckets {
  size_t bytes;         // enough to be sent
  int64_t stripe = 0;   // elements of a stripe; 0: not sharded
  bool joined = false;  // what has become whole goes as one however large, as suits a GPU
};

class GradientReducer {
 public:
  // gradients: dense (P) fp32 or fp64, the same length on every rank. `parts` in the order in which they
  // become final: every element is in one of them. Sharded, P is a whole number of stripes, and the end of
  // the last one may be padding, in no part.
  GradientReducer(Communicator& communicator, Tensor gradients, const std::vector<GradientRange>& parts,
                  const Buckets& buckets);
  // The next part, which has to be `part`, is final.
  void ready(GradientRange part);
  void progress();
  void finish();
  // What is sent, in this order; for tests.
  std::vector<GradientRange> buckets() const;

 private:
  struct Bucket {
    GradientRange range;
    size_t part;  // the last of its parts
  };
  void cut(const Buckets& buckets);
  void send_whole();

  Communicator& communicator_;
  Tensor gradients_;
  int64_t stripe_;
  std::vector<GradientRange> parts_;
  std::vector<Bucket> buckets_;
  std::vector<std::unique_ptr<Request>> in_flight_;
  size_t final_ = 0, next_ = 0;  // parts that are final; buckets that were sent
};

}  // namespace comm
