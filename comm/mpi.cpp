// The C interface only: the old C++ one needs a library that is not linked.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include "comm/mpi.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mpi.h>
#include <sched.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <limits>
#include <set>
#include <thread>
#include <utility>

#include "comm/checks.h"
#include "comm/ordered_reduce.h"

namespace comm::mpi {
namespace {

using Clock = std::chrono::steady_clock;
using kernels::CommError;

// One collective call, the same on every rank. Its messages carry it in their tag: phase, the low bits of
// the sequence number, a hash of everything else. The 23 bits fit every transport of Open MPI (UCX has the
// fewest).
struct Call {
  const char* name;
  Tensor tensor;
  int detail = 0;  // the reduction, the root, the cut
  int64_t sequence = 0;
  int hash = 0;

  static constexpr int kHashBits = 14, kSequenceBits = 8;
  int tag(int phase) const {
    const int low = static_cast<int>(sequence & ((1 << kSequenceBits) - 1));
    return (phase << (kSequenceBits + kHashBits)) | (low << kHashBits) | hash;
  }
  bool contradicts(int other) const {
    const int low_bits = (1 << (kSequenceBits + kHashBits)) - 1;
    return ((other & low_bits) >> kHashBits) == ((tag(0) & low_bits) >> kHashBits) &&
           (other & ((1 << kHashBits) - 1)) != hash;
  }
  std::string describe() const {
    return fmt::format("{} of {} (call {})", name, to_string(tensor), sequence);
  }
};

// Messages on their way; request i is one to or from rank peers[i].
struct Transfers {
  std::vector<MPI_Request> requests;
  std::vector<int> peers;
  std::vector<bool> receives;
  MPI_Request* add(int peer, bool receive) {
    peers.push_back(peer);
    receives.push_back(receive);
    return &requests.emplace_back(MPI_REQUEST_NULL);
  }
  void clear() {
    requests.clear();
    peers.clear();
    receives.clear();
  }
};

// The elements of a tensor that one rank owns: `count` times `length` of them, `stride` apart, from `first`
// on.
struct Share {
  int64_t first = 0, length = 0, stride = 0, count = 1;
  int64_t numel() const { return count * length; }
};
// Part `rank` of every stripe of t (stripes, size, n).
Share part_of_stripes(const Tensor& t, int rank) {
  return {rank * t.dim(2), t.dim(2), t.dim(1) * t.dim(2), t.dim(0)};
}

// What is sent or received at once: bytes, or a share of a tensor.
class Message {
 public:
  Message(const void* data, size_t bytes) : data_(const_cast<void*>(data)), count_(static_cast<int>(bytes)) {}
  Message(const Tensor& t, const Share& share) {
    const auto element = static_cast<int64_t>(kernels::size_of(t.dtype));
    const auto bytes = [&](int64_t n) { return static_cast<int>(n * element); };
    data_ = static_cast<char*>(t.data) + share.first * element;
    count_ = bytes(share.length);
    if (share.count == 1) return;
    check(MPI_Type_vector(static_cast<int>(share.count), count_, bytes(share.stride), MPI_BYTE, &type_),
          "MPI_Type_vector");
    check(MPI_Type_commit(&type_), "MPI_Type_commit");
    count_ = 1;
  }
  ~Message() {
    if (type_ != MPI_BYTE) MPI_Type_free(&type_);  // MPI keeps what a transfer needs of it
  }
  Message(const Message&) = delete;
  Message& operator=(const Message&) = delete;
  void* data() const { return data_; }
  int count() const { return count_; }
  MPI_Datatype type() const { return type_; }

 private:
  void* data_;
  int count_;
  MPI_Datatype type_ = MPI_BYTE;
};

class Reduction;

class World final : public MpiGroup {
 public:
  explicit World(std::chrono::milliseconds deadline);
  ~World() override;
  Health health() const override { return health_; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void all_reduce(Tensor t, Reduce op) override;
  std::unique_ptr<Request> all_reduce_async(Tensor t, Reduce op) override;
  std::unique_ptr<Request> reduce_scatter_async(Tensor t, Reduce op) override;
  void broadcast(Tensor t, int root) override;
  void transfer(Tensor t, int from, int to) override;
  std::unique_ptr<Request> all_gather_async(Tensor t) override;
  void barrier() override;

  void send(Transfers& to, const Call& call, int phase, const Message& message, int rank);
  void receive(Transfers& to, const Call& call, int phase, const Message& message, int rank);
  bool complete(Transfers& transfers);
  // Returns when done() is true; meanwhile every reduction in flight moves on, so that peers that wait for
  // one of those are served.
  template <typename Done>
  void wait_until(Done done, const Call& call, Transfers& transfers);
  void wait(const Call& call, Transfers& transfers);

  std::vector<Reduction*> active;
  std::vector<std::vector<std::byte>> spare_staging;

 private:
  Call begin(const char* name, const Tensor& tensor, int detail);
  void checked(int code, const char* call);
  void check_peers(const Call& call, const Transfers& transfers);
  [[noreturn]] void time_out(const Call& call, Transfers& transfers);
  [[noreturn]] void fail(Health health, const std::string& message);

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
  std::chrono::milliseconds deadline_;
  int64_t sequence_ = 0;
  Health health_ = Health::good;
};

// Phase 0 brings every rank's values of share r to rank r, which sums in rank order; phase 1 brings the sums
// to everybody. Small tensors skip phase 1: every rank owns everything. So do stripes: each rank keeps what
// it owns.
class Reduction final : public Request {
 public:
  // t: of any shape, or striped: (stripes, size, n).
  Reduction(World& world, const Call& call, Reduce op, bool striped);
  ~Reduction() override;
  bool test() override;
  void wait() override;
  void step();

 private:
  static constexpr size_t kSmall = 4096;
  bool direct() const { return !striped_ && t_.bytes() <= kSmall; }
  bool spreads() const { return !striped_ && !direct(); }  // has a phase 1
  bool is_next() const;
  Share share(int rank) const;
  char* at(int64_t element) const { return static_cast<char*>(t_.data) + element * element_size_; }
  void exchange();
  void sum();
  void spread();

  World& world_;
  Call call_;
  Tensor t_;
  Reduce op_;
  bool striped_;
  int64_t element_size_;
  int phase_ = 0;  // 2: done
  bool summed_ = false;
  Transfers transfers_;
  std::vector<std::byte> staging_;
};

World::World(std::chrono::milliseconds deadline) : deadline_(deadline) {
  checked(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup");
  checked(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  checked(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
  checked(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
  int* largest_tag = nullptr;
  int found = 0;
  checked(MPI_Comm_get_attr(comm_, MPI_TAG_UB, &largest_tag, &found), "MPI_Comm_get_attr");
  constexpr int kTagBits = 1 + Call::kSequenceBits + Call::kHashBits;
  if (!found || *largest_tag < (1 << kTagBits) - 1)
    throw CommError("this MPI offers too few message tags; use Open MPI 4.1 or newer");
}

World::~World() {
  if (health_ == Health::good) MPI_Comm_free(&comm_);
}

void World::fail(Health health, const std::string& message) {
  health_ = health;
  if (health == Health::timed_out) throw CommTimeout(message);
  throw CommError(message);
}

void World::checked(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  health_ = Health::failed;
  check(code, call);
}

Call World::begin(const char* name, const Tensor& tensor, int detail) {
  if (health_ != Health::good)
    throw CommError(fmt::format("{}: an earlier exchange between the ranks failed; restart the job", name));
  Call call{.name = name, .tensor = tensor, .detail = detail, .sequence = sequence_++};
  const std::array<int64_t, 3> what{static_cast<int64_t>(tensor.dtype), tensor.numel(), detail};
  const uint64_t hash = XXH3_64bits_withSeed(what.data(), sizeof(what), XXH3_64bits(name, std::strlen(name)));
  call.hash = static_cast<int>(hash & ((1 << Call::kHashBits) - 1));
  return call;
}

void World::send(Transfers& to, const Call& call, int phase, const Message& message, int rank) {
  checked(MPI_Isend(message.data(), message.count(), message.type(), rank, call.tag(phase), comm_,
                    to.add(rank, false)),
          "MPI_Isend");
}

void World::receive(Transfers& to, const Call& call, int phase, const Message& message, int rank) {
  checked(MPI_Irecv(message.data(), message.count(), message.type(), rank, call.tag(phase), comm_,
                    to.add(rank, true)),
          "MPI_Irecv");
}

bool World::complete(Transfers& transfers) {
  int done = 0;
  checked(MPI_Testall(static_cast<int>(transfers.requests.size()), transfers.requests.data(), &done,
                      MPI_STATUSES_IGNORE),
          "MPI_Testall");
  return done != 0;
}

template <typename Done>
void World::wait_until(Done done, const Call& call, Transfers& transfers) {
  constexpr auto kSpin = std::chrono::milliseconds(1), kShort = std::chrono::milliseconds(100);
  constexpr auto kPeerCheck = std::chrono::milliseconds(200);
  const auto start = Clock::now();
  auto next_check = start + kPeerCheck;
  for (;;) {
    for (size_t i = 0; i < active.size(); ++i) active[i]->step();
    if (done()) return;
    const auto now = Clock::now();
    if (now - start > deadline_) time_out(call, transfers);
    if (now > next_check) {
      check_peers(call, transfers);
      next_check = now + kPeerCheck;
    }
    if (now - start < kSpin) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(now - start < kShort ? 20 : 200));
    }
  }
}

void World::wait(const Call& call, Transfers& transfers) {
  wait_until([&] { return complete(transfers); }, call, transfers);
  transfers.clear();
}

// Messages of one sender match in the order they were sent: one that nobody receives and that carries this
// call's number was sent by a rank that took another path.
void World::check_peers(const Call& call, const Transfers& transfers) {
  for (size_t i = 0; i < transfers.peers.size(); ++i) {
    const int source = transfers.peers[i];
    if (!transfers.receives[i]) continue;
    int found = 0;
    MPI_Status status;
    checked(MPI_Iprobe(source, MPI_ANY_TAG, comm_, &found, &status), "MPI_Iprobe");
    if (found && call.contradicts(status.MPI_TAG))
      fail(Health::failed,
           fmt::format("rank {} runs {}, but rank {} runs another operation; start every rank with "
                       "the same program, configuration and data",
                       rank_, call.describe(), source));
  }
}

void World::time_out(const Call& call, Transfers& transfers) {
  std::set<int> late;
  for (size_t i = 0; i < transfers.requests.size(); ++i) {
    int done = 0;
    MPI_Test(&transfers.requests[i], &done, MPI_STATUS_IGNORE);
    if (!done) late.insert(transfers.peers[i]);
  }
  const std::string who = late.empty() ? "" : fmt::format(", waiting for rank {}", fmt::join(late, ", "));
  fail(Health::timed_out,
       fmt::format("rank {}: {} did not finish within {} s{}; see whether that rank or its host hangs, then "
                   "restart the job with --resume auto",
                   rank_, call.describe(), static_cast<double>(deadline_.count()) / 1000.0, who));
}

Reduction::Reduction(World& world, const Call& call, Reduce op, bool striped)
    : world_(world),
      call_(call),
      t_(call.tensor),
      op_(op),
      striped_(striped),
      element_size_(static_cast<int64_t>(kernels::size_of(t_.dtype))) {
  exchange();
  world_.active.push_back(this);
}

Reduction::~Reduction() {
  try {
    if (world_.health() == Health::good) wait();
  } catch (const CommError&) {
  }
  std::erase(world_.active, this);
  world_.spare_staging.push_back(std::move(staging_));
}

Share Reduction::share(int rank) const {
  if (striped_) return part_of_stripes(t_, rank);
  if (direct()) return {.length = t_.numel()};
  const int64_t first = t_.numel() * rank / world_.size();
  return {.first = first, .length = t_.numel() * (rank + 1) / world_.size() - first};
}

void Reduction::exchange() {
  if (!world_.spare_staging.empty()) {
    staging_ = std::move(world_.spare_staging.back());
    world_.spare_staging.pop_back();
  }
  const size_t mine = static_cast<size_t>(share(world_.rank()).numel() * element_size_);
  const size_t needed = mine * static_cast<size_t>(world_.size());
  if (staging_.size() < needed) staging_.resize(needed);
  for (int r = 0; r < world_.size(); ++r)
    if (r != world_.rank())
      world_.receive(transfers_, call_, 0, {staging_.data() + mine * static_cast<size_t>(r), mine}, r);
  for (int r = 0; r < world_.size(); ++r)
    if (r != world_.rank()) world_.send(transfers_, call_, 0, {t_, share(r)}, r);
}

void Reduction::sum() {
  const Share own = share(world_.rank());
  for (int64_t i = 0; i < own.count; ++i) {
    char* sums = at(own.first + i * own.stride);
    std::vector<const void*> parts;
    for (int r = 0; r < world_.size(); ++r) {
      const std::byte* received = staging_.data() + (r * own.numel() + i * own.length) * element_size_;
      parts.push_back(r == world_.rank() ? static_cast<const void*>(sums) : received);
    }
    ordered_reduce(t_.dtype, op_, parts, sums, own.length);
  }
}

void Reduction::spread() {
  for (int r = 0; r < world_.size(); ++r) {
    if (r == world_.rank()) continue;
    world_.receive(transfers_, call_, 1, {t_, share(r)}, r);
    world_.send(transfers_, call_, 1, {t_, share(world_.rank())}, r);
  }
}

// Tags tell 256 calls apart. Among more of one shape in flight messages match by their order, which is that
// of the calls in phase 0; so it has to be in phase 1.
bool Reduction::is_next() const {
  return std::none_of(world_.active.begin(), std::find(world_.active.begin(), world_.active.end(), this),
                      [](const Reduction* older) { return older->spreads() && older->phase_ == 0; });
}

void Reduction::step() {
  if (phase_ == 2 || !world_.complete(transfers_)) return;
  transfers_.clear();
  if (phase_ == 0 && !std::exchange(summed_, true)) sum();
  if (phase_ == 0 && spreads()) {
    if (!is_next()) return;
    phase_ = 1;
    spread();
  } else {
    phase_ = 2;
  }
}

// Older ones may have to go first.
bool Reduction::test() {
  for (size_t i = 0; i < world_.active.size() && phase_ != 2; ++i) world_.active[i]->step();
  return phase_ == 2;
}

void Reduction::wait() {
  if (phase_ != 2) world_.wait_until([&] { return phase_ == 2; }, call_, transfers_);
}

// bytes: of the largest message's extent.
void check_amount(const char* operation, const Tensor& t, size_t bytes) {
  check_host_dense(operation, t);
  check_reducible(operation, t);
  if (bytes > static_cast<size_t>(std::numeric_limits<int>::max()))
    throw kernels::ShapeError(
        fmt::format("{}: {} is too much at once; reduce it in buckets below 2 GiB", operation, to_string(t)));
}

std::unique_ptr<Request> World::all_reduce_async(Tensor t, Reduce op) {
  check_amount("all_reduce", t, t.bytes());
  return std::make_unique<Reduction>(*this, begin("all_reduce", t, static_cast<int>(op)), op, false);
}

std::unique_ptr<Request> World::reduce_scatter_async(Tensor t, Reduce op) {
  check_stripes("reduce_scatter", t, size_);
  // One part of one stripe lies in one piece, several lie apart.
  check_amount("reduce_scatter", t, t.dim(0) == 1 ? t.bytes() / static_cast<size_t>(size_) : t.bytes());
  const int detail = 2 * static_cast<int>(t.dim(0)) + static_cast<int>(op);
  return std::make_unique<Reduction>(*this, begin("reduce_scatter", t, detail), op, true);
}

// What is moved at once: staging stays small, and counts fit an int.
constexpr int64_t kPieceBytes = int64_t{32} << 20;

// Calls fn(piece) for consecutive ranges of a dense tensor.
template <typename Fn>
void for_pieces(const Tensor& t, Fn fn) {
  const auto element = static_cast<int64_t>(kernels::size_of(t.dtype));
  const int64_t step = kPieceBytes / element;
  for (int64_t i = 0; i < t.numel(); i += step)
    fn(Tensor(static_cast<char*>(t.data) + i * element, t.dtype, {std::min(step, t.numel() - i)}));
}

void World::all_reduce(Tensor t, Reduce op) {
  check_host_dense("all_reduce", t);
  check_reducible("all_reduce", t);
  for_pieces(t, [&](const Tensor& piece) { all_reduce_async(piece, op)->wait(); });
}

// A binomial tree: with ranks counted from the root, a rank's parent is itself without its lowest set bit.
void World::broadcast(Tensor t, int root) {
  check_host_dense("broadcast", t);
  check_root("broadcast", root, size_);
  const int self = (rank_ - root + size_) % size_;
  const auto rank_of = [&](int v) { return (v + root) % size_; };
  const int lowest = self == 0 ? size_ : self & -self;
  for_pieces(t, [&](const Tensor& piece) {
    const Call call = begin("broadcast", piece, root);
    Transfers transfers;
    if (self != 0) {
      receive(transfers, call, 0, {piece.data, piece.bytes()}, rank_of(self & (self - 1)));
      wait(call, transfers);
    }
    for (int bit = 1; bit < lowest && self + bit < size_; bit *= 2)
      send(transfers, call, 0, {piece.data, piece.bytes()}, rank_of(self + bit));
    wait(call, transfers);
  });
}

void World::transfer(Tensor t, int from, int to) {
  check_host_dense("transfer", t);
  check_root("transfer", from, size_);
  check_root("transfer", to, size_);
  for_pieces(t, [&](const Tensor& piece) {
    const Call call = begin("transfer", piece, from * size_ + to);
    Transfers transfers;
    if (from != to && rank_ == to) receive(transfers, call, 0, {piece.data, piece.bytes()}, from);
    if (from != to && rank_ == from) send(transfers, call, 0, {piece.data, piece.bytes()}, to);
    wait(call, transfers);
  });
}

// Done when it returns.
std::unique_ptr<Request> World::all_gather_async(Tensor t) {
  check_host_dense("all_gather", t);
  check_stripes("all_gather", t, size_);
  const auto stripe = static_cast<int64_t>(static_cast<size_t>(t.cols()) * kernels::size_of(t.dtype));
  const int64_t step = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(stripe, 1));
  for (int64_t s = 0; s < t.dim(0); s += step) {
    const Tensor stripes = t.slice(s, std::min(step, t.dim(0) - s));
    const Call call = begin("all_gather", stripes, static_cast<int>(stripes.dim(0)));
    Transfers transfers;
    for (int r = 0; r < size_; ++r) {
      if (r == rank_) continue;
      receive(transfers, call, 0, {stripes, part_of_stripes(stripes, r)}, r);
      send(transfers, call, 0, {stripes, part_of_stripes(stripes, rank_)}, r);
    }
    wait(call, transfers);
  }
  return std::make_unique<DoneRequest>();
}

void World::barrier() {
  const Call call = begin("barrier", Tensor(), 0);
  Transfers transfers;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    receive(transfers, call, 0, {nullptr, 0}, r);
    send(transfers, call, 0, {nullptr, 0}, r);
  }
  wait(call, transfers);
}

}  // namespace

void check(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw CommError(fmt::format("{} failed: {}; restart the job", call, text));
}

std::unique_ptr<MpiGroup> make_world(std::chrono::milliseconds deadline) {
  return std::make_unique<World>(deadline);
}

}  // namespace comm::mpi
