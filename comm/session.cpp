// The C interface only: the old C++ one needs a library that is not linked.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <fmt/format.h>
#include <mpi.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "comm/mpi.h"

namespace comm {
namespace {

bool set(const char* name) { return std::getenv(name) != nullptr; }

bool launched() {
  if (set("OMPI_COMM_WORLD_SIZE") || set("PMIX_RANK")) return true;
  if (!set("SLURM_PROCID")) return false;
  if (set("PMI_RANK") || set("PMI_FD")) return true;
  const char* tasks = std::getenv("SLURM_STEP_NUM_TASKS");
  if (tasks && std::atoi(tasks) > 1)
    throw kernels::ConfigError(fmt::format(
        "srun started {} tasks that cannot find each other; use srun --mpi=pmix or mpirun", tasks));
  return false;
}

int exit_code_of(mpi::Health health) { return health == mpi::Health::timed_out ? 70 : 1; }

mpi::MpiGroup& group(Communicator& world) { return static_cast<mpi::MpiGroup&>(world); }

}  // namespace

Session::Session(int* argc, char*** argv, std::chrono::seconds deadline)
    : exceptions_(std::uncaught_exceptions()) {
  if (!launched()) {
    world_ = make_local_communicator();
    return;
  }
  // A rank whose launcher was killed would wait for its peers for ever.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  int provided = MPI_THREAD_SINGLE;
  mpi::check(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
  mpi_ = true;
  mpi::check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  if (provided < MPI_THREAD_FUNNELED)
    throw kernels::CommError("this MPI does not support threads; install Open MPI 4.1 or newer");
  world_ = mpi::make_world(deadline);
  MPI_Comm host;
  mpi::check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host),
             "MPI_Comm_split_type");
  mpi::check(MPI_Comm_rank(host, &local_rank_), "MPI_Comm_rank");
  mpi::check(MPI_Comm_size(host, &local_size_), "MPI_Comm_size");
  mpi::check(MPI_Comm_free(&host), "MPI_Comm_free");
}

Session::~Session() {
  if (!mpi_) return;
  if (std::uncaught_exceptions() > exceptions_) abort(exit_code_of(group(*world_).health()));
  try {
    // MPI_Finalize waits without a deadline.
    world_->barrier();
  } catch (const kernels::CommError& error) {
    fmt::print(stderr, "{}\n", error.what());
    abort(exit_code_of(group(*world_).health()));
  }
  world_.reset();
  MPI_Finalize();
}

void Session::abort(int exit_code) {
  std::fflush(nullptr);
  if (mpi_) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace comm
