"""Faults between tensors and the CPU kernels, and the tests that see them."""

from .fault import Fault

OPS = "tests/test_ops.py::"
FORWARD = (f"{OPS}test_wrong_arguments_of_forward_are_refused",)
BACKWARD = (f"{OPS}test_wrong_arguments_of_backward_are_refused",)
SCALE = (f"{OPS}test_wrong_arguments_of_scale_gradient_are_refused",)
MEMORY = (f"{OPS}test_memory_of_gradients",)
NO_CLASSES = (f"{OPS}test_rows_of_no_classes",)
HUGE_PAGES = (f"{OPS}test_huge_pages_are_asked_for_within_the_gradient",)
MEAN = ("tests/test_extras.py::test_mean_by_a_sum_of_0_is_nan",)


def option(regime: str, name: str, labels: str, dtype: str = "float32") -> tuple[str]:
    """Return the test of an option in a regime."""
    return (f"tests/test_regimes.py::test_option_in_regime[{regime}-{name}-{dtype}-{labels}]",)


CALL = {
    "a mean by 0 is infinite": Fault(
        "csrc/binding/cpu.cpp",
        "reduction == kMean ? mean_of(sum, total_weight) : sum;",
        "reduction == kMean ? sum / total_weight : sum;",
        MEAN,
    ),
    "the gradient of a mean by 0 is infinite": Fault(
        "csrc/binding/cpu.cpp",
        "total_weight == nullptr ? 1 : mean_of(1, value_of(*total_weight));",
        "total_weight == nullptr ? 1 : 1 / value_of(*total_weight);",
        MEAN,
    ),
    "the gradient of a mean by 0 is infinite in fused mode": Fault(
        "csrc/binding/cpu.cpp",
        "total.reduction == kMean ? mean_of(1, total_weight) : 1;",
        "total.reduction == kMean ? 1 / total_weight : 1;",
        MEAN,
    ),
    "a mean is a sum in fused mode": Fault(
        "csrc/binding/cpu.cpp",
        "params.grad_scale = total.reduction == kMean ?",
        "params.grad_scale = total.reduction == kSum ?",
        ("tests/test_overwriting.py::test_gradient_is_the_default_modes_and_in_the_logits",),
    ),
    "the class weights' sum is the number of classes": Fault(
        "csrc/binding/cpu.cpp",
        "    if (!weight) return;\n",
        "    return;\n",
        option("rows", "none", "index, weighted and smoothed"),
    ),
    "the class weights' sum has one weight more": Fault(
        "csrc/binding/cpu.cpp",
        "    params.weight_sum = 0;\n",
        "    params.weight_sum = 1;\n",
        option("rows", "none", "index, weighted and smoothed"),
    ),
    "targets are not judged again by the backward": Fault(
        "csrc/binding/cpu.cpp",
        "    scan();  // the targets, once more\n",
        "",
        ("tests/test_errors.py::test_target_changed_unseen_by_autograd", *BACKWARD),
    ),
    "a normalizer spares the targets' judgement": Fault(
        "csrc/binding/cpu.cpp",
        "    const double of_rows = scan();\n"
        "    return total.normalizer == nullptr ? of_rows : value_of(*total.normalizer);",
        "    return total.normalizer == nullptr ? scan() : value_of(*total.normalizer);",
        FORWARD,
    ),
    "a normalizer is forgotten": Fault(
        "csrc/binding/cpu.cpp",
        "return total.normalizer == nullptr ? of_rows : value_of(*total.normalizer);",
        "return of_rows;",
        ("tests/test_extras.py::test_normalizer",),
    ),
    "a loss is rounded to float32 on its way": Fault(
        "csrc/binding/cpu.cpp",
        "torch::stable::to(torch::stable::full({}, loss, ScalarType::Double), loss_dtype)",
        "torch::stable::to(torch::stable::full({}, loss, ScalarType::Float), loss_dtype)",
        ("tests/test_functional.py::test_totals_of_many_rows",),
    ),
    "total_weight is that of no normalizer": Fault(
        "csrc/binding/cpu.cpp",
        "torch::stable::full({}, total_weight, ScalarType::Double)};",
        "torch::stable::full({}, scan(), ScalarType::Double)};",
        ("tests/test_extras.py::test_normalizer", f"{OPS}test_a_normalizer_divides_the_gradient"),
    ),
    "an error names the row, not its position": Fault(
        "csrc/binding/cpu.cpp",
        "problem.position(scan.bad_row)",
        "std::to_string(scan.bad_row)",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "an error names another target": Fault(
        "csrc/binding/cpu.cpp",
        "cpu::target_index(params, scan.bad_row)",
        "cpu::target_index(params, 0)",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "rows of no classes have the loss of a kernel": Fault(
        "csrc/binding/cpu.cpp",
        "if (params.vocab_size > 0) cpu::forward(params, threads);",
        "cpu::forward(params, threads);",
        NO_CLASSES,
    ),
    "no huge pages for the gradient": Fault(
        "csrc/binding/cpu.cpp",
        "advise_huge_pages(gradient.mutable_data_ptr(), ",
        "advise_huge_pages(gradient.mutable_data_ptr(), 0 * ",
        HUGE_PAGES,
    ),
    "huge pages for half of the gradient": Fault(
        "csrc/binding/cpu.cpp",
        "gradient.numel() * gradient.element_size()",
        "gradient.numel()",
        HUGE_PAGES,
    ),
    "huge pages before the gradient's begin": Fault(
        "csrc/binding/huge_pages.h",
        "(reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;",
        "reinterpret_cast<uintptr_t>(data) / kPage * kPage;",
        HUGE_PAGES,
    ),
    "huge pages after the gradient's end": Fault(
        "csrc/binding/huge_pages.h",
        "(reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;",
        "(reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;",
        HUGE_PAGES,
    ),
}

OPERATORS = {
    "statistics are never wanted": Fault(
        "csrc/binding/operators.h",
        "const Rows rows(call.problem, call.params, statistics);\n    const auto [loss",
        "const Rows rows(call.problem, call.params, false && statistics);\n    const auto [loss",
        ("tests/test_extras.py::test_argmax_is_the_first_of_the_greatest",),
    ),
    "row_max and log_sum are returned in the other order": Fault(
        "csrc/binding/operators.h",
        "return {loss,         total_weight, rows.max, rows.log_sum,",
        "return {loss,         total_weight, rows.log_sum, rows.max,",
        (f"{OPS}test_forward_saves_what_its_documentation_says",),
    ),
    "row_max and log_sum are returned in the other order in fused mode": Fault(
        "csrc/binding/operators.h",
        "return {loss, rows.max, rows.log_sum, rows.entropy, rows.argmax};",
        "return {loss, rows.log_sum, rows.max, rows.entropy, rows.argmax};",
        (f"{OPS}test_fused_mode_returns_what_forward_does",),
    ),
    "any reduction passes in fused mode": Fault(
        "csrc/binding/operators.h",
        "    check_reduction(reduction, loss_dtype);\n"
        "    Call call(logits, target, weight, token_weight, dim, ignore_index, numbers);\n"
        "    const Total total = total_of(call.problem, reduction, normalizer);\n"
        "    set_grad",
        "    Call call(logits, target, weight, token_weight, dim, ignore_index, numbers);\n"
        "    const Total total = total_of(call.problem, reduction, normalizer);\n"
        "    set_grad",
        FORWARD,
    ),
    "any reduction passes in the backward": Fault(
        "csrc/binding/operators.h",
        "    check_reduction(reduction, problem.acc_dtype);\n",
        "",
        BACKWARD,
    ),
    "a normalizer may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        '&problem.check_scalar("normalizer", *normalizer)',
        "&*normalizer",
        FORWARD,
    ),
    "total_weight may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        '    problem.check_scalar("total_weight", saved.total_weight);\n',
        "",
        BACKWARD,
    ),
    "row_max may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("row_max", saved.row_max).data_ptr()',
        "saved.row_max.data_ptr()",
        BACKWARD,
    ),
    "log_sum may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("log_sum", saved.log_sum).data_ptr()',
        "saved.log_sum.data_ptr()",
        BACKWARD,
    ),
    "label_mass may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("label_mass", saved.label_mass).data_ptr()',
        "saved.label_mass.data_ptr()",
        BACKWARD,
    ),
    "the focal loss's slope may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("loss_slope", saved.loss_slope).data_ptr()',
        "saved.loss_slope.data_ptr()",
        BACKWARD,
    ),
    "an entropy may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("entropy", saved.entropy).data_ptr()',
        "saved.entropy.data_ptr()",
        BACKWARD,
    ),
    "the gradient of the lse may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("grad_lse", *upstream.lse).data_ptr()',
        "upstream.lse->data_ptr()",
        BACKWARD,
    ),
    "the gradient of the entropy may be of any dtype and shape": Fault(
        "csrc/binding/operators.h",
        'problem.check_rows("grad_entropy", *upstream.entropy).data_ptr()',
        "upstream.entropy->data_ptr()",
        BACKWARD,
    ),
    "the gradients of lse and entropy are swapped": Fault(
        "csrc/binding/operators.h",
        "backward_into(grad_logits, call, {grad_loss, grad_lse, grad_entropy},",
        "backward_into(grad_logits, call, {grad_loss, grad_entropy, grad_lse},",
        ("tests/test_regimes.py::test_statistics_where_the_target_is_impossible",),
    ),
    "no gradient of the loss is a gradient of 1": Fault(
        "csrc/binding/operators.h",
        "return torch::stable::zero_(zero);",
        "return torch::stable::fill_(zero, 1);",
        ("tests/test_regimes.py::test_statistics_where_the_target_is_impossible",),
    ),
    "the backward of a mean is that of a sum": Fault(
        "csrc/binding/operators.h",
        "call.backward(reduction == kMean ? &saved.total_weight : nullptr);",
        "call.backward(reduction != kNone ? &saved.total_weight : nullptr);",
        ("tests/test_kernels.py::test_shape[two dimensions-index-float32]",),
    ),
    "token weights are forgotten when a gradient is scaled": Fault(
        "csrc/binding/operators.h",
        "Call call(grad_logits, target, std::nullopt, token_weight, dim, ignore_index,",
        "Call call(grad_logits, target, std::nullopt, std::nullopt, dim, ignore_index,",
        ("tests/test_layouts.py::test_upstream_of_rows_left_out_may_be_anything",),
    ),
    "any gradient is scaled in place": Fault(
        "csrc/binding/operators.h",
        'set_grad_logits(call.params, "grad_logits", grad_logits, dim);',
        "call.params.grad_logits = grad_logits.mutable_data_ptr();\n"
        '    call.params.grad_layout = layout_of("grad_logits", grad_logits, dim);',
        MEMORY,
    ),
}

TENSORS = {
    "the last size of a text has no comma": Fault(
        "csrc/binding/tensors.cpp",
        "text.erase(text.size() - (values.size() == 1 ? 1 : 2));",
        "text.erase(text.size() - 2);",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "rows that share one element pass": Fault(
        "csrc/binding/tensors.cpp",
        "if (stride <= reach) return true;",
        "if (stride < reach) return true;",
        MEMORY,
    ),
    "what smaller strides reach is forgotten": Fault(
        "csrc/binding/tensors.cpp",
        "reach += stride * (size - 1);",
        "reach = stride * (size - 1);",
        MEMORY,
    ),
    "dimensions of size 1 overlap": Fault(
        "csrc/binding/tensors.cpp",
        "if (tensor.size(d) > 1) dims.emplace_back(",
        "if (tensor.size(d) > 0) dims.emplace_back(",
        MEMORY,
    ),
    "strides are compared in the order of the dimensions": Fault(
        "csrc/binding/tensors.cpp",
        "  std::sort(dims.begin(), dims.end());\n",
        "  std::reverse(dims.begin(), dims.end());\n",
        MEMORY,
    ),
    "dimensions of size 1 are row dimensions": Fault(
        "csrc/binding/tensors.cpp",
        "if (d == dim || size == 1) continue;",
        "if (d == dim) continue;",
        (f"{OPS}test_dimensions_of_size_1_are_no_row_dimensions",),
    ),
    "row dimensions with a gap are merged": Fault(
        "csrc/binding/tensors.cpp",
        "if (last >= 0 && layout.stride[last] == size * stride) {",
        "if (last >= 0 && layout.stride[last] >= size * stride) {",
        ("tests/test_layouts.py::test_strides_of_logits",),
    ),
    "a merged dimension keeps the stride of the outer": Fault(
        "csrc/binding/tensors.cpp",
        "      layout.stride[last] = stride;\n",
        "",
        ("tests/test_layouts.py::test_strides_of_logits",),
    ),
    "bfloat16 is taken for float16": Fault(
        "csrc/binding/tensors.cpp",
        "      return DType::bfloat16;",
        "      return DType::float16;",
        option("rows", "none", "index", "bfloat16"),
    ),
    "the number of numbers is not checked": Fault(
        "csrc/binding/tensors.cpp",
        "numbers.size() == 5",
        "numbers.size() >= 5",
        FORWARD,
    ),
    "negative dimensions pass": Fault(
        "csrc/binding/tensors.cpp",
        "check(0 <= dim && dim < logits.dim(),",
        "check(dim < logits.dim(),",
        FORWARD,
    ),
    "a softcap is taken for a logit_scale": Fault(
        "csrc/binding/tensors.cpp",
        "  params.softcap = numbers[3];\n  params.logit_scale = numbers[4];",
        "  params.softcap = numbers[4];\n  params.logit_scale = numbers[3];",
        option("tile", "none", "index"),
    ),
    "class weights of any dtype are read": Fault(
        "csrc/binding/tensors.cpp",
        "weight->scalar_type() == acc_dtype && weight->is_contiguous()",
        "weight->is_contiguous()",
        FORWARD,
    ),
    "class weights with a step are read without": Fault(
        "csrc/binding/tensors.cpp",
        "weight->scalar_type() == acc_dtype && weight->is_contiguous()",
        "weight->scalar_type() == acc_dtype",
        FORWARD,
    ),
    "class weights may be more than the classes": Fault(
        "csrc/binding/tensors.cpp",
        "weight->size(0) == params.vocab_size",
        "weight->size(0) >= params.vocab_size",
        FORWARD,
    ),
    "class weights may have two dimensions": Fault(
        "csrc/binding/tensors.cpp",
        "weight->is_contiguous() && weight->dim() == 1 &&",
        "weight->is_contiguous() &&",
        FORWARD,
    ),
    "tensors of another device are read": Fault(
        "csrc/binding/tensors.cpp",
        "check(tensor.device() == logits.device(),",
        "check(true || tensor.device() == logits.device(),",
        FORWARD,
        unseen="The library has kernels of one device; a tensor on meta goes to meta's operators.",
    ),
    "probabilities of any shape are read": Fault(
        "csrc/binding/tensors.cpp",
        "check(shape_of(target) == shape_of(logits),",
        "check(target.numel() == logits.numel(),",
        FORWARD,
    ),
    "probabilities of float32 are read under float64": Fault(
        "csrc/binding/tensors.cpp",
        "(half && params.target_dtype == DType::float32)",
        "params.target_dtype == DType::float32",
        FORWARD,
    ),
    "probabilities of another 16-bit type are read": Fault(
        "csrc/binding/tensors.cpp",
        "check(params.target_dtype == params.dtype || (half &&",
        "check(element_size(params.target_dtype) == element_size(params.dtype) || (half &&",
        FORWARD,
    ),
    "probabilities in more dimensions than the kernels count are refused": Fault(
        "csrc/binding/tensors.cpp",
        "    target = with_layout(target, dim);\n",
        "",
        ("tests/test_errors.py::test_rows_of_more_dimensions_than_the_kernels_count",),
    ),
    "class indices of any number are read": Fault(
        "csrc/binding/tensors.cpp",
        "check(shape_of(target) == row_shape,",
        "check(target.numel() >= params.n_rows,",
        FORWARD,
    ),
    "class indices with a step are read without": Fault(
        "csrc/binding/tensors.cpp",
        "    target = torch::stable::contiguous(target);\n  }",
        "  }",
        ("tests/test_layouts.py::test_strides_of_class_indices",),
    ),
    "rows with a step are read without": Fault(
        "csrc/binding/tensors.cpp",
        "rows.scalar_type() == acc_dtype && rows.is_contiguous(),",
        "rows.scalar_type() == acc_dtype,",
        FORWARD,
    ),
    "rows of any dtype are read": Fault(
        "csrc/binding/tensors.cpp",
        "rows.scalar_type() == acc_dtype && rows.is_contiguous(),",
        "rows.is_contiguous(),",
        FORWARD,
    ),
    "an upstream gradient of any shape is read": Fault(
        "csrc/binding/tensors.cpp",
        "check(is_scalar || shape_of(grad_loss) == row_shape,",
        "check(is_scalar || grad_loss.numel() >= 1,",
        BACKWARD,
    ),
    "an upstream gradient of any dtype is read as it lies": Fault(
        "csrc/binding/tensors.cpp",
        "torch::stable::contiguous(torch::stable::to(grad_loss, acc_dtype));",
        "torch::stable::contiguous(grad_loss);",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "an expanded upstream gradient is read beyond its end": Fault(
        "csrc/binding/tensors.cpp",
        "torch::stable::contiguous(torch::stable::to(grad_loss, acc_dtype));",
        "torch::stable::to(grad_loss, acc_dtype);",
        ("tests/test_layouts.py::test_strides_of_upstream_gradient",),
    ),
    "one upstream gradient is read as one a row": Fault(
        "csrc/binding/tensors.cpp",
        "p.grad_loss_stride = is_scalar ? 0 : 1;",
        "p.grad_loss_stride = 1;",
        (
            "tests/test_overwriting.py::test_scalar_upstream_is_applied_once",
            "tests/test_kernels.py::test_shape[two dimensions-index-float32]",
        ),
    ),
    "a scalar of any dtype is read as float64": Fault(
        "csrc/binding/tensors.cpp",
        "scalar.dim() == 0 && scalar.scalar_type() == ScalarType::Double",
        "scalar.dim() == 0",
        BACKWARD,
    ),
    "statistics of more classes than the lanes count": Fault(
        "csrc/binding/tensors.cpp",
        "check(!statistics || p.vocab_size < INT32_MAX,",
        "check(!statistics || p.vocab_size <= INT64_MAX,",
        FORWARD,
    ),
    "rows of no classes keep what memory held": Fault(
        "csrc/binding/tensors.cpp",
        "  if (p.vocab_size > 0) return;\n",
        "  return;\n",
        NO_CLASSES,
    ),
    "of rows of no classes the first is the argmax": Fault(
        "csrc/binding/tensors.cpp",
        "torch::stable::fill_(argmax, -1);",
        "torch::stable::fill_(argmax, 0);",
        NO_CLASSES,
    ),
    "a position counts the last dimension first": Fault(
        "csrc/binding/tensors.cpp",
        "for (size_t d = row_shape.size(); d-- > 0; row /= row_shape[d]) index[d]",
        "for (size_t d = 0; d < row_shape.size(); row /= row_shape[d++]) index[d]",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "scale_gradient_ does not say that it writes": Fault(
        "csrc/binding/schemas.h",
        '"scale_gradient_(Tensor(a!) grad_logits,',
        '"scale_gradient_(Tensor grad_logits,',
        (f"{OPS}test_opcheck",),
    ),
}

FROM_OUTSIDE = {
    "the fused mode writes to a copy of many dimensions": Fault(
        "csrc/binding/operators.h",
        'set_grad_logits(call.params, "logits", logits, dim);',
        'set_grad_logits(call.params, "logits", call.problem.logits, dim);',
        ("tests/test_ops.py::test_more_row_dimensions_than_are_counted_are_not_overwritten",),
    ),
}

FAULTS = {
    **CALL,
    **OPERATORS,
    **TENSORS,
    **FROM_OUTSIDE,
}
