#pragma once
// Ranks with one GPU each, over NCCL. Defined only in builds with CUDA; callers stand behind kCudaEnabled.
#include <chrono>
#include <memory>

#include "comm/communicator.h"

namespace comm {

// Tensors on `device` travel over NCCL, on a stream of its own that is ordered against `compute` by events;
// host tensors and barriers go through `world`, which must outlive it. Called by all ranks, each with another
// GPU. Sums run in one order for a given machine and number of ranks; every rank gets the same bits. A
// maximum on a GPU is of integers only.
//
// A thread watches: when an exchange fails, or watched work is not done within the deadline, it aborts NCCL,
// which lets the host's waits return, and the next call or poll() throws CommTimeout. A host that does not
// come back to either is ended with exit code 70. The environment's NCCL settings stay as they are.
//
// Destroy graphs that hold its calls first: NCCL waits for them for ever. Destroyed by an exception it aborts
// instead of waiting for its peers.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& world, kernels::Device device,
                                                     kernels::Stream compute, std::chrono::seconds deadline);

}  // namespace comm
