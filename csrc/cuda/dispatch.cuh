// From the types that Params name to the kernels' template arguments, and the sizes of grids.
#pragma once

#include <algorithm>

#include "launch.h"
#include "memory.cuh"
#include "regimes.h"

namespace fused_xent::cuda {

template <typename T>
struct Type {};

template <typename Body>
cudaError_t with_dtype(DType dtype, const Body& body) {
#if defined(FUSED_XENT_BFLOAT16_ALONE)  // for tests: builds in a fraction of the time
  return dtype == DType::bfloat16 ? body(Type<__nv_bfloat16>{}) : cudaErrorNotSupported;
#endif
  switch (dtype) {
    case DType::float32:
      return body(Type<float>{});
    case DType::float64:
      return body(Type<double>{});
    case DType::bfloat16:
      return body(Type<__nv_bfloat16>{});
    default:
      return body(Type<__half>{});
  }
}

// Calls body(Type<T>, Type<S>): the types of the logits and of a Spread that exists.
template <typename Body>
cudaError_t with_spread_types(const Params& p, const Body& body) {
  return with_dtype(p.dtype, [&]<typename T>(Type<T> type) {
    if constexpr (sizeof(T) == 2) {
      if (!has_indices(p) && p.target_dtype == p.dtype) return body(type, type);
    }
    return body(type, Type<Acc<T>>{});
  });
}

// The same, with void for S if there is no spread, and Uniform if it need not be read.
template <typename Body>
cudaError_t with_types(const Params& p, const Body& body) {
  if (reads_labels(p)) return with_spread_types(p, body);
  return with_dtype(p.dtype, [&]<typename T>(Type<T> type) {
    if constexpr (sizeof(T) < 8) {
      if (has_spread(p)) return body(type, Type<Uniform>{});
    }
    return body(type, Type<void>{});
  });
}

// The same, with Capped or UniformCapped if there is a softcap.
template <typename Body>
cudaError_t with_row_types(const Params& p, const Body& body) {
  if (p.softcap == 0) return with_types(p, body);
  return with_dtype(p.dtype, [&]<typename T>(Type<T> type) {
    if constexpr (sizeof(T) < 8) {
      return has_spread(p) ? body(type, Type<UniformCapped>{}) : body(type, Type<Capped>{});
    }
    return cudaErrorNotSupported;  // see Shape::general
  });
}

// Blocks of a grid. Where `most` may be too few for all units, the kernel loops.
inline unsigned blocks_for(int64_t units, int64_t per_block, int64_t most = INT32_MAX) {
  return static_cast<unsigned>(std::min(ceil_div(units, per_block), most));
}

// Rows are along y. Parts of a row are along x, whose neighbours run at the same time.
constexpr int64_t kMaxGridY = 65535;
inline dim3 grid_for(const Params& p, const Plan& plan, int team) {
  const int64_t most = plan.max_groups > 0 ? plan.max_groups : kMaxGridY;
  return dim3(static_cast<unsigned>(plan.parts),
              blocks_for(p.n_rows, plan.threads / team, std::min(most, kMaxGridY)));
}

// A kernel must ask for more than 48 KiB of shared memory, of which it declares up to 2 KiB itself.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  return bytes <= 46 * 1024 ? cudaSuccess : allow_all_shared(reinterpret_cast<const void*>(kernel));
}

}  // namespace fused_xent::cuda
