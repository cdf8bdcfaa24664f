#pragma once
// A group of ranks that exchange tensors. `local` is one rank in one process; `mpi` wraps an MPI communicator
// (host memory); `nccl` (comm/nccl.h) adds GPU memory to it. Every call is collective over the group, made by
// all its ranks in the same order, from the thread that made the Session. A call that does not complete
// within the deadline throws CommTimeout naming the operation and the late ranks; one whose peers run another
// operation (each message carries a sequence number and an operation hash) throws CommError. After either,
// every further call throws and Session::abort must end the job. Tensors are dense and in memory that the
// group moves; ShapeError otherwise.
//
// On a GPU a call only puts work into streams, in the order of the compute stream, and may be recorded into a
// graph: it starts after what the compute stream holds, what follows there sees its result, and the host
// never waits. A request runs beside the compute stream until wait() joins it.
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/error.h"
#include "kernels/core/tensor.h"

namespace comm {

using kernels::Tensor;

// A call that did not complete within the deadline (exit code 70); every other CommError is a refusal.
struct CommTimeout : kernels::CommError {
  using kernels::CommError::CommError;
};

enum class Reduce { sum, max };

// A collective in flight. Its tensor must not be touched until wait() returns. Destroying an unfinished
// request waits.
class Request {
 public:
  virtual ~Request() = default;
  virtual bool test() = 0;  // moves data along; true when complete
  virtual void wait() = 0;
};

// Of a call that has done everything when it returns.
class DoneRequest final : public Request {
 public:
  bool test() override { return true; }
  void wait() override {}
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // In place, element-wise; f32, f64, i32, i64. Sums run in rank order, so every rank ends with identical
  // bits, and so does every repetition with the same number of ranks. A maximum over a NaN is NaN.
  virtual void all_reduce(Tensor t, Reduce op) = 0;
  virtual std::unique_ptr<Request> all_reduce_async(Tensor t, Reduce op) = 0;
  // t (stripes, size, n), in place: of every stripe, rank r gets the sums of part r. What the other parts
  // hold afterwards is undefined.
  virtual std::unique_ptr<Request> reduce_scatter_async(Tensor t, Reduce op) = 0;
  virtual void broadcast(Tensor t, int root) = 0;
  // t of rank `to` becomes that of rank `from`; the others' stay as they are, and need only say how large.
  virtual void transfer(Tensor t, int from, int to) = 0;
  // t (stripes, size, n) of any type, in place: of every stripe, part r becomes that of rank r.
  virtual std::unique_ptr<Request> all_gather_async(Tensor t) = 0;
  virtual void barrier() = 0;

  // For GPU work, of which the host knows nothing. watch(): what the compute stream holds now, a launched
  // graph for instance, has to be done within the deadline. poll(): throws once that or a call has failed;
  // for hosts that wait for a GPU.
  virtual void watch() {}
  virtual void poll() {}

  // Small host values, built on the above.
  std::string broadcast(const std::string& text, int root);
  double all_reduce(double value, Reduce op);
  int64_t all_reduce(int64_t value, Reduce op);
};

std::unique_ptr<Communicator> make_local_communicator();
// For ranks that compute on `device` and keep their order in `compute`: over NCCL (comm/nccl.h) where `world`
// has several ranks, local for one alone. Null on the CPU, where `world` itself serves.
std::unique_ptr<Communicator> make_gpu_communicator(Communicator& world, kernels::Device device,
                                                    kernels::Stream compute, std::chrono::seconds deadline);

// Starts the message-passing layer if the process was launched by mpirun or srun, and ends it: the only place
// that initialises and finalises MPI. Without a launcher the world is `local` and MPI is never touched.
// Ending waits for every rank; when it is destroyed by an exception or after a failed call, it aborts the job
// (exit code 70 after a CommTimeout, else 1). A rank whose launcher dies is killed with it.
class Session {
 public:
  Session(int* argc, char*** argv, std::chrono::seconds deadline = std::chrono::minutes(10));
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Communicator& world() { return *world_; }
  int local_rank() const { return local_rank_; }  // among the ranks of this host
  int local_size() const { return local_size_; }
  // Ends every rank of the job with this exit code; used by main after an error on any one rank. Does not
  // return.
  [[noreturn]] void abort(int exit_code);

 private:
  std::unique_ptr<Communicator> world_;
  int local_rank_ = 0, local_size_ = 1;
  bool mpi_ = false;
  int exceptions_ = 0;
};

}  // namespace comm
