#pragma once
// What Session needs of the message-passing layer, without its header.
#include <chrono>
#include <memory>

#include "comm/communicator.h"

namespace comm::mpi {

enum class Health { good, failed, timed_out };

class MpiGroup : public Communicator {
 public:
  // Anything but good: a call has failed, and every further one throws.
  virtual Health health() const = 0;
};

// The group of every rank of the job. MPI must be initialised.
std::unique_ptr<MpiGroup> make_world(std::chrono::milliseconds deadline);

// CommError with the library's text unless code is success.
void check(int code, const char* call);

}  // namespace comm::mpi
