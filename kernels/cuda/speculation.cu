// One cluster of blocks reads a row of numbers, or decides about a sequence. The drafts of a step lie in the
// host's memory, which is read while the kernels ahead still run.
#include <cmath>
#include <limits>

#include "kernels/cuda/device/row_share.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"
#include "kernels/ops/sampling.h"
#include "kernels/ops/speculation.h"

namespace kernels::cuda {

namespace {

constexpr int kMost = static_cast<int>(kMaxDecodeRows);
constexpr int kAhead = 8;           // numbers of a row that a thread asks for at once
constexpr int64_t kWideRow = 4096;  // shorter rows take one block

// fn(i, x, y) for a lane's numbers of its warp's share of a row and of another one, which may be null.
template <typename Fn>
__device__ __forceinline__ void over_share(const RowShare& share, const float* x, const float* y,
                                           const Fn& fn) {
  for (int first = share.begin + share.lane(); first < share.end; first += kAhead * 32) {
    float of_x[kAhead], of_y[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool inside = first + j * 32 < share.end;
      of_x[j] = inside ? x[first + j * 32] : 0;
      of_y[j] = inside && y != nullptr ? y[first + j * 32] : 0;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (first + j * 32 < share.end) fn(first + j * 32, of_x[j], of_y[j]);
  }
}

struct DrawCall {
  const float *x, *u;
  int32_t* tokens;
  int64_t x_stride, u_stride, tokens_stride;
  int columns, count;
};

__global__ void __launch_bounds__(kShareThreads, 2) draw_kernel(const DrawCall a) {
  __shared__ WarpNumbers numbers;
  __shared__ int drawn[kMost];
  __shared__ float u[kMost];
  const int64_t row = blockIdx.x / cluster_size();
  RowShare share(numbers, a.columns);
  if (static_cast<int>(threadIdx.x) < a.count) u[threadIdx.x] = a.u[row * a.u_stride + threadIdx.x];
  let_next_start();
  wait_for_previous();
  const float* x = a.x + row * a.x_stride;
  float mine = 0;
  over_share(share, x, nullptr, [&](int, float value, float) { mine += fmaxf(value, 0); });
  mine = warp_reduce<Sum>(mine);
  __syncthreads();
  for (int r = 0; r < a.count; ++r) {
    const auto left = [&](int i) {
      float value = fmaxf(x[i], 0);
      for (int before = 0; before < r; ++before)
        if (drawn[before] == i) value = 0;
      return value;
    };
    const int token = share.find(mine, u[r], left);
    if (share.first_thread()) a.tokens[row * a.tokens_stride + r] = token;
    if (r + 1 == a.count) break;
    // Threads of other warps may still compare with the ones before: this one is nobody's yet.
    if (threadIdx.x == 0) drawn[r] = token;
    __syncthreads();
    if (token < 0 || !share.holds(token)) continue;
    mine = 0;
    for (int i = share.begin + share.lane(); i < share.end; i += 32) mine += i == token ? 0 : left(i);
    mine = warp_reduce<Sum>(mine);
  }
  cluster_leave();
}

// The rows of one sequence.
struct Tree {
  int first, count, parents[kMost], tokens[kMost];
  // All threads; a barrier has to follow.
  __device__ void load(const int32_t* first_row, const int32_t* all_parents, const int32_t* all_tokens,
                       int sequence) {
    const int begin = first_row[sequence], i = static_cast<int>(threadIdx.x);
    if (i == 0) first = begin, count = first_row[sequence + 1] - begin;
    if (i < first_row[sequence + 1] - begin) {
      parents[i] = all_parents[begin + i];
      tokens[i] = all_tokens[begin + i];
    }
  }
};

struct RejectionCall {
  const int32_t *first_row, *parents, *tokens;
  const float *accept, *next;
  const int64_t* q;
  const float* p;
  float* left;
  int32_t* accepted;
  int64_t p_stride, left_stride, accepted_stride;
  int columns;
};

// Numbers that add up to 1, when they are multiplied by a scale.
struct Distribution {
  const float* x;
  float scale;
  __device__ __forceinline__ float at(int i) const { return __ldcg(x + i) * scale; }
};

class Rejection {
 public:
  struct Shared {
    WarpNumbers numbers;
    Tree tree;
    float accept[kMost], next[kMost];
    const float* q[kMost];
  };

  __device__ Rejection(const RejectionCall& a, int sequence, Shared& shared)
      : shared_(shared),
        share_(shared.numbers, a.columns),
        left_p_(a.left + 2 * sequence * a.left_stride),
        left_q_(left_p_ + a.left_stride) {}

  // The first accepted child of a node, or -1; p is left as the distribution the next token is drawn from.
  // The same in every thread of the cluster.
  __device__ int accept_child(int node, Distribution& p) {
    Distribution q{nullptr, 1};
    for (int child = node + 1; child < shared_.tree.count; ++child) {
      if (shared_.tree.parents[child] != node) continue;
      const int token = shared_.tree.tokens[child];
      if (q.x == nullptr || shared_.q[child] == nullptr) q = {shared_.q[child], 1};
      const float proposal = q.x == nullptr ? 1.0f : q.at(token);
      if (shared_.accept[child] * proposal < p.at(token)) return child;
      if (!reject(p, q, token)) return child;
    }
    return -1;
  }

  __device__ int draw(const Distribution& p, float u) {
    float mine = 0;
    over_share(share_, p.x, nullptr, [&](int, float value, float) { mine += fmaxf(value, 0); });
    return share_.find(warp_reduce<Sum>(mine), u, [&](int i) { return fmaxf(p.x[i], 0); });
  }

  __device__ __forceinline__ bool first_thread() const { return share_.first_thread(); }

 private:
  // p becomes what is left of the target after `token` was rejected, and q what is left of it. False when
  // rounding alone rejected it: p and q are equal, nothing is left, and the token stands.
  __device__ bool reject(Distribution& p, Distribution& q, int token) {
    cluster_sync();  // nobody looks at what earlier rejections left any more
    float2 sums{0, 0};
    over_share(share_, p.x, q.x, [&](int i, float of_p, float of_q) {
      const bool drawn = i == token;
      of_p *= p.scale;
      of_q *= q.scale;
      const float left = q.x == nullptr ? (drawn ? 0 : of_p) : fmaxf(of_p - of_q, 0);
      left_p_[i] = left;
      sums.x += left;
      if (q.x == nullptr) return;
      left_q_[i] = drawn ? 0 : of_q;
      sums.y += drawn ? 0 : of_q;
    });
    sums = share_.sum(sums);
    p = {left_p_, sums.x > 0 ? 1 / sums.x : 1};
    if (q.x != nullptr) q = {left_q_, sums.y > 0 ? 1 / sums.y : 1};
    return sums.x > 0;
  }

  Shared& shared_;
  RowShare share_;
  float *left_p_, *left_q_;
};

__global__ void __launch_bounds__(kShareThreads, 2) rejection_kernel(const RejectionCall a) {
  __shared__ Rejection::Shared shared;
  const int sequence = static_cast<int>(blockIdx.x / cluster_size()), i = static_cast<int>(threadIdx.x);
  shared.tree.load(a.first_row, a.parents, a.tokens, sequence);
  __syncthreads();
  const int first = shared.tree.first, count = shared.tree.count;
  if (i < count) {
    shared.accept[i] = a.accept[first + i];
    shared.next[i] = a.next[first + i];
    shared.q[i] = reinterpret_cast<const float*>(a.q[first + i]);
  }
  __syncthreads();
  let_next_start();
  wait_for_previous();
  if (count == 0) return;
  Rejection rejection(a, sequence, shared);
  Distribution p{};
  int node = -1;
  for (int child = 0; child >= 0;) {
    node = child;
    p = {a.p + (first + node) * a.p_stride, 1};
    child = rejection.accept_child(node, p);
  }
  const int token = rejection.draw(p, shared.next[node]);
  if (rejection.first_thread()) {
    a.accepted[sequence * a.accepted_stride] = node;
    a.accepted[sequence * a.accepted_stride + 1] = max(token, 0);
  }
  cluster_leave();
}

// H = E[l_max - l] - log p_max with l = logits / temperature: nothing cancels.
__global__ void __launch_bounds__(kShareThreads, 2)
    entropy_kernel(const float* logits, int64_t logits_stride, const float* p, int64_t p_stride, int columns,
                   float scale, const int32_t* likeliest, float* entropies) {
  __shared__ WarpNumbers numbers;
  const int64_t row = blockIdx.x / cluster_size();
  RowShare share(numbers, columns);
  let_next_start();
  wait_for_previous();
  const float *of_p = p + row * p_stride, *of_logits = logits + row * logits_stride;
  const float largest = of_logits[likeliest[row]];
  float mean = 0;
  over_share(share, of_p, of_logits, [&](int, float probability, float logit) {
    if (probability > 0) mean += probability * (largest - logit);
  });
  mean = share.sum({mean, 0}).x;
  if (share.first_thread()) entropies[row] = mean * scale - logf(of_p[likeliest[row]]);
  cluster_leave();
}

struct TypicalCall {
  const int32_t *first_row, *parents, *tokens, *likeliest;
  const float *p, *entropies;
  int32_t* accepted;
  int64_t p_stride, accepted_stride;
  double epsilon, delta;
};

// The likelihood of each draft that its parent's distribution allows, then the longest path of such drafts.
__global__ void __launch_bounds__(kMost) typical_kernel(const TypicalCall a) {
  constexpr double kRejected = -std::numeric_limits<double>::infinity();
  __shared__ Tree tree;
  __shared__ double score[kMost];
  __shared__ int depth[kMost];
  const int node = static_cast<int>(threadIdx.x), sequence = static_cast<int>(blockIdx.x);
  tree.load(a.first_row, a.parents, a.tokens, sequence);
  __syncthreads();
  let_next_start();
  wait_for_previous();
  score[node] = kRejected;
  if (node > 0 && node < tree.count) {
    const int64_t parent = tree.first + tree.parents[node];
    const double probability = a.p[parent * a.p_stride + tree.tokens[node]];
    const bool accept =
        probability > 0 &&
        (probability > a.epsilon || probability > a.delta * exp(-static_cast<double>(a.entropies[parent])));
    if (accept) score[node] = log(probability);
  }
  __syncthreads();
  if (node != 0 || tree.count == 0) return;
  int best = 0;
  score[0] = depth[0] = 0;
  for (int child = 1; child < tree.count; ++child) {
    const int parent = tree.parents[child];
    score[child] += score[parent];
    depth[child] = depth[parent] + 1;
    if (score[child] == kRejected) continue;
    if (depth[child] > depth[best] || (depth[child] == depth[best] && score[child] > score[best]))
      best = child;
  }
  a.accepted[sequence * a.accepted_stride] = best;
  a.accepted[sequence * a.accepted_stride + 1] = a.likeliest[tree.first + best];
}

// One cluster for each of `count` rows of `columns` numbers.
LaunchShape cluster_each(int64_t count, int64_t columns) {
  const unsigned cluster = columns >= kWideRow && has_clusters() ? kShareBlocks : 1;
  return {.grid = dim3(static_cast<unsigned>(count) * cluster),
          .block = dim3(kShareThreads),
          .cluster = cluster,
          .dependent = true};
}

}  // namespace

void draw(const Context& ctx, const Tensor& x, const Tensor& u, Tensor tokens) {
  if (x.rows() == 0 || tokens.cols() == 0) return;
  const DrawCall call{
      x.as<float>(), u.as<float>(),     tokens.as<int32_t>(),       x.row_stride,
      u.row_stride,  tokens.row_stride, static_cast<int>(x.cols()), static_cast<int>(tokens.cols())};
  launch(ctx, "draw", cluster_each(x.rows(), x.cols()), draw_kernel, call);
}

void accept_rejection(const Context& ctx, const DraftRows& rows, const Tensor& p, const Tensor& left,
                      Tensor accepted) {
  const RejectionCall call{.first_row = rows.first_row.as<int32_t>(),
                           .parents = rows.parents.as<int32_t>(),
                           .tokens = rows.tokens.as<int32_t>(),
                           .accept = rows.accept.as<float>(),
                           .next = rows.next.as<float>(),
                           .q = rows.q.as<int64_t>(),
                           .p = p.as<float>(),
                           .left = left.as<float>(),
                           .accepted = accepted.as<int32_t>(),
                           .p_stride = p.row_stride,
                           .left_stride = left.row_stride,
                           .accepted_stride = accepted.row_stride,
                           .columns = static_cast<int>(p.cols())};
  launch(ctx, "accept_rejection", cluster_each(accepted.rows(), p.cols()), rejection_kernel, call);
}

void accept_typical(const Context& ctx, const DraftRows& rows, const Tensor& logits, const Tensor& p,
                    const TypicalRule& rule, const Tensor& likeliest, const Tensor& entropies,
                    Tensor accepted) {
  cuda::argmax(ctx, p, likeliest);
  launch(ctx, "accept_typical", cluster_each(p.rows(), p.cols()), entropy_kernel, logits.as<float>(),
         logits.row_stride, p.as<float>(), p.row_stride, static_cast<int>(p.cols()),
         static_cast<float>(1 / rule.temperature), likeliest.as<int32_t>(), entropies.as<float>());
  const TypicalCall call{.first_row = rows.first_row.as<int32_t>(),
                         .parents = rows.parents.as<int32_t>(),
                         .tokens = rows.tokens.as<int32_t>(),
                         .likeliest = likeliest.as<int32_t>(),
                         .p = p.as<float>(),
                         .entropies = entropies.as<float>(),
                         .accepted = accepted.as<int32_t>(),
                         .p_stride = p.row_stride,
                         .accepted_stride = accepted.row_stride,
                         .epsilon = rule.epsilon,
                         .delta = rule.delta};
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(accepted.rows())),
                          .block = dim3(static_cast<unsigned>(kMost)),
                          .dependent = true};
  launch(ctx, "accept_typical", shape, typical_kernel, call);
}

}  // namespace kernels::cuda
