// Run under mpirun with any number of ranks: every collective against a serial computation, and equal bits on
// every rank. Prints what differs and returns 1.
#include <cstring>
#include <limits>

#include "comm/gradient_reducer.h"
#include "tests/comm/rank_values.h"

namespace {

using comm::Communicator;
using comm::Reduce;
using kernels::Tensor;
using ranks::expect;
using ranks::failures;
using ranks::layers;
using ranks::owned;
using ranks::reduced;
using ranks::striped;
using ranks::values_of;

template <typename T>
Tensor view(std::vector<T>& v) {
  return Tensor(v.data(), kernels::dtype_of<T>(), {static_cast<int64_t>(v.size())});
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

constexpr int64_t kSizes[] = {0, 1, 2, 3, 5, 7, 511, 1023, 1024, 1025, 4097, 100003, 300007};

template <typename T>
void test_all_reduce(Communicator& world) {
  uint32_t seed = 1;
  for (int64_t n : kSizes)
    for (Reduce op : {Reduce::sum, Reduce::max}) {
      const std::string what = fmt::format("all_reduce of {} {} op {}", n, name_of(kernels::dtype_of<T>()),
                                           op == Reduce::sum ? "sum" : "max");
      const std::vector<T> right = reduced<T>(world.size(), n, ++seed, op);
      std::vector<T> blocking = values_of<T>(world.rank(), n, seed), overlapped = blocking;
      world.all_reduce(view(blocking), op);
      expect(same_bits(blocking, right), what);
      auto request = world.all_reduce_async(view(overlapped), op);
      while (!request->test()) {
      }
      request->wait();
      expect(same_bits(overlapped, right), what + ", async");
    }
}

void test_more_than_one_piece(Communicator& world) {
  const int64_t n = (int64_t{32} << 20) / 4 + 12345;
  std::vector<float> v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<float>(i % 1000 + world.rank());
  world.all_reduce(view(v), Reduce::sum);
  const int ranks = world.size();
  bool same = true;
  for (int64_t i = 0; i < n; ++i)
    same =
        same && v[static_cast<size_t>(i)] == static_cast<float>(i % 1000 * ranks + ranks * (ranks - 1) / 2);
  expect(same, "all_reduce of 32 MiB and more");
}

void test_nan(Communicator& world) {
  std::vector<float> v{1.0f, -2.0f};
  if (world.rank() == world.size() - 1) v[1] = std::numeric_limits<float>::quiet_NaN();
  world.all_reduce(view(v), Reduce::max);
  expect(v[0] == 1.0f && std::isnan(v[1]), "a NaN on one rank is the maximum on all");
}

void test_broadcast(Communicator& world) {
  for (int root = 0; root < world.size(); ++root)
    for (int64_t n : kSizes) {
      std::vector<int32_t> v = values_of<int32_t>(world.rank(), n, 7);
      world.broadcast(view(v), root);
      expect(same_bits(v, values_of<int32_t>(root, n, 7)), fmt::format("broadcast of {} from {}", n, root));
    }
  const std::string text = "tokens \xe2\x9c\x93 of rank 0";
  expect(world.broadcast(world.rank() == 0 ? text : "other", 0) == text, "broadcast of text");
  expect(world.broadcast(world.rank() == 0 ? "" : "other", 0).empty(), "broadcast of empty text");
  expect(world.all_reduce(int64_t{1} << 40, Reduce::sum) == (int64_t{1} << 40) * world.size(),
         "sum of int64");
  expect(world.all_reduce(0.5 * world.rank(), Reduce::max) == 0.5 * (world.size() - 1), "maximum of doubles");
  world.barrier();
}

// Requests that are waited for in another order on each rank, with a blocking call in between.
void test_requests_in_any_order(Communicator& world) {
  constexpr size_t kCount = 4, kElements = 20011;
  std::vector<std::vector<float>> v;
  for (size_t i = 0; i < kCount; ++i) v.push_back(values_of<float>(world.rank(), kElements, 40 + i));
  std::vector<std::unique_ptr<comm::Request>> requests;
  for (auto& x : v) requests.push_back(world.all_reduce_async(view(x), Reduce::sum));
  for (size_t i = 0; i < kCount; ++i) {
    if (static_cast<int>(i) == world.rank()) world.barrier();
    requests[(i + static_cast<size_t>(world.rank())) % kCount]->wait();
  }
  for (size_t i = static_cast<size_t>(world.rank()); i >= kCount; --i) world.barrier();
  for (size_t i = 0; i < kCount; ++i)
    expect(same_bits(v[i], reduced<float>(world.size(), kElements, 40 + i, Reduce::sum)),
           fmt::format("request {} among several", i));
}

// More than tags tell apart, of one shape; each rank gets them done in an order of its own.
void test_many_in_flight(Communicator& world) {
  constexpr size_t kCount = 700, kElements = 5000;
  std::vector<std::vector<float>> v;
  for (size_t i = 0; i < kCount; ++i) v.emplace_back(kElements, static_cast<float>(i));
  std::vector<std::unique_ptr<comm::Request>> requests;
  for (auto& x : v) requests.push_back(world.all_reduce_async(view(x), Reduce::sum));
  for (size_t i = 0; i < kCount; ++i)
    requests[(i * 13 + 100 * static_cast<size_t>(world.rank())) % kCount]->wait();
  size_t wrong = 0;
  for (size_t i = 0; i < kCount; ++i)
    wrong += v[i] != std::vector<float>(kElements, static_cast<float>(i) * static_cast<float>(world.size()));
  expect(wrong == 0, fmt::format("{} of {} reductions in flight", kCount - wrong, kCount));
}

void test_stripes(Communicator& world) {
  const int size = world.size(), rank = world.rank();
  for (int64_t stripes : {1, 3})
    for (int64_t n : kSizes) {
      const std::string what = fmt::format("{} stripes of {}", stripes, n);
      std::vector<float> v = values_of<float>(rank, stripes * size * n, 21);
      world.reduce_scatter_async(striped(view(v), size, n), Reduce::sum)->wait();
      expect(same_bits(owned(v, rank, size, n),
                       owned(reduced<float>(size, stripes * size * n, 21, Reduce::sum), rank, size, n)),
             "reduce_scatter of " + what);
      const std::vector<double> right = values_of<double>(0, stripes * size * n, 9);
      std::vector<double> all = right;
      for (size_t i = 0; i < all.size(); ++i)
        if (static_cast<int64_t>(i) / n % size != rank) all[i] = std::numeric_limits<double>::quiet_NaN();
      world.all_gather_async(striped(view(all), size, n))->wait();
      expect(same_bits(all, right), "all_gather of " + what);
    }
  // More than is moved at once.
  const int64_t n = (int64_t{20} << 20) / 4 / size;
  const std::vector<int32_t> right = values_of<int32_t>(0, 3 * size * n, 11);
  std::vector<int32_t> all = right;
  for (size_t i = 0; i < all.size(); ++i)
    if (static_cast<int64_t>(i) / n % size != rank) all[i] = -1;
  world.all_gather_async(striped(view(all), size, n))->wait();
  expect(same_bits(all, right), "all_gather of 60 MiB");
}

void test_transfer(Communicator& world) {
  for (int root = 0; root < world.size(); ++root)
    for (int64_t n : kSizes) {
      const int from = (root + 1) % world.size();
      std::vector<double> t = values_of<double>(world.rank(), n, 22);
      world.transfer(view(t), from, root);
      expect(same_bits(t, values_of<double>(world.rank() == root ? from : world.rank(), n, 22)),
             fmt::format("transfer of {} from {} to {}", n, from, root));
    }
}

// Every rank ends with the sums of its own parts, also where the last stripe is padded.
void test_sharded_gradients(Communicator& world) {
  constexpr int64_t kParameters = 40009;
  const int size = world.size(), rank = world.rank();
  for (int64_t part : {64, 1000, 40009}) {
    const int64_t padded = (kParameters + size * part - 1) / (size * part) * size * part;
    std::vector<float> gradients = values_of<float>(rank, padded, 70);
    auto parts = layers(kParameters, 6007);
    std::iter_swap(parts.end() - 1, parts.end() - 2);
    comm::GradientReducer reducer(world, view(gradients), parts, {.bytes = 8000, .stripe = size * part});
    for (const auto& range : parts) {
      reducer.ready(range);
      reducer.progress();
    }
    reducer.finish();
    expect(same_bits(owned(gradients, rank, size, part),
                     owned(reduced<float>(size, padded, 70, Reduce::sum), rank, size, part)),
           fmt::format("gradients in parts of {}", part));
  }
}

void test_gradient_reducer(Communicator& world) {
  constexpr int64_t kParameters = 40009;
  std::vector<float> gradients;
  for (size_t bucket_bytes : {size_t{801}, size_t{4000}, size_t{65536}, size_t{1} << 20}) {
    gradients.assign(kParameters, std::numeric_limits<float>::quiet_NaN());
    // The layers' bounds are not the buckets'.
    const auto parts = layers(kParameters, 6007);
    comm::GradientReducer reducer(world, view(gradients), parts, {.bytes = bucket_bytes});
    for (uint32_t step = 0; step < 2; ++step) {
      const std::vector<float> mine = values_of<float>(world.rank(), kParameters, 60 + step);
      for (const auto& [begin, end] : parts) {
        std::copy(mine.begin() + begin, mine.begin() + end, gradients.begin() + begin);
        reducer.ready({begin, end});
        reducer.progress();
      }
      reducer.finish();
      expect(same_bits(gradients, reduced<float>(world.size(), kParameters, 60 + step, Reduce::sum)),
             fmt::format("gradients in buckets of {} bytes, step {}", bucket_bytes, step));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  comm::Session session(&argc, &argv, std::chrono::seconds(60));
  Communicator& world = session.world();
  try {
    test_all_reduce<float>(world);
    test_all_reduce<double>(world);
    test_all_reduce<int32_t>(world);
    test_all_reduce<int64_t>(world);
    test_more_than_one_piece(world);
    test_nan(world);
    test_broadcast(world);
    test_many_in_flight(world);
    test_stripes(world);
    test_requests_in_any_order(world);
    test_gradient_reducer(world);
    test_transfer(world);
    test_sharded_gradients(world);
    expect(session.local_size() == world.size() && session.local_rank() == world.rank(),
           "ranks of this host");
    return world.all_reduce(int64_t{failures}, Reduce::max) == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    fmt::print(stderr, "FAILED: {}\n", error.what());
    session.abort(1);
  }
}
