#include "comm/nccl.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <exception>
#include <utility>

#include "comm/checks.h"
#include "comm/nccl_watchdog.h"
#include "kernels/core/stream.h"

namespace comm {
namespace {

using kernels::CommError;
using kernels::DType;
using kernels::ShapeError;

ncclDataType_t type_of(DType dtype) {
  constexpr ncclDataType_t kTypes[] = {ncclFloat16, ncclBfloat16, ncclFloat32, ncclFloat64,
                                       ncclInt32,   ncclInt64,    ncclUint8};
  return kTypes[static_cast<int>(dtype)];
}

cudaStream_t handle(kernels::Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

bool capturing(kernels::Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(handle(stream), &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

class NcclGroup final : public Communicator {
 public:
  NcclGroup(Communicator& world, kernels::Device device, kernels::Stream compute,
            std::chrono::milliseconds deadline);
  ~NcclGroup() override;
  int rank() const override { return world_.rank(); }
  int size() const override { return world_.size(); }
  void all_reduce(Tensor t, Reduce op) override;
  std::unique_ptr<Request> all_reduce_async(Tensor t, Reduce op) override;
  std::unique_ptr<Request> reduce_scatter_async(Tensor t, Reduce op) override;
  void broadcast(Tensor t, int root) override;
  void transfer(Tensor t, int from, int to) override;
  std::unique_ptr<Request> all_gather_async(Tensor t) override;
  void barrier() override {
    watchdog_.check();
    world_.barrier();
  }
  void watch() override { watchdog_.watch(compute_); }
  void poll() override { watchdog_.check(); }

  // The compute stream goes on after exchange number `exchange`.
  void join(int64_t exchange);

 private:
  // Puts `call` into the communication stream, behind what the compute stream holds. Returns its number.
  template <typename Call>
  int64_t exchange(const char* operation, const Tensor& t, Call&& call);
  // The same for t (stripes, size, n), with call(stripe, this rank's part of it, n, type), as one exchange.
  template <typename Call>
  std::unique_ptr<Request> exchange_stripes(const char* operation, const Tensor& t, Call&& call);
  void check(ncclResult_t status, const char* operation);

  Communicator& world_;
  const kernels::Device device_;
  const kernels::Stream compute_;
  const std::string who_;
  kernels::OwnedStream stream_;
  kernels::Event forked_, joined_;
  NcclWatchdog watchdog_;
  ncclComm_t nccl_ = nullptr;
  int64_t exchanges_ = 0, joined_exchanges_ = 0;
  const int exceptions_ = std::uncaught_exceptions();
};

// The GPU moves data by itself: there is nothing to push along, and nothing for the host to wait for.
class GpuRequest final : public Request {
 public:
  GpuRequest(NcclGroup& group, int64_t exchange) : group_(group), exchange_(exchange) {}
  ~GpuRequest() override {
    try {
      wait();
    } catch (const kernels::Error&) {
    }
  }
  bool test() override { return true; }
  void wait() override {
    if (!std::exchange(waited_, true)) group_.join(exchange_);
  }

 private:
  NcclGroup& group_;
  int64_t exchange_;
  bool waited_ = false;
};

NcclGroup::NcclGroup(Communicator& world, kernels::Device device, kernels::Stream compute,
                     std::chrono::milliseconds deadline)
    : world_(world),
      device_(device),
      compute_(compute),
      who_(fmt::format("rank {} on cuda:{}", world.rank(), device.index)),
      stream_(device, true),
      forked_(device),
      joined_(device),
      watchdog_(who_, device, deadline) {
  kernels::use_device(device);
  watchdog_.expect_return("the GPUs of all ranks did not find each other");
  ncclUniqueId id{};
  if (world.rank() == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
  world.broadcast(Tensor(&id, DType::u8, {static_cast<int64_t>(sizeof(id))}), 0);
  check(ncclCommInitRank(&nccl_, world.size(), id, world.rank()), "ncclCommInitRank");
  watchdog_.guard(nccl_);
}

NcclGroup::~NcclGroup() {
  if (!nccl_ || !watchdog_.expect_return("the ranks did not end their exchanges")) return;
  kernels::use_device(device_);
  if (std::uncaught_exceptions() > exceptions_)
    ncclCommAbort(nccl_);
  else
    ncclCommDestroy(nccl_);
}

void NcclGroup::check(ncclResult_t status, const char* operation) {
  if (status == ncclSuccess) return;
  watchdog_.check();  // what it knows is the reason for this
  const char* detail = ncclGetLastError(nccl_);
  throw CommError(fmt::format("{}: {} failed: {} ({}); NCCL_DEBUG=WARN tells more", who_, operation,
                              ncclGetErrorString(status), detail && *detail ? detail : "no detail"));
}

template <typename Call>
int64_t NcclGroup::exchange(const char* operation, const Tensor& t, Call&& call) {
  watchdog_.check();
  check_dense(operation, t);
  if (t.device != device_)
    throw ShapeError(fmt::format("{}: the tensor is on cuda:{}, but {}", operation, t.device.index, who_));
  if (t.numel() == 0) return exchanges_;
  forked_.record(compute_);
  forked_.wait(stream_.get());
  check(call(t.data, static_cast<size_t>(t.numel()), type_of(t.dtype)), operation);
  return ++exchanges_;
}

void NcclGroup::join(int64_t exchange) {
  if (exchange <= joined_exchanges_) return;
  joined_exchanges_ = exchanges_;
  joined_.record(stream_.get());
  joined_.wait(compute_);
  if (!capturing(compute_)) watchdog_.watch(compute_);
}

void check_reduction(const char* operation, const Tensor& t, Reduce op) {
  check_reducible(operation, t);
  if (op == Reduce::max && t.dtype != DType::i32 && t.dtype != DType::i64)
    throw ShapeError(
        fmt::format("{}: on a GPU a maximum is of int32 or int64, not {}", operation, to_string(t)));
}

ncclRedOp_t operator_of(Reduce op) { return op == Reduce::sum ? ncclSum : ncclMax; }

std::unique_ptr<Request> NcclGroup::all_reduce_async(Tensor t, Reduce op) {
  if (!t.device.is_cuda()) return world_.all_reduce_async(t, op);
  check_reduction("all_reduce", t, op);
  return std::make_unique<GpuRequest>(*this, exchange("all_reduce", t, [&](void* data, size_t n, auto type) {
    return ncclAllReduce(data, data, n, type, operator_of(op), nccl_, handle(stream_.get()));
  }));
}

template <typename Call>
std::unique_ptr<Request> NcclGroup::exchange_stripes(const char* operation, const Tensor& t, Call&& call) {
  check_stripes(operation, t, size());
  const auto n = static_cast<size_t>(t.dim(2)), part = n * kernels::size_of(t.dtype);
  const auto all = [&](void* data, size_t, ncclDataType_t type) {
    ncclResult_t status = ncclGroupStart();
    for (int64_t s = 0; s < t.dim(0) && status == ncclSuccess; ++s) {
      char* stripe = static_cast<char*>(data) + static_cast<size_t>(s * size()) * part;
      status = call(stripe, stripe + static_cast<size_t>(rank()) * part, n, type);
    }
    const ncclResult_t end = ncclGroupEnd();
    return status == ncclSuccess ? end : status;
  };
  return std::make_unique<GpuRequest>(*this, exchange(operation, t, all));
}

std::unique_ptr<Request> NcclGroup::reduce_scatter_async(Tensor t, Reduce op) {
  if (!t.device.is_cuda()) return world_.reduce_scatter_async(t, op);
  check_reduction("reduce_scatter", t, op);
  return exchange_stripes("reduce_scatter", t, [&](void* stripe, void* mine, size_t n, ncclDataType_t type) {
    return ncclReduceScatter(stripe, mine, n, type, operator_of(op), nccl_, handle(stream_.get()));
  });
}

std::unique_ptr<Request> NcclGroup::all_gather_async(Tensor t) {
  if (!t.device.is_cuda()) return world_.all_gather_async(t);
  return exchange_stripes("all_gather", t, [&](void* stripe, void* mine, size_t n, ncclDataType_t type) {
    return ncclAllGather(mine, stripe, n, type, nccl_, handle(stream_.get()));
  });
}

void NcclGroup::all_reduce(Tensor t, Reduce op) {
  watchdog_.check();
  if (!t.device.is_cuda()) return world_.all_reduce(t, op);
  all_reduce_async(t, op)->wait();
}

void NcclGroup::broadcast(Tensor t, int root) {
  watchdog_.check();
  if (!t.device.is_cuda()) return world_.broadcast(t, root);
  check_root("broadcast", root, size());
  join(exchange("broadcast", t, [&](void* data, size_t n, auto type) {
    return ncclBroadcast(data, data, n, type, root, nccl_, handle(stream_.get()));
  }));
}

void NcclGroup::transfer(Tensor t, int from, int to) {
  watchdog_.check();
  if (!t.device.is_cuda()) return world_.transfer(t, from, to);
  check_root("transfer", from, size());
  check_root("transfer", to, size());
  if (from == to || (rank() != from && rank() != to)) return;
  join(exchange("transfer", t, [&](void* data, size_t n, auto type) {
    return rank() == from ? ncclSend(data, n, type, to, nccl_, handle(stream_.get()))
                          : ncclRecv(data, n, type, from, nccl_, handle(stream_.get()));
  }));
}

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& world, kernels::Device device,
                                                     kernels::Stream compute, std::chrono::seconds deadline) {
  return std::make_unique<NcclGroup>(world, device, compute, deadline);
}

}  // namespace comm
