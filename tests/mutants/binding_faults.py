"""Faults of the code between tensors and the CPU kernels, and the tests that find them."""

from .fault import Fault

CPU = "csrc/binding/cpu.cpp"
MEMORY_OF_GRADIENTS = "csrc/binding/gradient_memory.h"
OPERATORS = "csrc/binding/operators.h"
LAYOUT = "csrc/binding/layout.cpp"
TENSORS = "csrc/binding/tensors.cpp"
SCHEMAS = "csrc/binding/schemas.h"

OPS = "tests/test_ops.py::"
FORWARD = (f"{OPS}test_wrong_arguments_of_forward_are_refused",)
BACKWARD = (f"{OPS}test_wrong_arguments_of_backward_are_refused",)
SCALE = (f"{OPS}test_wrong_arguments_of_scale_gradient_are_refused",)
MULTIPLY = (f"{OPS}test_wrong_arguments_of_multiply_are_refused",)
MEMORY = (f"{OPS}test_operators_refuse_shared_memory",)
NO_CLASSES = (f"{OPS}test_rows_of_no_classes",)
HUGE_PAGES = (f"{OPS}test_huge_pages_are_requested_within_the_gradient",)
MEMORY_TESTS = "tests/test_gradient_memory.py::"
KEPT = (f"{MEMORY_TESTS}test_a_training_loop_uses_the_same_memory",)
REUSED = (f"{MEMORY_TESTS}test_memory_is_reused_for_gradients_of_at_least_half_its_size",)
MEAN = ("tests/test_options.py::test_mean_by_a_sum_of_0_is_nan",)
FUSED = (f"{OPS}test_fused_mode_returns_the_results_of_forward",)
STATE = (f"{OPS}test_state_of_all_options",)
WEIGHTS = (f"{OPS}test_weights_of_rows_have_any_real_dtype_and_strides",)


def option(regime: str, name: str, labels: str, dtype: str = "float32") -> tuple[str]:
    """Return the test of this option in this regime."""
    return (f"tests/test_regimes.py::test_option_in_regime[{regime}-{name}-{dtype}-{labels}]",)


CALL_FAULTS = {
    "a mean by 0 is infinite": Fault(
        CPU,
        "problem.reduction == kMean ? mean_of(sum, total_weight) : sum",
        "problem.reduction == kMean ? sum / total_weight : sum",
        MEAN,
    ),
    "the gradient of a mean by 0 is infinite": Fault(
        CPU,
        "problem.reduction == kMean ? mean_of(1, normalizer()) : 1;",
        "problem.reduction == kMean ? 1 / normalizer() : 1;",
        MEAN,
    ),
    "the gradient of a mean by 0 is infinite in fused mode": Fault(
        CPU,
        "problem.reduction == kMean ? mean_of(1, total_weight) : 1;",
        "problem.reduction == kMean ? 1 / total_weight : 1;",
        MEAN,
    ),
    "a mean is a sum in fused mode": Fault(
        CPU,
        "problem.reduction == kMean ? mean_of(1, total_weight) : 1;",
        "problem.reduction == kSum ? mean_of(1, total_weight) : 1;",
        ("tests/test_overwriting.py::test_gradient_equals_default_mode_and_overwrites_logits",),
    ),
    "the class weights' sum is the number of classes": Fault(
        CPU,
        "    if (!problem.weight) return;\n",
        "    return;\n",
        option("rows", "none", "index, weighted and smoothed"),
    ),
    "the class weights' sum has one weight more": Fault(
        CPU,
        "    params.weight_sum = 0;\n",
        "    params.weight_sum = 1;\n",
        option("rows", "none", "index, weighted and smoothed"),
    ),
    "targets are not checked again by the backward": Fault(
        CPU,
        "    scan();  // the targets, once more\n",
        "",
        (
            "tests/test_errors.py::test_target_changed_through_data",
            *BACKWARD,
        ),
    ),
    "targets are not checked with a normalizer": Fault(
        CPU,
        "    const double of_rows = scan();\n"
        "    return problem.normalizer ? normalizer() : of_rows;\n",
        "    return problem.normalizer ? normalizer() : scan();\n",
        FORWARD,
    ),
    "a normalizer is forgotten": Fault(
        CPU,
        "return problem.normalizer ? normalizer() : of_rows;",
        "return of_rows;",
        ("tests/test_options.py::test_normalizer",),
    ),
    "a loss is rounded to float32 in between": Fault(
        CPU,
        "*static_cast<double*>(scalar.mutable_data_ptr()) = value;",
        "*static_cast<double*>(scalar.mutable_data_ptr()) = static_cast<float>(value);",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "total_weight is that of no normalizer": Fault(
        CPU,
        "filled(total_weight, ScalarType::Double)}",
        "filled(scan(), ScalarType::Double)}",
        (
            "tests/test_options.py::test_normalizer",
            f"{OPS}test_a_normalizer_divides_the_gradient",
        ),
    ),
    "an error names the row, not its position": Fault(
        CPU,
        "problem.position(scan.bad_row)",
        "std::to_string(scan.bad_row)",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "an error names another target": Fault(
        CPU,
        "target_index(params, scan.bad_row)",
        "target_index(params, 0)",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "rows without classes reach the kernels": Fault(
        CPU,
        "if (params.vocab_size > 0) cpu::forward(params, threads);",
        "cpu::forward(params, threads);",
        NO_CLASSES,
    ),
    "no huge pages for the gradient": Fault(
        CPU,
        "advise_huge_pages(gradient.mutable_data_ptr(), ",
        "advise_huge_pages(gradient.mutable_data_ptr(), 0 * ",
        HUGE_PAGES,
    ),
    "huge pages for half of the gradient": Fault(
        CPU, "logits.numel() * logits.element_size()", "logits.numel()", HUGE_PAGES
    ),
    "the memory of the gradient is not kept": Fault(
        CPU, "if (bytes >= kLeastKept && keeps_gradients()) {", "if (false) {", KEPT
    ),
    "the memory of small gradients is kept": Fault(
        CPU,
        "bytes >= kLeastKept",
        "bytes > 0",
        (f"{MEMORY_TESTS}test_small_gradients_are_torchs",),
    ),
    "the memory of a gradient of the least size is not kept": Fault(
        CPU,
        "bytes >= kLeastKept",
        "bytes > kLeastKept",
        (f"{MEMORY_TESTS}test_small_gradients_are_torchs",),
    ),
    "the backward of a mean is that of a sum": Fault(
        CPU,
        "params.grad_scale = problem.reduction == kMean ? mean_of(1, normalizer()) : 1;",
        "params.grad_scale = problem.reduction == kSum ? mean_of(1, normalizer()) : 1;",
        ("tests/test_kernels.py::test_shape[two dimensions-index-float32]",),
    ),
    "a scalar of float32 is written as float64": Fault(
        CPU,
        "    if (is_float) {\n",
        "    if (false) {\n",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "a loss of 16 bits stays float64": Fault(
        CPU,
        "return is_float || dtype == ScalarType::Double ? scalar : torch::stable::to(scalar, "
        "dtype);",
        "return scalar;",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "losses of rows stay in the type of sums": Fault(
        CPU,
        "return loss_dtype == problem.acc_dtype ? row_loss : torch::stable::to(row_loss, "
        "loss_dtype);",
        "return row_loss;",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "no reduction is a sum": Fault(
        CPU,
        "    if (problem.reduction == kNone) {\n",
        "    if (false) {\n",
        (f"{OPS}test_meta_implementations_agree_in_dtypes",),
    ),
    "the operator loss does not check targets": Fault(
        CPU,
        "return loss_by(total_weight_of_rows(), rows, loss_dtype);",
        "return loss_by(1, rows, loss_dtype);",
        ("tests/test_errors.py::test_first_of_several_targets_out_of_range",),
    ),
    "rows without classes are read in fused mode": Fault(
        CPU,
        "if (params.vocab_size > 0) cpu::forward_backward(params, threads);",
        "cpu::forward_backward(params, threads);",
        NO_CLASSES,
    ),
    "a scaled gradient is of the last mean": Fault(
        CPU,
        "  void scale_gradient() const { cpu",
        "  void scale_gradient() { params.grad_scale = 2, cpu",
        (f"{OPS}test_multiply",),
    ),
}

MEMORY_FAULTS = {
    "huge pages before the gradient's begin": Fault(
        MEMORY_OF_GRADIENTS,
        "(reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;",
        "reinterpret_cast<uintptr_t>(data) / kPage * kPage;",
        HUGE_PAGES,
    ),
    "huge pages after the gradient's end": Fault(
        MEMORY_OF_GRADIENTS,
        "(reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;",
        "(reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;",
        HUGE_PAGES,
    ),
    "no huge pages in kept memory": Fault(
        MEMORY_OF_GRADIENTS, "{ advise_huge_pages(data, bytes); }", "{}", HUGE_PAGES
    ),
    "the layout of a gradient takes memory": Fault(
        MEMORY_OF_GRADIENTS,
        "aoti_torch_device_type_meta(), -1",
        "aoti_torch_device_type_cpu(), -1",
        (f"{MEMORY_TESTS}test_nothing_is_allocated_beside_kept_memory",),
    ),
    "emptied memory stays": Fault(
        MEMORY_OF_GRADIENTS,
        "  ~Block() { ::operator delete(data, kAlignment); }",
        "  ~Block() {}",
        (f"{MEMORY_TESTS}test_emptying_returns_memory_to_the_system",),
    ),
    "emptying empties nothing": Fault(
        MEMORY_OF_GRADIENTS,
        "  const std::unique_ptr<Block> block(kept_block.exchange(nullptr));\n",
        "  std::unique_ptr<Block> block(kept_block.exchange(nullptr));\n"
        "  if (block) kept_block = new Block(block->bytes);\n",
        KEPT,
    ),
    "the environment variable has no effect": Fault(
        MEMORY_OF_GRADIENTS,
        'std::string(choice) == "0"',
        "false",
        (f"{MEMORY_TESTS}test_environment_variable",),
    ),
    "any value of the environment variable turns it off": Fault(
        MEMORY_OF_GRADIENTS,
        'std::string(choice) == "0"',
        "true",
        (f"{MEMORY_TESTS}test_environment_variable",),
    ),
    "memory is kept across a fork": Fault(
        MEMORY_OF_GRADIENTS,
        "    pthread_atfork([] { empty_cache(); }, nullptr, nullptr);\n",
        "",
        (f"{MEMORY_TESTS}test_fork",),
    ),
    "memory that is too small is reused": Fault(
        MEMORY_OF_GRADIENTS, "if (block && bytes <= block->bytes && ", "if (block && ", REUSED
    ),
    "memory that is far too large is reused": Fault(
        MEMORY_OF_GRADIENTS, " && block->bytes / 2 <= bytes)", ")", REUSED
    ),
    "memory of just twice the size is not reused": Fault(
        MEMORY_OF_GRADIENTS, "block->bytes / 2 <= bytes", "block->bytes / 2 < bytes", REUSED
    ),
    "memory stays kept while a tensor uses it": Fault(
        MEMORY_OF_GRADIENTS,
        "std::unique_ptr<Block> block(kept_block.exchange(nullptr));\n  if (block && bytes",
        "std::unique_ptr<Block> block(kept_block.load());\n  if (block && bytes",
        (f"{MEMORY_TESTS}test_memory_that_a_view_uses_is_not_written_to", *KEPT),
    ),
    "the first gradient that was freed is kept": Fault(
        MEMORY_OF_GRADIENTS,
        "before(kept_block.exchange(static_cast<Block*>(context)));",
        "last(static_cast<Block*>(context));",
        KEPT,
    ),
    "the gradient is contiguous whatever the logits are": Fault(
        CPU,
        "empty_gradient(without_memory(logits), problem.dim, false)",
        "torch::stable::new_empty(without_memory(logits), logits.sizes())",
        (f"{MEMORY_TESTS}test_layouts",),
    ),
}

OPERATORS_FAULTS = {
    "statistics are never wanted": Fault(
        OPERATORS,
        "    const Rows rows(call.problem, call.params, statistics);\n    auto [loss",
        "    const Rows rows(call.problem, call.params, statistics && false);\n    auto [loss",
        (
            f"{OPS}test_opcheck",
            "tests/test_options.py::test_argmax_is_the_first_maximum",
        ),
    ),
    "the gradients of lse and entropy are swapped": Fault(
        OPERATORS,
        'problem.rows_of("grad_lse", upstream.grad_lse, p.grad_lse);\n'
        "    const auto grad_entropy =\n"
        '        problem.rows_of("grad_entropy", upstream.grad_entropy, p.grad_entropy);',
        'problem.rows_of("grad_lse", upstream.grad_lse, p.grad_entropy);\n'
        "    const auto grad_entropy =\n"
        '        problem.rows_of("grad_entropy", upstream.grad_entropy, p.grad_lse);',
        ("tests/test_regimes.py::test_statistics_with_a_masked_target",),
    ),
    "token weights are forgotten when a gradient is scaled": Fault(
        OPERATORS,
        "const Inputs inputs{grad_logits, target, {}, token_weight, {}, dim, kSum, {}};",
        "const Inputs inputs{grad_logits, target, {}, {}, {}, dim, kSum, {}};",
        ("tests/test_layouts.py::test_upstream_of_dropped_rows_may_be_anything",),
    ),
    "any gradient is scaled in place": Fault(
        OPERATORS,
        '    set_grad_logits(call.params, "grad_logits", gradient, dim);\n',
        "    call.params.grad_logits = gradient.mutable_data_ptr();\n"
        "    call.params.grad_layout = call.params.logits_layout;\n",
        MEMORY,
    ),
    "a softcap is taken for a logit_scale": Fault(
        OPERATORS,
        "    FUSED_XENT_OPTIONS(FUSED_XENT_READ)\n",
        "    FUSED_XENT_OPTIONS(FUSED_XENT_READ)\n"
        "    std::swap(options.softcap, options.logit_scale);\n",
        option("tile", "none", "index"),
    ),
    "the fused mode writes to a copy of many dimensions": Fault(
        OPERATORS,
        'set_grad_logits(call.params, "logits", in.inputs.logits, in.inputs.dim);',
        'set_grad_logits(call.params, "logits", call.problem.logits, in.inputs.dim);',
        (f"{OPS}test_more_than_4_row_dimensions_are_not_overwritten",),
    ),
    "a gradient of the entropy goes without it": Fault(
        OPERATORS,
        "FUSED_XENT_CHECK(!grad_entropy || upstream.entropy,",
        "FUSED_XENT_CHECK(true || !grad_entropy || upstream.entropy,",
        BACKWARD,
    ),
    "a mean without a total weight is computed": Fault(
        OPERATORS,
        "FUSED_XENT_CHECK(problem.reduction != kMean || problem.normalizer,",
        "FUSED_XENT_CHECK(true || problem.reduction != kMean || problem.normalizer,",
        BACKWARD,
    ),
    "ignored rows are scaled": Fault(
        OPERATORS,
        "    options.ignore_index = ignore_index;\n",
        "",
        (f"{OPS}test_scaled_gradients_of_ignored_rows_stay_0",),
    ),
    "several factors multiply a gradient": Fault(
        OPERATORS,
        "FUSED_XENT_CHECK(gradient.dim() > 0 && factor.dim() == 0,",
        "FUSED_XENT_CHECK(gradient.dim() > 0,",
        MULTIPLY,
    ),
    "a gradient is multiplied along its first dimension": Fault(
        OPERATORS,
        "scale(Call(Problem(gradient, gradient.dim() - 1)), gradient, factor, gradient.dim() - 1);",
        "scale(Call(Problem(gradient, gradient.dim() - 1)), gradient, factor, 0);",
        (f"{OPS}test_multiply",),
    ),
    "the backward with statistics forgets the entropy": Fault(
        OPERATORS,
        'problem.rows_of("entropy", grad_entropy ? upstream.entropy : std::nullopt, p.entropy);',
        'problem.rows_of("entropy", std::nullopt, p.entropy);',
        (
            f"{OPS}test_derivatives_of_forward",
            "tests/test_autograd_features.py::test_upstream_gradients_of_any_strides",
        ),
    ),
    "lse and entropy are returned in the other order": Fault(
        OPERATORS,
        "rows.state, rows.lse(), rows.entropy, rows.argmax);",
        "rows.state, rows.entropy, rows.lse(), rows.argmax);",
        FUSED,
    ),
    "lse and entropy are returned in the other order in fused mode": Fault(
        OPERATORS,
        "return_to(stack, loss, rows.lse(), rows.entropy, rows.argmax);",
        "return_to(stack, loss, rows.entropy, rows.lse(), rows.argmax);",
        FUSED,
    ),
    "the memory of the gradient is not prepared": Fault(
        OPERATORS,
        "in_place ? inputs.logits : call.new_gradient();",
        "in_place ? inputs.logits : empty_gradient(inputs.logits, inputs.dim, false);",
        HUGE_PAGES,
    ),
    "z-loss and focal loss are swapped": Fault(
        OPERATORS,
        "    FUSED_XENT_OPTIONS(FUSED_XENT_READ)\n",
        "    FUSED_XENT_OPTIONS(FUSED_XENT_READ)\n"
        "    std::swap(options.lse_square_scale, options.focal_gamma);\n",
        ("tests/test_options.py::test_formula",),
    ),
}

TENSORS_FAULTS = {
    "no gradient of the loss is a gradient of 1": Fault(
        TENSORS,
        "if (!grad_loss) torch::stable::zero_(rows);",
        "if (!grad_loss) torch::stable::fill_(rows, 1);",
        (f"{OPS}test_missing_upstream_gradients_are_0",),
    ),
    "the last size of a text has no comma": Fault(
        LAYOUT,
        "text.erase(text.size() - (values.size() == 1 ? 1 : 2));",
        "text.erase(text.size() - 2);",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "rows that share one element pass": Fault(
        LAYOUT, "if (stride <= reach) return true;", "if (stride < reach) return true;", MEMORY
    ),
    "the extent of smaller strides is forgotten": Fault(
        LAYOUT, "reach += stride * (size - 1);", "reach = stride * (size - 1);", MEMORY
    ),
    "dimensions of size 1 overlap": Fault(
        LAYOUT,
        "if (tensor.size(d) > 1) dims.emplace_back(",
        "if (tensor.size(d) > 0) dims.emplace_back(",
        MEMORY,
    ),
    "strides are compared in the order of the dimensions": Fault(
        LAYOUT,
        "  std::sort(dims.begin(), dims.end());\n",
        "  std::reverse(dims.begin(), dims.end());\n",
        MEMORY,
    ),
    "dimensions of size 1 are row dimensions": Fault(
        LAYOUT,
        "if (d == dim || size == 1) continue;",
        "if (d == dim) continue;",
        (f"{OPS}test_dimensions_of_size_1_do_not_count",),
    ),
    "row dimensions with a gap are merged": Fault(
        LAYOUT,
        "if (last >= 0 && layout.stride[last] == size * stride) {",
        "if (last >= 0 && layout.stride[last] >= size * stride) {",
        ("tests/test_layouts.py::test_strides_of_logits",),
    ),
    "a merged dimension keeps the stride of the outer": Fault(
        LAYOUT,
        "      layout.stride[last] = stride;\n",
        "",
        ("tests/test_layouts.py::test_strides_of_logits",),
    ),
    "bfloat16 is taken for float16": Fault(
        TENSORS,
        "      return DType::bfloat16;",
        "      return DType::float16;",
        option("rows", "none", "index", "bfloat16"),
    ),
    "negative dimensions pass": Fault(
        TENSORS, "0 <= dim && dim < logits.dim(),", "dim < logits.dim(),", FORWARD
    ),
    "class weights with a step are read without": Fault(
        TENSORS,
        "weight = contiguous_as(*inputs.weight, acc_dtype);",
        "weight = torch::stable::to(*inputs.weight, acc_dtype);",
        WEIGHTS,
    ),
    "class weights may be more than the classes": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(has_shape(*inputs.weight, {params.vocab_size}),",
        "FUSED_XENT_CHECK(inputs.weight->dim() == 1 && inputs.weight->size(0) >= "
        "params.vocab_size,",
        FORWARD,
    ),
    "class weights may have two dimensions": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(has_shape(*inputs.weight, {params.vocab_size}),",
        "FUSED_XENT_CHECK(inputs.weight->numel() == params.vocab_size,",
        FORWARD,
    ),
    "tensors of another device are read": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(tensor.device() == logits.device(),",
        "FUSED_XENT_CHECK(true || tensor.device() == logits.device(),",
        FORWARD,
        unseen="The library has kernels of one device; a tensor on meta goes to meta's operators.",
    ),
    "probabilities of any shape are read": Fault(
        TENSORS,
        'FUSED_XENT_CHECK(has_shape(*target, shape), "target',
        "FUSED_XENT_CHECK(target->numel() == logits.numel() || (is_indices && "
        'has_shape(*target, shape)), "target',
        FORWARD,
    ),
    "probabilities of float32 are read under float64": Fault(
        TENSORS,
        "(is_half && params.target_dtype == DType::float32)",
        "params.target_dtype == DType::float32",
        FORWARD,
    ),
    "probabilities of another 16-bit type are read": Fault(
        TENSORS,
        "params.target_dtype == params.dtype || (is_half &&",
        "element_size(params.target_dtype) == element_size(params.dtype) || (is_half &&",
        FORWARD,
    ),
    "class indices of any number are read": Fault(
        TENSORS,
        'FUSED_XENT_CHECK(has_shape(*target, shape), "target',
        'FUSED_XENT_CHECK(target->numel() >= params.n_rows || has_shape(*target, shape), "target',
        FORWARD,
    ),
    "class indices with a step are read without": Fault(
        TENSORS,
        "    target = contiguous_as(*target, target->scalar_type());\n",
        "",
        ("tests/test_layouts.py::test_strides_of_class_indices",),
    ),
    "rows with a step are read without": Fault(
        TENSORS,
        "  return contiguous_as(rows, acc_dtype);\n",
        "  return torch::stable::to(rows, acc_dtype);\n",
        WEIGHTS,
    ),
    "rows of any dtype are read": Fault(
        TENSORS,
        "  return contiguous_as(rows, acc_dtype);\n",
        "  return contiguous_as(rows, rows.scalar_type());\n",
        WEIGHTS,
    ),
    "an upstream gradient of any shape is read": Fault(
        TENSORS,
        "FUSED_XENT_CHECK((is_scalar || has_shape(rows, row_shape)) && "
        "!is_complex(rows.scalar_type()),",
        "FUSED_XENT_CHECK((is_scalar || rows.numel() >= 1) && !is_complex(rows.scalar_type()),",
        BACKWARD,
    ),
    "an upstream gradient of any dtype is read without a cast": Fault(
        TENSORS,
        "  rows = contiguous_as(rows, acc_dtype);\n",
        "  rows = contiguous_as(rows, rows.scalar_type());\n",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "an expanded upstream gradient is read beyond its end": Fault(
        TENSORS,
        "  rows = contiguous_as(rows, acc_dtype);\n",
        "  rows = torch::stable::to(rows, acc_dtype);\n",
        ("tests/test_layouts.py::test_strides_of_upstream_gradient",),
    ),
    "a single upstream gradient is read per row": Fault(
        TENSORS,
        "p.grad_loss_stride = is_scalar ? 0 : 1;",
        "p.grad_loss_stride = 1;",
        (
            "tests/test_overwriting.py::test_scalar_upstream_is_applied_once",
            "tests/test_kernels.py::test_shape[two dimensions-index-float32]",
        ),
    ),
    "statistics of more classes than the lanes count": Fault(
        TENSORS,
        '  if (statistics) problem.check_32_bits_for("statistics");\n',
        "",
        (f"{OPS}test_statistics_of_2_31_classes_are_refused",),
    ),
    "sparse labels of more classes than int32 counts": Fault(
        TENSORS,
        '  check_32_bits_for("target_indices");\n',
        "",
        (f"{OPS}test_sparse_labels_of_2_31_classes_are_refused",),
    ),
    "results of rows without classes are uninitialized": Fault(
        TENSORS, "  if (p.vocab_size > 0) return;\n", "  return;\n", NO_CLASSES
    ),
    "argmax of rows without classes is 0": Fault(
        TENSORS, "torch::stable::fill_(argmax, -1);", "torch::stable::fill_(argmax, 0);", NO_CLASSES
    ),
    "a position counts the last dimension first": Fault(
        TENSORS,
        "for (size_t d = row_shape.size(); d-- > 0; row /= row_shape[d]) index[d]",
        "for (size_t d = 0; d < row_shape.size(); row /= row_shape[d++]) index[d]",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "row_max and log_sum lie in the other order": Fault(
        TENSORS,
        "  p.row_max = take();\n  p.log_sum = take();\n",
        "  p.log_sum = take();\n  p.row_max = take();\n",
        (f"{OPS}test_forward_returns_state_and_total_weight",),
    ),
    "any reduction passes": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(reduction == kNone || reduction == kMean || reduction == kSum,",
        "FUSED_XENT_CHECK(reduction >= kNone,",
        FORWARD,
    ),
    "a normalizer may be of any dtype": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(normalizer->dim() == 0 && normalizer->scalar_type() == "
        "ScalarType::Double,",
        "FUSED_XENT_CHECK(normalizer->dim() == 0,",
        FORWARD,
    ),
    "total_weight may be of any shape": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(normalizer->dim() == 0 && normalizer->scalar_type() == "
        "ScalarType::Double,",
        "FUSED_XENT_CHECK(normalizer->scalar_type() == ScalarType::Double,",
        BACKWARD,
    ),
    "a state may be of any shape": Fault(
        TENSORS,
        "has_shape(state, shape) && state.scalar_type() == acc_dtype && state.is_contiguous(),",
        "state.scalar_type() == acc_dtype && state.is_contiguous(),",
        BACKWARD,
    ),
    "a state may be of any dtype": Fault(
        TENSORS,
        "has_shape(state, shape) && state.scalar_type() == acc_dtype && state.is_contiguous(),",
        "has_shape(state, shape) && state.is_contiguous(),",
        BACKWARD,
    ),
    "a state has no place for label_mass": Fault(
        TENSORS,
        "return 2 + !has_indices(params) + (params.focal_gamma != 0);",
        "return 2 + (params.focal_gamma != 0);",
        BACKWARD,
    ),
    "a state has no place for the focal loss's slope": Fault(
        TENSORS,
        "return 2 + !has_indices(params) + (params.focal_gamma != 0);",
        "return 2 + !has_indices(params);",
        BACKWARD,
    ),
    "a state with a step is read without": Fault(
        TENSORS,
        "has_shape(state, shape) && state.scalar_type() == acc_dtype && state.is_contiguous(),",
        "has_shape(state, shape) && state.scalar_type() == acc_dtype,",
        BACKWARD,
    ),
    "label_mass and slope lie in the other order": Fault(
        TENSORS,
        "  if (!has_indices(p)) p.label_mass = take();\n"
        "  if (p.focal_gamma != 0) p.loss_slope = take();\n",
        "  if (p.focal_gamma != 0) p.loss_slope = take();\n"
        "  if (!has_indices(p)) p.label_mass = take();\n",
        STATE,
    ),
    "numbers of a float64 state are 4 bytes": Fault(
        TENSORS, "(acc_dtype == ScalarType::Double ? 8 : 4)", "4", STATE
    ),
    "a state's numbers lie after the rows": Fault(
        TENSORS,
        "  shape.insert(shape.begin(), problem.state_size());\n",
        "  shape.push_back(problem.state_size());\n",
        (f"{OPS}test_forward_returns_state_and_total_weight",),
    ),
    "the lse is a difference": Fault(
        TENSORS,
        "torch::stable::select(state, 0, 1), -1);",
        "torch::stable::select(state, 0, 1), 1);",
        FUSED,
    ),
    "the lse is a multiple": Fault(
        TENSORS,
        "torch::stable::select(state, 0, 1), -1);",
        "torch::stable::select(state, 0, 0), -1);",
        FUSED,
    ),
    "rows may be of any shape": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(has_shape(rows, row_shape) && !is_complex(rows.scalar_type()),",
        "FUSED_XENT_CHECK(!is_complex(rows.scalar_type()),",
        BACKWARD,
    ),
    "rows may be complex": Fault(
        TENSORS,
        "FUSED_XENT_CHECK(has_shape(rows, row_shape) && !is_complex(rows.scalar_type()),",
        "FUSED_XENT_CHECK(has_shape(rows, row_shape),",
        BACKWARD,
    ),
    "complex numbers of 32 bits pass": Fault(
        TENSORS,
        "  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat ||\n"
        "         dtype == ScalarType::ComplexDouble;",
        "  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexDouble;",
        FORWARD,
    ),
    "complex numbers of 64 bits pass": Fault(
        TENSORS,
        "  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat ||\n"
        "         dtype == ScalarType::ComplexDouble;",
        "  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat;",
        FORWARD,
    ),
    "class weights of any dtype are read without a cast": Fault(
        TENSORS,
        "weight = contiguous_as(*inputs.weight, acc_dtype);",
        "weight = contiguous_as(*inputs.weight, inputs.weight->scalar_type());",
        WEIGHTS,
    ),
    "class weights of integers are cast": Fault(
        TENSORS, '    dtype_of("weight", inputs.weight->scalar_type());\n', "", FORWARD
    ),
    "probabilities in more dimensions than the kernels count are read in some": Fault(
        TENSORS,
        "    target = with_layout(*target, dim, params.target_layout);\n",
        "    merge_rows(*target, dim, params.target_layout);\n",
        ("tests/test_errors.py::test_more_than_four_row_dimensions",),
    ),
    "a complex upstream gradient is cast": Fault(
        TENSORS,
        "FUSED_XENT_CHECK((is_scalar || has_shape(rows, row_shape)) && "
        "!is_complex(rows.scalar_type()),",
        "FUSED_XENT_CHECK(is_scalar || has_shape(rows, row_shape),",
        (
            *BACKWARD,
            *SCALE,
            *MULTIPLY,
        ),
    ),
    "contiguous tensors of another dtype are not cast": Fault(
        LAYOUT,
        "const Tensor cast = tensor.scalar_type() == dtype ? tensor : "
        "torch::stable::to(tensor, dtype);",
        "const Tensor cast = tensor.is_contiguous() ? tensor : torch::stable::to(tensor, dtype);",
        WEIGHTS,
    ),
    "shapes are compared up to the shorter": Fault(
        TENSORS,
        "return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());",
        "return std::equal(sizes.begin(), sizes.begin() + std::min(sizes.size(), "
        "shape.size()), shape.begin());",
        FORWARD,
    ),
    "a gradient of many dimensions has no layout": Fault(
        LAYOUT,
        "  return merge_rows(gradient, dim, layout) ? gradient\n"
        "                                           : torch::stable::new_empty(logits, "
        "logits.sizes());",
        "  return gradient;",
        ("tests/test_errors.py::test_more_than_four_row_dimensions",),
    ),
    "logits of many dimensions are read in some": Fault(
        TENSORS,
        "  logits = with_layout(logits, dim, params.logits_layout);\n",
        "  merge_rows(logits, dim, params.logits_layout);\n",
        ("tests/test_errors.py::test_more_than_four_row_dimensions",),
    ),
    "memory is laid out in another order": Fault(
        LAYOUT,
        "for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {",
        "for (size_t d = 0; d < sizes.size(); stride *= std::max<int64_t>(sizes[d++], 1)) {",
        (f"{OPS}test_meta_implementations_agree_in_strides",),
    ),
    "the loss is in the accumulation type": Fault(
        TENSORS,
        "const ScalarType dtype = given ? *given : logits.scalar_type();",
        "const ScalarType dtype = given ? *given : acc_dtype;",
        (f"{OPS}test_meta_implementations_agree_in_dtypes",),
    ),
    "losses of integers pass": Fault(TENSORS, '  dtype_of("loss_dtype", dtype);\n', "", FORWARD),
    "the options are their defaults": Fault(
        TENSORS,
        "reduction(inputs.reduction) {\n  static_cast<Options&>(params) = options;\n",
        "reduction(inputs.reduction) {\n",
        (
            "tests/test_options.py::test_any_combination_of_many_options",
            f"{OPS}test_gradients_of_forward_equal_the_reference",
        ),
    ),
    "int32 targets are read as int64": Fault(
        TENSORS,
        "      return TargetKind::int32;",
        "      return TargetKind::int64;",
        ("tests/test_token_weight.py::test_token_weights",),
    ),
}

SCHEMAS_FAULTS = {
    "scale_gradient_ does not say that it writes": Fault(
        SCHEMAS,
        '"scale_gradient_(Tensor(a!) grad_logits,',
        '"scale_gradient_(Tensor grad_logits,',
        (f"{OPS}test_opcheck",),
    ),
    "multiply_ does not say that it writes": Fault(
        SCHEMAS,
        '"multiply_(Tensor(a!) gradient, ',
        '"multiply_(Tensor gradient, ',
        (f"{OPS}test_opcheck",),
    ),
    "the fused mode does not say that it writes": Fault(
        SCHEMAS,
        'define("forward_backward_(Tensor(a!)"',
        'define("forward_backward_(Tensor"',
        (f"{OPS}test_opcheck",),
    ),
    "the loss's dtype must be given": Fault(
        SCHEMAS,
        "ScalarType? loss_dtype=None",
        "ScalarType? loss_dtype",
        (
            f"{OPS}test_derivatives_of_forward",
            "tests/test_export.py::test_decompositions_equal_the_operators",
        ),
    ),
    "backward_ does not say that it writes": Fault(
        SCHEMAS,
        'define("backward_(Tensor(a!)"',
        'define("backward_(Tensor"',
        (f"{OPS}test_opcheck",),
    ),
}

FAULTS = CALL_FAULTS | MEMORY_FAULTS | OPERATORS_FAULTS | TENSORS_FAULTS | SCHEMAS_FAULTS
