#include "kernels/cuda/gemm.h"

#include <cublasLt.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "kernels/core/stream.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kCandidates = 24;

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw DeviceError(fmt::format("{}: cuBLASLt: {}", what, cublasLtGetStatusString(status)));
}

cudaDataType_t data_type(DType t) {
  switch (t) {
    case DType::f16:
      return CUDA_R_16F;
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f32:
      return CUDA_R_32F;
    default:
      throw ShapeError("on a GPU a tensor of fp16, bf16 or fp32 is required");
  }
}

template <typename Handle, cublasStatus_t (*destroy)(Handle)>
struct Destroy {
  using pointer = Handle;
  void operator()(Handle handle) const { destroy(handle); }
};
using Description =
    std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t,
                               Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t,
                                   Destroy<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

template <typename T>
void set(const Description& d, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulDescSetAttribute(d.get(), attribute, &value, sizeof value),
             "describing a product");
}
template <typename T>
void set(const Preference& p, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulPreferenceSetAttribute(p.get(), attribute, &value, sizeof value),
             "describing a product");
}

// What decides which kernels can compute a product, and how fast each is.
using Key = std::array<int64_t, 18>;

// How a pointer is aligned, up to the widest access.
int64_t alignment(const Tensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.data);
  return address == 0 ? 0 : static_cast<int64_t>(std::min<uintptr_t>(address & (~address + 1), 16));
}

Key key_of(const Product& p) {
  return {p.a.rows(),
          p.a.cols(),
          p.b.rows(),
          p.b.cols(),
          p.a.row_stride,
          p.b.row_stride,
          p.c.row_stride,
          p.aux.row_stride,
          alignment(p.a),
          alignment(p.b),
          alignment(p.c),
          alignment(p.aux),
          alignment(p.bias),
          p.addend.row_stride,
          alignment(p.addend),
          static_cast<int64_t>(p.a.dtype),
          static_cast<int64_t>(p.c.dtype),
          p.transposed_a * 1 + p.transposed_b * 2 + p.accumulate * 4 + static_cast<int64_t>(p.epilogue) * 8};
}

// Ours are rows, the library's are columns: a row-major matrix is its transpose, and c^T = op(b)^T op(a)^T.
Layout layout_of(const Tensor& t) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_blas(cublasLtMatrixLayoutCreate(&layout, data_type(t.dtype), static_cast<uint64_t>(t.cols()),
                                        static_cast<uint64_t>(t.rows()), std::max(t.row_stride, t.cols())),
             "describing a matrix");
  return Layout(layout);
}

cublasLtEpilogue_t epilogue_of(const Product& p) {
  switch (p.epilogue) {
    case Epilogue::bias:
      return CUBLASLT_EPILOGUE_BIAS;
    case Epilogue::gelu:
      if (p.aux) return p.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
      return p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case Epilogue::gelu_gradient:
      return CUBLASLT_EPILOGUE_DGELU;
    case Epilogue::column_sums:
      return CUBLASLT_EPILOGUE_BGRADB;  // our a is the library's b
    default:
      return CUBLASLT_EPILOGUE_DEFAULT;
  }
}

Description describe(const Product& p) {
  cublasLtMatmulDesc_t handle = nullptr;
  check_blas(cublasLtMatmulDescCreate(&handle, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product");
  Description d(handle);
  set(d, CUBLASLT_MATMUL_DESC_TRANSA, p.transposed_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(d, CUBLASLT_MATMUL_DESC_TRANSB, p.transposed_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(d, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p));
  if (p.bias) set(d, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(data_type(p.bias.dtype)));
  if (p.aux) set(d, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.aux.row_stride);
  return d;
}

// The addresses that the description carries; the others are arguments of the call.
void set_pointers(const Description& d, const Product& p) {
  if (p.bias) set(d, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(p.bias.data));
  if (p.aux) set(d, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux.data);
}

// A product as the library knows it; without an algorithm when the library has none.
struct Plan {
  Description description;
  Layout a, b, c, addend;
  std::optional<cublasLtMatmulAlgo_t> algorithm;
  std::optional<float> milliseconds;  // of the algorithm, where it was measured
};

// The state of one device. It lives as long as the process: when static objects are destroyed, the driver may
// be gone already.
class Products {
 public:
  explicit Products(int index) {
    use_device(index);
    check_blas(cublasLtCreate(&handle_), "starting cuBLASLt");
    const size_t bytes = product_workspace_bytes({Device::Kind::cuda, index});
    workspace_bytes_ = bytes - kColumnSums * sizeof(float);
    workspace_ = allocate_bytes(index, bytes);
  }

  float* column_sums() const {
    return reinterpret_cast<float*>(static_cast<char*>(workspace_) + workspace_bytes_);
  }

  std::optional<float> milliseconds(const Context& ctx, const Product& p) {
    const std::lock_guard lock(mutex_);
    return plan_of(ctx, p).milliseconds;
  }

  bool multiply(const Context& ctx, const Product& p) {
    const std::lock_guard lock(mutex_);
    const Plan& plan = plan_of(ctx, p);
    if (!plan.algorithm) {
      if (p.epilogue == Epilogue::none && !p.addend)
        throw DeviceError("cuBLASLt has no kernel for this matrix product");
      return false;
    }
    set_pointers(plan.description, p);
    check_blas(run(ctx, p, plan, *plan.algorithm, p.c.data), "a matrix product");
    return true;
  }

 private:
  const Plan& plan_of(const Context& ctx, const Product& p) {
    auto found = plans_.find(key_of(p));
    if (found == plans_.end()) found = plans_.emplace(key_of(p), make_plan(ctx, p)).first;
    return found->second;
  }

  Plan make_plan(const Context& ctx, const Product& p) {
    Plan plan{
        describe(p),  layout_of(p.a), layout_of(p.b), layout_of(p.c), layout_of(p.addend ? p.addend : p.c),
        std::nullopt, std::nullopt};
    set_pointers(plan.description, p);
    const auto candidates = suggestions(p, plan);
    if (candidates.empty()) return plan;
    plan.algorithm = candidates.front();
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_of(ctx), &capture), "a matrix product");
    if (capture == cudaStreamCaptureStatusNone && products_are_measured())
      choose_fastest(ctx, p, candidates, plan);
    return plan;
  }

  std::vector<cublasLtMatmulAlgo_t> suggestions(const Product& p, const Plan& plan) const {
    cublasLtMatmulPreference_t handle = nullptr;
    check_blas(cublasLtMatmulPreferenceCreate(&handle), "describing a product");
    const Preference preference(handle);
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes_);
    // Parts of a sum are added in fp32, in a fixed order.
    set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(alignment(p.b)));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(alignment(p.a)));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        static_cast<uint32_t>(alignment(p.addend ? p.addend : p.c)));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(alignment(p.c)));
    std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results{};
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle_, plan.description.get(), plan.b.get(), plan.a.get(), plan.addend.get(), plan.c.get(),
        preference.get(), kCandidates, results.data(), &count);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return {};
    check_blas(status, "choosing a matrix product");
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    for (int i = 0; i < count; ++i)
      if (results[static_cast<size_t>(i)].state == CUBLAS_STATUS_SUCCESS)
        algorithms.push_back(results[static_cast<size_t>(i)].algo);
    return algorithms;
  }

  // Times every candidate. One that only writes may write c again and again; one that accumulates gets memory
  // of its own for as long as this takes, and is not measured where there is none. No algorithm when none
  // runs.
  void choose_fastest(const Context& ctx, const Product& p,
                      const std::vector<cublasLtMatmulAlgo_t>& candidates, Plan& plan) const {
    void* c = p.c.data;
    std::unique_ptr<void, void (*)(void*)> scratch(nullptr, [](void* data) { cudaFree(data); });
    if (p.accumulate) {
      const size_t bytes = static_cast<size_t>(p.c.rows() * p.c.row_stride) * size_of(p.c.dtype);
      if (cudaMalloc(&c, bytes) != cudaSuccess) {
        cudaGetLastError();  // handled: later calls must not find it
        return;
      }
      scratch.reset(c);
      check(cudaMemsetAsync(c, 0, bytes, stream_of(ctx)), "clearing GPU memory");
    }
    std::vector<float> best(candidates.size(), std::numeric_limits<float>::infinity());
    for (int round = 0; round < kRounds; ++round)
      for (size_t i = 0; i < candidates.size(); ++i)
        best[i] = std::min(best[i], milliseconds(ctx, p, plan, candidates[i], c));
    const auto winner = std::min_element(best.begin(), best.end());
    plan.algorithm.reset();
    if (*winner == std::numeric_limits<float>::infinity()) return;
    plan.algorithm = candidates[static_cast<size_t>(winner - best.begin())];
    plan.milliseconds = *winner;
  }

  // Infinity for a candidate that does not run.
  float milliseconds(const Context& ctx, const Product& p, const Plan& plan,
                     const cublasLtMatmulAlgo_t& algorithm, void* c) const {
    constexpr int kRuns = 3;
    Event start(ctx.device, true), end(ctx.device, true);
    // The first run warms up.
    for (int i = 0; i <= kRuns; ++i) {
      if (i == 1) start.record(ctx.stream);
      if (run(ctx, p, plan, algorithm, c) != CUBLAS_STATUS_SUCCESS)
        return std::numeric_limits<float>::infinity();
    }
    end.record(ctx.stream);
    end.synchronize();
    return end.milliseconds_since(start) / kRuns;
  }

  cublasStatus_t run(const Context& ctx, const Product& p, const Plan& plan,
                     const cublasLtMatmulAlgo_t& algorithm, void* c) const {
    const float one = 1, beta = p.accumulate || p.addend ? 1 : 0;
    const void* before = p.addend ? p.addend.data : c;
    return cublasLtMatmul(handle_, plan.description.get(), &one, p.b.data, plan.b.get(), p.a.data,
                          plan.a.get(), &beta, before, plan.addend.get(), c, plan.c.get(), &algorithm,
                          workspace_, workspace_bytes_, stream_of(ctx));
  }

  static constexpr int kRounds = 3;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  std::map<Key, Plan> plans_;
  std::mutex mutex_;
};

Products& products_of(int index) {
  static std::mutex mutex;
  static auto* all = new std::map<int, std::unique_ptr<Products>>;
  const std::lock_guard lock(mutex);
  auto& products = (*all)[index];
  if (!products) products = std::make_unique<Products>(index);
  return *products;
}

}  // namespace

bool multiply(const Context& ctx, const Product& product) {
  return products_of(ctx.device.index).multiply(ctx, product);
}

std::optional<float> measured_milliseconds(const Context& ctx, const Product& product) {
  return products_of(ctx.device.index).milliseconds(ctx, product);
}

float* column_sums_memory(const Context& ctx) { return products_of(ctx.device.index).column_sums(); }

}  // namespace kernels::cuda
