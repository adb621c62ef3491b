// All kernels of one instruction set, for every dtype. Each instruction set's file includes this
// after it has defined
//   XENT_KERNELS        the function that returns the kernels
//   XENT_VECTOR_BYTES   the size of a vector
//   XENT_TARGET         the instructions that the compiler may use; without it, those of the build
//
// Headers come first, outside the target region that begins after them: what they define must not
// be compiled for one instruction set.
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define XENT_PRAGMA_OF(...) _Pragma(#__VA_ARGS__)
#define XENT_PRAGMA(...) XENT_PRAGMA_OF(__VA_ARGS__)
#if defined(XENT_TARGET) && defined(__clang__)
XENT_PRAGMA(clang attribute push(__attribute__((target(XENT_TARGET))), apply_to = function))
#elif defined(XENT_TARGET)
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC's own header for AVX-512
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
XENT_PRAGMA(GCC target(XENT_TARGET))
#endif

namespace fused_xent::cpu {
namespace {

// clang-format off: each file uses those before it
#include "simd.h"
#include "load_store.h"
#include "vector_pairs.h"
#include "../xent_formulas.h"
#include "elementary.h"
#include "row_labels.h"
#include "row_stats.h"
#include "row_gradients.h"
#include "transform.h"
#include "per_class_options.h"
#include "row_lanes.h"
#include "row_batch.h"
#include "lane_stats.h"
#include "tile_memory.h"
#include "tile_labels.h"
#include "tile_kernels.h"
#include "label_kernels.h"
// clang-format on

template <typename T, typename Target>
Kernels kernels_of(const Params& p) {
  const bool general = is_general(p);
  return {.segment_stats = general ? general_stats<T, Target> : segment_stats<T, Target>,
          .segment_gradient = general ? general_gradient<T, Target> : segment_gradient<T, Target>,
          .segment_scale = segment_scale<T>,
          .row_stats_saving = row_stats_saving<T, Target>,
          .row_gradient_of_saved = row_gradient_of_saved<T, Target>,
          .read_targets = read_targets<T>,
          .finish_batch = finish_batch<T>,
          .start_gradients = start_gradients<T>,
          .tile_forward = tile_forward<T, Target>,
          .tile_backward = tile_backward<T, Target>,
          .tile_scale = tile_scale<T>,
          .read_labels = read_labels<T>,
          .write_label_gradients = write_label_gradients<T>,
          .write_log_probs = write_log_probs<T>};
}

template <typename T>
Kernels kernels_for(const Params& p) {
  if (has_indices(p)) return kernels_of<T, void>(p);
  return p.target_dtype == p.dtype ? kernels_of<T, T>(p) : kernels_of<T, Acc<T>>(p);
}

}  // namespace

Kernels XENT_KERNELS(const Params& p) {
  switch (p.dtype) {
    case DType::float64:
      return kernels_for<double>(p);
    case DType::bfloat16:
      return kernels_for<BFloat16>(p);
    case DType::float16:
      return kernels_for<Half>(p);
    default:
      return kernels_for<float>(p);
  }
}

}  // namespace fused_xent::cpu

#if defined(XENT_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(XENT_TARGET)
#pragma GCC pop_options
#endif
