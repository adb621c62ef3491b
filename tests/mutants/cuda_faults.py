"""Faults of the CUDA kernels, their launchers and their binding, and the tests that find them."""

from .fault import Fault


def fault(name: str, part: str, old: str, new: str, unseen: str = "") -> Fault:
    """Return a fault of a file of csrc/cuda that the check of one part of the kernels sees."""
    folder = "csrc" if name.startswith("xent_") else "csrc/cuda"
    tests = (f"tests/test_cuda_native.py::test_part[{part}]",)
    return Fault(f"{folder}/{name}", old, new, tests, unseen)


def emulated(path: str, test: str, old: str, new: str) -> Fault:
    """Return a fault of a file of csrc that a test of the emulated operators sees."""
    return Fault(f"csrc/{path}", old, new, (f"tests/{test}",))


TEAMS = {
    "a barrier of a block is missing": fault("team.cuh", "forward", "      __syncthreads();\n", ""),
    "the barrier of a cluster is missing": fault(
        "team.cuh", "forward_backward", "    __cluster_barrier_wait();\n    stats", "    stats"
    ),
    "the warp that writes to other blocks does not release": fault(
        "team.cuh",
        "forward_backward-thread",
        "      __cluster_barrier_arrive();\n",
        "      __cluster_barrier_arrive_relaxed();\n",
    ),
    "rows share the memory of the exchange": fault(
        "team.cuh", "forward_backward-thread", "    turn_ ^= 1;\n", ""
    ),
    "lanes are merged without a common maximum": fault(
        "team.cuh", "forward", "  shift_stats(stats, max);\n", "  stats.max = max;\n"
    ),
    "lanes are merged in too few steps": fault(
        "team.cuh",
        "forward",
        "shift_stats(stats, max);\n#pragma unroll\n  for (int lane = 1; lane < kWarp; lane *= 2) {",
        "shift_stats(stats, max);\n  for (int lane = 2; lane < kWarp; lane *= 2) {",
    ),
    "the maximum of lanes is that of half of them": fault(
        "team.cuh",
        "forward",
        "  Acc max = stats.max;\n#pragma unroll\n  for (int lane = 1; lane < kWarp; lane *= 2) {",
        "  Acc max = stats.max;\n  for (int lane = 2; lane < kWarp; lane *= 2) {",
    ),
    "labels of other lanes are left out": fault(
        "team.cuh", "forward", "      stats.dot += __shfl_xor_sync(mask, stats.dot, lane);\n", ""
    ),
    "the mask of a part of a warp is that of the first part": fault(
        "team.cuh",
        "forward",
        "(in_block_ == kWarp ? ~0u : (1u << in_block_) - 1) << first;",
        "(in_block_ == kWarp ? ~0u : (1u << in_block_) - 1);",
    ),
    "the last warp of a block is left out": fault(
        "team.cuh",
        "forward",
        "stats = lane < n_warps ? exchange",
        "stats = lane < n_warps - (n_warps > 4) ? exchange",
    ),
    "the last block of a cluster is left out": fault(
        "team.cuh",
        "forward_backward",
        "stats = lane < n_blocks_ ? exchange",
        "stats = lane < n_blocks_ - 1 ? exchange",
    ),
    "blocks write to one place of the exchange": fault(
        "team.cuh",
        "forward_backward",
        "&exchange.blocks[turn_][block_]",
        "&exchange.blocks[turn_][0]",
    ),
}

SWEEPS = {
    "a vector too many is read": fault(
        "share.cuh", "forward", "bits[u] = w < end ? read", "bits[u] = w <= end ? read"
    ),
    "single elements are taken one by one": fault(
        "sweep.cuh",
        "forward",
        "i < view.n_edges; i += step) {\n    const int j = view.edge_class(i);\n    if (j",
        "i < view.n_edges; ++i) {\n    const int j = view.edge_class(i);\n    if (j",
    ),
    "sums are not moved to another maximum": fault(
        "sweep.cuh",
        "forward",
        "    this->sum *= exponential().to(Exp(by, max));\n",
        "",
    ),
    "what a row's exponentials have in common stays in its sum": fault(
        "sweep.cuh", "forward", "    stats.sum *= exponential.to_exact();\n", ""
    ),
    "a part of a row has the target of the part after it": fault(
        "share.cuh", "backward", "if (v < first || v >= end || in", "if (v < first || in"
    ),
    "a part of a row has the target of the part before it": fault(
        "share.cuh", "backward", "if (v < first || v >= end || in", "if (v >= end || in"
    ),
    "threads have the target of another group": fault(
        "share.cuh", "backward", " || in_group >= kCount * lanes)", ")"
    ),
    "the target is left out of another vector of its group": fault(
        "share.cuh", "forward", "in_group / lanes * kVector<T> + after", "after"
    ),
    "both numbers of a word are left out with the target": fault(
        "sweep.cuh",
        "forward",
        "(element & 1) != 0 ? 0x5410 : 0x3254;",
        "0x7654;",
    ),
    "the target is twice in the sum of a row's edges": fault(
        "sweep.cuh", "forward", "    if (j == apart) continue;\n", ""
    ),
    "the target is twice in the sum of a row's vectors": fault(
        "forward.cu",
        "forward",
        "      if (v == place.group) leave_out<T>(bits, place.element);\n",
        "",
    ),
    "the first edge is in the sum even if it is the target": fault(
        "forward_backward.cu", "forward_backward", "if (j != apart) add_element", "add_element"
    ),
    "the target is twice in the sum of general vectors": fault(
        "per_class_options.cu",
        "per_class_options",
        "j[i] == apart ? -kInfinity<A> : transformed(transform, z[i])",
        "transformed(transform, z[i])",
    ),
    "the target is twice in the sum of general edges": fault(
        "per_class_options.cu",
        "per_class_options",
        "        if (j[u] == apart) j[u] = INT32_MAX;\n",
        "",
    ),
    "the target is twice in the sum of a column": fault(
        "columns.cu",
        "columns",
        "!Spread<T, S>::kExists && rows.has_target_in_group(j)",
        "false",
    ),
    "the first rows alone leave their targets out": fault(
        "column_rows.cuh",
        "columns",
        "has |= static_cast<unsigned>(target[r] ^ j)",
        "has = !r && static_cast<unsigned>(target[r] ^ j)",
    ),
    "a part of a row begins where the one before it begins": fault(
        "share.cuh",
        "forward",
        "begin = min(part * per_part, n_vectors);",
        "begin = min((part - (part > 2)) * per_part, n_vectors);",
    ),
    "parts of a row all have its single elements": fault(
        "share.cuh", "forward", "edge_step = team.size() * parts;", "edge_step = team.size();"
    ),
    "labels' sums are not moved to another maximum": fault(
        "sweep.cuh",
        "forward",
        "if (this->mass != 0) add_labels(0, shift * with_lost(this->mass, this->lost_mass));",
        "if (this->mass == 0) add_labels(0, shift);",
    ),
    "an infinite sum becomes NaN by its compensation term": fault(
        "xent_formulas.h",
        "per_class_options",
        "return lost - lost == 0 ? sum + lost : sum;",
        "return sum + lost;",
    ),
    "a class of label 0 and logit -inf counts": fault(
        "sweep.cuh",
        "forward",
        "      if (t[i] != 0) sums.dot += t[i]",
        "      sums.dot += t[i]",
    ),
    "labels beyond a row's end are read": fault(
        "sweep.cuh",
        "forward",
        "      if (!kReadsLabels<S> || w < share.end) add(exponential, bits[u], w);\n",
        "      add(exponential, bits[u], w);\n",
    ),
    "labels are no part of the gradient of single elements": fault(
        "gradient.cuh",
        "backward",
        "    if constexpr (Spread<T, S>::kExists) t[0] = spread.at(j);\n    replace",
        "    replace",
    ),
    "a gradient's factor forgets what the exponentials have in common": fault(
        "gradient.cuh",
        "backward",
        "factor(row.factor * exponential.to_exact() *",
        "factor(row.factor *",
    ),
    "logits and gradient are taken to be aligned together": fault(
        "gradient.cuh", "backward", "  if (apart % 16 != 0) view.use_no_vectors();\n", ""
    ),
    "labels are taken to be aligned with the logits": fault(
        "labels.cuh", "backward", "is_aligned = is_vector_aligned(t + j);", "is_aligned = true;"
    ),
    "single elements of an ignored row are left as they were": fault(
        "gradient.cuh",
        "backward",
        "    out[view.edge_class(i)] = from_acc<T>(value);\n",
        "    if (i > 2) out[view.edge_class(i)] = from_acc<T>(value);\n",
    ),
    "the gradient's last vectors are left out": fault(
        "share.cuh",
        "backward",
        "if (v + u * lanes < end) body(u, v + u * lanes);",
        "if (v + u * lanes < end - (u > 0)) body(u, v + u * lanes);",
    ),
}

MEMORY = {
    "classes beyond the end are 0": fault("memory.cuh", "forward", "0xff80ff80u", "0u"),
    "the maximum of two vectors is that of half their elements": fault(
        "memory.cuh", "forward", "one(a.z, b.z), one(a.w, b.w))", "one(a.z, b.z), a.w)"
    ),
    "a pair's elements change places": fault(
        "memory.cuh",
        "backward",
        "__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);",
        "__floats2bfloat162_rn(x[2 * i + 1], x[2 * i]);",
    ),
    "single elements are rounded towards zero": fault(
        "memory.cuh", "backward", "return __float2bfloat16_rn(x);", "return __float2bfloat16_rz(x);"
    ),
    "a row's last element is in a vector and alone": fault(
        "memory.cuh",
        "forward",
        "n_edges = vocab_size - n_vectors * kVector<T>;",
        "n_edges = vocab_size - n_vectors * kVector<T> - (head > 6);",
    ),
}

TRANSFORMS = {
    "a sum of one scale is moved to another as if scales were one": fault(
        "transform.cuh",
        "forward",
        "return is_near() == other.is_near() ? exp2_approximate(other.offset - offset) : 0.0f;",
        "return exp2_approximate(other.offset - offset);",
    ),
    "great 16-bit logits are multiplied beyond float32's range": fault(
        "transform.cuh", "forward", "return fabsf(max) < 0x1p17f;", "return true;"
    ),
    "logits of 64 and more are not multiplied by log2(e)": fault(
        "transform.cuh", "forward", "return fabsf(max) < 0x1p17f;", "return fabsf(max) < 0x1p6f;"
    ),
    "sums of great 16-bit logits overflow": emulated(
        "cuda/transform.cuh",
        "test_cuda.py::test_sum_of_great_logits_is_finite",
        "kShrink = 0x1p-20f;",
        "kShrink = 1;",
    ),
    "a logit scale is no part of the maximum of 16-bit logits": fault(
        "transform.cuh",
        "forward",
        "float max_of(By by, float x) { return x * by.scale; }",
        "float max_of(By, float x) { return x; }",
    ),
    "a logit scale is no part of the sum of 16-bit logits": fault(
        "transform.cuh",
        "forward",
        "__device__ __forceinline__ float unit() const { return by.scale; }",
        "__device__ __forceinline__ float unit() const { return 1; }",
    ),
    "four reciprocals are in the wrong order": fault(
        "transform.cuh", "forward", "x[i] = of_first * x[i + 1];", "x[i] = of_first * x0;"
    ),
    "a capped logit has no sign": fault(
        "transform.cuh",
        "forward",
        "x[i] = copysignf(fmaf(r[i], 2 * by.cap, -by.cap), x[i]);",
        "x[i] = fmaf(r[i], 2 * by.cap, -by.cap);",
    ),
    "a capped logit's slope is that of its exponential": fault(
        "transform.cuh", "backward", "slopes[i] *= -r[i] * r[i];", "slopes[i] *= -r[i];"
    ),
    "large negative logits are taken for small ones": emulated(
        "cuda/memory.cuh",
        "test_cuda.py::test_one_large_logit_among_small_softcapped_ones",
        "__hmax2_nan(__habs2(a), __habs2(b))",
        "__hmax2_nan(a, b)",
    ),
    "large bfloat16 logits that are no float16 numbers are taken for small ones": emulated(
        "cuda/memory.cuh",
        "test_cuda.py::test_one_large_logit_among_small_softcapped_ones",
        "__hmax2_nan(",
        "__hmax2(",
    ),
    "the first logit of a pair is taken for a small one": emulated(
        "cuda/memory.cuh",
        "test_cuda.py::test_one_large_logit_among_small_softcapped_ones",
        "return top < beyond && top << 16 < beyond;",
        "return top < beyond;",
    ),
    "small groups of a row are those of the row before, too": emulated(
        "cuda/forward_backward.cu",
        "test_cuda.py::test_one_group_of_large_softcapped_logits_in_fused_mode",
        "    small_groups_ = 0;\n",
        "    if (row.index == 0) small_groups_ = 0;\n",
    ),
    "groups beyond the 32nd are small where the first are": emulated(
        "cuda/forward_backward.cu",
        "test_cuda.py::test_one_group_of_large_softcapped_logits_in_fused_mode",
        "kIsCapped<S> && g < 32 && (small_groups_ >> g & 1) != 0;",
        "kIsCapped<S> && (small_groups_ >> (g & 31) & 1) != 0;",
    ),
    "the next group is small where one is": emulated(
        "cuda/forward_backward.cu",
        "test_cuda.py::test_one_group_of_large_softcapped_logits_in_fused_mode",
        "(small_groups_ >> g & 1) != 0;",
        "(small_groups_ >> (g - 1) & 1) != 0;",
    ),
    "softcapped logits with label smoothing have no spread": fault(
        "dispatch.cuh",
        "forward",
        "has_spread(p) ? body(type, Type<UniformCapped>{})",
        "false ? body(type, Type<UniformCapped>{})",
    ),
    "the polynomial of the tanh is used beyond its range": emulated(
        "cuda/launch.h",
        "test_cuda.py::test_small_softcapped_logits",
        "kTanhSeriesEnd = 2.0 / 3;",
        "kTanhSeriesEnd = 0.9;",
    ),
    "terms of the tanh's polynomial leave float32's range": emulated(
        "cuda/launch.h",
        "test_cuda.py::test_softcapped_logits_of_any_size",
        "0x1p-13 < inner_or_0 && inner_or_0 < 0x1p13;",
        "true;",
    ),
    "a small logit's slope is that of half its tanh": emulated(
        "cuda/transform.cuh",
        "test_cuda.py::test_small_softcapped_logits",
        "set_fma(slopes, half_tanh, half_tanh, -0.25f);",
        "set_product(slopes, half_tanh, half_tanh);\n    set_fma(slopes, slopes, 0.25f, -0.25f);",
    ),
    "the first of the vectors with a large logit stands for all": emulated(
        "cuda/share.cuh",
        "test_cuda.py::test_one_large_logit_among_small_softcapped_ones",
        "      for (int u = 1; u < kCount; ++u) left[u - 1] = left[u];\n",
        "      for (int u = 1; u < 1; ++u) left[u - 1] = left[u];\n",
    ),
    "the second sum of a vector is left out": fault(
        "packed.cuh", "forward", "return even + odd;", "return 2 * even;"
    ),
    "the second numbers of pairs are products alone": emulated(
        "cuda/packed.cuh",
        "test_cuda.py::test_small_softcapped_logits",
        "__ffma2_rn(pair_at(a, i), pair_at(b, i), pair_at(c, i));",
        "__ffma2_rn(pair_at(a, i), pair_at(b, i), make_float2(at(c, i), 0));",
    ),
    "the sum of capped logits is in powers of 2": fault(
        "transform.cuh",
        "forward",
        "float unit() const { return 1 / kLog2E; }",
        "float unit() const { return 1; }",
    ),
    "the sum of all logits is not relative to their maximum": fault(
        "sweep.cuh",
        "forward",
        "fma(-stats.mass, origin, unit * this->dot)",
        "unit * this->dot + 0 * origin",
    ),
    "the sum of float32 logits stays relative to another maximum": emulated(
        "cuda/sweep.cuh",
        "test_cuda.py::test_transformed_and_uniformly_smoothed_rows",
        "kHasSpread && (Exp::kIsRelative || !kIsUniform)",
        "kHasSpread && !kIsUniform",
    ),
    "rounding errors of the sum of all logits are lost": emulated(
        "cuda/sweep.cuh",
        "test_cuda.py::test_sum_of_all_logits",
        "unit * this->dot), unit * this->lost_dot);",
        "unit * this->dot), A(0));",
    ),
    "vectors beyond a row's end are in the sum of all logits": fault(
        "share.cuh",
        "forward",
        "share.for_vectors(v, [&](int u, int w) { body(of, bits[u], w); });",
        "for (int u = 0; u < kCount; ++u) body(of, bits[u], v + u * share.lanes);",
    ),
    "what stands for the target of a capped row is in its sum": emulated(
        "cuda/sweep.cuh",
        "test_cuda.py::test_target_of_a_softcap_that_all_reach",
        "    stats.sum -= stats.exponential().power(x[0]);\n",
        "",
    ),
    "a gradient forgets the logit scale": fault(
        "gradient.cuh",
        "backward",
        "exponential.to_exact() * common_slope(transform)",
        "exponential.to_exact() * (kIsCapped<S> ? -4 : 1)",
    ),
    "the labels' gradient forgets the logit scale": fault(
        "gradient.cuh",
        "backward",
        "spread_factor(row.spread * common_slope(transform))",
        "spread_factor(row.spread * (kIsCapped<S> ? -4 : 1))",
    ),
    "a target's logit is not transformed": fault(
        "forward.cu", "forward", "transformed(transform, x, kIsCapped<S>)", "x"
    ),
    "a target's gradient is by its transformed logit": fault(
        "backward.cu", "backward", "* slope_at(transform, x, kIsCapped<S>)", ""
    ),
    "a target's gradient is by its transformed logit in fused mode": fault(
        "forward_backward.cu",
        "forward_backward",
        "* slope_at(transform, x, kIsCapped<S>)",
        "",
    ),
    "strided logits are not transformed": fault(
        "plan.h", "columns", "(regime == Regime::columns && (scaled || capped))", "false"
    ),
    "softcapped rows have no class weights": fault(
        "launch.cpp", "forward", "p.dtype == DType::float64 || reads_labels(p);", "false;"
    ),
    "softcapped rows hold as many vectors in registers as plain ones": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py::test_softcap_leaves_fewer_vectors_in_registers",
        "shape.capped ? 4 : 8;",
        "8;",
    ),
    "a great softcap costs digits": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_softcap_far_above_the_logits",
        "p.softcap > kMaxFastSoftcap ||",
        "",
    ),
    "negative logit scales have the least logit as maximum": fault(
        "launch.cpp", "forward", "!(p.logit_scale > 0) ||", ""
    ),
}

LABELS = {
    "a row of weight 0 is read": fault(
        "labels.cuh",
        "per_class_options-address",
        "  if (has_no_weight(p, row)) return {};\n",
        "",
    ),
    "a negative target is a class": fault(
        "labels.cuh", "backward", "index < 0 || index >= p.vocab_size;", "index >= p.vocab_size;"
    ),
    "the number of classes is a class": fault(
        "labels.cuh", "forward", "index >= p.vocab_size;", "index > p.vocab_size;"
    ),
    "int32 targets are read as int64": fault(
        "xent_rows.h",
        "forward",
        "static_cast<const int32_t*>(p.target)[row]",
        "static_cast<const int64_t*>(p.target)[row / 2]",
    ),
    "the target's class weight is left out": fault(
        "xent_rows.h",
        "forward",
        "Acc(0) : class_weight<Acc>(p, target);",
        "Acc(0) : Acc(1);",
    ),
    "smoothing is spread and not taken from the target": fault(
        "xent_rows.h",
        "forward",
        "smoothing.keep * of_label",
        "of_label",
    ),
    "probabilities are not smoothed": fault(
        "labels.cuh",
        "forward",
        "A(t == nullptr) : smoothing.uniform;",
        "A(t == nullptr) : A(0);",
    ),
    "class weights of probabilities are left out": fault(
        "labels.cuh",
        "forward",
        "return weight == nullptr ? value : value * weight[j];",
        "return value;",
    ),
    "labels of a vector have the class weights of its first half": fault(
        "labels.cuh",
        "forward",
        "values[begin + i] = smooth(read[i], j + begin + i);",
        "values[begin + i] = smooth(read[i], j + i);",
    ),
    "a target out of range makes a loss of 0": fault(
        "labels.cuh",
        "forward",
        "return target.is_bad ? kNaN<A> : A(0);",
        "return 0 * A(target.is_bad);",
    ),
    "the focal loss is the plain one": fault(
        "xent_rows.h",
        "forward",
        "    results.loss = focal.loss;\n",
        "",
    ),
    "the focal loss has the plain one's gradient": fault(
        "xent_rows.h",
        "forward_backward",
        "    results.slope = focal.slope;\n",
        "",
    ),
    "the saved slope of the focal loss is not used": fault(
        "xent_rows.h",
        "backward",
        "  if (p.focal_gamma != 0) upstream.g *= results.slope;\n",
        "",
    ),
    "the z-loss is the square of the sum's logarithm": fault(
        "xent_rows.h",
        "forward",
        "lse_square_scale,\n                             results.max + results.log_sum);",
        "lse_square_scale, results.log_sum);",
    ),
    "the z-loss's gradient is half of it": fault(
        "xent_rows.h",
        "backward",
        "upstream.softmax = 2 * upstream.g",
        "upstream.softmax = upstream.g",
    ),
    "the gradient of lse has the other sign": fault(
        "xent_rows.h",
        "backward",
        "  if (p.grad_lse != nullptr) upstream.softmax +=",
        "  if (p.grad_lse != nullptr) upstream.softmax -=",
    ),
    "token weights are no part of the gradient": fault(
        "xent_rows.h",
        "backward",
        "upstream{grad_loss * token_weight<Acc>(p, row), 0, 0}",
        "upstream{grad_loss, 0, 0}",
    ),
    "token weights are no part of the loss": fault(
        "xent_rows.h",
        "forward",
        "token_weight<Acc>(p, row), lse_square_scale,",
        "Acc(1), lse_square_scale,",
    ),
    "a gradient is not divided by the total weight": fault(
        "labels.cuh", "backward", "scale / divisor * unit;", "scale * unit;"
    ),
    "the upstream gradient of a row is the first row's": fault(
        "labels.cuh", "backward", "[row * p.grad_loss_stride] * scale;", "[0 * row] * scale;"
    ),
    "class weights' sum is the number of classes": fault(
        "labels.cuh",
        "backward",
        "return a.weight_sum_on_device == nullptr ? static_cast<A>(a.vocab_size)",
        "return a.vocab_size > 0 ? static_cast<A>(a.vocab_size)",
    ),
    "a target's gradient forgets the softmax's own terms": fault(
        "xent_formulas.h",
        "backward",
        "return p == 0 ? gradient : gradient + part;",
        "return gradient;",
    ),
    "a target of probability 0 has a gradient of NaN": fault(
        "xent_formulas.h",
        "per_class_options",
        "return p == 0 ? gradient : gradient + part;",
        "return gradient + part;",
    ),
    "rows of four dimensions are counted as if they were three": fault(
        "xent_params.h",
        "columns",
        "for (int d = layout.n_dims - 1; d > 0; --d) {",
        "for (int d = layout.n_dims - 1; d > (sizeof(Row) == 4 && layout.n_dims > 3); --d) {",
    ),
}

ROWS = {
    "the target's gradient is that of other classes": fault(
        "backward.cu",
        "backward",
        "    if (has_target) {\n",
        "    if (false) {\n",
    ),
    "an ignored row's gradient of 0 is scaled": Fault(
        "csrc/cuda/backward.cu",
        "    if (read_target(a, row).is_ignored) continue;\n",
        "",
        ("tests/test_cuda_native.py::test_races",),
    ),
    "a gradient stays unscaled if the first row's upstream is 1": Fault(
        "csrc/cuda/backward.cu",
        "if (a.grad_loss_stride == 0 && grad_loss_of(a, scale, 0) == 1) return;",
        "if (grad_loss_of(a, scale, 0) == 1) return;",
        ("tests/test_cuda_native.py::test_races",),
    ),
    "the first vectors of a share stand for all": fault(
        "backward.cu", "backward", "    read(v + share.step);\n", ""
    ),
    "a target out of range has a gradient of 0": fault(
        "backward.cu",
        "backward",
        "unread_value<A>(target), team",
        "A(0), team",
    ),
    "the last part of a row is not merged": fault(
        "merge_parts.cuh",
        "forward",
        "for (int part = 1; part < parts; ++part)",
        "for (int part = 1; part < parts - 1; ++part)",
    ),
    "the target of a row in parts is class 0": fault(
        "merge_parts.cuh",
        "forward",
        "to_acc(logits[target.index]);",
        "to_acc(logits[0]);",
    ),
    "an ignored row of several parts is not written": fault(
        "forward.cu",
        "forward",
        "if (team.is_leader() && team.part() == 0) write_unread_row",
        "if (team.is_leader() && team.part() == 3) write_unread_row",
    ),
    "the workspace of rows in parts is too small": fault(
        "launch.cpp",
        "forward",
        "return p.n_rows * plan.parts * bytes;",
        "return p.n_rows * (plan.parts - 1) * bytes;",
    ),
    "an ignored row is read": fault(
        "forward_backward.cu",
        "forward_backward-address",
        "    if (!row.is_read) {\n",
        """
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row.index);
    if (to_acc(logits[a.vocab_size / 2]) > A(1e30)) return;
    if (!row.is_read) {
""",
    ),
    "the kernel does not wait for the copies": fault(
        "forward_backward.cu", "forward_backward", "    wait_for_copies();\n", ""
    ),
    "no copy of the next row into shared memory": fault(
        "forward_backward.cu",
        "forward_backward",
        "      if (next.is_read) fetch_registers(next, next_share, g);\n",
        "",
    ),
    "the next row's first element is that of this row": fault(
        "forward_backward.cu",
        "forward_backward",
        "    if (next.is_read) fetch_edge(next, next_share);\n",
        "",
    ),
    "the next row is copied over this one before it is read": fault(
        "forward_backward.cu",
        "forward_backward",
        "      if (is_there(share, kHeld + g)) {\n        read(bits, row, share, kHeld + g);\n",
        "      if (next.is_read) fetch_shared(next, next_share, g);\n"
        "      if (is_there(share, kHeld + g)) {\n        read(bits, row, share, kHeld + g);\n",
    ),
    "the next row is taken to lie in memory as this one does": fault(
        "forward_backward.cu",
        "forward_backward",
        "ShareFor<S>(team, next.view.n_vectors));",
        "ShareFor<S>(team, row.view.n_vectors));",
    ),
    "a group that does not fit is read from shared memory": fault(
        "forward_backward.cu",
        "forward_backward",
        "if (g - kHeld < n_shared_) {",
        "if (g - kHeld <= n_shared_) {",
    ),
    "the part of a row that does not fit gets no gradient": fault(
        "forward_backward.cu",
        "forward_backward",
        "for (int g = kHeld + n_shared_; is_there(share, g); ++g) {",
        "for (int g = kHeld + n_shared_ + 1; is_there(share, g); ++g) {",
    ),
    "only the leader adds the target": fault(
        "forward_backward.cu",
        "forward_backward",
        "const A x = target >= 0 ?",
        "const A x = team.is_leader() && target >= 0 ?",
    ),
    "the target's logit is read when the gradient is there": fault(
        "forward_backward.cu",
        "forward_backward",
        "      row.out[target] = from_acc<T>(gradient.at_target *",
        "      const A late = to_acc(row.view.data[target]);\n"
        "      row.out[target] = from_acc<T>(\n"
        "          backward_of_row(a, scale, row.index, target, results, true, late).at_target *",
    ),
    "no request for more than 48 KiB of shared memory": fault(
        "forward_backward.cu",
        "forward_backward",
        "cudaError_t error = allow_shared(kernel, shared);",
        "cudaError_t error = allow_shared(kernel, 0);",
    ),
    "a cluster's blocks write to those that have not started": fault(
        "forward_backward.cu",
        "forward_backward",
        "  if (gridDim.x > 1) cooperative_groups::this_cluster().sync();\n",
        "",
        unseen="the emulator starts all blocks of a cluster before one of them runs",
    ),
}

LANE_ROWS = {
    "a lane has the stats of its team's last row": fault(
        "forward.cu",
        "forward",
        "    if (team.rank() == pass) stats = merged;\n",
        "    stats = merged;\n",
    ),
    "the target is twice in the sum of a short row": fault(
        "forward.cu",
        "forward",
        "      if (v == group) leave_out<T>(bits, place.element(team));\n",
        "",
    ),
    "a short row begins with the vectors of the row before it": fault(
        "forward.cu", "forward", "    read(share.first);\n  };\n", "  };\n"
    ),
    "a short row that is not read has no loss": fault(
        "forward.cu", "forward", "  } else if (mine.exists()) {\n", "  } else if (false) {\n"
    ),
    "lanes beyond the passes have rows": emulated(
        "cuda/warp_rows.cuh",
        "test_cuda.py::test_results_do_not_depend_on_the_schedule",
        "lane() < n_passes_ && row < n_rows",
        "row < n_rows",
    ),
    "the rows of a team are those of the team before it": fault(
        "warp_rows.cuh", "forward", "int64_t{team} * n_passes_ + lane();", "team + lane();"
    ),
    "a pass has the row of the first lane": fault(
        "warp_rows.cuh",
        "backward",
        "return __shfl_sync(~0u, x, pass, size_);",
        "return __shfl_sync(~0u, x, 0, size_);",
    ),
    "the target of a short row is in the group of another thread": fault(
        "warp_rows.cuh",
        "forward",
        "vector & ~((kCount - 1) * team.size());",
        "vector & ~(kCount - 1);",
    ),
    "the target of a short row is in the first vector of its group": fault(
        "warp_rows.cuh",
        "forward",
        "return u * kVector<T> + (after & (kVector<T> - 1));",
        "return after & (kVector<T> - 1);",
    ),
    "the target of a short row is counted from its first class": fault(
        "warp_rows.cuh", "forward", ": after(j - view.head), vector", ": after(j), vector"
    ),
    "teams have more rows than lanes": emulated(
        "cuda/warp_rows.cuh",
        "test_cuda.py::test_short_rows",
        "static_cast<int>(std::min<int64_t>(ceil_div(a.n_rows, most), plan.team));",
        "static_cast<int>(ceil_div(a.n_rows, most));",
    ),
    "a group is whole though a vector is missing": fault(
        "share.cuh", "backward", "end + lane + 1 - kCount", "end + lane + 2 - kCount"
    ),
    "a short row's target has the gradient of other classes": fault(
        "backward.cu", "backward", "  if (is_mine_read) {\n    my_out", "  if (false) {\n    my_out"
    ),
    "a short row that is not read has no gradient": fault(
        "backward.cu", "backward", "    } else if (state == 1) {\n", "    } else if (false) {\n"
    ),
    "targets' logits of short rows are overwritten before they are read": Fault(
        "csrc/cuda/backward.cu",
        "  __syncwarp();  // the lanes have read",
        "  // the lanes have read",
        ("tests/test_cuda_native.py::test_races",),
    ),
    "targets' gradients of short rows are overwritten": Fault(
        "csrc/cuda/backward.cu",
        "  __syncwarp();  // the teams have written",
        "  // the teams have written",
        ("tests/test_cuda_native.py::test_races",),
    ),
    "many short rows have a team each": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py::test_teams_of_a_warp_have_several_rows",
        "    plan.max_groups = static_cast<int>(blocks);\n",
        "",
    ),
    "the last wave of blocks of short rows is nearly empty": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py::test_teams_of_a_warp_have_several_rows",
        "if (4 * blocks < 3 * slots",
        "if (4 * blocks < slots",
    ),
    "softcapped short rows are planned for kernels that they lack": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py::test_teams_of_a_warp_have_several_rows",
        "&& !shape.spread && !shape.capped;",
        "&& !shape.spread;",
    ),
}

GENERAL = {
    "the moment is not moved with the maximum": fault(
        "per_class_options.cuh",
        "per_class_options",
        "    moment = factor == 0 ? A(0) : factor * moment;\n",
        "",
    ),
    "the moment is moved by the maximum and not rescaled": fault(
        "per_class_options.cuh",
        "per_class_options",
        "moment = with_lost(moment, lost_moment) + shift * with_lost(this->sum, this->lost_sum);",
        "moment = with_lost(moment, lost_moment);",
    ),
    "a sum's compensation term is not rescaled": fault(
        "sweep.cuh",
        "per_class_options",
        "    if (max != this->max) lost_sum *= exp_nonpositive(this->max - max);\n",
        "",
    ),
    "the moment's compensation term is counted twice": emulated(
        "cuda/per_class_options.cuh",
        "test_cuda.py::test_compensation_terms_are_rescaled",
        "    lost_moment = 0;\n",
        "",
    ),
    "the argmax is the last of the greatest in a vector": fault(
        "per_class_options.cuh",
        "per_class_options",
        "if (!is_above(result(), z[i], j[i])) continue;",
        "if (z[i] < top) continue;",
    ),
    "NaN is not the greatest": fault(
        "per_class_options.cuh",
        "per_class_options",
        "may_be_top |= !(z[i] < top);",
        "may_be_top |= z[i] >= top;",
    ),
    "an exponential of 0 and a logit of -inf make a moment of NaN": fault(
        "per_class_options.cuh",
        "per_class_options",
        "if (e != 0) sums[1] += e * d;",
        "sums[1] += e * d;",
    ),
    "an exponential of 0 and a logit of -inf make a gradient of NaN": fault(
        "per_class_options.cuh",
        "per_class_options",
        "if (e != 0) value += e * d * this->shifted_factor;",
        "value += e * d * this->shifted_factor;",
    ),
    "threads without classes provide the argmax of rows of -inf": emulated(
        "xent_math.h",
        "test_cuda.py::test_argmax_with_idle_threads",
        "other.argmax >= 0 && is_above",
        "is_above",
    ),
    "a saturated softcap has no derivative": fault(
        "transform.cuh",
        "per_class_options",
        "  const A e = exp_nonpositive(-2 * fabs(x * t.inner)), r = reciprocal(1 + e);\n"
        "  return 4 * t.scale * e * r * r;\n",
        "  const A y = tanh(x * t.inner);\n  return t.scale * (1 - y * y);\n",
    ),
    "the softcap's derivative forgets the scale": fault(
        "transform.cuh",
        "per_class_options",
        "return 4 * t.scale * e * r * r;",
        "return 4 * e * r * r;",
    ),
    "the scale is no part of a capped logit": fault(
        "launch.h",
        "per_class_options",
        "p.softcap == 0 ? 0 : p.logit_scale / p.softcap;",
        "p.softcap == 0 ? 0 : 1 / p.softcap;",
    ),
    "the entropy's gradient forgets the entropy": fault(
        "xent_rows.h",
        "per_class_options",
        "grad_entropy * (results.entropy - results.log_sum);",
        "grad_entropy * results.log_sum;",
    ),
    "the target's derivative is left out": fault(
        "per_class_options.cu",
        "per_class_options",
        "from_acc<T>(at_target * slope_at(view.transform, x))",
        "from_acc<T>(at_target)",
    ),
    "a team does not wait for its statistics": fault(
        "per_class_options.cu",
        "per_class_options",
        "    wait();\n    if (rank >= n) continue;\n",
        "    if (rank >= n) continue;\n",
    ),
    "the next row's statistics overwrite what is being read": fault(
        "per_class_options.cu",
        "per_class_options-thread",
        "  wait();  // the next row's statistics go where these are\n",
        "",
    ),
    "with a softcap, a target out of range has a gradient of 0": fault(
        "per_class_options.cu",
        "per_class_options",
        "fill_any_row(a, out, value, team);",
        "fill_any_row(a, out, A(0), team);",
    ),
    "strided rows are filled in part": fault(
        "per_class_options.cu",
        "per_class_options",
        "j += share.edge_step) {\n    out",
        "j += share.edge_step + 1) {\n    out",
    ),
    "the last part of a row's statistics is not merged": fault(
        "merge_parts.cuh",
        "per_class_options",
        "for (int part = 1; part < parts; ++part)",
        "for (int part = 1; part < parts - 1; ++part)",
    ),
    "the target of a row in parts is not transformed": fault(
        "merge_parts.cuh",
        "per_class_options",
        "const Acc<T> z = transformed(transform_of<Acc<T>>(a), x);",
        "const Acc<T> z = x;",
    ),
    "the backward lacks the entropy": fault(
        "xent_rows.h",
        "per_class_options",
        "p.grad_entropy == nullptr ? Acc(0) : acc_at<Acc>(p, p.entropy, row)};",
        "Acc(0)};",
    ),
    "strided logits are read as vectors": fault(
        "per_class_options.cu",
        "per_class_options",
        "const bool is_adjacent = stride == 1 && (out",
        "const bool is_adjacent = (out",
    ),
    "a strided gradient is written as vectors": fault(
        "per_class_options.cu",
        "per_class_options",
        "(out == nullptr || a.grad_layout.class_stride == 1) &&",
        "",
    ),
    "classes beyond the end may be the greatest": fault(
        "per_class_options.cu",
        "per_class_options",
        "z[u] = is_there ? logit(j[u]) : -kInfinity<A>;",
        "z[u] = is_there ? logit(j[u]) : A(0);",
    ),
}

COLUMNS = {
    "a class too many is in a row's gradient": fault(
        "column_rows.cuh",
        "columns",
        "body(j, vocab_size - j);",
        "body(j, kGroup);",
    ),
    "the workers' statistics are not awaited": fault(
        "columns.cu",
        "columns",
        "    }\n    __syncthreads();\n    for (int slot",
        "    }\n    for (int slot",
    ),
    "the rows' gradients are not awaited": fault(
        "columns.cu",
        "columns",
        "    }\n    __syncthreads();\n    if (has_backward && has_rows)",
        "    }\n    if (has_backward && has_rows)",
    ),
    "a strided row's compensation term is not rescaled": fault(
        "sweep.cuh",
        "columns",
        "    if (max != this->max) lost_sum *= exp_nonpositive(this->max - max);\n",
        "",
    ),
    "a strided row's compensation term is dropped": emulated(
        "cuda/sweep.cuh",
        "test_cuda.py::test_small_exponentials_beside_a_large_one",
        "    stats.sum = with_lost(stats.sum, lost_sum);\n",
        "",
    ),
    "the last worker's classes are left out": fault(
        "columns.cu",
        "columns",
        "for (int i = 1; i < n_workers; ++i) merge_stats",
        "for (int i = 1; i < n_workers - 1; ++i) merge_stats",
    ),
    "each row of a vector has the labels of its first": fault(
        "column_rows.cuh",
        "columns",
        "if (R == 1 || kIsUniform<S> || is_shared) {",
        "if (R == 1 || j >= 0) {",
    ),
    "ignored rows of a vector get a gradient": fault(
        "columns.cu", "columns", "x[r] = rows.is_kept[r] ? value : A(0);", "x[r] = value;"
    ),
    "the targets of other workers are written": fault(
        "column_rows.cuh",
        "columns",
        "return j >= 0 && (j / kGroup & (n_workers - 1)) == worker;",
        "return j >= 0 && (j & (n_workers - 1)) == worker;",
    ),
    "rows beyond the last one are written": fault(
        "columns.cu", "columns", "      if (first + slot >= a.n_rows) continue;\n", ""
    ),
    "a strided target that is no class has a gradient of 0": fault(
        "columns.cu",
        "columns",
        "return {{0, value, 0}, 0};",
        "return {{0, A(0), 0}, 0};",
    ),
    "rows are used before all are in shared memory": fault(
        "columns.cu",
        "columns",
        "n_staged);\n      __syncthreads();\n    }\n    const int64_t row",
        "n_staged);\n    }\n    const int64_t row",
    ),
    "gradients leave shared memory before all are written": fault(
        "columns.cu",
        "columns",
        "    __syncthreads();  // the next rows' stats overwrite these gradients\n",
        "",
    ),
    "single elements after the vectors of staged rows are not read": fault(
        "staged.cuh",
        "columns",
        "    if (last < n) *at(0, last) = global[last];\n",
        "",
    ),
    "single elements after the vectors of staged rows are not written": fault(
        "staged.cuh",
        "columns",
        "    if (last < n) global[last] = *at(0, last);\n",
        "",
    ),
}

LAUNCHERS = {
    "the shared memory of rows in vectors is that of one row": fault(
        "plan.cpp",
        "columns-address",
        "stats = 4 * acc * plan.threads * plan.row_vector;",
        "stats = 4 * acc * plan.threads;",
    ),
    "float32 probabilities are read as 16-bit ones": fault(
        "dispatch.cuh",
        "forward",
        "if (!has_indices(p) && p.target_dtype == p.dtype) return body(type, type);",
        "if (!has_indices(p)) return body(type, type);",
    ),
    "smoothed labels run in the kernels of plain ones": fault(
        "xent_params.h",
        "forward",
        "return !has_indices(p) || p.label_smoothing != 0;",
        "return !has_indices(p);",
    ),
    "the last rows have no block": fault(
        "dispatch.cuh",
        "columns",
        "ceil_div(units, per_block)",
        "ceil_div(units - 1, per_block)",
    ),
    "scaled logits run in the kernels of plain ones": fault(
        "xent_params.h",
        "forward",
        "return p.softcap != 0 || p.logit_scale != 1;",
        "return p.softcap != 0;",
    ),
    "rows in vectors may end within one": fault(
        "launch.cpp",
        "columns",
        "if (layout.size[inner] % elements != 0 || layout.class_stride % elements != 0)",
        "if (layout.class_stride % elements != 0)",
    ),
    "classes of rows in vectors may begin within one": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_row_vectors_need_aligned_classes",
        "if (layout.size[inner] % elements != 0 || layout.class_stride % elements != 0)",
        "if (layout.size[inner] % elements != 0)",
    ),
    "batches of rows in vectors may begin within one": fault(
        "launch.cpp",
        "columns",
        "    if (layout.stride[d] % elements != 0) return false;\n",
        "    if (d > 0 && layout.stride[d] % elements != 0) return false;\n",
    ),
    "rows in vectors may begin anywhere": fault(
        "launch.cpp",
        "columns",
        "reinterpret_cast<uintptr_t>(data) % 16 != 0 || layout.stride[inner] != 1",
        "layout.stride[inner] != 1",
    ),
    "the gradient's layout is not checked": fault(
        "launch.cpp", "backward", "  add(p.grad_logits, p.grad_layout);\n", ""
    ),
    "the probabilities' layout is not checked": fault(
        "launch.cpp",
        "columns",
        "  if (!has_indices(p)) add(p.target, p.target_layout);\n",
        "",
    ),
    "smoothing is divided by one class less": fault(
        "xent_rows.h",
        "forward",
        "static_cast<double>(p.vocab_size)}",
        "static_cast<double>(p.vocab_size - 1)}",
    ),
    "rows are split over clusters where there are none": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "return device.capability >= 90;",
        "return device.capability >= 80;",
    ),
    "few rows are split into parts that fill no whole waves": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "waves <= kMostWaves && best < 90",
        "waves <= kMostWaves && best < 1",
    ),
    "rows of a few hundred classes always have half as many threads": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "is_enough ? half : wanted",
        "half",
    ),
    "few rows get no clusters": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "    share_few_rows(plan, shape, device);\n",
        "",
    ),
    "few rows get clusters though a row costs time": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "(vectors + kRowVectors)",
        "vectors",
    ),
    "images get no vectors while those leave a multiprocessor few threads": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "int64_t{256} * device.sm_count * vector;",
        "int64_t{512} * device.sm_count * vector;",
    ),
    "short rows are read and written in place": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_short_rows_move_16_bytes",
        "layout.stride[0] == p.vocab_size &&",
        "layout.stride[0] != p.vocab_size &&",
    ),
    "the memory of staged rows is too small": fault(
        "plan.cpp",
        "columns-address",
        "return stats + rows + rows / 128 * acc;",
        "return stats + rows;",
    ),
    "workers are no power of two": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "return power_of_two(std::min(ceil_div(threads, n_rows), shape.vocab_size / 16), 1, 8);",
        "return static_cast<int>(std::clamp<int64_t>(ceil_div(threads, n_rows), 1, 7));",
    ),
    "a plan with too many threads passes": emulated(
        "cuda/plan.cpp",
        "test_cuda_plans.py",
        "plan.threads < 32 || plan.threads > max_threads(shape))",
        "plan.threads < 32)",
    ),
}

SUMS = {
    "the last block's sum is left out": fault(
        "sums.cu",
        "sums",
        "sum_of_block(i < count ? partials",
        "sum_of_block(i < count - 1 ? partials",
    ),
    "the last warp's sum is left out": fault(
        "sums.cu",
        "sums",
        "if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;",
        "if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = "
        "threadIdx.x < kThreads - kWarp ? mine : Pair{0, 0};",
    ),
    "ignored rows have a weight": fault(
        "sums.cu",
        "sums",
        "target < a.vocab_size && target != a.ignore_index;",
        "target < a.vocab_size;",
    ),
    "rows whose target is out of range have a weight": fault(
        "sums.cu",
        "sums",
        "return 0 <= target && target < a.vocab_size && target",
        "return 0 <= target && target",
    ),
    "rows without a token weight have one": fault(
        "sums.cu", "sums", "const bool counts = token[u] != 0 && (", "const bool counts = ("
    ),
    "rows beyond the last are counted": fault(
        "sums.cu", "sums", "has(u) && is_class(index[u]) ?", "is_class(index[u]) ?"
    ),
    "a batch forgets its last loss": fault(
        "sums.cu",
        "sums",
        "u < kBatch<A>; ++u) mine.loss",
        "u < kBatch<A> - 1; ++u) mine.loss",
    ),
    "targets are read although the total weight is known": fault(
        "sums.cu",
        "sums",
        "a.total_weight == nullptr && (sums.mean || sums.total_weight != nullptr)",
        "sums.mean || sums.total_weight != nullptr",
    ),
    "the total weight forgets class weights": fault(
        "sums.cu",
        "sums",
        "has_indices(a) ? class_weight<A>(a, target[u]) : A(1);",
        "A(1);",
    ),
    "the total weight forgets token weights": fault(
        "sums.cu",
        "sums",
        "double{of_class[u]} * token[u];",
        "double{of_class[u]};",
    ),
    "a normalizer is not used": fault(
        "sums.cu",
        "sums",
        "a.total_weight == nullptr ? sum.weight : *a.total_weight;",
        "sum.weight;",
    ),
    "a mean is not divided": fault(
        "sums.cu", "sums", "sums.mean ? mean_of(sum.loss, total_weight) : sum.loss", "sum.loss"
    ),
    "a loss in float16 is written as float32": fault(
        "sums.cu",
        "sums",
        "      *static_cast<__half*>(sums.loss) = __float2half_rn(static_cast<float>(loss));\n",
        "      *static_cast<float*>(sums.loss) = static_cast<float>(loss);\n",
    ),
    "rows beyond the largest grid are left out": fault(
        "sums.cu",
        "sums",
        "begin += gridDim.x * rows_at_once",
        "begin += gridDim.x * 64 * rows_at_once",
    ),
    "the last class weight is left out": fault(
        "sums.cu", "sums", "weights.n_rows = p.vocab_size;", "weights.n_rows = p.vocab_size - 1;"
    ),
}
SPARSE_LABELS = {
    "a label beyond the classes is read": fault(
        "sparse_labels.cuh", "sparse_labels", "0 <= y && y < a.vocab_size ?", "0 <= y ?"
    ),
    "padding is a label": fault(
        "sparse_labels.cuh",
        "sparse_labels",
        "    if (y == sparse.ignore_index) return kNotCounted;\n",
        "",
    ),
    "a row's class index is its first label": fault(
        "sparse_labels.cu", "sparse_labels", "target < 0 || z > top;", "target < 0;"
    ),
    "sums of labels are not moved to a greater logit": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "    if (weight != 0 && z != top) extra_loss += weight * (z - top);\n",
        "",
    ),
    "sums of lanes are not moved to the greatest logit": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "  sums.raise(all.top, all.target);\n",
        "  sums.target = all.target;\n",
    ),
    "a label of 0 at minus infinity counts": emulated(
        "cuda/sparse_labels.cu",
        "test_cuda_sparse.py::test_infinite_logits",
        "if (w != 0 && z != top) extra",
        "if (z != top) extra",
    ),
    "labels of rows without weight are read": fault(
        "sparse_labels.cu", "sparse_labels", "if (!has_no_weight(a, row)) sums", "sums"
    ),
    "a bad row of selected classes has no weight": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "A(sums.is_bad || sums.target >= 0)",
        "A(sums.target >= 0)",
    ),
    "rows without weight get gradients at their labels": emulated(
        "cuda/sparse_labels.cu",
        "test_cuda_sparse.py::test_options",
        "has_no_weight(a, row) || ",
        "",
    ),
    "a row with a bad label gets gradients at the others": fault(
        "sparse_labels.cu", "sparse_labels", " || sparse.target[row] < 0) return;", ") return;"
    ),
    "labels on one class do not add up": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "      if (classes.at(i) == y) label += labels.weight_of(i, y);\n",
        "",
    ),
    "the last label on a class writes its gradient": fault(
        "sparse_labels.cu", "sparse_labels", "    if (first.k != k) continue;\n", ""
    ),
    "whichever label comes first is the first on its class": fault(
        "sparse_labels.cuh", "sparse_labels", "2 * min(k, before >> 1)", "before & ~1"
    ),
    "each label is alone on its class": fault(
        "sparse_labels.cuh", "sparse_labels", "(slots_[i] & 1) != 0", "true"
    ),
    "labels are inserted before the table is empty": fault(
        "sparse_labels.cuh",
        "sparse_labels-thread",
        "slots_[i] = kFree;\n    __syncwarp();\n",
        "slots_[i] = kFree;\n",
    ),
    "rows share a part of their tables": fault(
        "sparse_labels.cuh",
        "sparse_labels",
        "return n_labels + slots_for(n_labels);",
        "return slots_for(n_labels);",
    ),
    "a gradient forgets the labels on other classes": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "    here.softmax += upstream.g * (smoothing.keep * static_cast<A>(all_labels - label));\n",
        "",
    ),
    "a label's gradient is by its transformed logit": fault(
        "sparse_labels.cu", "sparse_labels", "by_z * slope_at(transform, x)", "by_z"
    ),
    "a label's gradient forgets that of the entropy": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "    add_entropy_gradient(upstream, a, row, results);\n",
        "",
    ),
    "a label is above the row's maximum": fault(
        "sparse_labels.cu",
        "sparse_labels",
        "return z > max ? max : z;",
        "return z;",
        "only beside label smoothing and a softcap, and by a few roundings",
    ),
    "a row with a bad class has log-probabilities": fault(
        "sparse_labels.cu", "sparse_labels", "is_bad ? kNaN<A> : log_prob", "log_prob"
    ),
    "the padding of selected classes has a log-probability": fault(
        "sparse_labels.cu", "sparse_labels", "batch.y[u] < 0 ? A(0) : z -", "z -"
    ),
    "rows of sparse labels weigh a class": emulated(
        "binding/cuda.cpp",
        "test_cuda_sparse.py::test_options",
        "rows.target_kind = TargetKind::probabilities;",
        "{}",
    ),
    "the mean's divisor is gone before the gradients at the labels": emulated(
        "binding/cuda.cpp",
        "test_cuda_sparse.py::test_options",
        '    if (!is_empty()) {\n      const Plan plan = plan_for("forward_backward"',
        "    rows_weight = {};\n    if (!is_empty()) {\n"
        '      const Plan plan = plan_for("forward_backward"',
    ),
}

BINDING = {
    "clusters of any size may be forced": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_clusters_of_three_blocks_are_refused",
        " || (plan[3] & (plan[3] - 1)) == 0,",
        " || true,",
    ),
    "smoothing ignores the sum of class weights": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_sums_of_several_blocks_beside_class_weights",
        "      params.weight_sum_on_device = scratch_data();\n",
        "",
    ),
    "the fused mode's mean is not divided": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_forced_plans",
        "      params.total_weight = data_of(*rows_weight);\n    }",
        "    }",
    ),
    "a backward does not divide by the total weight": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_forced_plans",
        "      params.total_weight = data_of(*problem.normalizer);\n",
        "      params.total_weight = nullptr;\n",
    ),
    "an unreduced loss is added up": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_sums_are_launched_where_there_is_something_to_add",
        "    if (problem.reduction == kNone) return torch",
        "    if (problem.reduction == kNone) sum_rows(total_weight, nullptr);\n"
        "    if (problem.reduction == kNone) return torch",
    ),
    "the total weight of a sum is not written": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_total_weight_is_written",
        "    sum_rows(total_weight, &loss);\n",
        "    sum_rows(problem.reduction == kMean ? total_weight : nullptr, &loss);\n",
    ),
    "the total weight of losses that are not added is not written": emulated(
        "cuda/labels.cuh",
        "test_cuda.py::test_total_weight_is_written",
        "  if (is_first && a.unread_total_weight != nullptr) *a.unread_total_weight = 0;\n",
        "",
    ),
    "the total weight of no losses is not written": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_total_weight_is_written",
        "    if (is_none && !has_kernel) sum_rows(&total_weight, nullptr);\n",
        "",
    ),
    "fused mode copies a normalizer": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_sums_are_launched_where_there_is_something_to_add",
        "problem.reduction == kMean && params.total_weight == nullptr",
        "problem.reduction == kMean",
    ),
    "the digits of a small loss are added to 1": emulated(
        "xent_math.h",
        "test_cuda.py::test_loss_and_target_gradient_as_p_approaches_1",
        "std::log1p(stats.sum) + zero;",
        "std::log(1 + stats.sum) + zero;",
    ),
    "an infinite logit of the target is a certain one": emulated(
        "xent_math.h",
        "test_cuda.py::test_infinite_logits",
        "const Acc zero = z - z;",
        "const Acc zero = 0;",
    ),
    "forced plans are not checked": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_invalid_plan",
        "  FUSED_XENT_CHECK(why == nullptr, ",
        "  FUSED_XENT_CHECK(true, ",
    ),
    "a gradient's rows are not aligned like the logits'": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_rows_of_any_alignment_move_16_bytes",
        "empty_gradient(problem.logits, problem.dim, true)",
        "empty_gradient(problem.logits, problem.dim, false)",
    ),
    "a gradient begins at an aligned address": emulated(
        "binding/layout.cpp",
        "test_cuda.py::test_rows_of_any_alignment_move_16_bytes",
        "offset = logits.storage_offset() % vector;",
        "offset = 0;",
    ),
    "a gradient of short rows is padded": emulated(
        "binding/layout.cpp",
        "test_cuda.py::test_fake_gradients_are_laid_out_like_real_ones",
        "logits.size(dim) * size < 512",
        "size < 0",
    ),
    "rows beyond 2^31 are counted": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_too_many_rows_or_classes",
        "params.n_rows <= cuda::kMaxRows && params.vocab_size",
        "params.vocab_size",
    ),
}

HOST = {
    "each launch sets the limit of its shared memory": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_shared_memory_is_allowed_once",
        "  most -= static_cast<int>(attributes.sharedSizeBytes);\n",
        "  most = 48 * 1024 + 1024 * static_cast<int>(allowed.size());\n",
    ),
    "a kernel's own shared memory is allowed twice": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_shared_memory_is_allowed_once",
        "  most -= static_cast<int>(attributes.sharedSizeBytes);\n",
        "",
    ),
    "a cluster is launched where there is no room for it": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_cluster_that_the_device_has_no_room_for",
        "    if (n_clusters == 0) continue;\n",
        "",
    ),
    "a smaller cluster leaves groups idle": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_cluster_that_the_device_has_no_room_for",
        "  plan->max_groups *= plan->parts / entry->second;\n",
        "",
    ),
    "every block of rows is scaled by a block of threads": emulated(
        "cuda/launch.cpp",
        "test_cuda.py::test_scaling_launches_no_more_blocks_than_run_at_once",
        "  Plan plan = of_backward;\n  const int64_t n_threads = int64_t{kScaleThreadsPerSm}",
        "  Plan plan = of_backward;\n  const int64_t n_threads = int64_t{1 << 24}",
    ),
    "scaling leaves out rows beyond the grid": emulated(
        "cuda/columns.cu",
        "test_cuda.py::test_multiply",
        "first += int64_t{gridDim.x} * lanes * R) {\n    const Rows<4, R>",
        "first += a.n_rows) {\n    const Rows<4, R>",
    ),
    "rows in vectors that are ignored are scaled": emulated(
        "cuda/columns.cu",
        "test_cuda.py::test_scaling_of_rows_in_vectors",
        "factor[r] = rows.is_kept[r] ? ",
        "factor[r] = rows.any ? ",
    ),
    "scaling reads past the last class": emulated(
        "cuda/columns.cu",
        "test_cuda.py::test_multiply",
        "        if (u >= count) continue;\n        A x[R];",
        "        A x[R];",
    ),
    "scaling takes the factor of a neighbouring row": emulated(
        "cuda/columns.cu",
        "test_cuda.py::test_scaling_of_rows_in_vectors",
        "grad_loss_of(a, scale, first + r) : 1",
        "grad_loss_of(a, scale, first) : 1",
    ),
    "a launch waits for the device": Fault(
        "csrc/cuda/forward_backward.cu",
        "  cudaLaunchKernelEx(&config,",
        "  if (cudaDeviceSynchronize() != cudaSuccess) return cudaErrorUnknown;\n"
        "  cudaLaunchKernelEx(&config,",
        ("tests/test_cuda_native.py::test_launchers_can_be_captured_cold",),
    ),
    "an old driver passes": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_driver_that_is_too_old",
        "driver == 0 || driver / 1000 >=",
        "driver == 0 || driver / 1000 + 1 >=",
    ),
    "a machine without a driver is reported": emulated(
        "binding/cuda.cpp",
        "test_cuda.py::test_driver_that_is_too_old",
        "driver == 0 || driver / 1000 >=",
        "driver / 1000 >=",
    ),
}

SHARDS = {
    "the rows of all blocks but the first are left out": emulated(
        "cuda/shards.cu",
        "test_shards.py::test_rows[emulated-two-torch.float32]",
        "row = int64_t{blockIdx.x} * kShardThreads + threadIdx.x;",
        "row = threadIdx.x;",
    ),
    "a GPU adds up shards in float32 alone": emulated(
        "cuda/shards.cu",
        "test_shards.py::test_rows[emulated-two-torch.float64]",
        "shards.acc == DType::float64",
        "false",
    ),
}

FAULTS = {
    **TEAMS,
    **SWEEPS,
    **MEMORY,
    **TRANSFORMS,
    **LABELS,
    **ROWS,
    **LANE_ROWS,
    **GENERAL,
    **COLUMNS,
    **LAUNCHERS,
    **SUMS,
    **SPARSE_LABELS,
    **SHARDS,
    **BINDING,
    **HOST,
}
