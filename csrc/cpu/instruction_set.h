// The body of each instruction set's file: all kernels, for every dtype. Included by those files
// alone, inside their target region, with XENT_KERNELS and XENT_VECTOR_BYTES defined.

namespace fused_xent::cpu {
namespace {

// clang-format off: each uses those before it
#include "simd.h"
#include "elementary.h"
#include "spread.h"
#include "row_kernels.h"
#include "transform.h"
#include "general_rows.h"
#include "lane_stats.h"
#include "tile_memory.h"
#include "tile_labels.h"
#include "tile_kernels.h"
// clang-format on

template <typename T, typename Target>
Kernels kernels_of() {
  return {segment_stats<T, Target>,
          segment_gradient<T, Target>,
          row_stats_saving<T, Target>,
          row_gradient_of_saved<T, Target>,
          segment_scale<T>,
          general_stats<T, Target>,
          general_gradient<T, Target>,
          transformed_logit<T>,
          logit<T>,
          set_gradient<T>,
          tile_forward<T, Target>,
          tile_backward<T, Target>,
          tile_scale<T>};
}

template <typename T>
Kernels kernels_of(const Params& p) {
  if (p.target_kind != TargetKind::probabilities) return kernels_of<T, void>();
  return p.target_dtype == p.dtype ? kernels_of<T, T>() : kernels_of<T, float>();
}

}  // namespace

Kernels XENT_KERNELS(const Params& p) {
  switch (p.dtype) {
    case DType::float64:
      return p.target_kind == TargetKind::probabilities ? kernels_of<double, double>()
                                                        : kernels_of<double, void>();
    case DType::bfloat16:
      return kernels_of<BFloat16>(p);
    case DType::float16:
      return kernels_of<Half>(p);
    default:
      return kernels_of<float>(p);
  }
}

}  // namespace fused_xent::cpu
