// Training attention through cuDNN's fused attention. A plan is built once per problem and device, at the
// first use (a rehearsal, as a rule: never while a graph is captured), and kept for the process.
#include <cudnn_frontend.h>
#include <fmt/format.h>

#include <cmath>
#include <map>
#include <memory>
#include <mutex>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/softmax_attention.h"

namespace kernels::cuda {

namespace {

namespace fe = cudnn_frontend;
using Attributes = std::shared_ptr<fe::graph::Tensor_attributes>;

// Names of a plan's tensors; a ragged tensor's offsets are kOffsets + its own.
enum Uid : int64_t { kQ, kK, kV, kO, kStats, kDout, kDq, kDk, kDv, kTensors, kLengthsQ, kLengthsK, kOffsets };

struct Problem {
  int device;
  DType dtype;
  bool backward, ragged, deterministic;
  int64_t rows, sequences, longest, heads, key_heads, width;
  std::array<int64_t, kTensors> strides;  // of one row; 0: absent
  auto operator<=>(const Problem&) const = default;
};

struct Plan {
  fe::graph::Graph graph;
  bool supported = false;
  int64_t workspace = 0;
};

std::array<const Tensor*, kTensors> tensors_of(const AttentionCall& c) {
  return {&c.q, &c.k, &c.v, &c.o, &c.log_sum, &c.dout, &c.dq, &c.dk, &c.dv};
}

Problem problem_of(const Context& ctx, const AttentionCall& c) {
  Problem p{.device = ctx.device.index,
            .dtype = c.q.dtype,
            .backward = c.backward(),
            .ragged = !c.by_sequence(),
            .deterministic = c.backward() && c.hints.deterministic,
            .rows = c.rows(),
            .sequences = c.sequences(),
            .longest = c.longest(),
            .heads = c.heads(),
            .key_heads = c.key_heads(),
            .width = c.width(),
            .strides = {}};
  const auto tensors = tensors_of(c);
  for (size_t i = 0; i < kTensors; ++i) p.strides[i] = tensors[i]->row_stride;
  return p;
}

// What no plan has to be tried for: other types and head sizes, single rows, rows that 16-byte loads do not
// reach, more heads of sequences than a grid takes. cuDNN 9.14 accepts a backward over wider heads than 128
// and leaves dk and dv unwritten behind the first 128 columns.
bool eligible(const AttentionCall& c) {
  if ((c.q.dtype != DType::f16 && c.q.dtype != DType::bf16) || c.width() % 8 != 0) return false;
  if (c.width() > 128) return false;
  if (c.rows() == 0 || c.sequences() == 0 || c.longest() < 2) return false;
  if (c.sequences() * c.heads() > 65535) return false;
  for (const Tensor* x : tensors_of(c)) {
    if (x == &c.log_sum || x->shape.rank() == 0) continue;
    if (reinterpret_cast<uintptr_t>(x->data) % 16 != 0 || x->row_stride % 8 != 0) return false;
  }
  return true;
}

// Makes the tensors of a plan.
struct Builder {
  const Problem& p;
  fe::graph::Graph& graph;

  Attributes table(const char* name, int64_t uid, int64_t count, fe::DataType_t type) {
    return graph.tensor(fe::graph::Tensor_attributes()
                            .set_name(name)
                            .set_uid(uid)
                            .set_dim({count, 1, 1, 1})
                            .set_stride({1, 1, 1, 1})
                            .set_data_type(type));
  }
  Attributes offsets(Uid uid) {
    return table("offsets", kOffsets + uid, p.sequences + 1, fe::DataType_t::INT64);
  }
  void describe(fe::graph::Tensor_attributes& x, const char* name, Uid uid, int64_t heads) {
    const int64_t stride = p.strides[uid];
    x.set_name(name)
        .set_uid(uid)
        .set_dim({p.sequences, heads, p.longest, p.width})
        .set_stride({p.longest * stride, p.width, stride, 1});
    if (p.ragged) x.set_ragged_offset(offsets(uid));
  }
  void describe_stats(fe::graph::Tensor_attributes& x) {
    const int64_t stride = p.strides[kStats];
    x.set_name("stats")
        .set_uid(kStats)
        .set_dim({p.sequences, p.heads, p.longest, 1})
        .set_data_type(fe::DataType_t::FLOAT);
    if (p.ragged) {
      x.set_stride({p.longest * stride, 1, stride, 1}).set_ragged_offset(offsets(kStats));
    } else {
      x.set_stride({p.heads * p.longest, p.longest, 1, 1});
    }
  }
  Attributes input(const char* name, Uid uid, int64_t heads) {
    fe::graph::Tensor_attributes x;
    describe(x, name, uid, heads);
    return graph.tensor(x);
  }
  template <typename Options>
  void set_options(Options& options) {
    options.set_attn_scale(1.0f / std::sqrt(static_cast<float>(p.width))).set_causal_mask(true);
    if (p.ragged)
      options.set_padding_mask(true)
          .set_seq_len_q(table("lengths q", kLengthsQ, p.sequences, fe::DataType_t::INT32))
          .set_seq_len_kv(table("lengths k", kLengthsK, p.sequences, fe::DataType_t::INT32));
  }

  void forward() {
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
    set_options(options);
    const auto q = input("q", kQ, p.heads), k = input("k", kK, p.key_heads), v = input("v", kV, p.key_heads);
    auto [o, stats] = graph.sdpa(q, k, v, options);
    describe(o->set_output(true), "o", kO, p.heads);
    describe_stats(stats->set_output(true));
  }
  void backward() {
    auto options = fe::graph::SDPA_backward_attributes()
                       .set_name("attention backward")
                       .set_deterministic_algorithm(p.deterministic);
    set_options(options);
    if (p.ragged) options.set_max_total_seq_len_q(p.rows).set_max_total_seq_len_kv(p.rows);
    const auto q = input("q", kQ, p.heads), k = input("k", kK, p.key_heads), v = input("v", kV, p.key_heads),
               o = input("o", kO, p.heads), dout = input("dout", kDout, p.heads);
    fe::graph::Tensor_attributes stats;
    describe_stats(stats);
    auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, o, dout, graph.tensor(stats), options);
    describe(dq->set_output(true), "dq", kDq, p.heads);
    describe(dk->set_output(true), "dk", kDk, p.key_heads);
    describe(dv->set_output(true), "dv", kDv, p.key_heads);
  }
};

void describe_problem(const Problem& p, fe::graph::Graph& graph) {
  graph.set_io_data_type(p.dtype == DType::f16 ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  Builder builder{p, graph};
  p.backward ? builder.backward() : builder.forward();
}

void check(cudnnStatus_t status, const char* what) {
  if (status != CUDNN_STATUS_SUCCESS)
    throw DeviceError(fmt::format("{}: {}", what, cudnnGetErrorString(status)));
}

// One handle per device; used under the lock that guards the plans.
cudnnHandle_t handle_of(int device) {
  static std::map<int, cudnnHandle_t> handles;
  auto& handle = handles[device];
  if (!handle) {
    use_device(device);
    check(cudnnCreate(&handle), "starting cuDNN");
  }
  return handle;
}

std::mutex plans_lock;

const Plan& plan_of(const Problem& p) {
  static std::map<Problem, std::unique_ptr<Plan>> plans;
  auto& plan = plans[p];
  if (!plan) {
    plan = std::make_unique<Plan>();
    describe_problem(p, plan->graph);
    plan->supported = plan->graph.build(handle_of(p.device), {fe::HeurMode_t::A}).is_good() &&
                      plan->graph.get_workspace_size(plan->workspace).is_good();
  }
  return *plan;
}

// Addresses by uid. The tables of a ragged problem are made in scratch memory, in front of the workspace.
std::unordered_map<int64_t, void*> addresses(const Context& ctx, const Problem& p, const AttentionCall& c) {
  std::unordered_map<int64_t, void*> at;
  RaggedTables tables{nullptr, nullptr};
  if (p.ragged) {
    tables.lengths = ctx.scratch->allocate("sequence lengths", DType::i32, {p.sequences}).as<int32_t>();
    tables.offsets =
        ctx.scratch->allocate("sequence offsets", DType::i64, {int64_t{kTensors} * (p.sequences + 1)})
            .as<int64_t>();
    at[kLengthsQ] = at[kLengthsK] = tables.lengths;
  }
  const auto tensors = tensors_of(c);
  for (int64_t i = 0; i < kTensors; ++i) {
    const auto uid = static_cast<size_t>(i);
    if (tensors[uid]->shape.rank() == 0) continue;
    at[i] = tensors[uid]->data;
    if (!p.ragged) continue;
    at[kOffsets + i] = tables.offsets + tables.tables * (p.sequences + 1);
    tables.strides[static_cast<size_t>(tables.tables++)] = p.strides[uid];
  }
  if (p.ragged && !ctx.rehearsal) {
    if (p.backward) {
      tables.cleared = {c.dq, c.dk, c.dv};
    } else {
      tables.cleared = {c.o, c.log_sum, Tensor{}};
    }
    make_ragged_tables(ctx, c.cu_seqlens, p.rows, tables);
  }
  return at;
}

// A batch rehearsed for the most sequences it can have may turn out to be uniform: that plan is made, and its
// memory asked for, as well.
void rehearse_uniform(const Context& ctx, const AttentionCall& call) {
  const int64_t longest = call.hints.longest;
  if (!ctx.rehearsal || call.hints.uniform || longest == 0 || call.rows() % longest != 0) return;
  AttentionCall uniform = call;
  uniform.hints.uniform = true;
  uniform.cu_seqlens.shape = {call.rows() / longest + 1};
  if (uniform.by_sequence()) cudnn_attention(ctx, uniform);
}

}  // namespace

bool cudnn_attention(const Context& ctx, const AttentionCall& call) {
  if (!eligible(call) || device_count() == 0) return false;
  rehearse_uniform(ctx, call);
  const std::lock_guard lock(plans_lock);
  const Problem problem = problem_of(ctx, call);
  const Plan& plan = plan_of(problem);
  if (!plan.supported) return false;
  ArenaScope scope(*ctx.scratch);
  auto at = addresses(ctx, problem, call);
  void* workspace = ctx.scratch->allocate("cuDNN workspace", DType::u8, {plan.workspace}).data;
  if (ctx.rehearsal) return true;
  const cudnnHandle_t handle = handle_of(problem.device);
  check(cudnnSetStream(handle, stream_of(ctx)), "softmax_attention");
  auto status = plan.graph.execute(handle, at, workspace);
  if (!status.is_good()) throw DeviceError("softmax_attention: cuDNN: " + status.get_message());
  return true;
}

}  // namespace kernels::cuda
