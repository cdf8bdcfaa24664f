// A job in which something goes wrong: run under mpirun by session_test with the name of a scenario.
#include <fmt/format.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "comm/communicator.h"

namespace {

using comm::Reduce;
using kernels::DType;
using kernels::Tensor;

void reduce_floats(comm::Communicator& world, int64_t n) {
  std::vector<float> v(static_cast<size_t>(n), 1.0f);
  world.all_reduce(Tensor(v.data(), DType::f32, {n}), Reduce::sum);
}

void play(const std::string& scenario, comm::Communicator& world, const std::string& folder) {
  const bool odd_one = world.rank() == 1;
  const auto sleep = [] { std::this_thread::sleep_for(std::chrono::seconds(60)); };
  world.barrier();
  if (scenario == "error" && odd_one) throw kernels::DataError("the file is gone");
  if (scenario == "crash" && odd_one) std::_Exit(9);
  if (scenario == "late" && odd_one) sleep();
  if (scenario == "different" && odd_one) return (void)world.broadcast("text", 1);
  if (scenario == "sizes" && odd_one) return reduce_floats(world, 5001);
  if (scenario == "skipped" && odd_one) return world.barrier();
  if (scenario == "orphans") {
    // Open MPI itself notices a lost launcher after seconds; the kernel does at once.
    int signal = 0;
    if (::prctl(PR_GET_PDEATHSIG, &signal) != 0 || signal != SIGKILL)
      throw kernels::CommError("would outlive its launcher");
    std::ofstream(fmt::format("{}/{}.tmp", folder, world.rank())) << ::getpid();
    std::rename(fmt::format("{}/{}.tmp", folder, world.rank()).c_str(),
                fmt::format("{}/{}", folder, world.rank()).c_str());
    sleep();
  }
  reduce_floats(world, 5000);
  world.barrier();
}

int exit_code_of(const std::exception& error) {
  if (dynamic_cast<const comm::CommTimeout*>(&error)) return 70;
  return dynamic_cast<const kernels::DataError*>(&error) ? 74 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string scenario = argv[1], folder = argc > 2 ? argv[2] : "";
  const std::chrono::seconds deadline(scenario == "late" || scenario == "unwound late" ? 1 : 300);
  if (scenario.starts_with("unwound")) {
    // The session is destroyed on the way out of the exception, while the others wait.
    try {
      comm::Session session(&argc, &argv, deadline);
      play(scenario == "unwound late" ? "late" : "error", session.world(), folder);
    } catch (const std::exception&) {
    }
    return 0;
  }
  comm::Session session(&argc, &argv, deadline);
  try {
    play(scenario, session.world(), folder);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    session.abort(exit_code_of(error));
  }
}
