#include "launch/job.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <new>
#include <thread>

#include "kernels/core/cores.h"
#include "kernels/core/error.h"
#include "kernels/core/parallel.h"

namespace launch {
namespace {

void print_problem(const std::exception_ptr& problem, const std::string& who) {
  std::fflush(stdout);
  fmt::print(stderr, "foretell: {}{}\n", who, one_line(problem));
}

}  // namespace

int exit_code_of(const std::exception_ptr& problem) {
  try {
    std::rethrow_exception(problem);
  } catch (const kernels::ConfigError&) {
    return 2;
  } catch (const comm::CommTimeout&) {
    return 70;
  } catch (const kernels::DataError&) {
    return 74;
  } catch (const kernels::CheckpointError&) {
    return 74;
  } catch (const std::filesystem::filesystem_error&) {
    return 74;
  } catch (...) {
    return 1;
  }
}

std::string one_line(const std::exception_ptr& problem) {
  std::string text = "an unknown error";
  try {
    std::rethrow_exception(problem);
  } catch (const std::bad_alloc&) {
    text = "not enough memory; use a smaller model, train.micro_batch or model.context";
  } catch (const std::filesystem::filesystem_error& error) {
    text = fmt::format("{}: {}; check its permissions and the free space", error.path1().string(),
                       error.code().message());
  } catch (const std::exception& error) {
    text = error.what();
  } catch (...) {
  }
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

comm::Session& Job::join(std::chrono::seconds deadline, const std::exception_ptr& problem) {
  session_.emplace(argc_, argv_, deadline);
  comm::Communicator& world = session_->world();
  const int64_t size = world.size(), rank = world.rank();
  const int64_t first = size - world.all_reduce(problem ? size - rank : int64_t{0}, comm::Reduce::max);
  if (first == size) return *session_;
  const int64_t code = world.all_reduce(int64_t{problem ? exit_code_of(problem) : 0}, comm::Reduce::max);
  if (rank == first) print_problem(problem, first == 0 ? "" : fmt::format("rank {}: ", rank));
  throw Refused{static_cast<int>(code)};
}

comm::Session& Job::join_alone(const std::string& command) {
  comm::Session& session = join();
  if (session.world().size() == 1) return session;
  session.world().barrier();
  if (session.world().rank() == 0)
    fmt::print(stderr, "foretell: `foretell {}` runs in one process; start it without mpirun\n", command);
  throw Refused{2};
}

int Job::fail(const std::exception_ptr& problem) {
  const int code = exit_code_of(problem);
  // The others end this rank with SIGTERM; it must not be taken for a request to save.
  std::signal(SIGTERM, SIG_DFL);
  if (!joined() || session_->world().size() == 1) {
    print_problem(problem, "");
    return code;
  }
  // What every rank finds wrong is said once: the first rank to speak ends the others.
  const int rank = session_->world().rank();
  std::this_thread::sleep_for(
      std::min(std::chrono::milliseconds(500) * rank, std::chrono::milliseconds(5000)));
  // What went wrong between ranks says itself on which.
  const std::string who = fmt::format("rank {}", rank);
  print_problem(problem, one_line(problem).starts_with(who) ? "" : who + ": ");
  session_->abort(code);
}

namespace {

int choose_threads(const comm::Session& session, bool speaks, int64_t wanted) {
  const int cores = kernels::available_cores();
  const int on_machine = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const int threads = wanted > 0 ? static_cast<int>(wanted) : std::max(1, cores / session.local_size());
  if (!speaks) return threads;
  if (kernels::allowed_cores() == 1 && on_machine > 1 && session.local_size() > 1)
    fmt::print(stderr, "warning: mpirun bound each rank to one of {} cores; start it with --bind-to none\n",
               on_machine);
  else if (threads * session.local_size() > cores)
    fmt::print(stderr,
               "warning: {} ranks with {} threads each share {} cores; lower train.threads or the ranks\n",
               session.local_size(), threads, cores);
  return threads;
}

// Whether this rank has a GPU; with "auto", whether all have. ConfigError when one is demanded in vain.
bool choose_gpu(comm::Session& session, bool speaks, const std::string& device) {
  if (device == "cpu") return false;
  const std::string problem = kernels::cuda_problem();
  const int count = problem.empty() ? kernels::cuda_device_count() : 0, ranks = session.local_size();
  if (device == "auto") {
    const bool lacking = session.world().all_reduce(int64_t{count < ranks}, comm::Reduce::max) != 0;
    if (lacking && count > 0 && speaks)
      fmt::print(
          stderr,
          "warning: {} ranks on this host and {} GPU{}, so all compute on CPU cores; start as many ranks "
          "as GPUs\n",
          ranks, count, count == 1 ? "" : "s");
    return !lacking;
  }
  if (!problem.empty())
    throw kernels::ConfigError(
        fmt::format("train.device = cuda, but {}; or use train.device = cpu", problem));
  if (count < ranks)
    throw kernels::ConfigError(fmt::format(
        "train.device = cuda, but this host has {} ranks and {} GPU{}; start at most {} rank{} on it", ranks,
        count, count == 1 ? "" : "s", count, count == 1 ? "" : "s"));
  return true;
}

}  // namespace

Placement place(comm::Session& session, bool speaks, const std::string& device, int64_t threads) {
  Placement placement;
  if (choose_gpu(session, speaks, device)) {
    placement.ctx.device = {kernels::Device::Kind::cuda, session.local_rank()};
    kernels::use_device(placement.ctx.device);
  }
  kernels::set_threads(choose_threads(session, speaks, threads));
  placement.stream = std::make_unique<kernels::OwnedStream>(placement.ctx.device);
  placement.ctx.stream = placement.stream->get();
  return placement;
}

}  // namespace launch
