// A job whose ranks exchange GPU memory: run under mpirun by nccl_cuda_test with the name of a scenario.
// "compare" holds every collective against a serial computation and prints what differs.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "comm/gradient_reducer.h"
#include "comm/nccl.h"
#include "kernels/core/stream.h"
#include "tests/comm/rank_values.h"

namespace {

using comm::Communicator;
using comm::Reduce;
using kernels::Device;
using kernels::Tensor;
using ranks::expect;
using ranks::failures;
using ranks::layers;
using ranks::owned;
using ranks::reduced;
using ranks::striped;
using ranks::values_of;

// Device memory with values that reach it in the order of a stream.
template <typename T>
class OnGpu {
 public:
  OnGpu(Device device, kernels::Stream stream, std::vector<T> values)
      : device_(device),
        stream_(stream),
        bytes_(values.size() * sizeof(T)),
        pinned_(device, std::max<size_t>(bytes_, 1)),
        data_(kernels::allocate_bytes(device, std::max<size_t>(bytes_, 1))) {
    std::memcpy(pinned_.data(), values.data(), bytes_);
    upload();
  }
  ~OnGpu() { kernels::free_bytes(device_, data_); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  void upload() { kernels::copy_async(data_, pinned_.data(), bytes_, device_, stream_); }
  Tensor tensor() const {
    return Tensor(data_, kernels::dtype_of<T>(), {static_cast<int64_t>(bytes_ / sizeof(T))}, device_);
  }
  // In the stream's order, like everything that uses a result.
  std::vector<T> read() const {
    kernels::PinnedBuffer landing(device_, std::max<size_t>(bytes_, 1));
    kernels::copy_async(landing.data(), data_, bytes_, device_, stream_);
    kernels::synchronize(device_, stream_);
    std::vector<T> v(bytes_ / sizeof(T));
    std::memcpy(v.data(), landing.data(), bytes_);
    return v;
  }

 private:
  Device device_;
  kernels::Stream stream_;
  size_t bytes_;
  kernels::PinnedBuffer pinned_;
  void* data_;
};

struct Job {
  Communicator& world;  // host memory
  Communicator& ranks;
  Device device;
  kernels::Stream stream;
};

// A sum of two has one result, so up to two ranks the bits are those of the serial computation; with more,
// each of the n - 1 additions may round by half a unit, 2^-24 of the largest sum on the way.
template <typename T>
bool agrees(const std::vector<T>& given, const std::vector<T>& right, int ranks) {
  if (given.size() != right.size()) return false;
  double largest = 0;
  for (const T x : right) largest = std::max(largest, std::abs(static_cast<double>(x)));
  const double allowed = ranks <= 2 || std::is_integral_v<T> ? 0 : ranks * std::ldexp(ranks * largest, -24);
  for (size_t i = 0; i < given.size(); ++i)
    if (!(std::abs(static_cast<double>(given[i]) - static_cast<double>(right[i])) <= allowed)) return false;
  return true;
}

constexpr int64_t kSizes[] = {0, 1, 3, 1023, 4097, 300007};

template <typename T>
void compare_reductions(const Job& job) {
  const int size = job.ranks.size();
  uint32_t seed = 1;
  for (const int64_t n : kSizes)
    for (const Reduce op : {Reduce::sum, Reduce::max}) {
      if (op == Reduce::max && !std::is_integral_v<T>) continue;
      const std::string what = fmt::format("{} {}", n, name_of(kernels::dtype_of<T>()));
      const auto right = reduced<T>(size, n, ++seed, op);
      OnGpu<T> t(job.device, job.stream, values_of<T>(job.ranks.rank(), n, seed));
      job.ranks.all_reduce(t.tensor(), op);
      expect(agrees(t.read(), right, size), "all_reduce of " + what);
      const int rank = job.ranks.rank();
      const auto scattered = owned(reduced<T>(size, 5 * size * n, seed, op), rank, size, n);
      OnGpu<T> stripes(job.device, job.stream, values_of<T>(rank, 5 * size * n, seed));
      job.ranks.reduce_scatter_async(striped(stripes.tensor(), size, n), op)->wait();
      expect(agrees(owned(stripes.read(), rank, size, n), scattered, size), "reduce_scatter of " + what);
    }
}

void compare_moves(const Job& job) {
  const int size = job.ranks.size(), rank = job.ranks.rank();
  for (int root = 0; root < size; ++root) {
    OnGpu<double> b(job.device, job.stream, values_of<double>(rank, 4097, 5));
    job.ranks.broadcast(b.tensor(), root);
    expect(b.read() == values_of<double>(root, 4097, 5), fmt::format("broadcast from {}", root));
    const int from = (root + 1) % size;
    OnGpu<float> t(job.device, job.stream, values_of<float>(rank, 4097, 6));
    job.ranks.transfer(t.tensor(), from, root);
    expect(t.read() == values_of<float>(rank == root ? from : rank, 4097, 6),
           fmt::format("transfer from {} to {}", from, root));
  }
  // fp16 weights, each rank's parts in place.
  constexpr int64_t kPart = 5000, kStripes = 7;
  const auto right = [](int64_t i) { return static_cast<float>(i / kPart + i % 100); };
  std::vector<kernels::f16> weights;
  for (int64_t i = 0; i < kStripes * size * kPart; ++i)
    weights.push_back(kernels::f16(i / kPart % size == rank ? right(i) : -1.0f));
  OnGpu<kernels::f16> all(job.device, job.stream, weights);
  job.ranks.all_gather_async(striped(all.tensor(), size, kPart))->wait();
  bool same = true;
  const auto gathered = all.read();
  for (size_t i = 0; i < gathered.size(); ++i)
    same = same && static_cast<float>(gathered[i]) == right(static_cast<int64_t>(i));
  expect(same, "all_gather of fp16 in place");
  expect(job.ranks.all_reduce(int64_t{rank == 0}, Reduce::sum) == 1, "host values go through the host");
}

// Values arrive, buckets are reduced behind them, everything is read in the order of the compute stream:
// eager, then recorded and launched again and again.
// piece: of a rank in a stripe; 0: every rank gets all sums.
void compare_buckets(const Job& job, int64_t piece) {
  const int size = job.ranks.size(), rank = job.ranks.rank();
  const int64_t stripe = piece * size, grain = std::max<int64_t>(stripe, 1);
  const int64_t parameters = ((1 << 20) + grain - 1) / grain * grain;
  OnGpu<float> gradients(job.device, job.stream, values_of<float>(rank, parameters, 60));
  auto parts = layers(parameters, 60007);
  std::iter_swap(parts.end() - 1, parts.end() - 2);
  comm::GradientReducer reducer(job.ranks, gradients.tensor(), parts,
                                {.bytes = 200000, .stripe = stripe, .joined = true});
  const auto step = [&] {
    gradients.upload();
    for (const auto& part : parts) {
      reducer.ready(part);
      reducer.progress();
    }
    reducer.finish();
  };
  const auto right = reduced<float>(size, parameters, 60, Reduce::sum);
  const auto part = [&](const std::vector<float>& v) { return piece > 0 ? owned(v, rank, size, piece) : v; };
  step();
  expect(agrees(part(gradients.read()), part(right), size), fmt::format("buckets, pieces of {}", piece));
  kernels::Graph graph;
  kernels::Graph::begin(job.stream);
  step();
  graph.end(job.stream);
  kernels::synchronize(job.device, job.stream);
  const auto before = kernels::device_counters().synchronizations.load();
  for (int i = 0; i < 5; ++i) {
    graph.launch(job.stream);
    job.ranks.watch();
  }
  expect(kernels::device_counters().synchronizations == before, "the host does not wait");
  expect(agrees(part(gradients.read()), part(right), size),
         fmt::format("recorded buckets, pieces of {}", piece));
}

void refuse(const Job& job) {
  const auto refused = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const kernels::ShapeError&) {
      return true;
    }
    return false;
  };
  OnGpu<float> t(job.device, job.stream, {1.0f, 2.0f});
  expect(refused([&] { job.ranks.all_reduce(t.tensor(), Reduce::max); }), "a maximum of floats is refused");
  expect(refused([&] { job.world.all_reduce(t.tensor(), Reduce::sum); }) || job.world.size() == 1,
         "MPI refuses GPU memory");
}

int compare(const Job& job) {
  compare_reductions<float>(job);
  compare_reductions<double>(job);
  compare_reductions<int32_t>(job);
  compare_reductions<int64_t>(job);
  compare_moves(job);
  compare_buckets(job, 0);
  compare_buckets(job, 4096);
  compare_buckets(job, 100000);
  refuse(job);
  return static_cast<int>(job.world.all_reduce(int64_t{failures > 0}, Reduce::max));
}

// One rank stays away; the others wait for it as a training step does.
int wait_for_the_missing(const Job& job, const std::string& scenario) {
  OnGpu<float> t(job.device, job.stream, std::vector<float>(1000, 1.0f));
  job.ranks.all_reduce(t.tensor(), Reduce::sum);
  t.read();
  job.world.barrier();
  if (job.world.rank() == 1) {
    if (scenario == "dead") std::_Exit(9);
    std::this_thread::sleep_for(std::chrono::seconds(300));
  }
  kernels::Event landed(job.device);
  job.ranks.all_reduce(t.tensor(), Reduce::sum);
  landed.record(job.stream);
  if (scenario == "late_blocked") kernels::synchronize(job.device, job.stream);
  while (!landed.done()) job.ranks.poll();
  job.ranks.poll();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string scenario = argv[1];
  const std::chrono::seconds deadline(scenario.starts_with("late") ? 10 : 60);
  comm::Session session(&argc, &argv, std::chrono::seconds(200));
  try {
    const Device device{Device::Kind::cuda, session.local_rank()};
    kernels::use_device(device);
    kernels::OwnedStream stream(device);
    const auto ranks = comm::make_nccl_communicator(session.world(), device, stream.get(), deadline);
    const Job job{session.world(), *ranks, device, stream.get()};
    return scenario == "compare" ? compare(job) : wait_for_the_missing(job, scenario);
  } catch (const comm::CommTimeout& error) {
    fmt::print(stderr, "{}\n", error.what());
    session.abort(70);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    session.abort(1);
  }
}
