#include "launch.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "regimes.h"

namespace fused_xent::cuda {
namespace {

bool is_aligned_to(const Layout& layout, const void* data, int64_t elements) {
  const int inner = layout.n_dims - 1;
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || layout.stride[inner] != 1) return false;
  if (layout.size[inner] % elements != 0 || layout.class_stride % elements != 0) return false;
  for (int d = 0; d < inner; ++d) {
    if (layout.stride[d] % elements != 0) return false;
  }
  return true;
}

// Any of the passes over logits. workspace: of forward alone.
cudaError_t run(const Arguments& given, const Plan& plan, void* workspace, bool has_forward,
                bool has_backward, cudaStream_t stream) {
  if (given.n_rows == 0) return cudaSuccess;
  const Arguments a = with_constants(given);
  const Shape shape = shape_of(a);
  if (shape.is_general(plan.regime)) {
    return general(a, plan, workspace, has_forward, has_backward, stream);
  }
  const int64_t shared = shared_bytes(plan, shape);
  if (plan.regime == Regime::columns) {
    return by_columns(a, plan, shared, has_forward, has_backward, stream);
  }
  if (!has_backward) return forward_by_rows(a, plan, workspace, stream);
  if (!has_forward) return backward_by_rows(a, plan, stream);
  return forward_backward_by_rows(a, plan, shared, stream);
}

}  // namespace

Arguments with_constants(const Arguments& given) {
  Arguments a = given;
  a.smoothing = smoothing_of(a);
  a.smoothing_float = {static_cast<float>(a.smoothing.keep),
                       static_cast<float>(a.smoothing.uniform)};
  a.transform = Transform<double>(a);
  a.transform_float = Transform<float>(a);
  return a;
}

cudaError_t describe_device(Device* device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  read(&major, cudaDevAttrComputeCapabilityMajor);
  read(&minor, cudaDevAttrComputeCapabilityMinor);
  read(&device->sm_count, cudaDevAttrMultiProcessorCount);
  read(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->capability = capability_of_code(10 * major + minor);
  return error;
}

Shape shape_of(const Params& p) {
  const int size = static_cast<int>(element_size(p.dtype));
  const int64_t vector = 16 / size;
  const bool scaled = p.logit_scale != 1, capped = p.softcap != 0;
  // The kernels by rows have no softcap beside labels that are read, nor in float64. A great one
  // would cost them digits: see CappedExp.
  const bool is_capped_apart =
      p.softcap > kMaxFastSoftcap || p.dtype == DType::float64 || reads_labels(p);
  const bool general = wants_statistics(p) || !(p.logit_scale > 0) || (capped && is_capped_apart);
  const bool may_be_packed = !has_spread(p);  // such rows need no label but the target's
  Shape shape{p.n_rows, p.vocab_size,    size,          true,   true,
              general,  reads_labels(p), may_be_packed, scaled, capped};
  const auto add = [&](const void* data, const Layout& layout) {
    if (data == nullptr) return;
    shape.adjacent_classes &= layout.class_stride == 1;
    shape.adjacent_rows &= is_aligned_to(layout, data, vector);
    shape.packed &= layout.n_dims == 1 && layout.class_stride == 1 &&
                    layout.stride[0] == p.vocab_size && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  add(p.logits, p.logits_layout);
  add(p.grad_logits, p.grad_layout);
  if (!has_indices(p)) add(p.target, p.target_layout);
  return shape;
}

// Sets the limit to all that the device has, once: if each launch set its own, another host thread
// could lower it between that and the launch.
cudaError_t allow_all_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0, most = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel}) > 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  most -= static_cast<int>(attributes.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.insert({device, kernel});
  return error;
}

// Halves the cluster until the device has room for it. Some have less than their capability
// promises: parts of a GPU (MIG), and future ones.
cudaError_t fit_cluster(const void* kernel, cudaLaunchConfig_t config, Plan* plan) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t, int>, int> known;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || plan->parts == 1) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] =
      known.try_emplace({device, kernel, plan->threads, config.dynamicSmemBytes, plan->parts}, 1);
  for (int size = plan->parts; is_new && size > 1; size /= 2) {
    int n_clusters = 0;
    const cudaLaunchAttribute cluster = cluster_of(size);
    config.gridDim = dim3(static_cast<unsigned>(size));
    config.attrs = const_cast<cudaLaunchAttribute*>(&cluster);
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&n_clusters, kernel, &config) != cudaSuccess)
      cudaGetLastError();  // not the error of a launch
    if (n_clusters == 0) continue;
    entry->second = size;
    break;
  }
  plan->max_groups *= plan->parts / entry->second;
  plan->parts = entry->second;
  return cudaSuccess;
}

int64_t workspace_bytes(const Params& p, const Plan& plan) {
  if (plan.regime != Regime::split) return 0;
  const auto bytes_for = [&](auto acc) -> int64_t {
    using Acc = decltype(acc);
    return shape_of(p).general ? sizeof(FullStats<Acc>) : sizeof(RowStats<Acc>);
  };
  const int64_t bytes = p.dtype == DType::float64 ? bytes_for(0.0) : bytes_for(0.0f);
  return p.n_rows * plan.parts * bytes;
}

cudaError_t forward(const Arguments& a, const Plan& plan, void* workspace, cudaStream_t stream) {
  return run(a, plan, workspace, true, false, stream);
}

cudaError_t backward(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  return run(a, plan, nullptr, false, true, stream);
}

cudaError_t forward_backward(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  return run(a, plan, nullptr, true, true, stream);
}

// With as many blocks as run at once, which loop over rows: mostly the factor is 1, and each of
// them only starts and exits.
cudaError_t scale_gradient(const Arguments& a, const Plan& of_backward, cudaStream_t stream) {
  if (a.n_rows == 0) return cudaSuccess;
  Device device{};
  const cudaError_t error = describe_device(&device);
  if (error != cudaSuccess) return error;
  Plan plan = of_backward;
  const int64_t n_threads = int64_t{kScaleThreadsPerSm} * device.sm_count;
  plan.max_groups =
      static_cast<int>(std::max<int64_t>(n_threads / (plan.threads * int64_t{plan.parts}), 1));
  return plan.regime == Regime::columns ? scale_by_columns(a, plan, stream)
                                        : scale_by_rows(a, plan, stream);
}

}  // namespace fused_xent::cuda
