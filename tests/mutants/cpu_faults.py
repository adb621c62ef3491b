"""Faults of the CPU kernels, and the tests that find them."""

from .fault import Fault

ACCURACY = "tests/test_accuracy.py::"
OPTIONS = "tests/test_options.py::"
LAYOUTS = "tests/test_layouts.py::"
SHAPE = "tests/test_kernels.py::test_shape"
OPS = "tests/test_ops.py::"
SPARSE_LABELS = "tests/test_sparse_labels.py::"
INFINITIES = f"{ACCURACY}test_infinities_nan_and_extremes_match_torch"
SIZES = f"{ACCURACY}test_exponentials_and_logarithms_of_all_sizes"
NEAR_0 = f"{ACCURACY}test_losses_near_0_are_accurate"
ARGMAX = f"{OPTIONS}test_argmax_is_the_first_maximum"


def option(regime: str, name: str, labels: str, dtype: str = "float32") -> str:
    """Return the test of an option in a regime."""
    return f"tests/test_regimes.py::test_option_in_regime[{regime}-{name}-{dtype}-{labels}]"


def masked(regime: str, base: str, mask: str, labels: str, dtype: str = "float32") -> str:
    """Return the test of classes that are -inf in a regime."""
    test = "test_masked_classes"
    return f"tests/test_regimes.py::{test}[{regime}-{base}-{dtype}-{mask}-{labels}]"


LAUNCH = {
    "a gradient stays unscaled if the first row's upstream is 1": Fault(
        "csrc/cpu/launch.cpp",
        "(p.grad_loss_stride == 0 && grad_loss_of(p, 0) == 1)",
        "(grad_loss_of(p, 0) == 1)",
        (f"{LAYOUTS}test_strides_of_upstream_gradient",),
    ),
    "the last segment of a row ends before its last class": Fault(
        "csrc/cpu/launch.cpp",
        "segment(i / n_segments, i, begin, std::min(begin + kSegmentClasses, p.vocab_size));",
        "segment(i / n_segments, i, begin, std::min(begin + kSegmentClasses, p.vocab_size - 1));",
        (option("segments", "none", "index"),),
    ),
    "segments of a row are merged without the last": Fault(
        "csrc/cpu/launch.cpp",
        "for (int64_t s = 1; s < n_segments; ++s) merge_segments(",
        "for (int64_t s = 1; s + 1 < n_segments; ++s) merge_segments(",
        (option("segments", "none", "index"),),
    ),
    "the gradient of ignored rows of segments is left as it was": Fault(
        "csrc/cpu/row_passes.h",
        "if (!batch.kept[i]) return zero_gradient(p, row, begin, end);",
        "if (!batch.kept[i]) return;",
        (f"{LAYOUTS}test_upstream_of_dropped_rows_may_be_anything",),
    ),
    "dropped rows of segments have the results of others": Fault(
        "csrc/cpu/row_lanes.h",
        "kept == 0 ? F64{} : value",
        "value",
        ("tests/test_functional.py::test_ignore_index",),
    ),
    "segments of great numbers are written by their first segment alone": Fault(
        "csrc/cpu/row_passes.h",
        "if (begin == 0) k.tile_backward(",
        "if (begin < 0) k.tile_backward(",
        (f"{INFINITIES}[other +inf-33000-default-float32]",),
    ),
    "the last row of a task is left out": Fault(
        "csrc/cpu/tasks.h",
        "std::min((i + 1) * step, count)",
        "std::min((i + 1) * step - (step > 1), count)",
        (f"{SHAPE}[many rows of many classes-index-float32]",),
    ),
    "strided probabilities are read as if they were adjacent": Fault(
        "csrc/cpu/launch.cpp",
        "(!has_indices(p) && p.target_layout.class_stride != 1)",
        "(!has_indices(p) && p.target_layout.class_stride < 1)",
        (f"{LAYOUTS}test_strides_of_probabilities",),
    ),
    "strided classes are read as if they were adjacent": Fault(
        "csrc/cpu/launch.cpp",
        "p.vocab_size <= kMaxTileVocab || layout.class_stride != 1 ||",
        "p.vocab_size <= kMaxTileVocab || layout.class_stride < 1 ||",
        (option("strided tiles", "none", "index"),),
    ),
    "a strided gradient is written as if it were adjacent": Fault(
        "csrc/cpu/launch.cpp",
        "needs_tiles(p, p.logits_layout) || p.grad_layout.class_stride != 1",
        "needs_tiles(p, p.logits_layout)",
        (f"{LAYOUTS}test_strides_of_logits",),
    ),
    "tiles of an image end before its last rows": Fault(
        "csrc/cpu/launch.cpp",
        "const int64_t per_inner = ceil_div(inner, kTileRows)",
        "const int64_t per_inner = std::max<int64_t>(1, inner / kTileRows)",
        (f"{LAYOUTS}test_strides_of_upstream_gradient",),
    ),
    "tiles reach over the end of an image's rows": Fault(
        "csrc/cpu/launch.cpp",
        "tile(begin, std::min(begin + kTileRows, first + inner));",
        "tile(begin, std::min(begin + kTileRows, p.n_rows));",
        (f"{LAYOUTS}test_strides_of_upstream_gradient",),
        # Rows are computed twice, in place from what was a gradient already.
    ),
    "fused mode forgets the options of rows": Fault(
        "csrc/cpu/launch.cpp",
        "  } else if (is_general(p)) {",
        "  } else if (p.entropy != nullptr) {",
        (option("rows", "softcap", "index"),),
    ),
    "the choice between rows and segments depends on the threads in fused mode": Fault(
        "csrc/cpu/launch.cpp",
        "p.n_rows < kFewRows && p.vocab_size > kSegmentClasses",
        "p.n_rows < 4 * threads.count && p.vocab_size > kSegmentClasses",
        (f"{ACCURACY}test_results_do_not_depend_on_the_number_of_threads",),
    ),
    "general rows take the plain backward": Fault(
        "csrc/cpu/instruction_set.h",
        "general ? general_gradient",
        "has_transform(p) ? general_gradient",
        (masked("rows", "0", "first half", "index"),),
    ),
    "a strided gradient is scaled as if it were adjacent": Fault(
        "csrc/cpu/launch.cpp",
        "if (needs_tiles(p, p.grad_layout)) {",
        "if (p.vocab_size <= kMaxTileVocab) {",
        (option("strided tiles", "none", "index"),),
    ),
}

SCAN = {
    "the last bad row is named, not the first": Fault(
        "csrc/cpu/scan.cpp",
        "if (all.bad_row < 0) all.bad_row = block.bad_row;",
        "if (block.bad_row >= 0) all.bad_row = block.bad_row;",
        ("tests/test_errors.py::test_first_of_several_targets_out_of_range",),
    ),
    "the last bad row of a block is named": Fault(
        "csrc/cpu/scan.cpp",
        "} else if (scan.bad_row < 0) {",
        "} else {",
        ("tests/test_errors.py::test_first_of_several_targets_out_of_range",),
    ),
    "negative targets pass for classes": Fault(
        "csrc/cpu/scan.cpp",
        "static_cast<uint64_t>(y) >= static_cast<uint64_t>(p.vocab_size)",
        "y >= p.vocab_size",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "the target that is the number of classes passes for a class": Fault(
        "csrc/cpu/scan.cpp",
        "if (0 <= y && y < p.vocab_size) {",
        "if (0 <= y && y <= p.vocab_size) {",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "targets of rows of weight 0 are checked": Fault(
        "csrc/cpu/scan.cpp",
        "if (is_left_out(p, row)) continue;",
        "if (y == p.ignore_index) continue;",
        ("tests/test_errors.py::test_first_of_several_targets_out_of_range",),
    ),
    "the mean forgets token weights of indices": Fault(
        "csrc/cpu/scan.cpp",
        "class_weight(p, y) * token_weight(p, row)",
        "class_weight(p, y)",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "the mean forgets token weights where there are no class weights": Fault(
        "csrc/cpu/scan.cpp",
        "n_bad == 0 && p.weight == nullptr && p.token_weight == nullptr",
        "n_bad == 0 && p.weight == nullptr",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "token weights of probabilities are counted from the first row in every block": Fault(
        "csrc/cpu/scan.cpp",
        "for (int64_t row = begin; row < end; ++row) scan.total_weight += token_weight(p, row);",
        "for (int64_t i = 0; i < end - begin; ++i) scan.total_weight += token_weight(p, i);",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "losses are added up in float": Fault(
        "csrc/cpu/scan.cpp",
        "  double sums[4] = {};",
        "  float sums[4] = {};",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "the last losses of a block are left out of the sum": Fault(
        "csrc/cpu/scan.cpp",
        "for (; i < count; ++i) sums[0] += values[i];",
        "",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "one of four sums of losses is forgotten": Fault(
        "csrc/cpu/scan.cpp",
        "(sums[0] + sums[1]) + (sums[2] + sums[3])",
        "(sums[0] + sums[1]) + sums[2]",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "the blocks of a sum depend on the threads": Fault(
        "csrc/cpu/scan.cpp",
        "  return std::accumulate(sums.begin(), sums.end(), 0.0);",
        "  if (threads.count % 2 == 0) return std::accumulate(sums.rbegin(), sums.rend(), 0.0);\n"
        "  return std::accumulate(sums.begin(), sums.end(), 0.0);",
        (f"{ACCURACY}test_results_do_not_depend_on_the_number_of_threads",),
    ),
}

NEAR_1_CASE = f"{ACCURACY}test_loss_and_target_gradient_as_p_approaches_1"
NEAR_1 = (NEAR_1_CASE,)
TARGET_APART = {
    "a large gamma loses the digits of p": Fault(
        "csrc/xent_formulas.h",
        "p < Acc(0.5) ? (1 - rounded) - p : Real{};",
        "Real{};",
        ("tests/test_options.py::test_focal_loss_of_a_large_gamma",),
    ),
    "the target's exponential hides the others": Fault(
        "csrc/cpu/row_inputs.h",
        "return has_spread(p) ? -1 : checked_class(p, target_index(p, row));",
        "return has_spread(p) || row >= 0 ? -1 : checked_class(p, target_index(p, row));",
        NEAR_1,
    ),
    "the others' sum is added to 1 before its logarithm": Fault(
        "csrc/cpu/row_batch.h",
        "log_sum + lost / sum;",
        "log_sum;",
        NEAR_1,
    ),
    "a target above all other classes is not the maximum": Fault(
        "csrc/cpu/row_batch.h",
        "if (is_apart) max = vmax(target, max);",
        "",
        NEAR_1,
    ),
    "a target below the maximum is left out of the sum": Fault(
        "csrc/cpu/row_batch.h",
        "add_to(sum, lost, e);",
        "",
        ("tests/test_regimes.py::test_option_in_regime[rows-none-float32-index]",),
    ),
    "a target is left out of the entropy": Fault(
        "csrc/cpu/row_batch.h",
        " + (e == 0 ? F64{} : e * d)",
        "",
        ("tests/test_regimes.py",),
    ),
    "a target is never the argmax": Fault(
        "csrc/cpu/row_batch.h",
        "target >= 0 && is_above(others, target_logit, target)",
        "false",
        ("tests/test_options.py::test_argmax_is_the_first_maximum",),
    ),
    "the rounding error of a difference counts where it is large": Fault(
        "csrc/cpu/elementary.h",
        "a > -88.03f ? r + lost : r",
        "lost - lost == 0 ? r + lost : r",
        (f"{ACCURACY}test_masked_classes_before_small_logits",),
    ),
    "a guess of the maximum is the target": Fault(
        "csrc/cpu/row_stats.h", "is_apart ? j + kSample : j", "j", NEAR_1
    ),
    "exponentials that overwrite the logits are relative to the target": Fault(
        "csrc/cpu/row_stats.h",
        "  if (apart >= 0) x[apart] = -std::numeric_limits<A>::infinity();\n",
        "",
        NEAR_1,
    ),
    "transformed logits are relative to the target": Fault(
        "csrc/cpu/per_class_options.h",
        "if (j <= apart && apart < j + count) z.values",
        "if (false) z.values",
        NEAR_1,
    ),
    "gradients take saved exponentials for those relative to the maximum": Fault(
        "csrc/cpu/row_batch.h",
        "scale / sum);",
        "1 / sum);",
        (option("rows", "none", "index", "bfloat16"), option("rows", "none", "index")),
    ),
    "a target in the last lanes hides the others": Fault(
        "csrc/cpu/row_stats.h",
        "0 <= i && i < n ? static_cast<int>(i) : -1, kLowest",
        "-1, kLowest",
        NEAR_1,
    ),
    "the wrong class is left out instead of the target": Fault(
        "csrc/cpu/row_stats.h",
        "store_one(without + (apart - pair), kLowest);",
        "store_one(without, kLowest);",
        NEAR_1,
    ),
}

ROWS = {
    "dropped rows are those of token weight 0 alone": Fault(
        "csrc/cpu/row_inputs.h",
        "(has_indices(p) && target_index(p, row) == p.ignore_index) || token_weight(p, row) == 0",
        "token_weight(p, row) == 0",
        (option("rows", "none", "index"),),
    ),
    "gradients of the lse are an option of no row": Fault(
        "csrc/cpu/row_inputs.h",
        "         p.grad_lse != nullptr || p.grad_entropy != nullptr;\n}",
        "         p.grad_entropy != nullptr;\n}",
        ("tests/test_regimes.py::test_statistics_with_a_masked_target[rows-0-1-float32]",),
    ),
    "the z-loss's gradient forgets the factor 2": Fault(
        "csrc/cpu/row_lanes.h",
        "upstream.softmax = 2 * upstream.g * p.lse_square_scale * (max + log_sum);",
        "upstream.softmax = upstream.g * p.lse_square_scale * (max + log_sum);",
        (option("rows", "lse_square_scale", "index"),),
    ),
    "the z-loss's gradient is multiplied by the slope of the focal loss": Fault(
        "csrc/cpu/row_lanes.h",
        "upstream.softmax = 2 * upstream.g * p.lse_square_scale * (max + log_sum);",
        "upstream.softmax = 2 * upstream.g * p.lse_square_scale * (max + log_sum);\n"
        "    if (p.focal_gamma != 0) upstream.softmax *= rows.read(p.loss_slope);",
        (option("rows", "rows", "index"),),
    ),
    "the gradient of the lse is multiplied by the token weight": Fault(
        "csrc/cpu/row_lanes.h",
        "upstream.softmax += rows.read(p.grad_lse);",
        "upstream.softmax += rows.read(p.token_weight, 1) * rows.read(p.grad_lse);",
        (option("rows", "token_weight", "index"),),
    ),
    "the gradient of the entropy forgets log_sum": Fault(
        "csrc/cpu/row_lanes.h",
        "grad_entropy * (rows.read(p.entropy) - log_sum)",
        "grad_entropy * rows.read(p.entropy)",
        (option("rows", "none", "index"),),
    ),
    "the slope of the focal loss is forgotten": Fault(
        "csrc/cpu/row_lanes.h",
        "if (p.focal_gamma != 0) upstream.g *= rows.read(p.loss_slope);",
        "",
        (option("tile", "focal_gamma", "index"),),
    ),
    "uint8 targets are read as int32": Fault(
        "csrc/xent_rows.h",
        "return body(static_cast<const uint8_t*>(p.target));",
        "return body(static_cast<const int8_t*>(p.target));",
        ("tests/test_functional.py::test_uint8_targets_above_127",),
    ),
}

ONE_ROW = {
    "labels are spread without the smoothing": Fault(
        "csrc/xent_rows.h",
        "p.label_smoothing / static_cast<double>(p.vocab_size)}",
        "1.0 / static_cast<double>(p.vocab_size)}",
        (option("rows", "none", "index, smoothed"),),
    ),
    "log_sum may be below 0": Fault(
        "csrc/cpu/row_batch.h",
        "log_sum = ((0 < sum) & (sum < 1)) ? F64{} : log_sum;",
        "",
        (f"{ACCURACY}test_log_sum_is_never_below_0",),
    ),
    "a target's class weight is that of class 0": Fault(
        "csrc/cpu/row_batch.h",
        "class_weight(p, y);",
        "class_weight(p, 0);",
        (option("rows", "none", "index, weighted and smoothed"),),
    ),
    "the entropy's moment is not divided by the sum": Fault(
        "csrc/cpu/row_batch.h",
        "log_sum - moment / sum",
        "log_sum - moment",
        (option("rows", "none", "index"),),
    ),
    "dropped rows have argmax 0": Fault(
        "csrc/cpu/row_batch.h",
        "batch.kept[i] ? argmax : -1",
        "batch.kept[i] ? argmax : 0",
        (option("rows", "none", "index"),),
    ),
    "the focal loss of smoothed labels forgets the spread's part of the mass": Fault(
        "csrc/cpu/row_batch.h",
        "label_mass(on_target, smoothing.uniform, p.weight_sum - F64{})",
        "label_mass(on_target, 0.0, p.weight_sum - F64{})",
        (option("rows", "focal_gamma", "index, smoothed"),),
    ),
    "the z-loss is multiplied by no token weight": Fault(
        "csrc/xent_formulas.h",
        "return token_weight * focal_loss;",
        "return lse_square_scale != 0 ? focal_loss : token_weight * focal_loss;",
        (option("rows", "rows", "index"),),
    ),
    "the z-loss takes log_sum for the lse": Fault(
        "csrc/cpu/row_batch.h",
        "labels.q, max + log_sum);",
        "labels.q, log_sum);",
        (option("rows", "lse_square_scale", "index"),),
    ),
    "rows have no row options": Fault(
        "csrc/cpu/row_batch.h",
        "if (has_row_options(p)) loss = losses_of",
        "if (p.focal_gamma != 0) loss = losses_of",
        (option("rows", "lse_square_scale", "index"),),
    ),
    "a row's second segment is left out": Fault(
        "csrc/cpu/row_passes.h",
        "for (int64_t j = kSegmentClasses; j < p.vocab_size; j += kSegmentClasses) {",
        "for (int64_t j = kSegmentClasses; j + 16 < p.vocab_size; j += kSegmentClasses) {",
        (option("rows of several segments", "none", "index"),),
    ),
    "the gradient at the target is not transformed": Fault(
        "csrc/cpu/row_batch.h",
        "at_target * load(batch.target_slope + lane)",
        "at_target",
        (option("rows", "softcap", "index"),),
    ),
    "the target's gradient lacks that of the statistics": Fault(
        "csrc/cpu/row_batch.h",
        "upstream.softmax, upstream.shifted, prob, d);",
        "upstream.softmax, F64{}, prob, d);",
        (option("rows", "none", "index"),),
    ),
    "0 times infinity at a target of probability 0": Fault(
        "csrc/xent_formulas.h",
        "return p == 0 ? gradient : gradient + part;",
        "return gradient + part;",
        ("tests/test_regimes.py::test_statistics_with_a_masked_target[rows-2-0-float32]",),
    ),
    "the mass of probabilities is that of class weights": Fault(
        "csrc/cpu/row_batch.h",
        "p.weight_sum - F64{} : rows.read(p.label_mass);",
        "p.weight_sum - F64{} : p.weight_sum - F64{};",
        (option("rows", "none", "probabilities, weighted and smoothed"),),
    ),
    "the factor of the entropy's gradient is not divided by the sum": Fault(
        "csrc/cpu/row_batch.h",
        "upstream.shifted * one_over_sum",
        "upstream.shifted",
        (option("rows", "none", "index"),),
    ),
    "the target at the first class of a segment keeps the gradient of the others": Fault(
        "csrc/cpu/row_gradients.h",
        "if (begin <= y && y < end)",
        "if (begin < y && y < end)",
        (option("rows", "none", "index"),),
    ),
    "half of an ignored row's gradient is left as it was": Fault(
        "csrc/cpu/row_passes.h",
        "std::memset(out + begin * size, 0, (end - begin) * size);",
        "std::memset(out + begin * size, 0, (end - begin) * size / 2);",
        (f"{LAYOUTS}test_ignored_rows_may_hold_anything[(6, 200)-nan-default-float32]",),
    ),
    "ignored rows are scaled": Fault(
        "csrc/cpu/launch.cpp",
        "if (!is_left_out(p, row)) k.segment_scale(",
        "k.segment_scale(",
        (f"{LAYOUTS}test_upstream_of_dropped_rows_may_be_anything",),
    ),
    "16-bit rows of values beyond 2^24 take the row kernels in fused mode": Fault(
        "csrc/cpu/row_passes.h",
        "is_for_tiles(p, batch, i) && element_size(p.dtype) == 2",
        "is_for_tiles(p, batch, i) && element_size(p.dtype) == 1",
        (masked("rows", "greatest", "first half", "index", "bfloat16"),),
    ),
}

FORMULAS = {
    "a shift that overflows makes NaN of what is 0": Fault(
        "csrc/xent_math.h",
        "if (stats.mass != 0) stats.dot += shift * stats.mass;",
        "stats.dot += shift * stats.mass;",
        (masked("rows", "greatest", "first half", "probabilities", "float64"),),
    ),
    "the labels' sum of distances is not moved with the maximum": Fault(
        "csrc/xent_math.h",
        "if (stats.mass != 0) stats.dot += shift * stats.mass;",
        "",
        (option("rows of several blocks", "none", "probabilities"),),
    ),
    "a moment of nothing is multiplied by infinity": Fault(
        "csrc/xent_math.h",
        "stats.moment = factor == 0 ? Acc(0) : factor * (stats.moment + shift * stats.sum);",
        "stats.moment = factor * (stats.moment + shift * stats.sum);",
        (
            masked("rows of several blocks", "greatest", "first half", "index", "float64"),
            masked("rows of several blocks", "greatest", "the first blocks", "index", "float64"),
        ),
    ),
    "the moment is not moved with the maximum": Fault(
        "csrc/xent_math.h",
        "factor * (stats.moment + shift * stats.sum);",
        "factor * stats.moment;",
        (option("rows of several blocks", "none", "index"),),
    ),
    "argmax of equal maxima is that of the last segment": Fault(
        "csrc/xent_math.h",
        "if (both_nan || z == stats.top) return j < stats.argmax;",
        "if (both_nan || z == stats.top) return j > stats.argmax;",
        (f"{ARGMAX}[torch.float32-40000]",),
    ),
    "a later segment's NaN is not above its numbers": Fault(
        "csrc/xent_math.h",
        "return z != z || z > stats.top;",
        "return z > stats.top;",
        (f"{ARGMAX}[torch.float32-40000]",),
    ),
    "a number of a later segment is above NaN": Fault(
        "csrc/xent_math.h",
        "return z != z || z > stats.top;",
        "return z != z || !(z <= stats.top);",
        (f"{ARGMAX}[torch.float32-40000]",),
    ),
    "the mass of merged general segments is lost": Fault(
        "csrc/xent_math.h",
        "  stats.mass += other.mass;\n",
        "",
        (option("rows of several blocks", "all", "probabilities"),),
    ),
    "a target of weight 0 hides NaN": Fault(
        "csrc/xent_formulas.h",
        "on_target == 0 ? log_sum - log_sum : on_target",
        "on_target == 0 ? Real{} : on_target",
        (f"{ACCURACY}test_target_of_weight_0_does_not_hide_nan",),
    ),
    "infinite weights of other classes enter the gradient": Fault(
        "csrc/xent_formulas.h",
        "return spread == 0 ? on_target : on_target + spread * mass;",
        "return on_target + spread * mass;",
        (f"{ACCURACY}test_weight_of_an_absent_class[inf-3-default-float32]",),
    ),
    "the gradient at a confident target cancels": Fault(
        "csrc/xent_formulas.h",
        "const Real gradient = on_target * expm1_log_p;",
        "const Real gradient = on_target * (p - 1);",
        (f"{NEAR_0}[100-0.0-False-torch.float32]",),
    ),
    "the spread's part of the target's gradient is lost": Fault(
        "csrc/xent_formulas.h",
        "return spread == 0 ? gradient : gradient + spread * (mass * p - t);",
        "return gradient;",
        (option("rows", "none", "index, smoothed"),),
    ),
    "a focal loss of 0 is NaN": Fault(
        "csrc/xent_formulas.h",
        "(cross_entropy == 0) | (factor == 0)",
        "factor == 0",
        (f"{OPTIONS}test_focal_loss_of_certain_and_impossible_targets[9-torch.float64]",),
    ),
    "the slope of an infinite focal loss is NaN": Fault(
        "csrc/xent_formulas.h",
        "const Real rise = p == 0 ? Real{} : gamma * p * minus_log_p / rest;",
        "const Real rise = gamma * p * minus_log_p / rest;",
        (f"{OPTIONS}test_focal_loss_of_certain_and_impossible_targets[9-torch.float64]",),
    ),
    "the focal loss forgets the mass of its labels": Fault(
        "csrc/xent_formulas.h",
        "const Real minus_log_p = cross_entropy / mass, p",
        "const Real minus_log_p = cross_entropy, p",
        (option("rows", "focal_gamma", "index, weighted"),),
    ),
    "the focal loss of a certain target loses its digits": Fault(
        "csrc/xent_formulas.h",
        "exact = -Math::expm1(-minus_log_p);",
        "exact = rounded;",
        (f"{OPTIONS}test_focal_loss_of_certain_and_impossible_targets[9-torch.float64]",),
    ),
    "the quotient of a mean by 0 is infinite": Fault(
        "csrc/xent_math.h",
        "return total_weight == 0 ? NAN : sum / total_weight;",
        "return sum / total_weight;",
        (f"{OPTIONS}test_mean_by_a_sum_of_0_is_nan",),
    ),
}

SWEEPS = {
    "a block whose maximum was guessed too low is not summed again": Fault(
        "csrc/cpu/row_stats.h",
        "if (block.max > guess + kSlack) {",
        "if (false) {",
        (masked("rows", "0", "first half", "index"),),
    ),
    "the maximum of a block is forgotten in those after it": Fault(
        "csrc/cpu/row_stats.h",
        "if (block.max > max) max = block.max;",
        "max = block.max;",
        (f"{OPS}test_forward_returns_state_and_total_weight[torch.float32-(2, 17000)]",),
    ),
    "blocks are added around the origin of the last": Fault(
        "csrc/cpu/row_stats.h",
        "if (stats.max != origin) shift_stats(stats, origin);",
        "stats.max = origin;",
        (option("rows of several blocks", "none", "index"),),
    ),
    "a row's last lanes add exponentials of 0": Fault(
        "csrc/cpu/row_stats.h",
        "Vec<A> logits = load_first(x + j, n, kLowest), t{};",
        "Vec<A> logits = load_first(x + j, n), t{};",
        (option("rows", "none", "index"),),
    ),
    "the maximum of a row's last lanes may be 0": Fault(
        "csrc/cpu/row_stats.h",
        "first = vmax(load_first(x + j, n, -std::numeric_limits<A>::infinity()), first);",
        "first = vmax(load_first(x + j, n), first);",
        (
            masked("rows", "least", "last half", "index", "float64"),
            f"{ACCURACY}test_offset_of_all_logits",
        ),
    ),
    "the second of a pair of vectors has no part in the maximum": Fault(
        "csrc/cpu/row_stats.h",
        "return {max_lane(vmax(top[0], top[1])), Exp",
        "return {max_lane(top[0]), Exp",
        (
            f"{OPS}test_forward_returns_state_and_total_weight[torch.float32-(3, 200)]",
            f"{OPS}test_forward_returns_state_and_total_weight[torch.float32-(2, 17000)]",
        ),
    ),
    "0 times -inf of a class of probability 0 is NaN in rows": Fault(
        "csrc/cpu/row_stats.h",
        "dot[i] += t == 0 ? Vec<A>{} : t * exponent;",
        "dot[i] += t * exponent;",
        (masked("rows", "0", "every other", "probabilities"),),
    ),
    "the second vector's probabilities have no part in the loss": Fault(
        "csrc/cpu/row_stats.h",
        "dot.add(sums.dot[0] + sums.dot[1]);",
        "dot.add(sums.dot[0]);",
        (option("rows", "none", "probabilities"),),
    ),
    "the labels' part of a gradient is added": Fault(
        "csrc/cpu/row_gradients.h",
        "if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;\n        store_first",
        "if constexpr (Spread::kExists) value += spread.first(j, n) * scale;\n        store_first",
        (option("rows", "none", "index, smoothed"),),
    ),
    "the second vector's labels have no part in the gradient": Fault(
        "csrc/cpu/row_gradients.h",
        "{value.first - t.first * scale, value.second - t.second * scale}",
        "{value.first - t.first * scale, value.second - t.first * scale}",
        (option("rows", "none", "probabilities"),),
    ),
    "the origin of an exponential is taken for the row's maximum": Fault(
        "csrc/cpu/row_batch.h",
        "is_fused ? FusedExp::origin_of(max) : max",
        "max",
        (f"{ACCURACY}test_offset_of_all_logits",),
    ),
    "saved exponentials are relative to the first block's origin": Fault(
        "csrc/cpu/row_gradients.h",
        "scratch.origins[begin / kBlock] - gradient.max",
        "scratch.origins[0] - gradient.max",
        (option("rows of several blocks", "none", "index"),),
    ),
    "the origins of saved exponentials are one block late": Fault(
        "csrc/cpu/row_stats.h",
        "origins[(j - begin) / kBlock] = exp.origin();",
        "origins[(j - begin) / kBlock] = max;",
        (option("rows of several blocks", "none", "index", "bfloat16"),),
    ),
    "a block's maximum is not known to the next, in place": Fault(
        "csrc/cpu/row_stats.h",
        "block_max(x, j, block_end, stats.max)",
        "block_max(x, j, block_end, std::numeric_limits<A>::lowest())",
        (f"{OPS}test_fused_mode_returns_the_results_of_forward[(3, 5000)-plain]",),
    ),
    "long sums lack their compensation term": Fault(
        "csrc/xent_formulas.h",
        "return lost - lost == 0 ? sum + lost : sum;",
        "return sum;",
        (
            f"{ACCURACY}test_ascending_logits_with_spread_labels",
            f"{ACCURACY}test_many_small_probabilities_beside_a_large_one",
        ),
    ),
    "an infinite long sum is NaN": Fault(
        "csrc/xent_formulas.h",
        "return lost - lost == 0 ? sum + lost : sum;",
        "return sum + lost;",
        (
            f"{ACCURACY}test_overflowing_distance_gives_no_wrong_loss",
            INFINITIES,
        ),
    ),
}

ARITHMETIC = {
    "exponentials of tiles lose NaN": Fault(
        "csrc/cpu/elementary.h",
        "x = vmax(-88.03f - F32{}, x);",
        "x = vmax(x, -88.03f - F32{});",
        (f"{INFINITIES}[other NaN-5-default-float32]",),
    ),
    "exponentials of float64 lose NaN": Fault(
        "csrc/cpu/elementary.h",
        "x = vmax(-709.0895657128241 - F64{}, x);",
        "x = vmax(x, -709.0895657128241 - F64{});",
        (f"{INFINITIES}[other NaN-5-default-float64]",),
    ),
    "exponentials of rows lose NaN": Fault(
        "csrc/cpu/elementary.h",
        "t = vmax(-127.0f - F32{}, t);",
        "t = vmax(t, -127.0f - F32{});",
        (f"{INFINITIES}[other NaN-200-default-float32]",),
    ),
    "exponentials of rows wrap around below the least number": Fault(
        "csrc/cpu/elementary.h",
        "    t = vmax(-127.0f - F32{}, t);  // 2^n is 0 there\n",
        "",
        (masked("rows", "0", "every other", "index"),),
    ),
    "the polynomial of tiles has a digit wrong": Fault(
        "csrc/cpu/elementary.h",
        "p = p * f + 5.55071086e-2f;",
        "p = p * f + 5.55271086e-2f;",
        (f"{SIZES}[2-False-torch.float32-5.0-5e-07-2e-07]",),
    ),
    "the polynomial of rows has a digit wrong": Fault(
        "csrc/cpu/elementary.h",
        "p = p * f + 181.033264f;",
        "p = p * f + 181.073264f;",
        (f"{SIZES}[200-False-torch.float32-5.0-5e-07-2e-07]",),
    ),
    "the series of float64's exponential ends early": Fault(
        "csrc/cpu/elementary.h",
        "(expm1_over_x<12>(r) * r + 1)",
        "(expm1_over_x<9>(r) * r + 1)",
        (f"{SIZES}[2-False-torch.float64-16.0-4e-15-1e-15]",),
    ),
    "log 2 has one part in float64": Fault(
        "csrc/cpu/elementary.h",
        "(x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10",
        "x - n * 6.93147180369123816490e-01",
        (option("tile", "none", "index", "float64"),),
    ),
    "the logarithm of 0 is a number": Fault(
        "csrc/cpu/elementary.h",
        "return x == 0 ? -__builtin_inff() - F32{} : log + (x - x);",
        "return log + (x - x);",
        (f"{INFINITIES}[all -inf-5-default-float32]",),
    ),
    "the logarithm's series ends early": Fault(
        "csrc/cpu/elementary.h",
        "p = p * t2 + 2.0f / 5;",
        "p = 0 * p + 2.0f / 5;",
        (f"{SIZES}[2-False-torch.float32-5.0-5e-07-2e-07]",),
    ),
    "exp(x) - 1 cancels near 0": Fault(
        "csrc/cpu/elementary.h",
        "return x > -0.5f ? (p * x) * x + x : exp_nonpositive(x) - 1;",
        "return exp_nonpositive(x) - 1;",
        (f"{NEAR_0}[100-0.0-False-torch.float32]",),
    ),
    "exp(x) - 1 is its series where that has ended": Fault(
        "csrc/cpu/elementary.h",
        "return x > -0.5f ? (p * x)",
        "return x > -2.5f ? (p * x)",
        (f"{SIZES}[2-False-torch.float32-5.0-5e-07-2e-07]",),
    ),
    "16-bit probabilities of rows are scaled once more": Fault(
        "csrc/cpu/row_labels.h",
        "t = {t.first * scale + offset, t.second * scale + offset};",
        "t = {t.first * scale + offset, t.second * scale};",
        (option("rows", "none", "probabilities, weighted and smoothed"),),
    ),
    "class weights of probabilities are forgotten in a row's last lanes": Fault(
        "csrc/cpu/row_labels.h",
        "    if (weight != nullptr) t *= load_first(weight + j, n);\n",
        "",
        (option("rows", "none", "probabilities, weighted and smoothed"),),
    ),
    "lanes beyond a row's end have smoothing's share": Fault(
        "csrc/cpu/row_labels.h",
        "    for (int i = n; i < kLanes<A>; ++i) t[i] = 0;\n",
        "",
        (f"{SHAPE}[many rows of many classes-probabilities, smoothed-float32]",),
    ),
    "lanes beyond a row's end have a uniform share": Fault(
        "csrc/cpu/row_labels.h",
        "for (int i = 0; i < n; ++i) t[i] = one;",
        "for (int i = 0; i < kLanes<A>; ++i) t[i] = n > 0 ? one : 0;",
        (option("rows", "none", "index, smoothed"),),
    ),
    "class weights of smoothed indices are forgotten": Fault(
        "csrc/cpu/row_labels.h",
        "if (p.weight == nullptr) return body(UniformSpread<T>{});",
        "if (p.weight != nullptr) return body(UniformSpread<T>{});",
        (option("rows", "none", "index, weighted and smoothed"),),
    ),
    "the slope of a capped logit is that of the scaled one": Fault(
        "csrc/cpu/transform.h",
        "4 * scale * e / (one_plus_e * one_plus_e)",
        "scale - 0 * e",
        (option("rows", "softcap", "index"),),
    ),
    "the slope of a scaled logit is 1": Fault(
        "csrc/cpu/transform.h",
        "return {x * scale, Vec<A>{} + scale};",
        "return {x * scale, Vec<A>{} + 1};",
        (option("rows", "logit_scale", "index"),),
    ),
    "a softcap forgets the scale": Fault(
        "csrc/cpu/transform.h",
        "static_cast<A>(p.logit_scale / p.softcap)",
        "static_cast<A>(1 / p.softcap)",
        (option("rows", "all", "index"),),
    ),
    "a capped negative logit is positive": Fault(
        "csrc/cpu/transform.h",
        "return {y < 0 ? -capped : capped,",
        "return {capped,",
        (option("rows", "softcap", "index"),),
    ),
    "the slope of a saturated softcap cancels": Fault(
        "csrc/cpu/transform.h",
        "4 * scale * e / (one_plus_e * one_plus_e)",
        "scale * (1 - tanh * tanh)",
        (f"{OPTIONS}test_derivative_of_a_saturated_softcap",),
    ),
}

GENERAL = {
    "the slopes of a row's last lanes are forgotten": Fault(
        "csrc/cpu/per_class_options.h",
        "store_first(out + j, value * lanes.slope, n);",
        "store_first(out + j, n < kLanes<A> ? value : value * lanes.slope, n);",
        (option("rows", "softcap", "index"),),
    ),
    "0 times -inf is in the moment of rows": Fault(
        "csrc/cpu/per_class_options.h",
        "sum.add(power == 0 ? Vec<A>{} : power * d);",
        "sum.add(power * d);",
        (masked("rows", "0", "every other", "index"),),
    ),
    "0 times -inf is in the gradient of the entropy of rows": Fault(
        "csrc/cpu/per_class_options.h",
        "(e == 0 ? Vec<A>{} : e * d * shifted_factor)",
        "e * d * shifted_factor",
        (masked("rows", "0", "every other", "index"),),
    ),
    "the gradient of the entropy of rows is forgotten": Fault(
        "csrc/cpu/per_class_options.h",
        "(e == 0 ? Vec<A>{} : e * d * shifted_factor)",
        "Vec<A>{}",
        (option("rows", "none", "index"),),
    ),
    "the argmax of a block is counted from its start": Fault(
        "csrc/cpu/per_class_options.h",
        "      stats.argmax = begin + i;",
        "      stats.argmax = i;",
        (f"{ARGMAX}[torch.float32-5000]",),
    ),
    "a later block of the same maximum has the argmax": Fault(
        "csrc/cpu/per_class_options.h",
        "if (stats.argmax < 0 || max > stats.top) take_first",
        "if (stats.argmax < 0 || max >= stats.top) stats.argmax = -1, take_first",
        (f"{ARGMAX}[torch.float32-5000]",),
    ),
    "NaN is not the argmax in rows": Fault(
        "csrc/cpu/per_class_options.h",
        "  if (sum != sum) take_first([](A value) { return value != value; });\n",
        "  (void)sum;\n",
        (f"{ARGMAX}[torch.float32-300]",),
    ),
    "the softmax of a block of -inf alone is NaN": Fault(
        "csrc/cpu/per_class_options.h",
        "const Exp exp(max > kLowest ? max : kLowest);",
        "const Exp exp(max);",
        (masked("rows of several blocks", "0", "the first blocks", "index"),),
    ),
    "the labels of every block are those of the first": Fault(
        "csrc/cpu/per_class_options.h",
        "of_block{spread, j};",
        "of_block{spread, begin};",
        (option("rows of several blocks", "softcap", "probabilities"),),
    ),
    "the labels' part of a general gradient is not transformed": Fault(
        "csrc/cpu/per_class_options.h",
        "if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;\n"
        "      store_first(out + j, value * lanes.slope, n);",
        "value *= lanes.slope;\n"
        "      if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;\n"
        "      store_first(out + j, value, n);",
        (option("rows", "softcap", "probabilities"),),
    ),
    "the moment is scaled by nothing": Fault(
        "csrc/cpu/per_class_options.h",
        "Exp::kScale * block_moment(",
        "block_moment(",
        (option("rows", "none", "index"),),
    ),
}

LANES = {
    "a lane's compensation term is not rescaled": Fault(
        "csrc/cpu/lane_stats.h",
        "    sum.lost *= factor;\n",
        "",
        (f"{NEAR_0}[100-1e-09-False-torch.float32]",),
    ),
    "a lane's shift that overflows makes NaN of no mass": Fault(
        "csrc/cpu/lane_stats.h",
        "this->dot.add(mass == 0 ? Vec<A>{} : (max - top) * mass);",
        "this->dot.add((max - top) * mass);",
        (masked("strided tiles", "greatest", "first half", "probabilities"),),
    ),
    "a lane's sum is not rescaled": Fault(
        "csrc/cpu/lane_stats.h",
        "    sum.sum *= factor;\n",
        "",
        (option("tiles", "none", "index"),),
    ),
    "a lane's labels are not moved with the maximum": Fault(
        "csrc/cpu/lane_stats.h",
        "this->dot.add(mass == 0 ? Vec<A>{} : (max - top) * mass);",
        "",
        (option("tiles", "none", "probabilities"),),
    ),
    "a lane's compensation term is dropped": Fault(
        "csrc/cpu/lane_stats.h",
        "      if (kTwoSum) lost += e + (before - total);\n",
        "",
        (f"{NEAR_0}[100-1e-09-False-torch.float32]",),
    ),
    "the logarithm of a lane's sum lacks the compensation term": Fault(
        "csrc/cpu/lane_stats.h",
        "return sum.sum == 0 ? log : log + sum.lost / sum.sum;",
        "return log;",
        (f"{NEAR_0}[100-0.0-False-torch.float32]",),
    ),
    "the logarithm of a lane of no sum is NaN": Fault(
        "csrc/cpu/lane_stats.h",
        "return sum.sum == 0 ? log : log + sum.lost / sum.sum;",
        "return log + sum.lost / sum.sum;",
        ("tests/test_regimes.py::test_rows_of_minus_infinity[tile-float32]",),
    ),
    "statistics change how the sum of a tile is rounded": Fault(
        "csrc/cpu/tile_kernels.h",
        "        if (is_apart) {  // the sum",
        "        if (false) {  // the sum",
        ("tests/test_linear_autograd.py::test_finite_differences",),
    ),
    "the sum of a lane's other classes begins at 1": Fault(
        "csrc/cpu/lane_stats.h",
        "constexpr A kStart = kTwoSum ? 1 : 0;",
        "constexpr A kStart = 1;",
        (f"{ACCURACY}test_many_small_exponentials_beside_a_large_one",),
    ),
    "the rounding error of a lane's shift is forgotten": Fault(
        "csrc/cpu/elementary.h",
        "exp_nonpositive(a > -88.03f ? r + lost : r)",
        "exp_nonpositive(r)",
        (f"{NEAR_1_CASE}[(2, 1000, 5, 6)-plain-torch.float32]",),
    ),
    "log 2 has one part in a lane's shift": Fault(
        "csrc/cpu/elementary.h",
        "(x - n * 6.93145752e-1f) - n * 1.42860677e-6f",
        "(x - n * 6.93145752e-1f)",
        (f"{NEAR_1_CASE}[(2, 1000, 5, 6)-plain-torch.float32]",),
    ),
    "a lane's shift that overflows has a rounding error": Fault(
        "csrc/cpu/elementary.h",
        "exp_nonpositive(a > -88.03f ? r + lost : r)",
        "exp_nonpositive(r + lost)",
        (masked("strided tiles", "greatest", "first half", "index"),),
    ),
    "a lane's target is the argmax if it is equal to an earlier class": Fault(
        "csrc/cpu/lane_stats.h",
        "above | (equal & (Index)(target < argmax))",
        "above | equal",
        (f"{ARGMAX}[torch.float32-7]",),
    ),
    "a lane's target is not the argmax if it is equal to a later class": Fault(
        "csrc/cpu/lane_stats.h",
        "above | (equal & (Index)(target < argmax))",
        "above",
        (f"{ARGMAX}[torch.float32-7]",),
    ),
    "a lane's target of NaN is not the argmax before a later NaN": Fault(
        "csrc/cpu/lane_stats.h",
        "const auto equal = (Index)(logit == top_) | both_nan;",
        "const auto equal = (Index)(logit == top_);",
        (f"{ARGMAX}[torch.float32-7]",),
    ),
    "a lane starts at minus infinity": Fault(
        "csrc/cpu/lane_stats.h",
        "Vec<A> max = Vec<A>{} + std::numeric_limits<A>::lowest();",
        "Vec<A> max = Vec<A>{} - std::numeric_limits<A>::infinity();",
        (masked("strided tiles", "0", "first half", "index"),),
    ),
    "a lane's first group is handled like the others": Fault(
        "csrc/cpu/lane_stats.h",
        "if (j != 0) rescale(top);",
        "if (j == 0) rescale(top);",
        (option("tiles", "none", "index"),),
    ),
    "0 times -inf of a class of probability 0 is NaN in tiles": Fault(
        "csrc/cpu/lane_stats.h",
        "dots += weight == 0 ? Vec<A>{} : weight * d;",
        "dots += weight * d;",
        (masked("tile", "0", "every other", "probabilities"),),
    ),
    "a lane's moment of nothing is multiplied by infinity": Fault(
        "csrc/cpu/lane_stats.h",
        "factor == 0 ? Vec<A>{} : factor * (moment_.value() + shift * sum);",
        "factor * (moment_.value() + shift * sum);",
        (masked("tiles", "greatest", "first half", "index"),),
    ),
    "a lane's moment is not moved with the maximum": Fault(
        "csrc/cpu/lane_stats.h",
        "factor * (moment_.value() + shift * sum);",
        "factor * moment_.value();",
        (option("tiles", "none", "index"),),
    ),
    "0 times -inf is in the moment of tiles": Fault(
        "csrc/cpu/lane_stats.h",
        "moment += e == 0 ? Vec<A>{} : e * d;",
        "moment += e * d;",
        (masked("tile", "0", "every other", "index"),),
    ),
    "of equal logits a lane's argmax is the last": Fault(
        "csrc/cpu/lane_stats.h",
        "~(Index)(logits <= top_) & (Index)(top_ == top_)",
        "~(Index)(logits < top_) & (Index)(top_ == top_)",
        (f"{ARGMAX}[torch.float32-7]",),
    ),
    "a number is above NaN in a lane": Fault(
        "csrc/cpu/lane_stats.h",
        "~(Index)(logits <= top_) & (Index)(top_ == top_)",
        "~(Index)(logits <= top_)",
        (f"{ARGMAX}[torch.float32-7]",),
    ),
    "a lane's argmax is counted from its group": Fault(
        "csrc/cpu/lane_stats.h",
        "static_cast<BitsOf<A>>(j + u) - Index{}",
        "static_cast<BitsOf<A>>(u) - Index{}",
        (f"{ARGMAX}[torch.float32-300]",),
    ),
}

TILES = {
    "a dropped row keeps its loss in a tile": Fault(
        "csrc/cpu/tile_kernels.h",
        "store_rows<A>(p.row_loss, begin, lane, n, is_left_out ? Vec<A>{} : loss);",
        "store_rows<A>(p.row_loss, begin, lane, n, loss);",
        (f"{LAYOUTS}test_ignored_rows_may_hold_anything[(6, 7)-nan-default-float32]",),
    ),
    "dropped rows of a tile keep an entropy": Fault(
        "csrc/cpu/tile_kernels.h",
        "const Vec<A> entropy = is_left_out ? Vec<A>{} : s.entropy();",
        "const Vec<A> entropy = s.entropy();",
        (option("tile", "none", "index"),),
    ),
    "dropped rows of a tile have an argmax": Fault(
        "csrc/cpu/tile_kernels.h",
        "labels.kept[i] != 0 ? static_cast<int64_t>(s.argmax[i - lane]) : -1;",
        "static_cast<int64_t>(s.argmax[i - lane]);",
        (f"{ARGMAX}[torch.float32-7]",),
    ),
    "dropped rows of a tile have the options of others": Fault(
        "csrc/cpu/tile_labels.h",
        "load_bits<Narrow<Bits>>(kept + lane) != 0",
        "load_bits<Narrow<Bits>>(kept + lane) >= 0",
        (f"{OPTIONS}test_token_weight_of_ignored_rows_may_be_anything",),
    ),
    "row options of a tile are those of the first rows": Fault(
        "csrc/cpu/row_lanes.h",
        "load_wide(static_cast<const A*>(from) + first, n);",
        "load_wide(static_cast<const A*>(from), n);",
        (option("tiles", "all", "index"),),
    ),
    "a tile's focal loss forgets what smoothing takes from the target": Fault(
        "csrc/cpu/tile_kernels.h",
        "smoothing.keep * load_wide(labels.label_weights() + lane, rows.n);",
        "load_wide(labels.label_weights() + lane, rows.n);",
        (option("tile", "focal_gamma", "index, weighted and smoothed"),),
    ),
    "a tile's focal loss forgets the mass of smoothed labels": Fault(
        "csrc/cpu/tile_kernels.h",
        "label_mass(on_target, smoothing.uniform, p.weight_sum - F64{})",
        "on_target",
        (option("tile", "focal_gamma", "index, smoothed"),),
    ),
    "a tile's last row has no row options": Fault(
        "csrc/cpu/load_store.h",
        "for (int i = 0; i < n; ++i) to[i] = narrow[i];",
        "for (int i = 0; i + 1 < n; ++i) to[i] = narrow[i];",
        (option("tile", "focal_gamma", "index"),),
    ),
    "the series of float64's logarithm ends early": Fault(
        "csrc/cpu/elementary.h",
        "polynomial<AtanhSeries, 10>(t2)",
        "polynomial<AtanhSeries, 6>(t2)",
        (f"{SIZES}",),
    ),
    "log 2 has one part in float64's logarithm": Fault(
        "csrc/cpu/elementary.h",
        "(log_m + n * 1.90821492927058770002e-10)",
        "log_m",
        (f"{SIZES}",),
    ),
    "the series of float64's expm1 ends early": Fault(
        "csrc/cpu/elementary.h",
        "expm1_over_x<15>(x) * x",
        "expm1_over_x<11>(x) * x",
        (f"{SIZES}",),
    ),
    "the focal loss of a negative cross-entropy is a number": Fault(
        "csrc/cpu/elementary.h",
        'return x > 0 ? __builtin_nan("") - F64{} : exp_nonpositive(x);',
        "return exp_nonpositive(x);",
        (f"{OPTIONS}test_focal_loss_of_a_negative_cross_entropy",),
    ),
    "a tile's last loss is not written": Fault(
        "csrc/cpu/tile_kernels.h",
        "store_first(rows, value, n_rows - lane);",
        "store_first(rows, value, n_rows - lane - 1);",
        (option("tile", "none", "index"),),
    ),
    "a tile writes results beyond its last row": Fault(
        "csrc/cpu/tile_kernels.h",
        "if (n_rows - lane >= kLanes<A>) {",
        "if (n_rows - lane >= kLanes<A> - 1) {",
        ("tests/test_cpu_native.py",),  # Python sees no memory behind a tensor
    ),
    "the last group of classes is a class short": Fault(
        "csrc/cpu/tile_kernels.h",
        "vocab_size - j < size ? vocab_size - j : size",
        "vocab_size - j < size ? vocab_size - j - 1 : size",
        (option("tiles", "none", "index"),),
    ),
    "the logits of a tile's last rows are not transformed": Fault(
        "csrc/cpu/tile_kernels.h",
        "for (int lane = 0; lane < n_rows; lane += kLanes<A>) {\n      A* at = lanes",
        "for (int lane = 0; lane + kLanes<A> <= n_rows; lane += kLanes<A>) {\n      A* at = lanes",
        (option("tile", "softcap", "index"),),
    ),
    "a tile forgets the transformation in its forward": Fault(
        "csrc/cpu/tile_kernels.h",
        "if (kGeneral && has_transform(p)) transform_lanes(",
        "if (kGeneral && p.softcap != 0) transform_lanes(",
        (option("tile", "logit_scale", "index"),),
    ),
    "smoothed tiles take the kernels of unsmoothed ones": Fault(
        "csrc/cpu/tile_kernels.h",
        "forward_tile<T, Target, kHasSpread, kGeneral>",
        "forward_tile<T, Target, kHasSpread && (kGeneral || !std::is_void_v<Target>), kGeneral>",
        (option("tile", "none", "index, smoothed"),),
    ),
    "smoothed tiles have the gradient of unsmoothed ones": Fault(
        "csrc/cpu/tile_kernels.h",
        "backward_tile<T, Target, kHasSpread, kGeneral>",
        "backward_tile<T, Target, kHasSpread && (kGeneral || !std::is_void_v<Target>), kGeneral>",
        (option("tile", "none", "index, smoothed"),),
    ),
    "the labels of a general tile's gradient are not transformed": Fault(
        "csrc/cpu/tile_kernels.h",
        "value -= spread.at(j + u, u, lane) * load(gradient.spread + lane);\n"
        "          value *= z.slope;",
        "          value *= z.slope;\n"
        "          if (has_spread) value -= spread.at(j + u, u, lane) * load(gradient.spread "
        "+ lane);",
        (option("tile", "softcap", "probabilities"),),
    ),
    "the labels of a group are those of the one before": Fault(
        "csrc/cpu/tile_kernels.h",
        "    if (kHasSpread) spread.read(j, count);\n"
        "    for (int lane = 0; lane < n; lane += kWidth) {\n"
        "      const Vec<A> max",
        "    if (kHasSpread && j == 0) spread.read(j, count);\n"
        "    for (int lane = 0; lane < n; lane += kWidth) {\n"
        "      const Vec<A> max",
        (option("tiles", "none", "probabilities"),),
    ),
    "the gradient of a dropped row is not 0": Fault(
        "csrc/cpu/tile_kernels.h",
        "store_bits(at, (decltype(kept))value & kept);",
        "store(at, value);",
        (f"{LAYOUTS}test_ignored_rows_may_hold_anything[(6, 7)-nan-default-float32]",),
    ),
    "the gradient at the target is not transformed in tiles": Fault(
        "csrc/cpu/tile_kernels.h",
        "value = gradient.at_target(labels, lane, z.logit) * z.slope;",
        "value = gradient.at_target(labels, lane, z.logit);",
        (option("tile", "softcap", "index"),),
    ),
    "the target of a tile's row keeps the gradient of the others": Fault(
        "csrc/cpu/tile_kernels.h",
        "if (labels.index[i] >= 0) store_one(",
        "if (labels.index[i] > 0) store_one(",
        (option("tile", "none", "index"),),
    ),
    "ignored rows are scaled in tiles": Fault(
        "csrc/cpu/tile_kernels.h",
        "is_left_out(p, begin + i) ? A(0) : grad_loss",
        "false ? A(0) : grad_loss",
        (f"{LAYOUTS}test_upstream_of_dropped_rows_may_be_anything",),
    ),
    "the first row's upstream scales all rows of a tile": Fault(
        "csrc/cpu/tile_kernels.h",
        "[(begin + i) * p.grad_loss_stride]",
        "[begin * p.grad_loss_stride]",
        (f"{LAYOUTS}test_strides_of_upstream_gradient",),
    ),
    "rows of token weight 0 are kept in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "if (static_cast<const A*>(p.token_weight)[begin + i] == 0) index[i] = -1;",
        "if (static_cast<const A*>(p.token_weight)[i] == 0) index[i] = -1;",
        (option("tiles", "token_weight", "index"),),
    ),
    "the smoothed target has all of its weight in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "    share = static_cast<A>(smoothing.keep);\n",
        "    share = 1;\n",
        (option("tile", "none", "index, smoothed"),),
    ),
    "the target's class weight is forgotten in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "if (index[i] >= 0) target_weight[i] = weight[index[i]];",
        "if (index[i] > 0) target_weight[i] = weight[index[i]];",
        (option("tile", "none", "index, weighted"),),
    ),
    "the rows of a tile's last vector have no labels": Fault(
        "csrc/cpu/tile_labels.h",
        "n_lanes(static_cast<int>(ceil_div(n_rows, kLanes<A>)) * kLanes<A>)",
        "n_lanes(n_rows / kLanes<A> * kLanes<A>)",
        (option("tiles", "none", "index"),),
    ),
    "a target of the next group is picked in the current one": Fault(
        "csrc/cpu/tile_labels.h",
        "u < static_cast<uint64_t>(count) ? lanes + u * kTileRows",
        "u < kGroup ? lanes + u * kTileRows",
        (option("tiles", "none", "index"),),
    ),
    "a tile's target is added to the others": Fault(
        "csrc/cpu/tile_labels.h",
        "if (apart) *from = -std::numeric_limits<A>::infinity();",
        "",
        (option("tile", "none", "index"),),
    ),
    "a tile's smoothed target is left out": Fault(
        "csrc/cpu/tile_kernels.h",
        "const bool is_apart = !kHasSpread || !has_spread(p);",
        "const bool is_apart = std::is_void_v<Target>;",
        (option("tile", "none", "index, smoothed"),),
    ),
    "the target of general tiles hides the others": Fault(
        "csrc/cpu/tile_kernels.h",
        "const bool is_apart = !kHasSpread || !has_spread(p);",
        "const bool is_apart = !kHasSpread;",
        (f"{NEAR_1_CASE}[(1, 5000, 30)-statistics-torch.float32]",),
    ),
    "probabilities of tiles are not smoothed": Fault(
        "csrc/cpu/tile_labels.h",
        "load(scratch.lanes + u * kTileRows + lane) * scale + offset;",
        "load(scratch.lanes + u * kTileRows + lane);",
        (option("tile", "none", "probabilities, weighted and smoothed"),),
    ),
    "class weights of probabilities are counted from the group in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "return weight == nullptr ? t : t * weight[j];",
        "return weight == nullptr ? t : t * weight[u];",
        (option("tiles", "none", "probabilities, weighted and smoothed"),),
    ),
    "class weights of smoothed indices are forgotten in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "weight == nullptr ? Acc<T>(1) : weight[j]",
        "weight == nullptr || j < 0 ? Acc<T>(1) : weight[0]",
        (option("tile", "none", "index, weighted and smoothed"),),
    ),
    "the mass of probabilities is that of the first rows in every tile": Fault(
        "csrc/cpu/tile_labels.h",
        "__builtin_memcpy(mass, static_cast<const A*>(p.label_mass) + begin, bytes);",
        "__builtin_memcpy(mass, static_cast<const A*>(p.label_mass), bytes);",
        (option("tiles", "none", "probabilities, weighted and smoothed"),),
    ),
    "the softmax of statistics' gradients is forgotten in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "(g * q + load(softmax + lane)) * one_over_sum",
        "g * q * one_over_sum",
        (option("tile", "lse_square_scale", "index"),),
    ),
    "the factor of the entropy's gradient is not divided by the sum in tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "load(shifted + lane) * one_over_sum",
        "load(shifted + lane)",
        (option("tile", "none", "index"),),
    ),
    "0 times -inf is in the gradient of the entropy of tiles": Fault(
        "csrc/cpu/tile_labels.h",
        "(e == 0 ? Vec<A>{} : e * d * load(shifted_factor + lane))",
        "e * d * load(shifted_factor + lane)",
        (masked("tile", "0", "every other", "index"),),
    ),
    "0 times infinity at a target of probability 0 in tiles": Fault(
        "csrc/xent_formulas.h",
        "return p == 0 ? gradient : gradient + part;",
        "return gradient + part;",
        ("tests/test_regimes.py::test_statistics_with_a_masked_target[tile-2-0-float32]",),
    ),
    "the upstream gradient of a tile begins with the first row's": Fault(
        "csrc/cpu/row_lanes.h",
        "static_cast<const A*>(p.grad_loss) + first * p.grad_loss_stride;",
        "static_cast<const A*>(p.grad_loss);",
        (option("tiles", "none", "index"),),
    ),
    "per-row options of the first rows are used in every tile": Fault(
        "csrc/cpu/tile_labels.h",
        "return {p, begin + lane, n_rows - lane,",
        "return {p, lane, n_rows - lane,",
        (option("tiles", "all", "index"),),
    ),
    "rows beyond the innermost dimension are read as neighbours": Fault(
        "csrc/cpu/tile_memory.h",
        "const bool is_regular = inner == 0 || n_rows <= until_end;",
        "const bool is_regular = true;",
        (f"{LAYOUTS}test_strides_of_logits[sliced image-index-float32]",),
    ),
    "the last square of classes is a class off": Fault(
        "csrc/cpu/tile_memory.h",
        "if (count % 8 != 0) square(i, count - 8);",
        "if (count % 8 > 1) square(i, count - 8);",
        (option("tiles", "none", "index"),),
    ),
    "squares are taken of strided classes": Fault(
        "csrc/cpu/tile_memory.h",
        "if (class_stride_ != 1 || count < 8) return 0;",
        "if (count < 8) return 0;",
        (f"{LAYOUTS}test_strides_of_logits[every third class-index-float32]",),
    ),
    "two columns of a square are swapped": Fault(
        "csrc/cpu/tile_memory.h",
        "b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);\n"
        "    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);",
        "b[i + 2] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);\n"
        "    b[i + 1] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);",
        (option("tiles", "none", "index"),),
    ),
    "a tile's row is written beyond its end": Fault(
        "csrc/cpu/tile_memory.h",
        "if (i < n_rows) store_first(to + i, load(lanes + i), n_rows - i);",
        "if (i < n_rows) store(to + i, load(lanes + i));",
        (f"{LAYOUTS}test_nothing_is_written_outside_the_logits",),
    ),
    "a tile's last rows are not written": Fault(
        "csrc/cpu/tile_memory.h",
        "if (i < n_rows) store_first(to + i, load(lanes + i), n_rows - i);",
        "",
        (option("strided tiles", "none", "index"),),
    ),
}

NUMBERS = {
    "float16 is rounded towards 0 in columns": Fault(
        "csrc/cpu/load_store.h",
        "store_bits(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT |",
        "store_bits(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_ZERO |",
        (f"{OPS}test_all_16_bit_numbers_are_read_and_rounded_to_nearest_even",),
    ),
    "bfloat16 halves are rounded up": Fault(
        "csrc/cpu/load_store.h",
        "const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);",
        "const Bits rounded = bits + 0x8000;",
        (f"{OPS}test_all_16_bit_numbers_are_read_and_rounded_to_nearest_even",),
    ),
    "the first of a pair of vectors is written twice": Fault(
        "csrc/cpu/vector_pairs.h",
        "store(to + kLanes<Acc<T>>, pair.second);",
        "store(to + kLanes<Acc<T>>, pair.first);",
        (option("rows", "none", "index"),),
    ),
    "NaN is rounded to infinity in bfloat16": Fault(
        "csrc/cpu/load_store.h",
        "return kMayBeNan ? rounded | (Bits)(value != value) : rounded;",
        "return rounded;",
        (f"{OPS}test_all_16_bit_numbers_are_read_and_rounded_to_nearest_even",),
    ),
    "the maximum of lanes ignores one half": Fault(
        "csrc/cpu/simd.h",
        "return combine_lanes(v, [](auto a, auto b) { return a > b ? a : b; });",
        "return combine_lanes(v, [](auto a, auto b) { return a > b ? a : a; });",
        (option("rows", "none", "index"),),
    ),
    "lanes are added up in float": Fault(
        "csrc/cpu/simd.h",
        "using Double = typename VectorOf<double, kCount>::type;",
        "using Double = typename VectorOf<float, kCount>::type;",
        (option("rows", "none", "index", "float64"),),
    ),
}

CHOICE = {
    "the target's logit of a dropped row is read": Fault(
        "csrc/cpu/row_batch.h",
        "const bool has_target = is_kept && has_indices(p);",
        "const bool has_target = i < batch.n && has_indices(p);",
        ("tests/test_out_of_bounds.py",),
    ),
    "a block's maximum may be far above what it is guessed to be": Fault(
        "csrc/cpu/row_stats.h",
        "constexpr double kSlack = 8;",
        "constexpr double kSlack = 100;",
        ("tests/test_accuracy.py::test_class_far_above_earlier_ones",),
    ),
    "the lowest allowed instruction set is chosen": Fault(
        "csrc/cpu/capability.cpp",
        "if (allowed && capability.is_supported()) return capability;",
        'if (allowed && capability.name == std::string("portable")) return capability;',
        ("tests/test_package.py::test_capability_is_the_best_that_the_environment_allows",),
    ),
    "an unknown instruction set is the portable one": Fault(
        "csrc/cpu/capability.cpp",
        "  throw std::invalid_argument(",
        "  if (limit != nullptr) return kCapabilities[std::size(kCapabilities) - 1];\n"
        "  throw std::invalid_argument(",
        ("tests/test_package.py::test_unknown_capability",),
    ),
    "the last task is left out": Fault(
        "csrc/cpu/tasks.h",
        "for (int64_t i = next++; i < n_tasks; i = next++) task(i);",
        "for (int64_t i = next++; i < n_tasks - (n_tasks > 1); i = next++) task(i);",
        ("tests/test_kernels.py::test_shape[many rows of many classes-index-float32]",),
    ),
    "tasks are rounded down": Fault(
        "csrc/xent_math.h",
        "return (a + b - 1) / b;",
        "return a < b ? a : a / b;",
        ("tests/test_kernels.py::test_shape[more rows than a tile holds-index-float32]",),
    ),
    "rows of values beyond 2^24 take the row kernels": Fault(
        "csrc/cpu/kernels.h",
        "constexpr double kMaxOrigin = 0x1p24;",
        "constexpr double kMaxOrigin = 0x1p200;",
        ("tests/test_accuracy.py::test_infinities_nan_and_extremes_match_torch",),
    ),
    "the last row dimension is counted by its neighbour's stride": Fault(
        "csrc/xent_params.h",
        "offset += rest % size * layout.stride[d];",
        "offset += rest % size * layout.stride[d - (d > 1)];",
        ("tests/test_kernels.py::test_shape[volume-index-float32]", "tests/test_layouts.py"),
    ),
}

FROM_OUTSIDE = {
    "class weights of other classes are multiplied by no smoothing": Fault(
        "csrc/cpu/tile_kernels.h",
        "const bool has_spread = kHasSpread && labels.spread != 0;",
        "const bool has_spread = kHasSpread;",
        ("tests/test_accuracy.py::test_weight_of_an_absent_class",),
    ),
    "the argmax of lanes begins above the lowest number": Fault(
        "csrc/cpu/lane_stats.h",
        "Vec<A> top_ = -std::numeric_limits<A>::infinity() - Vec<A>{};",
        "Vec<A> top_ = std::numeric_limits<A>::lowest() - Vec<A>{};",
        ("tests/test_options.py::test_argmax_is_the_first_maximum",),
    ),
}

SPARSE = {
    "sparse labels on one class are not added up": Fault(
        "csrc/cpu/label_kernels.h",
        "weights[slots[slot]] += weights[k];",
        "weights[slots[slot]] = weights[k];",
        (f"{SPARSE_LABELS}test_layouts",),
    ),
    "sparse labels take the first free slot for that of their class": Fault(
        "csrc/cpu/label_kernels.h",
        " && classes[slots[slot]] != classes[k])",
        " && classes[slots[slot]] < 0)",
        (f"{SPARSE_LABELS}test_layouts",),
    ),
    "sparse labels: two infinite logits are subtracted": Fault(
        "csrc/cpu/label_kernels.h",
        "weights[k] != 0 && z[k] != z[top]",
        "weights[k] != 0",
        (f"{SPARSE_LABELS}test_labels_on_classes_of_minus_infinity_alone",),
    ),
    "sparse labels: a label of 0 at an infinite logit has an infinite loss": Fault(
        "csrc/cpu/label_kernels.h",
        "weights[k] != 0 && z[k] != z[top]",
        "z[k] != z[top]",
        (f"{SPARSE_LABELS}test_gradient_of_probabilities_at_infinite_logits",),
    ),
    "sparse labels: labels of other classes have no part of the softmax": Fault(
        "csrc/cpu/label_kernels.h",
        "smoothing.keep * (sum - weights[k])",
        "smoothing.keep * sum",
        (f"{SPARSE_LABELS}test_layouts",),
    ),
    "sparse labels of padding count": Fault(
        "csrc/cpu/label_kernels.h",
        "classes[k] = y == sparse.ignore_index ? -1 : checked_class(p, y);",
        "classes[k] = y == sparse.ignore_index ? 0 : checked_class(p, y);",
        (f"{SPARSE_LABELS}test_padding",),
    ),
    "sparse labels: smoothing keeps all of the extra loss": Fault(
        "csrc/cpu/label_kernels.h",
        "keep == 0 ? 0 : keep * extra_loss",
        "extra_loss",
        (f"{SPARSE_LABELS}test_options",),
    ),
    "sparse labels: the class with the least logit is the target": Fault(
        "csrc/cpu/label_kernels.h",
        "logits[k] > logits[top]",
        "logits[k] < logits[top]",
        (f"{SPARSE_LABELS}test_several_labels_near_1",),
    ),
    "sparse labels: gradients are not by the logits before the softcap": Fault(
        "csrc/cpu/label_kernels.h",
        "store_first(gradients + k, gradient * z.slope, n);",
        "store_first(gradients + k, gradient, n);",
        (f"{SPARSE_LABELS}test_options",),
    ),
    "sparse labels: rows of token weight 0 get gradients": Fault(
        "csrc/cpu/label_kernels.h",
        "if (token_weight(p, row) != 0) write_label_gradients_of_row<T>(p, sparse, row);",
        "write_label_gradients_of_row<T>(p, sparse, row);",
        (f"{SPARSE_LABELS}test_rows_left_out_have_no_gradient_of_statistics",),
    ),
    "rows with sparse labels have the class weight of their target": Fault(
        "csrc/cpu/row_batch.h",
        "batch.label_weight[i] = label_weight(p, row, y);",
        "batch.label_weight[i] = class_weight(p, y);",
        (f"{SPARSE_LABELS}test_long_rows",),
    ),
    "rows with sparse labels have no extra loss": Fault(
        "csrc/cpu/row_batch.h",
        "if (p.extra_loss != nullptr) loss += rows.read(p.extra_loss);",
        "",
        (f"{SPARSE_LABELS}test_long_rows",),
    ),
    "tiles with sparse labels have the class weights of their targets": Fault(
        "csrc/cpu/tile_labels.h",
        "return has_label_weight ? label_weight : target_weight;",
        "return target_weight;",
        (f"{SPARSE_LABELS}test_layouts",),
    ),
    "tiles with sparse labels have no extra loss": Fault(
        "csrc/cpu/tile_kernels.h",
        "if (p.extra_loss != nullptr) {",
        "if (false) {",
        (f"{SPARSE_LABELS}test_layouts",),
    ),
    "sparse labels below 0 are in range": Fault(
        "csrc/cpu/scan.cpp",
        "if ((0 <= y && y < p.vocab_size) || y == sparse.ignore_index) continue;",
        "if (y < p.vocab_size || y == sparse.ignore_index) continue;",
        (f"{SPARSE_LABELS}test_indices_out_of_range",),
    ),
    "log-probabilities are not capped": Fault(
        "csrc/cpu/label_kernels.h",
        "const Vec<A> d = transform(load_first(logits + k, n)).logit - max;",
        "const Vec<A> d = load_first(logits + k, n) - max;",
        ("tests/test_selected.py",),
    ),
    "log-probabilities of padding are not 0": Fault(
        "csrc/cpu/label_kernels.h",
        "*out = classes[k] < 0 ? A(0) : logits[k];",
        "*out = logits[k];",
        ("tests/test_selected.py",),
    ),
}


def shards(old: str, new: str, *tests: str, path: str = "csrc/xent_shards.h") -> Fault:
    """Return a fault of the operator that adds up shards, and the tests of test_shards."""
    return Fault(path, old, new, tuple(f"tests/test_shards.py::{test}" for test in tests))


ROWS_OF_TWO = "test_rows[native-two-torch.float64]"
SHARDS = {
    "shards: of equal maxima the last is the argmax": shards(
        "if (at(s.max, r) > at(s.max, top)) top = r;",
        "if (at(s.max, r) >= at(s.max, top)) top = r;",
        "test_ties_go_to_the_first_rank[native]",
    ),
    "shards: a gap between the ranks' classes passes": shards(
        "(first == end || first == next)",
        "(first >= end || first == next)",
        "test_wrong_ranges_are_nan[native-ranges0]",
    ),
    "shards: empty shards must begin where the last one ends": shards(
        "(first == end || first == next)",
        "(first == end)",
        "test_empty_shards_may_begin_anywhere[native]",
    ),
    "shards: the last classes may be missing": shards(
        "return is_right && end == static_cast<Acc>(s.n_classes);",
        "return is_right;",
        "test_wrong_ranges_are_nan[native-ranges2]",
    ),
    "shards: sums of confident rows lose their digits": shards(
        "others += r == top ? std::expm1(log_sum) : std::exp(",
        "others += r == top ? std::exp(log_sum) - 1 : std::exp(",
        "test_digits_of_confident_targets[native-30]",
    ),
    "shards: a class of another rank counts here": shards(
        "return at(s.part, rank) < 0 ? Acc(0) : Acc(1);",
        "return 1;",
        ROWS_OF_TWO,
    ),
    "shards: the argmax is not the class that is NaN": shards(
        "if (at(s.log_sum, r) != at(s.log_sum, r)) top = r;", "", "test_infinite_logits[native]"
    ),
    "shards: the rise is not that of the maximum": shards(
        "(log_sum - shards.at(s.log_sum, r)) - (shards.at(s.max, r) - max);",
        "log_sum - shards.at(s.log_sum, r);",
        ROWS_OF_TWO,
    ),
    "shards: a shard of -inf makes the entropy NaN": shards(
        "entropy += share == 0 ? Acc(0) : share",
        "entropy += share",
        "test_infinite_logits[native]",
    ),
    "shards: a shard of -inf without labels makes the loss NaN": shards(
        "(q == 0 ? Acc(0) : q * rise);", "q * rise;", "test_infinite_logits[native]"
    ),
    "shards: the part of a class that is elsewhere is added": shards(
        "(is_elsewhere ? Acc(0) : part)", "part", ROWS_OF_TWO
    ),
    "shards: the other shards' mass has this one's": shards(
        "r == s.rank ? Acc(0) : q;", "q;", ROWS_OF_TWO
    ),
    "shards: the own mass is that of another rank": shards(
        "if (r == s.rank) set(s.own_mass, q);",
        "set(s.own_mass, q);",
        "test_labels_on_all_classes[native-torch.float64]",
    ),
    "shards: the focal loss is by one label": shards(
        "focal_loss<ScalarMath<Acc>>(cross_entropy, mass,",
        "focal_loss<ScalarMath<Acc>>(cross_entropy, Acc(2),",
        "test_options[native]",
    ),
    "shards: the z-loss is missing": shards(
        "const Acc lse_square_scale = static_cast<Acc>(s.lse_square_scale);",
        "const Acc lse_square_scale = 0;",
        "test_options[native]",
    ),
    "shards: the gradient of the others has no token weight": shards(
        "of_others = weight * focal.slope * other_mass;",
        "of_others = focal.slope * other_mass;",
        "test_options[native]",
    ),
    "shards: a row with a class out of range has a loss": shards(
        "is_unread ? Acc(0) : is_bad ? nan : loss);",
        "is_unread ? Acc(0) : loss);",
        "test_options[native]",
    ),
    "shards: ranks may have different targets": shards(
        "s.label_mass == nullptr && mass != 1;",
        "false;",
        "test_ranks_with_different_targets[native-none]",
    ),
    "shards: a row that is left out has a gradient of NaN": shards(
        "set(s.other_mass, is_unread ? Acc(0) : is_bad",
        "set(s.other_mass, is_bad",
        "test_ranks_with_different_targets[native-none]",
    ),
    "shards: a row that is left out has an entropy": shards(
        "set(s.row_entropy, is_unread ? Acc(0) : entropy);",
        "set(s.row_entropy, entropy);",
        "test_options[native]",
    ),
    "shards: the last rows of a task are left out": shards(
        "run_pieces(threads, shards.n_rows, kTaskRows",
        "run_pieces(threads, shards.n_rows - 1, kTaskRows",
        ROWS_OF_TWO,
        path="csrc/cpu/shards.cpp",
    ),
    "shards: the stride of ranks is not checked": shards(
        "(shards.n_ranks == 1 || tensor.stride(0) == shards.rank_stride);",
        "true;",
        "test_errors[native-case5]",
        path="csrc/binding/shards.h",
    ),
    "shards: rows of another length pass": shards(
        "given->dim() == 1 && given->size(0) == shards.n_rows &&",
        "given->dim() == 1 &&",
        "test_errors[native-case8]",
        path="csrc/binding/shards.h",
    ),
    "shards: a rank beyond the last passes": shards(
        "0 <= shards.rank && shards.rank < shards.n_ranks",
        "0 <= shards.rank",
        "test_errors[native-case0]",
        path="csrc/binding/shards.h",
    ),
}

FAULTS = {
    **LAUNCH,
    **SCAN,
    **TARGET_APART,
    **ROWS,
    **ONE_ROW,
    **FORMULAS,
    **SWEEPS,
    **ARITHMETIC,
    **GENERAL,
    **LANES,
    **TILES,
    **NUMBERS,
    **CHOICE,
    **FROM_OUTSIDE,
    **SPARSE,
    **SHARDS,
}
