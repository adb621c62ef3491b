"""Faults of the Python package, and the tests that see them."""

from .fault import Fault

FUNCTIONAL = "fused_xent/functional.py"
CHECKS = "fused_xent/_checks.py"
LINEAR = "fused_xent/linear.py"
PRODUCTS = "fused_xent/_linear.py"
LINEAR_AUTOGRAD = "fused_xent/_linear_autograd.py"
AUTOGRAD = "fused_xent/_autograd.py"
OPS = "fused_xent/_ops.py"
REFERENCE = "fused_xent/reference.py"
NN = "fused_xent/nn.py"
MAIN = "fused_xent/__main__.py"

TOKENS = ("tests/test_token_weight.py::test_token_weights",)
CANCEL = ("tests/test_token_weight.py::test_mean_by_weights_that_cancel",)
POSITION = ("tests/test_token_weight.py::test_position_of_a_target_that_is_no_class",)
NARROW = ("tests/test_linear_dtypes.py::test_narrow_targets",)
PROBABILITIES = ("tests/test_linear_dtypes.py::test_probabilities_of_another_dtype",)
REFUSED = ("tests/test_errors.py::test_refused",)
TAKEN = ("tests/test_errors.py::test_taken",)
LINEAR_ERRORS = ("tests/test_linear_errors.py::test_errors",)
MODULES = ("tests/test_nn.py::test_every_option_reaches_the_function",)
REPORT = ("tests/test_fallback.py::test_report_of_a_kernel_that_is_wrong",)
CHUNKS = ("tests/test_linear.py::test_rows_of_a_chunk",)
SHIFT = ("tests/test_linear.py::test_shift_and_drop_ignored",)
STATISTICS = ("tests/test_linear.py::test_statistics",)
TRANSFORMS = ("tests/test_doors.py::test_transforms_of_torch_func",)
BATCHES = ("tests/test_doors.py::test_batches_of_upstream_gradients",)
FORMULA = ("tests/test_extras.py::test_formula",)
SUBCLASSES = ("tests/test_functional.py::test_tensor_subclasses_are_asked_first",)
USED_BEFORE = ("tests/test_overwriting_shared.py::test_logits_used_before_the_loss_too",)
OPERATORS = ("tests/test_ops.py::test_meta_implementations_agree_in_strides",)

FUNCTIONAL_FAULTS = {
    "token weights in float32 beside float64 probabilities": Fault(
        FUNCTIONAL,
        "dtype = torch.float64 if target.dtype == torch.float64 else input.dtype",
        "dtype = input.dtype",
        TOKENS,
    ),
    "token weights of another dtype reach the kernels": Fault(
        FUNCTIONAL,
        "token_weight.to(_ops.accumulation_dtype(dtype)).contiguous()",
        "token_weight.contiguous()",
        TOKENS,
    ),
    "token weights with a step reach the kernels": Fault(
        FUNCTIONAL,
        "token_weight.to(_ops.accumulation_dtype(dtype)).contiguous()",
        "token_weight.to(_ops.accumulation_dtype(dtype))",
        TOKENS,
    ),
    "class weights with a step reach the kernels": Fault(
        FUNCTIONAL,
        "weight=tensors.weight.to(acc).contiguous()",
        "weight=tensors.weight.to(acc)",
        ("tests/test_functional.py::test_weight_of_any_stride_that_is_a_view",),
    ),
    "class weights in the dtype of the logits": Fault(
        FUNCTIONAL,
        "acc = _ops.accumulation_dtype(tensors.logits.dtype)",
        "acc = tensors.logits.dtype",
        PROBABILITIES,
    ),
    "z-loss of an ignored row of NaN weight": Fault(
        FUNCTIONAL,
        "z_loss * token_weight.masked_fill(argmax < 0, 0)",
        "z_loss * token_weight",
        TOKENS,
    ),
    "z-loss without its token weight": Fault(
        FUNCTIONAL,
        "z_loss = z_loss * token_weight.masked_fill(argmax < 0, 0)",
        "pass",
        TOKENS,
    ),
    "z-loss of the lse, not squared": Fault(
        FUNCTIONAL,
        "options.lse_square_scale * lse.square()",
        "options.lse_square_scale * lse",
        TOKENS,
    ),
    "ignored rows are correct where ignore_index is -1": Fault(
        FUNCTIONAL,
        "correct = (argmax == target) & (argmax >= 0)",
        "correct = argmax == target",
        TOKENS,
    ),
    "range of targets without the rows of weight 0": Fault(
        FUNCTIONAL,
        "_checks.check_range(target, token_weight, n_classes, options.ignore_index)",
        "_checks.check_range(target, None, n_classes, options.ignore_index)",
        TOKENS,
    ),
    "no range of targets by torch operations": Fault(
        FUNCTIONAL,
        "if not target.is_floating_point() and has_values(target):",
        "if False:",
        POSITION,
    ),
    "values of targets are looked at under vmap": Fault(
        FUNCTIONAL,
        "if not target.is_floating_point() and has_values(target):",
        "if not target.is_floating_point():",
        TOKENS,
    ),
    "ignore_index of the range is the default": Fault(
        FUNCTIONAL,
        "_checks.check_range(target, token_weight, n_classes, options.ignore_index)",
        "_checks.check_range(target, token_weight, n_classes, -100)",
        TOKENS,
    ),
    "loss by torch operations in their dtype": Fault(
        FUNCTIONAL,
        "return results._replace(loss=results.loss.to(options.loss_dtype))",
        "return results",
        TOKENS,
    ),
    "logits not promoted beside float64 probabilities": Fault(
        FUNCTIONAL,
        "logits.to(torch.float64) if is_promoted else logits",
        "logits",
        TOKENS,
    ),
    "class weights do not promote": Fault(
        FUNCTIONAL,
        "dtype = torch.promote_types(dtype, weight.dtype)",
        "pass",
        ("tests/test_functional.py::test_dtype_of_mixed_probabilities",),
    ),
    "float32 probabilities rounded to 16 bits": Fault(
        FUNCTIONAL,
        "target = target.to(torch.float32)",
        "target = target.to(input.dtype)",
        PROBABILITIES,
    ),
    "float64 loss cast under autocast": Fault(
        FUNCTIONAL,
        "if is_autocast(input.device) and dtype != torch.float64:",
        "if is_autocast(input.device):",
        ("tests/test_functional.py::test_autocast",),
    ),
    "loss in 16 bits under autocast": Fault(
        FUNCTIONAL,
        "if is_autocast(input.device) and dtype != torch.float64:",
        "if False:",
        ("tests/test_functional.py::test_autocast",),
    ),
    "reduce without size_average is ignored": Fault(
        FUNCTIONAL,
        "if size_average is not None or reduce is not None:",
        "if size_average is not None:",
        ("tests/test_functional.py::test_legacy_reduction",),
    ),
    "all scales must want a gradient": Fault(
        FUNCTIONAL,
        "or any(tensor is not None and tensor.requires_grad for tensor in scales)",
        "or all(tensor is not None and tensor.requires_grad for tensor in scales)",
        ("tests/test_autograd.py::test_gradient_to_a_weight",),
    ),
    "focal loss of probabilities that want a gradient": Fault(
        FUNCTIONAL,
        "or (options.focal_gamma != 0 and target.requires_grad)",
        "",
        ("tests/test_doors.py::test_all_options",),
    ),
    "no classes reach the kernels": Fault(
        FUNCTIONAL,
        "or tensors.logits.shape[options.dim] == 0",
        "",
        ("tests/test_functional.py::test_probabilities_of_no_classes",),
    ),
    "vmap reaches the kernels": Fault(
        FUNCTIONAL, "in (kinds.Vmap, kinds.Jvp)", "in (kinds.Jvp,)", TRANSFORMS
    ),
    "all levels must be vmap or jvp": Fault(
        FUNCTIONAL,
        "return any(interpreter.key() in",
        "return bool(stack) and all(interpreter.key() in",
        TRANSFORMS,
    ),
    "dual numbers reach the kernels": Fault(
        FUNCTIONAL,
        "forward_ad._current_level >= 0",
        "forward_ad._current_level > 0",
        ("tests/test_doors.py::test_dual_numbers",),
    ),
    "values of meta tensors are looked at": Fault(
        FUNCTIONAL,
        'if torch.compiler.is_compiling() or tensor.device.type == "meta":',
        "if torch.compiler.is_compiling():",
        ("tests/test_linear_doors.py::test_tensors_without_memory",),
    ),
    "values of fake tensors are looked at": Fault(
        FUNCTIONAL,
        "return not (_is_transformed() or isinstance(tensor, FakeTensor))",
        "return not _is_transformed()",
        ("tests/test_linear_doors.py::test_fake_tensors_outside_their_mode",),
    ),
    "normalizer keeps its dtype": Fault(
        FUNCTIONAL,
        "return normalizer.to(input.device, torch.float64)",
        "return normalizer.to(input.device)",
        ("tests/test_extras.py::test_normalizer",),
    ),
    "normalizer stays on its device": Fault(
        FUNCTIONAL,
        "return normalizer.to(input.device, torch.float64)",
        "return normalizer.to(torch.float64)",
        ("tests/test_functional.py::test_normalizer_goes_to_the_logits_device",),
    ),
    "normalizer of a number on the default device": Fault(
        FUNCTIONAL,
        "return input.new_full((), float(normalizer), dtype=torch.float64)",
        "return torch.full((), float(normalizer), dtype=torch.float64)",
        ("tests/test_functional.py::test_normalizer_goes_to_the_logits_device",),
    ),
    "normalizer cut to an integer": Fault(
        FUNCTIONAL,
        "input.new_full((), float(normalizer)",
        "input.new_full((), int(normalizer)",
        ("tests/test_extras.py::test_any_combination_of_many_options",),
    ),
    "offset of the overwritten logits is lost": Fault(
        FUNCTIONAL,
        "logits.stride(), logits.storage_offset())",
        "logits.stride(), 0)",
        ("tests/test_layouts.py::test_nothing_is_written_outside_the_logits",),
    ),
    "strides of the overwritten logits are lost": Fault(
        FUNCTIONAL,
        "view = (logits.size(), logits.stride(),",
        "view = (logits.size(), logits.contiguous().stride(),",
        ("tests/test_layouts.py::test_strides_of_overwritten_logits",),
    ),
    "the view is marked dirty, not its owner": Fault(
        FUNCTIONAL,
        "memory = logits if logits._base is None else logits._base",
        "memory = logits",
        ("tests/test_overwriting_shared.py::test_logits_used_after_the_loss_too",),
    ),
    "compiled fused mode overwrites nothing": Fault(
        FUNCTIONAL,
        "inplace_backward = True  # compiled",
        "pass  # compiled",
        ("tests/test_compile.py::test_logits_from_outside_that_are_needed_after_that",),
    ),
    "logits without a gradient are overwritten": Fault(
        FUNCTIONAL,
        "if grad_in_forward and torch.is_grad_enabled() and tensors.logits.requires_grad:",
        "if grad_in_forward and torch.is_grad_enabled():",
        ("tests/test_overwriting.py::test_without_grad_nothing_is_overwritten",),
    ),
    "logits are overwritten without grad mode": Fault(
        FUNCTIONAL,
        "if grad_in_forward and torch.is_grad_enabled() and tensors.logits.requires_grad:",
        "if grad_in_forward and tensors.logits.requires_grad:",
        ("tests/test_overwriting.py::test_without_grad_nothing_is_overwritten",),
    ),
    "inplace_backward may be any object": Fault(
        FUNCTIONAL, '    _checks.check_flag("inplace_backward", inplace_backward)\n', "", REFUSED
    ),
    "logits of inplace_backward are not checked": Fault(
        FUNCTIONAL,
        "if inplace_backward or grad_in_forward:",
        "if grad_in_forward:",
        ("tests/test_overwriting.py::test_a_leaf_is_refused",),
    ),
    "modes are swapped where they are checked": Fault(
        FUNCTIONAL,
        "options.dim, inplace_backward, grad_in_forward\n",
        "options.dim, grad_in_forward, inplace_backward\n",
        ("tests/test_overwriting.py::test_a_leaf_is_refused",),
    ),
    "modes are dropped before the kernels": Fault(
        FUNCTIONAL,
        "return compute(tensors, options, inplace_backward, grad_in_forward)",
        "return compute(tensors, options)",
        ("tests/test_nn.py::test_copies_keep_all_options",),
    ),
    "subclasses of weights are not asked": Fault(
        FUNCTIONAL,
        "tensors = (input, target, weight, token_weight, normalizer)\n    options = {",
        "tensors = (input, target, None, token_weight, normalizer)\n    options = {",
        SUBCLASSES,
    ),
    "a cap is not checked": Fault(
        FUNCTIONAL,
        'None if softcap is None else check_number("softcap", softcap, 1e-30, 1e30)',
        "softcap",
        REFUSED,
    ),
    "a scale may be 0": Fault(
        FUNCTIONAL,
        'check_number("logit_scale", logit_scale, 1e-30, 1e30)',
        'check_number("logit_scale", logit_scale, 0, 1e30)',
        REFUSED,
    ),
    "z-loss at most 1": Fault(
        FUNCTIONAL,
        'check_number("lse_square_scale", lse_square_scale, 0, 1e30)',
        'check_number("lse_square_scale", lse_square_scale, 0, 1)',
        TAKEN,
    ),
    "scale and cap are not compared": Fault(
        FUNCTIONAL,
        "    _checks.check_transform(options.softcap, options.logit_scale)\n",
        "",
        REFUSED,
    ),
    "z-loss and focal loss are swapped": Fault(
        FUNCTIONAL,
        '        check_number("lse_square_scale", lse_square_scale, 0, 1e30),\n'
        '        check_number("focal_gamma", focal_gamma, 0, 1e30),\n',
        '        check_number("focal_gamma", focal_gamma, 0, 1e30),\n'
        '        check_number("lse_square_scale", lse_square_scale, 0, 1e30),\n',
        FORMULA,
    ),
    "loss_dtype has no effect": Fault(
        FUNCTIONAL,
        "loss_dtype or result_dtype",
        "result_dtype",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "lse and entropy are swapped": Fault(
        FUNCTIONAL,
        "return CrossEntropyStatistics(loss, lse, z_loss, entropy, argmax, correct)",
        "return CrossEntropyStatistics(loss, entropy, z_loss, lse, argmax, correct)",
        TOKENS,
    ),
    "names of options are not checked": Fault(
        FUNCTIONAL,
        '    _checks.check_names("cross_entropy_with_statistics", options, _NAMES)\n',
        "",
        ("tests/test_errors.py::test_unknown_arguments",),
    ),
    "label smoothing by default": Fault(
        FUNCTIONAL,
        '    reduction: str = "mean",\n    label_smoothing: float = 0.0,\n    *,',
        '    reduction: str = "mean",\n    label_smoothing: float = 0.1,\n    *,',
        ("tests/test_functional.py::test_legacy_reduction",),
    ),
    "ignored class 0 by default": Fault(
        FUNCTIONAL,
        "    size_average: bool | None = None,\n    ignore_index: int = -100,\n"
        '    reduce: bool | None = None,\n    reduction: str = "mean",\n'
        "    label_smoothing: float = 0.0,\n    *,",
        "    size_average: bool | None = None,\n    ignore_index: int = -1,\n"
        '    reduce: bool | None = None,\n    reduction: str = "mean",\n'
        "    label_smoothing: float = 0.0,\n    *,",
        ("tests/test_functional.py::test_torchs_arguments_come_first_with_torchs_defaults",),
    ),
    "signature of the statistics is the loss's": Fault(
        FUNCTIONAL,
        "    return_annotation=CrossEntropyStatistics,\n",
        "",
        ("tests/test_extras.py::test_signature_of_the_statistics_is_that_of_the_loss",),
    ),
}

CHECKS_FAULTS = {
    "autocast of a device that has none": Fault(
        CHECKS,
        "return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)",
        "return torch.is_autocast_enabled(device.type)",
        ("tests/test_functional.py::test_meta_tensors_have_shapes_and_dtypes",),
    ),
    "a bool is an index": Fault(
        CHECKS,
        "if isinstance(value, bool) or not isinstance(value, (int, SupportsIndex)):",
        "if not isinstance(value, (int, SupportsIndex)):",
        REFUSED,
    ),
    "an index of numpy is refused": Fault(
        CHECKS,
        "not isinstance(value, (int, SupportsIndex))",
        "not isinstance(value, int)",
        TAKEN,
    ),
    "2**63 fits in 64 bits": Fault(
        CHECKS, "if not -(2**63) <= value < 2**63:", "if not -(2**63) <= value <= 2**63:", REFUSED
    ),
    "the least number of 64 bits is refused": Fault(
        CHECKS, "if not -(2**63) <= value < 2**63:", "if not -(2**63) < value < 2**63:", TAKEN
    ),
    "a dimension beyond the last": Fault(
        CHECKS, "<= index < input.dim():", "<= index <= input.dim():", REFUSED
    ),
    "a dimension from the end is kept negative": Fault(
        CHECKS, "return index % input.dim()", "return index", ("tests/test_extras.py::test_dim",)
    ),
    "sparse tensors are taken": Fault(
        CHECKS, "if tensor.layout != torch.strided:", "if False:", REFUSED
    ),
    "the name of a sparse tensor is lost": Fault(
        CHECKS, "{name} must be a dense tensor", "input must be a dense tensor", REFUSED
    ),
    "targets of other devices": Fault(
        CHECKS, '    _check_device("target", target, input)\n', "", REFUSED
    ),
    "class weights of other devices": Fault(
        CHECKS, '    _check_device("weight", weight, input)\n', "", REFUSED
    ),
    "token weights of other devices": Fault(
        CHECKS, '    _check_device("token_weight", token_weight, input)\n', "", REFUSED
    ),
    "layers of other devices": Fault(
        CHECKS, '    _check_device("linear_weight", linear_weight, input)\n', "", LINEAR_ERRORS
    ),
    "biases of other devices": Fault(
        CHECKS, '        _check_device("linear_bias", linear_bias, input)\n', "", LINEAR_ERRORS
    ),
    "int16 targets": Fault(
        CHECKS,
        "(torch.int64, torch.int32, torch.uint8)",
        "(torch.int64, torch.int32, torch.int16, torch.uint8)",
        REFUSED,
    ),
    "int32 targets are refused": Fault(
        CHECKS,
        "(torch.int64, torch.int32, torch.uint8)",
        "(torch.int64, torch.uint8)",
        NARROW,
    ),
    "class 0 is ignored beside probabilities": Fault(
        CHECKS, "        if ignore_index >= 0:", "        if ignore_index > 0:", REFUSED
    ),
    "integer class weights beside probabilities": Fault(
        CHECKS,
        "if weight.dtype not in _ops.DTYPES or (weight.dtype != input.dtype and not promotes):",
        "if weight.dtype != input.dtype and not promotes:",
        REFUSED,
    ),
    "class weights of a module under autocast are refused": Fault(
        CHECKS,
        "promotes = target.is_floating_point() or is_autocast(input.device)",
        "promotes = target.is_floating_point()",
        ("tests/test_functional.py::test_autocast_with_a_float32_weight_beside_bfloat16_logits",),
    ),
    "class weights of any dtype beside indices": Fault(
        CHECKS,
        "promotes = target.is_floating_point() or is_autocast(input.device)",
        "promotes = True",
        REFUSED,
    ),
    "complex token weights": Fault(
        CHECKS, "    if token_weight.dtype.is_complex:", "    if False:", REFUSED
    ),
    "complex normalizer": Fault(
        CHECKS,
        "elif normalizer.dim() != 0 or normalizer.dtype.is_complex:",
        "elif normalizer.dim() != 0:",
        REFUSED,
    ),
    "several normalizers": Fault(
        CHECKS,
        "elif normalizer.dim() != 0 or normalizer.dtype.is_complex:",
        "elif normalizer.dtype.is_complex:",
        REFUSED,
    ),
    "normalizer of a sum": Fault(CHECKS, '    if reduction != "mean":', "    if False:", REFUSED),
    "normalizer of minus infinity": Fault(
        CHECKS,
        "if normalizer == 0 or not -math.inf < normalizer < math.inf:",
        "if normalizer == 0 or not normalizer < math.inf:",
        REFUSED,
    ),
    "negative normalizer is refused": Fault(
        CHECKS,
        "if normalizer == 0 or not -math.inf < normalizer < math.inf:",
        "if not 0 < normalizer < math.inf:",
        TAKEN,
    ),
    "NaN is in every interval": Fault(
        CHECKS,
        "    if not least <= value <= most:",
        "    if value < least or value > most:",
        REFUSED,
    ),
    "the ends of an interval are refused": Fault(
        CHECKS, "    if not least <= value <= most:", "    if not least < value < most:", TAKEN
    ),
    "a bool is a number": Fault(
        CHECKS,
        "if isinstance(value, bool) or not isinstance(value, (float, Real)):",
        "if not isinstance(value, (float, Real)):",
        REFUSED,
    ),
    "the value is lost in a message": Fault(
        CHECKS,
        "{name} must be in [{least:g}, {most:g}], got {value}",
        "{name} must be in [{least:g}, {most:g}]",
        REFUSED,
    ),
    "scale far below the cap": Fault(
        CHECKS,
        "not 1e-30 <= logit_scale / softcap <= 1e30",
        "not logit_scale / softcap <= 1e30",
        REFUSED,
    ),
    "loss of any dtype": Fault(
        CHECKS,
        "if loss_dtype is not None and loss_dtype not in _ops.DTYPES:",
        "if loss_dtype is not None and not isinstance(loss_dtype, torch.dtype):",
        REFUSED,
    ),
    "five row dimensions are written": Fault(
        CHECKS,
        "return len(merged) <= 4",
        "return len(merged) <= 5",
        ("tests/test_errors.py::test_rows_of_one_dimension_too_many",),
    ),
    "four row dimensions are refused": Fault(
        CHECKS,
        "return len(merged) <= 4",
        "return len(merged) <= 3",
        ("tests/test_errors.py::test_rows_of_as_many_dimensions_as_the_kernels_count",),
    ),
    "dimensions of size 1 are counted": Fault(
        CHECKS,
        "if d == dim or size == 1:",
        "if d == dim:",
        ("tests/test_errors.py::test_rows_of_as_many_dimensions_as_the_kernels_count",),
    ),
    "the dimension of the classes is counted": Fault(
        CHECKS,
        "if d == dim or size == 1:",
        "if size == 1:",
        ("tests/test_errors.py::test_rows_of_as_many_dimensions_as_the_kernels_count",),
    ),
    "dimensions that merge are counted": Fault(
        CHECKS,
        "if merged and merged[-1] == size * stride:",
        "if False:",
        ("tests/test_errors.py::test_rows_of_many_dimensions_that_are_one",),
    ),
    "a target in the logits' memory": Fault(
        CHECKS,
        "if not is_compiling and _share_memory(target, input):",
        "if False:",
        ("tests/test_overwriting_shared.py::test_memory_that_the_target_shares",),
    ),
    "both modes at once": Fault(
        CHECKS, "    if inplace_backward and grad_in_forward:", "    if False:", REFUSED
    ),
    "the mode in a message is the other": Fault(
        CHECKS,
        'name = "grad_in_forward" if grad_in_forward else "inplace_backward"',
        'name = "grad_in_forward"',
        ("tests/test_overwriting.py::test_a_leaf_is_refused",),
    ),
    "views of a leaf are overwritten": Fault(
        CHECKS,
        "(input.is_leaf or memory.is_leaf)",
        "input.is_leaf",
        ("tests/test_overwriting.py::test_a_leaf_is_refused",),
    ),
    "shared elements are overwritten": Fault(
        CHECKS,
        "stride == 0 < size - 1 for",
        "stride < 0 for",
        ("tests/test_errors.py::test_messages_in_full",),
    ),
    "a dimension of size 1 and stride 0 is refused": Fault(
        CHECKS,
        "stride == 0 < size - 1 for",
        "stride == 0 < size for",
        ("tests/test_errors.py::test_a_dimension_of_size_1_shares_no_memory",),
    ),
    "a view of other signs is overwritten": Fault(
        CHECKS,
        "    if not is_compiling and input.is_neg():",
        "    if False:",
        ("tests/test_errors.py::test_overwriting_a_view_of_other_signs",),
    ),
    "overwriting under torch.func": Fault(
        CHECKS,
        "    if not is_compiling and torch._C._functorch.get_interpreter_stack():",
        "    if False:",
        ("tests/test_errors.py::test_overwriting_under_torch_func",),
    ),
    "probabilities that want a gradient in fused mode": Fault(
        CHECKS,
        "    if grad_in_forward and target.requires_grad:",
        "    if False:",
        ("tests/test_overwriting.py::test_gradient_of_probabilities_in_fused_mode",),
    ),
    "float16 in fused mode": Fault(
        CHECKS,
        "    if grad_in_forward and input.dtype == torch.float16:",
        "    if False:",
        ("tests/test_errors.py::test_float16_has_no_gradient_in_forward",),
    ),
    "a part of a tensor in fused mode": Fault(
        CHECKS,
        "(memory.numel() != input.numel() or memory.dtype != input.dtype)",
        "memory.dtype != input.dtype",
        ("tests/test_overwriting_shared.py::test_part_of_a_tensor_has_no_gradient_in_forward",),
    ),
    "memory of another dtype in fused mode": Fault(
        CHECKS,
        "(memory.numel() != input.numel() or memory.dtype != input.dtype)",
        "memory.numel() != input.numel()",
        (
            "tests/test_overwriting_shared.py::"
            "test_the_real_part_of_complex_numbers_has_no_gradient_in_forward",
        ),
    ),
    "the range in fewer bits": Fault(
        CHECKS,
        "    target = target.to(torch.int64)  # in fewer bits",
        "    # in fewer bits",
        ("tests/test_linear_dtypes.py::test_narrow_targets_that_are_no_class",),
    ),
    "negative targets are classes": Fault(
        CHECKS,
        "((target < 0) | (target >= n_classes))",
        "(target >= n_classes)",
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "the target after the last class": Fault(
        CHECKS,
        "(target >= n_classes))",
        "(target > n_classes))",
        ("tests/test_fallback.py::test_target_out_of_range", *POSITION),
    ),
    "the last bad target is named": Fault(
        CHECKS, "bad.nonzero()[0].tolist()", "bad.nonzero()[-1].tolist()", POSITION
    ),
    "rows of weight 0 may hold no other target": Fault(
        CHECKS, "        bad = bad & (token_weight != 0)\n", "        pass\n", POSITION
    ),
    "rows of weight 0 alone are checked": Fault(
        CHECKS, "bad & (token_weight != 0)", "bad & (token_weight == 0)", POSITION
    ),
    "a layer of one dimension": Fault(
        CHECKS, "    if linear_weight.dim() < 2:", "    if linear_weight.dim() < 1:", LINEAR_ERRORS
    ),
    "features that do not fit": Fault(
        CHECKS,
        "    if linear_weight.shape[-1] != input.shape[-1]:",
        "    if False:",
        LINEAR_ERRORS,
    ),
    "a bias of another shape": Fault(
        CHECKS,
        "        if linear_bias.shape != linear_weight.shape[:-1]:",
        "        if False:",
        LINEAR_ERRORS,
    ),
    "a bias of another dtype": Fault(
        CHECKS,
        '(("linear_weight", linear_weight), ("linear_bias", linear_bias))',
        '(("linear_weight", linear_weight),)',
        LINEAR_ERRORS,
    ),
    "ignore_index beside probabilities of a layer": Fault(
        CHECKS, "        if ignore_index is not None:", "        if False:", LINEAR_ERRORS
    ),
    "a negative shift": Fault(CHECKS, "    if shift < 0:", "    if False:", LINEAR_ERRORS),
    "a shift of no sequence": Fault(
        CHECKS, "    if shift > 0 and input.dim() < 2:", "    if False:", LINEAR_ERRORS
    ),
    "a shift of True is refused": Fault(
        CHECKS,
        'shift = int(shift) if isinstance(shift, bool) else check_index("shift", shift)',
        'shift = check_index("shift", shift)',
        ("tests/test_linear.py::test_next_tokens_without_weights",),
    ),
    "torch's chunk size is ignored": Fault(
        CHECKS, "    if chunk_rows is None and is_given:", "    if False:", CHUNKS
    ),
    "torch's chunk size goes before chunk_rows": Fault(
        CHECKS, "    if chunk_rows is None and is_given:", "    if is_given:", CHUNKS
    ),
    "chunks of no rows": Fault(
        CHECKS, "    if chunk_rows < 1:", "    if chunk_rows < 0:", LINEAR_ERRORS
    ),
}

LINEAR_FAULTS = {
    "a row is dropped where any of its positions is ignored": Fault(
        LINEAR,
        "counts.flatten(1).any(1)",
        "counts.flatten(1).all(1)",
        ("tests/test_linear_dtypes.py::test_a_row_is_dropped_where_all_of_its_positions_are",),
    ),
    "kept rows by an ignored index of fewer bits": Fault(
        LINEAR,
        "is_label = target.to(torch.int64) != ignore_index",
        "is_label = target != ignore_index",
        NARROW,
    ),
    "ignored rows of a token weight are kept": Fault(
        LINEAR,
        "counts = is_label if counts is None else counts & is_label",
        "counts = is_label if counts is None else counts | is_label",
        ("tests/test_linear_dtypes.py::test_a_row_is_dropped_where_all_of_its_positions_are",),
    ),
    "rows of token weight 0 are kept": Fault(
        LINEAR,
        "counts = None if token_weight is None else token_weight != 0",
        "counts = None",
        ("tests/test_linear_dtypes.py::test_a_row_is_dropped_where_all_of_its_positions_are",),
    ),
    "float64 layers are cast by autocast": Fault(
        LINEAR,
        "tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)",
        "tensor if tensor is None else tensor.to(dtype)",
        ("tests/test_linear_dtypes.py::test_autocast_of_layers_of_any_dtype",),
    ),
    "layers are not cast by autocast": Fault(
        LINEAR,
        "    if not _checks.is_autocast(device):",
        "    if True:",
        ("tests/test_linear_dtypes.py::test_autocast_of_layers_of_any_dtype",),
    ),
    "autocast's dtype is another device's": Fault(
        LINEAR,
        "torch.get_autocast_dtype(device.type)",
        'torch.get_autocast_dtype("cuda")',
        ("tests/test_linear_dtypes.py::test_autocast_of_layers_of_any_dtype",),
    ),
    "chunks of a float32 layer beside float64 probabilities": Fault(
        LINEAR,
        "        or (target.dtype == torch.float64 and layer.hidden.dtype != torch.float64)\n",
        "",
        PROBABILITIES,
    ),
    "probabilities that want a gradient get none": Fault(
        LINEAR,
        "        or (torch.is_grad_enabled() and target.requires_grad)\n",
        "",
        ("tests/test_linear_doors.py::test_gradients_of_probabilities",),
    ),
    "chunks under torch.func": Fault(
        LINEAR,
        "        or (not torch.compiler.is_compiling() and is_under_torch_func())\n",
        "",
        ("tests/test_linear_doors.py::test_transforms_of_torch_func",),
    ),
    "chunks of no positions": Fault(
        LINEAR,
        "        or 0 in tensors.logits.shape\n",
        "",
        ("tests/test_linear_doors.py::test_module_of_no_positions",),
    ),
    "labels beyond a sequence are the next one's": Fault(
        LINEAR,
        "return torch.cat([torch.zeros_like(first), others], dim)",
        "return torch.cat([first, others], dim)",
        SHIFT,
    ),
    "labels before the shift are checked": Fault(
        LINEAR,
        "    if shift > 0:\n        tensors = tensors._replace(token_weight="
        "_without_first(tensors, len(rows), shift))\n",
        "    if shift > len(rows):\n        tensors = tensors._replace(token_weight="
        "_without_first(tensors, len(rows), shift))\n",
        ("tests/test_linear_errors.py::test_position_of_a_target_that_is_no_class",),
    ),
    "token weights are not shifted": Fault(
        LINEAR, "flat(token_weight)[shift:]", "flat(token_weight)[: n_rows - shift]", SHIFT
    ),
    "targets are not shifted": Fault(
        LINEAR,
        "Tensors(logits, flat(target)[shift:],",
        "Tensors(logits, flat(target)[: n_rows - shift],",
        SHIFT,
    ),
    "weights of a shift in float32": Fault(
        LINEAR,
        "token_weight = logits.new_ones(logits.select(n_row_dims, 0).shape, dtype=acc)",
        "token_weight = logits.new_ones(logits.select(n_row_dims, 0).shape, dtype=torch.float32)",
        STATISTICS,
    ),
    "argmax of a row that is left out is 0": Fault(
        LINEAR, "restore(argmax, -1)", "restore(argmax)", STATISTICS
    ),
    "a row that is left out is correct": Fault(
        LINEAR, "restore(correct, False)", "restore(correct, True)", STATISTICS
    ),
    "kept rows are put first": Fault(
        LINEAR,
        "whole.index_copy(0, kept, values)",
        "whole.index_copy(0, torch.arange(len(kept)), values)",
        SHIFT,
    ),
    "the loss of no reduction is not restored": Fault(
        LINEAR, '    if reduction == "none":\n        loss = restore(loss)\n', "", SHIFT
    ),
    "the target of all rows beside kept ones": Fault(
        LINEAR,
        "target = target.index_select(0, kept)",
        "target = target[: kept.numel()]",
        NARROW,
    ),
    "the token weight of all rows beside kept ones": Fault(
        LINEAR,
        "None if token_weight is None else token_weight.index_select(0, kept)",
        "None if token_weight is None else token_weight[: kept.numel()]",
        SHIFT,
    ),
    "rows are dropped unasked": Fault(
        LINEAR,
        "if drop_ignored and functional.has_values(tensors.target):",
        "if functional.has_values(tensors.target):",
        ("tests/test_linear_dtypes.py::test_the_module_drops_what_it_is_told_to",),
    ),
    "rows are dropped in compiled code": Fault(
        LINEAR,
        "if drop_ignored and functional.has_values(tensors.target):",
        "if drop_ignored:",
        ("tests/test_linear_doors.py::test_in_one_graph",),
    ),
    "any object drops rows": Fault(
        LINEAR, '    _checks.check_flag("drop_ignored", drop_ignored)\n', "", LINEAR_ERRORS
    ),
    "dtypes of a layer are not compared": Fault(
        LINEAR, "    _checks.check_linear_dtypes(*layer)\n", "", LINEAR_ERRORS
    ),
    "dtypes are compared before autocast": Fault(
        LINEAR,
        "    layer = _autocast(_Layer(input, linear_weight, linear_bias))\n"
        "    _checks.check_linear_dtypes(*layer)\n",
        "    layer = _Layer(input, linear_weight, linear_bias)\n"
        "    _checks.check_linear_dtypes(*layer)\n    layer = _autocast(layer)\n",
        ("tests/test_linear_dtypes.py::test_autocast_of_a_layer_of_several_dtypes",),
    ),
    "targets of a layer are not checked": Fault(
        LINEAR,
        "    _checks.check_linear_target(target, rows, classes, ignore_index)\n",
        "",
        LINEAR_ERRORS,
    ),
    "range of a layer's targets by the default index": Fault(
        LINEAR,
        "_check_range(tensors, classes[0], ignore_index)",
        "_check_range(tensors, classes[0], IGNORE_INDEX)",
        NARROW,
    ),
    "range of a layer's targets by its last dimension": Fault(
        LINEAR,
        "_check_range(tensors, classes[0], ignore_index)",
        "_check_range(tensors, classes[-1], ignore_index)",
        ("tests/test_linear.py::test_a_loss_in_each_of_many_positions",),
    ),
    "another ignored index by default": Fault(
        LINEAR, "IGNORE_INDEX = -100", "IGNORE_INDEX = -1", NARROW
    ),
    "classes are still behind all rows": Fault(
        LINEAR,
        "loss_options._replace(dim=1)",
        "loss_options",
        ("tests/test_linear.py::test_rows_of_any_shape",),
    ),
    "chunk_rows has no effect": Fault(
        LINEAR,
        "        *layer, tensors, options, classes, chunk_rows\n",
        "        *layer, tensors, options, classes, None\n",
        CHUNKS,
    ),
    "subclasses of a layer's class weights are not asked": Fault(
        LINEAR,
        "tensors = (input, linear_weight, target, linear_bias, weight, token_weight, normalizer)",
        "tensors = (input, linear_weight, target, linear_bias, None, token_weight, normalizer)",
        ("tests/test_linear_doors.py::test_tensor_subclasses_are_asked_first",),
    ),
    "subclasses of a layer's token weights are not asked": Fault(
        LINEAR,
        'others = ("linear_bias", "weight", "token_weight", "normalizer")',
        'others = ("linear_bias", "weight", "normalizer")',
        ("tests/test_linear_doors.py::test_tensor_subclasses_are_asked_first",),
    ),
    "statistics of a layer take any name": Fault(
        LINEAR,
        '    _checks.check_names("linear_cross_entropy_with_statistics", options, _NAMES)\n',
        "",
        ("tests/test_linear_errors.py::test_unknown_names",),
    ),
    "logits of all rows are not promoted": Fault(
        LINEAR,
        "functional.compute(functional.with_logits(tensors, logits), options)",
        "functional.compute(tensors._replace(logits=logits), options)",
        PROBABILITIES,
    ),
    "class weights of a layer in its own dtype": Fault(
        LINEAR, "    tensors = functional.for_kernels(tensors)\n", "", PROBABILITIES
    ),
    "the bias of all logits is lost": Fault(
        LINEAR,
        "logits = F.linear(*layer).reshape(tensors.logits.shape)",
        "logits = F.linear(*layer[:2]).reshape(tensors.logits.shape)",
        ("tests/test_linear_doors.py::test_transforms_of_torch_func",),
    ),
}

PRODUCTS_FAULTS = {
    "weights of narrow targets": Fault(
        PRODUCTS, "target = inputs.target.to(torch.int64)", "target = inputs.target", NARROW
    ),
    "chunks' sums in loss_dtype": Fault(
        PRODUCTS,
        "loss_dtype = torch.float64 if is_reduced else inputs.loss_dtype",
        "loss_dtype = inputs.loss_dtype",
        ("tests/test_linear_dtypes.py::test_loss_dtype",),
    ),
    "chunks' sums in float32": Fault(
        PRODUCTS,
        "loss_dtype = torch.float64 if is_reduced else inputs.loss_dtype",
        "loss_dtype = torch.float32 if is_reduced else inputs.loss_dtype",
        ("tests/test_linear.py::test_against_float64",),
    ),
    "loss of no reduction in float64": Fault(
        PRODUCTS,
        "return loss.to(inputs.loss_dtype), *rows, *gradients",
        "return loss, *rows, *gradients",
        ("tests/test_linear_dtypes.py::test_loss_dtype",),
    ),
    "rows of weight 0 have a part in the mean": Fault(
        PRODUCTS,
        "left_out = (target == inputs.ignore_index) | (weights == 0)",
        "left_out = target == inputs.ignore_index",
        ("tests/test_linear.py::test_a_row_that_is_left_out_has_no_part_in_the_mean",),
    ),
    "ignored rows have a part in the mean": Fault(
        PRODUCTS,
        "left_out = (target == inputs.ignore_index) | (weights == 0)",
        "left_out = weights == 0",
        NARROW,
    ),
    "mean without token weights": Fault(
        PRODUCTS, "        weights = weights * inputs.token_weight\n", "        pass\n", SHIFT
    ),
    "mean without class weights": Fault(
        PRODUCTS,
        "weights = weights * inputs.weight[target.clamp(0, inputs.classes[0] - 1)]",
        "pass",
        NARROW,
    ),
    "an ignored index is looked up": Fault(
        PRODUCTS,
        "inputs.weight[target.clamp(0, inputs.classes[0] - 1)]",
        "inputs.weight[target]",
        NARROW,
    ),
    "normalizer has no effect": Fault(
        PRODUCTS,
        "    if inputs.normalizer is not None:",
        "    if False:",
        ("tests/test_linear.py::test_against_float64",),
    ),
    "chunk_rows is not read": Fault(
        PRODUCTS, "    most = inputs.chunk_rows\n", "    most = None\n", CHUNKS
    ),
    "chunks of any number of bytes": Fault(
        PRODUCTS, "most = max(1, min(most, n_bytes // row_bytes))", "most = max(1, most)", CHUNKS
    ),
    "chunks of very unequal sizes": Fault(
        PRODUCTS, "    size = -(-n_rows // n_chunks)\n", "    size = most\n", CHUNKS
    ),
    "bytes of a row of features": Fault(
        PRODUCTS,
        "row_bytes = inputs.linear_weight.shape[0] * inputs.hidden.element_size()",
        "row_bytes = inputs.linear_weight.shape[1] * inputs.hidden.element_size()",
        CHUNKS,
    ),
    "16-bit gradients are summed in 16 bits": Fault(
        PRODUCTS,
        "sums = torch.float32 if self.hidden.element_size() == 2 else self.hidden.dtype",
        "sums = self.hidden.dtype",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "float64 gradients are summed in float32": Fault(
        PRODUCTS,
        "sums = torch.float32 if self.hidden.element_size() == 2 else self.hidden.dtype",
        "sums = torch.float32",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "sums of gradients are given out": Fault(
        PRODUCTS,
        "return tuple(gradient.to(self.hidden.dtype) for gradient in gradients)",
        "return gradients",
        ("tests/test_linear_doors.py::test_gradients_that_are_not_needed_have_no_elements",),
    ),
    "every chunk's weight gradient is the first": Fault(
        PRODUCTS,
        "self.hidden[rows], rows.start == 0)",
        "self.hidden[rows], True)",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "every chunk's bias gradient is the first": Fault(
        PRODUCTS,
        "self.grad_bias = summed if rows.start == 0 else self.grad_bias.add_(summed)",
        "self.grad_bias = summed",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "slabs add to what was in memory": Fault(
        PRODUCTS,
        "_slab_by_slab(one, other, total, 0 if is_first else 1)",
        "_slab_by_slab(one, other, total, 1)",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "slabs of the inner dimension forget the first": Fault(
        PRODUCTS,
        "beta if slab.start == 0 else 1)",
        "beta)",
        ("tests/test_linear.py::test_both_ways_to_multiply_16_bits",),
    ),
    "slabs without the bias": Fault(
        PRODUCTS,
        "_slab_by_slab(one, other, out.copy_(bias), 1)",
        "_slab_by_slab(one, other, out.copy_(bias), 0)",
        ("tests/test_linear.py::test_both_ways_to_multiply_16_bits",),
    ),
    "by classes without a gradient of the weight": Fault(
        PRODUCTS,
        "        and inputs.needs[1]\n",
        "",
        ("tests/test_linear.py::test_what_is_not_laid_out_class_by_class",),
    ),
    "by classes in spite of chunk_rows": Fault(
        PRODUCTS,
        "        and inputs.chunk_rows is None\n",
        "",
        ("tests/test_linear.py::test_what_is_not_laid_out_class_by_class",),
    ),
    "by classes in several positions": Fault(
        PRODUCTS,
        "        and len(inputs.classes) == 1\n",
        "",
        ("tests/test_linear.py::test_what_is_not_laid_out_class_by_class",),
    ),
    "by classes of many rows": Fault(
        PRODUCTS,
        "        and n_rows <= most\n",
        "",
        ("tests/test_linear.py::test_float32_of_more_rows_than_features_is_in_chunks",),
    ),
    "never by classes": Fault(
        PRODUCTS,
        "        and n_rows * n_classes * size > FEW_BYTES\n",
        "        and n_rows * n_classes * size < 0\n",
        ("tests/test_linear.py::test_logits_of_few_rows_lie_in_the_gradients_memory",),
    ),
    "logits at the start of the gradient's memory": Fault(
        PRODUCTS,
        "grad_weight.view(-1)[n_classes * (n_features - n_first) :].view(n_classes, n_first)",
        "grad_weight.view(-1)[: n_classes * n_first].view(n_classes, n_first)",
        ("tests/test_linear.py::test_both_ways_to_multiply_16_bits",),
    ),
    "products are cast by autocast": Fault(
        PRODUCTS,
        "with torch.autocast(inputs.hidden.device.type, enabled=False):",
        "with torch.autocast(inputs.hidden.device.type, enabled=torch.is_autocast_enabled('cpu')):",
        ("tests/test_linear_doors.py::test_autocast_casts_the_layer_and_nothing_else",),
    ),
    "expanded upstream gradients reach the kernels": Fault(
        PRODUCTS,
        "else grad[rows].contiguous()",
        "else grad[rows]",
        ("tests/test_linear_doors.py::test_upstream_gradients_that_are_expanded",),
    ),
    "the backward has no entropy": Fault(
        PRODUCTS,
        "*operands, torch.float32, grad_entropy is not None)",
        "*operands, torch.float32, False)",
        ("tests/test_linear_doors.py::test_finite_differences",),
    ),
    "lse without the maximum": Fault(
        PRODUCTS,
        "statistics.append((row_max + log_sum, *others))",
        "statistics.append((log_sum, *others))",
        STATISTICS,
    ),
    "token weights of the first chunk for all": Fault(
        PRODUCTS,
        "else self.token_weight[rows]",
        "else self.token_weight[: rows.stop - rows.start]",
        SHIFT,
    ),
    "statistics of other dtypes in compiled code": Fault(
        PRODUCTS,
        "for dtype in (acc, acc, torch.int64)]",
        "for dtype in (acc, acc, torch.int32)]",
        ("tests/test_linear_doors.py::test_operators",),
    ),
    "a scalar loss in compiled code": Fault(
        PRODUCTS,
        'shape = inputs.row_shape if inputs.reduction == _ops.REDUCTIONS["none"] else []',
        "shape = []",
        ("tests/test_linear_doors.py::test_operators",),
    ),
    "gradients that are not needed in compiled code": Fault(
        PRODUCTS,
        "inputs.hidden.new_empty(tensor.shape if needed else [0])",
        "inputs.hidden.new_empty([0] if tensor is None else tensor.shape)",
        ("tests/test_linear_doors.py::test_gradients_that_are_not_needed_have_no_elements",),
    ),
}

LINEAR_AUTOGRAD_FAULTS = {
    "float16 gradients without a loss scale": Fault(
        LINEAR_AUTOGRAD,
        "            and tensors[0].dtype != torch.float16\n",
        "",
        ("tests/test_linear_doors.py::test_loss_scale",),
    ),
    "gradients of no reduction are made in the forward": Fault(
        LINEAR_AUTOGRAD,
        '            ctx.options.reduction != "none"\n            and ',
        "            ",
        ("tests/test_linear_doors.py::test_batched_upstream_gradients",),
    ),
    "gradients are kept beside the loss": Fault(
        LINEAR_AUTOGRAD,
        "gradients, ctx.gradients = ctx.gradients, None",
        "gradients = ctx.gradients",
        ("tests/test_linear_doors.py::test_gradients_are_not_kept_beside_the_loss",),
    ),
    "zeros for gradients that never come": Fault(
        LINEAR_AUTOGRAD,
        "        ctx.set_materialize_grads(False)\n",
        "",
        ("tests/test_linear.py::test_logits_are_made_once_for_a_loss_and_its_gradient",),
    ),
    "gradients are not scaled": Fault(
        LINEAR_AUTOGRAD,
        "                    _scale(gradient, grad_loss)\n",
        "                    pass\n",
        SHIFT,
    ),
    "rows of the scaled gradient are ignored": Fault(
        LINEAR_AUTOGRAD,
        "_ops.scale_gradient_(rows, grad_loss, target, None, 1, -1)",
        "_ops.scale_gradient_(rows, grad_loss, target, None, 1, 0)",
        SHIFT,
    ),
    "batches of upstream gradients in place": Fault(
        LINEAR_AUTOGRAD,
        "elif is_compiling or is_batched(grad_loss):",
        "elif is_compiling:",
        ("tests/test_linear_doors.py::test_batched_upstream_gradients",),
    ),
    "a second derivative under autocast": Fault(
        LINEAR_AUTOGRAD,
        "torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()",
        "nullcontext()",
        ("tests/test_linear_doors.py::test_autocast_casts_the_layer_and_nothing_else",),
    ),
    "gradients of statistics are left out": Fault(
        LINEAR_AUTOGRAD,
        "if gradients is None or any(grad is not None for grad in of_statistics):",
        "if gradients is None:",
        STATISTICS,
    ),
    "gradients for a graph have none": Fault(
        LINEAR_AUTOGRAD,
        "        if torch.is_grad_enabled():\n            return *_with_graph",
        "        if False:\n            return *_with_graph",
        ("tests/test_linear_doors.py::test_batched_upstream_gradients",),
    ),
    "lse and entropy of a graph are swapped": Fault(
        LINEAR_AUTOGRAD,
        "zip((loss, lse, entropy), upstream, strict=True)",
        "zip((loss, entropy, lse), upstream, strict=True)",
        ("tests/test_linear_doors.py::test_upstream_gradients_that_are_expanded",),
    ),
    "a gradient that is not needed for a graph": Fault(
        LINEAR_AUTOGRAD,
        "return tuple(next(gradients) if needed else None for needed in ctx.needs)",
        "return (*gradients, None, None)[:3]",
        ("tests/test_linear_doors.py::test_second_derivatives_of_some_of_the_layer",),
    ),
    "gradients without grad mode": Fault(
        LINEAR_AUTOGRAD,
        "[is_recorded and tensor is not None and tensor.requires_grad for tensor in layer]",
        "[tensor is not None and tensor.requires_grad for tensor in layer]",
        ("tests/test_linear_doors.py::test_without_gradients_no_gradient_is_made",),
    ),
    "the bias wants no gradient": Fault(
        LINEAR_AUTOGRAD,
        "    if any(needs):\n",
        "    if any(needs[:2]):\n",
        ("tests/test_linear.py::test_whichever_of_the_layer_wants_a_gradient",),
    ),
    "all of the layer must want a gradient": Fault(
        LINEAR_AUTOGRAD,
        "    if any(needs):\n",
        "    if all(needs):\n",
        ("tests/test_linear.py::test_whichever_of_the_layer_wants_a_gradient",),
    ),
}

AUTOGRAD_FAULTS = {
    "gradient of probabilities of weight 0 at NaN": Fault(
        AUTOGRAD,
        "        gradient = gradient.masked_fill((token_weight == 0).unsqueeze(dim), 0)\n",
        "        pass\n",
        TOKENS,
    ),
    "gradient of probabilities without token weights": Fault(
        AUTOGRAD, "        scale = scale * token_weight\n", "        pass\n", TOKENS
    ),
    "gradient of probabilities without the mean": Fault(
        AUTOGRAD,
        "scale = scale / total_weight.masked_fill(total_weight == 0, torch.nan)",
        "pass",
        TOKENS,
    ),
    "gradient of probabilities without smoothing": Fault(
        AUTOGRAD,
        "scale = grad_loss.to(row_max.dtype) * (1 - options.label_smoothing)",
        "scale = grad_loss.to(row_max.dtype)",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
    "gradient of probabilities without class weights": Fault(
        AUTOGRAD,
        "minus_log_prob, q = minus_log_prob * weight, q * weight",
        "pass",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
    "gradient of probabilities at minus infinity": Fault(
        AUTOGRAD,
        "minus_log_prob = minus_log_prob.masked_fill((q == 0) & seen.isneginf(), 0)",
        "pass",
        ("tests/test_functional.py::test_gradient_of_probabilities_at_logits_of_minus_infinity",),
    ),
    "gradient of probabilities of logits without a cap": Fault(
        AUTOGRAD,
        "reference.transform(logits.to(row_max.dtype), options.softcap,",
        "reference.transform(logits.to(row_max.dtype), None,",
        ("tests/test_doors.py::test_all_options",),
    ),
    "no cap is a cap of 1": Fault(
        AUTOGRAD,
        "softcap = 0.0 if self.softcap is None else self.softcap",
        "softcap = self.softcap or 1.0",
        FORMULA,
    ),
    "cap and scale are swapped": Fault(
        AUTOGRAD,
        "numbers = [*self[2:5], softcap, self.logit_scale]",
        "numbers = [*self[2:5], self.logit_scale, softcap]",
        FORMULA,
    ),
    "torch operations in the dtype of the logits": Fault(
        AUTOGRAD,
        "    acc = _ops.accumulation_dtype(tensors.logits.dtype)\n",
        "    acc = tensors.logits.dtype\n",
        TOKENS,
    ),
    "focal loss is lost by torch operations": Fault(
        AUTOGRAD,
        "        focal_gamma=options.focal_gamma,\n",
        "",
        ("tests/test_doors.py::test_all_options",),
    ),
    "z-loss is lost by torch operations": Fault(
        AUTOGRAD, "        lse_square_scale=options.lse_square_scale,\n", "", TOKENS
    ),
    "scale is lost by torch operations": Fault(
        AUTOGRAD,
        "        logit_scale=options.logit_scale,\n",
        "",
        ("tests/test_doors.py::test_all_options",),
    ),
    "dimension of the classes is torch's by torch operations": Fault(
        AUTOGRAD, "        dim=options.dim,\n", "", TOKENS
    ),
    "probabilities alone want no graph": Fault(
        AUTOGRAD,
        "        tensors.logits.requires_grad or tensors.target.requires_grad\n",
        "        tensors.logits.requires_grad\n",
        ("tests/test_autograd.py::test_only_the_gradients_that_are_needed",),
    ),
    "lse is the logarithm of the sum alone": Fault(
        AUTOGRAD, "return *results, row_max + log_sum\n", "return *results, log_sum\n", TOKENS
    ),
    "upstream gradients of statistics with a step": Fault(
        AUTOGRAD,
        "None if grad is None else grad.contiguous() for grad in (grad_lse, grad_entropy)",
        "grad for grad in (grad_lse, grad_entropy)",
        ("tests/test_doors.py::test_upstream_gradients_of_any_strides",),
    ),
    "upstream gradients of statistics are swapped": Fault(
        AUTOGRAD,
        "upstream = (grad_loss, grad_lse, grad_entropy)",
        "upstream = (grad_loss, grad_entropy, grad_lse)",
        TOKENS,
    ),
    "a graph of overwritten logits": Fault(
        AUTOGRAD,
        "        if ctx.inplace and torch.is_grad_enabled():",
        "        if False:",
        ("tests/test_overwriting.py::test_gradient_of_gradient_is_refused",),
    ),
    "inplace backward without memory": Fault(
        AUTOGRAD,
        "        if needs_logits and ctx.inplace:",
        "        if False:",
        ("tests/test_overwriting.py::test_gradient_is_the_default_modes_and_in_the_logits",),
    ),
    "a gradient for a graph that has none": Fault(
        AUTOGRAD,
        "        elif needs_logits and torch.is_grad_enabled():\n",
        "        elif False:\n",
        ("tests/test_autograd.py::test_second_derivative_of_other_dtypes",),
    ),
    "a batch of gradients for a graph that has none": Fault(
        AUTOGRAD,
        "any(map(is_batched, upstream))",
        "False",
        ("tests/test_doors.py::test_batches_of_gradients_for_a_graph",),
    ),
    "every gradient for a graph is by torch operations": Fault(
        AUTOGRAD,
        "any(map(is_batched, upstream))",
        "True",
        ("tests/test_doors.py::test_first_derivative_for_a_graph_is_the_kernels",),
    ),
    "gradients that are not needed": Fault(
        AUTOGRAD,
        "        if needs_target and grad_loss is not None:",
        "        if target.is_floating_point() and grad_loss is not None:",
        ("tests/test_autograd.py::test_allocated_is_the_gradient_alone",),
    ),
    "no vmap of a gradient's gradient": Fault(
        AUTOGRAD, "    generate_vmap_rule = True\n", "    generate_vmap_rule = False\n", TRANSFORMS
    ),
    "no second derivative of probabilities": Fault(
        AUTOGRAD,
        "*inputs[3 : 5 if inputs[4].is_floating_point() else 4]]",
        "inputs[3]]",
        ("tests/test_doors.py::test_all_options",),
    ),
    "second derivative of the gradient's upstream": Fault(
        AUTOGRAD,
        "results = [None if grad is None else next(gradients) for grad in inputs[:3]]",
        "results = [None for grad in inputs[:3] if grad is None or next(gradients) is not None]",
        ("tests/test_doors.py::test_all_options",),
    ),
    "saved mass and slope are swapped": Fault(
        AUTOGRAD,
        "        ctx.save_for_backward(*tensors[:4], *saved)\n",
        "        ctx.save_for_backward(*tensors[:4], *saved[:3], saved[4], saved[3], *saved[5:])\n",
        ("tests/test_extras.py::test_any_combination_of_many_options",),
    ),
    "the overwritten memory is not marked": Fault(
        AUTOGRAD,
        "        ctx.mark_dirty(memory)\n",
        "",
        ("tests/test_overwriting_shared.py::test_logits_used_after_the_loss_too",),
    ),
    "gradients of statistics in fused mode are lost": Fault(
        AUTOGRAD,
        "        if any(grad is not None for grad in grads):\n            raise",
        "        if False:\n            raise",
        ("tests/test_overwriting.py::test_gradient_of_statistics_in_fused_mode",),
    ),
    "another use of overwritten logits is lost": Fault(
        AUTOGRAD,
        "        if grad_memory is not None:",
        "        if False:",
        ("tests/test_overwriting_shared.py::test_logits_used_after_the_loss_too",),
    ),
    "a graph in fused mode": Fault(
        AUTOGRAD,
        '        if torch.is_grad_enabled():\n            raise RuntimeError("grad_in_forward',
        '        if False:\n            raise RuntimeError("grad_in_forward',
        ("tests/test_overwriting.py::test_gradient_of_gradient_is_refused",),
    ),
    "changes of the gradient in the logits are unseen": Fault(
        AUTOGRAD,
        "ctx.save_for_backward(memory, target, token_weight)",
        "ctx.save_for_backward(memory.data, target, token_weight)",
        ("tests/test_overwriting.py::test_logits_changed_between_forward_and_backward",),
    ),
    "rows of weight 0 are scaled": Fault(
        AUTOGRAD,
        "_ops.scale_gradient_(logits, grad_loss, target, token_weight, *ctx.options[:2])",
        "_ops.scale_gradient_(logits, grad_loss, target, None, *ctx.options[:2])",
        ("tests/test_overwriting.py::test_upstream_of_each_row_is_its_own",),
    ),
    "ignored rows are scaled": Fault(
        AUTOGRAD,
        "_ops.scale_gradient_(logits, grad_loss, target, token_weight, *ctx.options[:2])",
        "_ops.scale_gradient_(logits, grad_loss, target, token_weight, ctx.options[0], -1)",
        ("tests/test_overwriting.py::test_upstream_of_each_row_is_its_own",),
    ),
    "the gradient in fused mode is that of a loss": Fault(
        AUTOGRAD,
        "        _ops.scale_gradient_(logits,",
        "        _ops.scale_gradient_(logits * 1,",
        ("tests/test_overwriting.py::test_scalar_upstream_is_applied_once",),
    ),
}

OPS_FAULTS = {
    "samples of vmap along the first dimension": Fault(
        OPS,
        "argument.select(dim, i) if isinstance(dim, int)",
        "argument.select(0, i) if isinstance(dim, int)",
        BATCHES,
    ),
    "the first sample of vmap for all": Fault(
        OPS, "samples = [sample(i) for i in", "samples = [sample(0) for i in", BATCHES
    ),
    "no vmap of the backward": Fault(
        OPS,
        'torch.library.register_vmap("fused_xent::backward", _in_turn(_ops.backward.default))',
        "pass",
        BATCHES,
    ),
    "statistics where none are wanted, of meta tensors": Fault(
        OPS, "        rows(statistics),\n", "        rows(),\n", OPERATORS
    ),
    "argmax of meta tensors is a number": Fault(
        OPS, "rows(statistics, torch.int64)", "rows(statistics)", OPERATORS
    ),
    "masses of class indices, of meta tensors": Fault(
        OPS, "rows(target.is_floating_point())", "rows()", OPERATORS
    ),
    "slopes without a focal loss, of meta tensors": Fault(
        OPS,
        "rows(numbers[2] != 0)",
        "rows(numbers[1] != 0)",
        ("tests/test_ops.py::test_meta_implementations_agree_by_each_option_alone",),
    ),
    "total weight of meta tensors in the rows' dtype": Fault(
        OPS,
        "logits.new_empty([], dtype=torch.float64)",
        "logits.new_empty([], dtype=acc)",
        OPERATORS,
    ),
    "gradient of meta tensors is contiguous": Fault(
        OPS,
        "    return torch.empty_like(logits)\n",
        "    return logits.new_empty(logits.shape)\n",
        OPERATORS,
    ),
    "loss of meta tensors in float32": Fault(
        OPS,
        "return logits.new_empty(shape, dtype=loss_dtype)",
        "return logits.new_empty(shape, dtype=torch.float32)",
        ("tests/test_functional.py::test_meta_tensors_have_shapes_and_dtypes",),
    ),
    "maximum and sum of meta tensors in fused mode": Fault(
        OPS,
        "return loss, row_max, log_sum, entropy, argmax\n",
        "return loss, row_max, log_sum, argmax, entropy\n",
        OPERATORS,
    ),
    "no fake of the fused mode": Fault(
        OPS,
        'torch.library.register_fake("fused_xent::forward_backward_", _fake_forward_backward)',
        "pass",
        OPERATORS,
    ),
    "versions of what is overwritten stay": Fault(
        OPS, "        increment_version(arguments[index])", "        pass", USED_BEFORE
    ),
    "the version of another argument is raised": Fault(
        OPS, '(("backward_", 3),', '(("backward_", 4),', USED_BEFORE
    ),
    "versions of refused arguments are raised": Fault(
        OPS,
        "        with torch._C._AutoDispatchBelowADInplaceOrView():\n            below",
        "        increment_version(arguments[index])\n"
        "        with torch._C._AutoDispatchBelowADInplaceOrView():\n            below",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "kernels without a library": Fault(
        OPS,
        'return LOAD_ERROR is None and device.type in ("cpu", "meta")',
        'return device.type in ("cpu", "meta")',
        ("tests/test_fallback.py::test_installation_without_a_library_that_loads",),
    ),
    "CUDA kernels without a library": Fault(
        OPS,
        "return CUDA_LOAD_ERROR is None",
        "return True",
        ("tests/test_fallback.py::test_cuda_library_that_does_not_load",),
    ),
    "a broken library is an error": Fault(
        OPS,
        "            except OSError as error:\n",
        "            except KeyError as error:\n",
        ("tests/test_fallback.py::test_installation_without_a_library_that_loads",),
    ),
    "an instruction set without a library": Fault(
        OPS,
        "return _ops.cpu_capability() if LOAD_ERROR is None else None",
        "return _ops.cpu_capability()",
        ("tests/test_fallback.py::test_installation_without_a_library_that_loads",),
    ),
    "sums of float64 in float32": Fault(
        OPS,
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return torch.float32",
        TOKENS,
    ),
    "float16 is no dtype": Fault(
        OPS,
        "torch.float64, torch.bfloat16, torch.float16)",
        "torch.float64, torch.bfloat16)",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "mean and sum are swapped": Fault(OPS, '"mean": 1, "sum": 2', '"mean": 2, "sum": 1', TOKENS),
}

REFERENCE_FAULTS = {
    "a mean by 0 is infinite": Fault(
        REFERENCE,
        "        normalizer = normalizer.masked_fill(normalizer == 0, torch.nan)\n",
        "        pass\n",
        CANCEL,
    ),
    "mean of ignored rows by torch operations": Fault(
        REFERENCE, "        kept = kept & (target != ignore_index)\n", "        pass\n", TOKENS
    ),
    "ignored index of fewer bits by torch operations": Fault(
        REFERENCE,
        "        target = target.to(torch.int64)  # in fewer bits",
        "        # in fewer bits",
        ("tests/test_functional.py::test_ignore_index_beyond_the_targets_type",),
    ),
    "NaN weights of ignored rows by torch operations": Fault(
        REFERENCE, "    token_weight = token_weight.masked_fill(~kept, 0)\n", "", TOKENS
    ),
    "NaN logits of ignored rows by torch operations": Fault(
        REFERENCE,
        "logits = input.masked_fill(~kept.unsqueeze(dim), 0)",
        "logits = input",
        TOKENS,
    ),
    "NaN probabilities of rows of weight 0": Fault(
        REFERENCE,
        "        target = target.masked_fill(~kept.unsqueeze(dim), 0)\n",
        "",
        ("tests/test_token_weight.py::test_gradients_of_weights_beside_rows_that_are_left_out",),
    ),
    "scale after the cap": Fault(
        REFERENCE,
        "softcap * (logits / softcap).tanh()",
        "softcap * (input / softcap).tanh() * logit_scale",
        ("tests/test_extras.py::test_cap_of_scaled_logits",),
    ),
    "focal loss at probability 1": Fault(
        REFERENCE,
        "minus_log_p = cross_entropy.masked_fill(zero, 1) / mass.masked_fill(zero, 1)",
        "minus_log_p = cross_entropy / mass",
        ("tests/test_extras.py::test_focal_loss_of_certain_rows",),
    ),
    "focal loss without the mass": Fault(
        REFERENCE,
        "/ mass.masked_fill(zero, 1)",
        "",
        ("tests/test_extras.py::test_any_combination_of_many_options",),
    ),
    "0 times minus infinity": Fault(
        REFERENCE,
        "(q * log_prob.masked_fill((q == 0) & log_prob.isneginf(), 0)).sum(dim)",
        "(q * log_prob).sum(dim)",
        ("tests/test_reference.py::test_probability_or_weight_0_of_a_masked_class_adds_0",),
    ),
    "a target that is no class has a loss": Fault(
        REFERENCE,
        "    row_loss = row_loss * torch.where(is_class | ~kept, 1.0, torch.nan)\n",
        "",
        ("tests/test_reference.py::test_a_target_that_is_no_class_is_nan",),
    ),
    "mean of no classes": Fault(
        REFERENCE,
        "has_weight = 1.0 if n_classes else 0.0",
        "has_weight = 1.0",
        ("tests/test_functional.py::test_probabilities_of_no_classes",),
    ),
    "lse of no classes": Fault(
        REFERENCE,
        "(logits.logsumexp(dim) if input.shape[dim] else log_prob.sum(dim))",
        "logits.logsumexp(dim)",
        ("tests/test_functional.py::test_statistics_of_no_classes",),
    ),
    "z-loss by torch operations without token weights": Fault(
        REFERENCE,
        "z_loss = lse_square_scale * lse.square() * token_weight",
        "z_loss = lse_square_scale * lse.square()",
        TOKENS,
    ),
    "argmax of rows that are left out by torch operations": Fault(
        REFERENCE, "argmax.masked_fill(~kept, -1), ", "argmax, ", TOKENS
    ),
    "rows that are left out are correct by torch operations": Fault(
        REFERENCE, "(argmax == label) & kept", "argmax == label", TOKENS
    ),
    "statistics of one iterable": Fault(
        REFERENCE,
        "super().__new__(cls, *((loss, *rows) if rows else loss))",
        "super().__new__(cls, loss, *rows)",
        TOKENS,
    ),
    "mean by class weights alone": Fault(
        REFERENCE, "total = (row_weight * token_weight).sum()", "total = row_weight.sum()", TOKENS
    ),
    "smoothing of an index without class weights": Fault(
        REFERENCE,
        "smooth_loss = -_weighted_sum(class_weight, log_prob, dim)",
        "smooth_loss = -_weighted_sum(torch.ones_like(log_prob), log_prob, dim)",
        ("tests/test_reference.py::test_is_torchs",),
    ),
    "entropy of probabilities that are 0": Fault(
        REFERENCE,
        "-_weighted_sum(log_prob.exp(), log_prob, dim)",
        "-(log_prob.exp() * log_prob).sum(dim)",
        ("tests/test_extras.py::test_entropy_of_masked_classes",),
    ),
    "classes of a vector are its second dimension": Fault(
        REFERENCE,
        "return 0 if input.dim() == 1 else 1",
        "return 1",
        ("tests/test_reference.py::test_is_torchs",),
    ),
}

NN_FAULTS = {
    **{
        f"the module drops {name}": Fault(
            NN, f"            {name}=self.{name},\n        )", "        )", MODULES
        )
        for name in ("grad_in_forward", "chunk_rows")
    },
    **{
        f"the module has no {name}": Fault(
            NN, f"        self.{name} = {name}\n", f"        self.{name} = {value}\n", MODULES
        )
        for name, value in (
            ("inplace_backward", "False"),
            ("dim", "None"),
            ("shift", "0"),
            ("options", "None"),
        )
    },
    "the module drops drop_ignored": Fault(
        NN, "            drop_ignored=self.drop_ignored,\n", "", MODULES
    ),
    "the module drops shift": Fault(NN, "            shift=self.shift,\n", "", MODULES),
    "the module drops torch's options": Fault(
        NN, "            options=self.options,\n", "", MODULES
    ),
    "the module drops dim": Fault(NN, "            dim=self.dim,\n", "", MODULES),
    "the module drops inplace_backward": Fault(
        NN, "            inplace_backward=self.inplace_backward,\n", "", MODULES
    ),
    "the module drops a batch's tensors": Fault(
        NN,
        "            dim=self.dim,\n            token_weight=token_weight,\n",
        "            dim=self.dim,\n",
        MODULES,
    ),
    "arguments of torch's module are swapped": Fault(
        NN,
        "super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)",
        "super().__init__(weight, reduce, ignore_index, size_average, reduction, label_smoothing)",
        ("tests/test_nn.py::test_positional_arguments_are_torchs",),
    ),
    "a linear module without its reduction": Fault(
        NN, "super().__init__(weight, reduction=reduction)", "super().__init__(weight)", MODULES
    ),
    "a linear module without its class weights": Fault(
        NN,
        "super().__init__(weight, reduction=reduction)",
        "super().__init__(reduction=reduction)",
        MODULES,
    ),
    "a linear module of one position": Fault(
        NN,
        "n_outputs = math.prod(self.out_features, start=num_classes)",
        "n_outputs = num_classes",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module on the default device": Fault(
        NN,
        "torch.nn.Linear(in_features, n_outputs, bias, device=device, dtype=dtype)",
        "torch.nn.Linear(in_features, n_outputs, bias, dtype=dtype)",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module of the default dtype": Fault(
        NN,
        "torch.nn.Linear(in_features, n_outputs, bias, device=device, dtype=dtype)",
        "torch.nn.Linear(in_features, n_outputs, bias, device=device)",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module always with a bias": Fault(
        NN,
        "torch.nn.Linear(in_features, n_outputs, bias, device=device, dtype=dtype)",
        "torch.nn.Linear(in_features, n_outputs, device=device, dtype=dtype)",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module that forgets its bias": Fault(
        NN,
        "            linear_bias=linear_bias,\n",
        "",
        ("tests/test_linear_doors.py::test_module",),
    ),
    "positions before classes": Fault(
        NN,
        "shape = (self.num_classes, *self.out_features)",
        "shape = (*self.out_features, self.num_classes)",
        ("tests/test_linear_doors.py::test_module",),
    ),
    "old modules have no logit_scale": Fault(
        NN,
        "    logit_scale = 1.0\n",
        "",
        ("tests/test_nn.py::test_state_of_a_module_of_before_an_option_was_there",),
    ),
    "old modules overwrite": Fault(
        NN,
        "    inplace_backward = grad_in_forward = False\n",
        "    inplace_backward = grad_in_forward = True\n",
        ("tests/test_nn.py::test_state_of_a_module_of_before_an_option_was_there",),
    ),
    "repr shows defaults": Fault(
        NN,
        "for name, value, default in values if value != default)",
        "for name, value, default in values)",
        ("tests/test_nn.py::test_shows_its_options",),
    ),
}

MAIN_FAULTS = {
    "NaN is no error": Fault(MAIN, "errors.nan_to_num(nan=torch.inf)", "errors", REPORT),
    "NaN is an error of 0": Fault(
        MAIN, "errors.nan_to_num(nan=torch.inf)", "errors.nan_to_num()", REPORT
    ),
    "the last shape alone is reported": Fault(
        MAIN,
        "found = Errors(*map(max, found, (error(*pair) for pair in pairs)))",
        "found = Errors(*(error(*pair) for pair in pairs))",
        ("tests/test_fallback.py::test_report_of_one_shape_that_is_wrong", *REPORT),
    ),
    "one error within the limits is enough": Fault(
        MAIN, "return all(error <= limit * slack", "return any(error <= limit * slack", REPORT
    ),
    "slack where there are kernels": Fault(
        MAIN,
        "slack = 1 if _ops.has_kernels(torch.device(device)) else 1000",
        "slack = 1000",
        REPORT,
    ),
    "float64 is checked as float32": Fault(
        MAIN, "loss = 5e-6 if dtype != torch.float64 else 1e-12", "loss = 5e-6", REPORT
    ),
    "gradients of float64 are checked as float32": Fault(
        MAIN,
        "gradient = rounding if dtype != torch.float64 else 1e-12",
        "gradient = rounding + 1e-6",
        REPORT,
    ),
    "statistics are not compared": Fault(
        MAIN,
        "(torch.stack(results[1:4]), torch.stack(expected[1:4]))",
        "(torch.stack(results[1:2]), torch.stack(expected[1:2]))",
        REPORT,
    ),
    "modes are not tried": Fault(
        MAIN,
        "for mode in MODES[: 2 if dtype == torch.float16 else 3]:",
        "for mode in MODES[:1]:",
        REPORT,
    ),
    "fused mode is not tried": Fault(
        MAIN,
        "for mode in MODES[: 2 if dtype == torch.float16 else 3]:",
        "for mode in MODES[:2]:",
        REPORT,
    ),
    "options are not tried": Fault(
        MAIN, "(make_options(logits, soft) if has_options else {})", "{}", REPORT
    ),
    "probabilities are not tried": Fault(
        MAIN,
        "(False, True), _ops.DTYPES, (False, True)",
        "(False, True), _ops.DTYPES, (False,)",
        REPORT,
    ),
    "dtypes are not tried": Fault(
        MAIN,
        "(False, True), _ops.DTYPES, (False, True)",
        "(False, True), _ops.DTYPES[:2], (False, True)",
        REPORT,
    ),
    "the exit status is 0": Fault(MAIN, "    return 1 if n_wrong else 0", "    return 0", REPORT),
    "lines that are wrong are not counted": Fault(
        MAIN, "        n_wrong += not is_well\n", "", REPORT
    ),
    "an unknown instruction set raises": Fault(
        MAIN,
        "    except ValueError as error:",
        "    except KeyError as error:",
        ("tests/test_fallback.py::test_report_of_an_instruction_set_that_does_not_exist",),
    ),
    "an unknown instruction set is no failure": Fault(
        MAIN,
        'print(f"CPU: no kernels, because {error}")\n        return 1',
        'print(f"CPU: no kernels, because {error}")\n        return 0',
        ("tests/test_fallback.py::test_report_of_an_instruction_set_that_does_not_exist",),
    ),
    "a reader that has seen enough is an error": Fault(
        MAIN,
        '    if hasattr(signal, "SIGPIPE"):',
        "    if False:",
        ("tests/test_fallback.py::test_report_that_is_not_read_to_its_end",),
    ),
}

WITH_LOGITS = "    tensors = with_logits(tensors, tensors.logits)\n"
CHECK_OVERWRITABLE = """\
    if inplace_backward or grad_in_forward:
        _checks.check_overwritable(
            tensors.logits, tensors.target, options.dim, inplace_backward, grad_in_forward
        )
"""
FROM_OUTSIDE = {
    "the second derivative forgets the normalizer": Fault(
        "fused_xent/_autograd.py",
        "Tensors(logits, target, weight, token_weight, total_weight), options)",
        "Tensors(logits, target, weight, token_weight, None), options)",
        ("tests/test_autograd.py::test_second_derivative_under_a_normalizer",),
    ),
    "a gradient in the logits' memory has their graph": Fault(
        "fused_xent/_autograd.py",
        "            grad_logits = logits.detach()\n",
        "            grad_logits = logits\n",
        ("tests/test_overwriting.py::test_gradients_have_no_graph",),
    ),
    "float64 class weights alone do not promote the sums": Fault(
        "fused_xent/functional.py",
        "        if dtype == torch.float64:\n            target = target.to(dtype)",
        "        if torch.float64 in (input.dtype, target.dtype):\n"
        "            target = target.to(torch.float64)",
        ("tests/test_functional.py::test_float64_class_weights_promote_the_sums",),
    ),
    "token weights of any shape of as many numbers": Fault(
        "fused_xent/_checks.py",
        "    if token_weight.shape != row_shape:",
        "    if token_weight.numel() != row_shape.numel():",
        ("tests/test_errors.py::test_refused",),
    ),
    "a z-loss of scale 0 is added": Fault(
        "fused_xent/reference.py",
        "    if lse_square_scale != 0:\n        row_loss = row_loss + z_loss\n",
        "    row_loss = row_loss + z_loss\n",
        (
            "tests/test_reference.py::test_the_square_of_a_great_lse_is_no_part_of_a_loss_without_it",
        ),
    ),
    "the CUDA library is loaded without the schemas": Fault(
        "fused_xent/_ops.py",
        "    if LOAD_ERROR is not None:  # without",
        "    if False:  # without",
        ("tests/test_fallback.py::test_no_cuda_kernels_without_the_library_of_the_schemas",),
    ),
    "a mean by 0 makes infinite gradients of probabilities": Fault(
        "fused_xent/_autograd.py",
        "total_weight.masked_fill(total_weight == 0, torch.nan)",
        "total_weight",
        ("tests/test_token_weight.py::test_gradients_of_a_mean_by_weights_that_cancel",),
    ),
    "an index stays the object it was": Fault(
        "fused_xent/_checks.py",
        "    value = operator.index(value)\n    if not -(2**63)",
        "    if not -(2**63)",
        ("tests/test_errors.py::test_what_says_which_index_it_is",),
    ),
    "logits are checked before they are promoted": Fault(
        "fused_xent/functional.py",
        WITH_LOGITS + CHECK_OVERWRITABLE,
        CHECK_OVERWRITABLE + WITH_LOGITS,
        ("tests/test_overwriting.py::test_a_leaf_that_is_promoted_is_not_overwritten",),
    ),
}

MORE_FAULTS = {
    "versions of fused mode's memory stay": Fault(
        OPS,
        '("forward_backward_", 0), ("scale_gradient_", 0)',
        '("scale_gradient_", 0)',
        ("tests/test_ops.py::test_version_of_what_is_overwritten",),
    ),
    "versions of a scaled gradient stay": Fault(
        OPS,
        '("forward_backward_", 0), ("scale_gradient_", 0)',
        '("forward_backward_", 0)',
        ("tests/test_ops.py::test_version_of_what_is_overwritten",),
    ),
    "no fake of the scaling": Fault(
        OPS,
        'torch.library.register_fake("fused_xent::scale_gradient_", lambda *_: None)',
        "pass",
        ("tests/test_ops.py::test_meta_tensors_are_overwritten_by_nothing",),
    ),
    "no fake of the backward in place": Fault(
        OPS,
        'torch.library.register_fake("fused_xent::backward_", lambda *_: None)',
        "pass",
        ("tests/test_ops.py::test_meta_tensors_are_overwritten_by_nothing",),
    ),
    "rows of meta tensors without the first dimension": Fault(
        OPS,
        "return [*logits.shape[:dim], *logits.shape[dim + 1 :]]",
        "return [*logits.shape[:dim], *logits.shape[dim + 2 :]]",
        OPERATORS,
    ),
    "16-bit products by the other dtype's processor": Fault(
        PRODUCTS,
        'name = "bf16" if matrix.dtype == torch.bfloat16 else "fp16"',
        'name = "fp16" if matrix.dtype == torch.bfloat16 else "bf16"',
        ("tests/test_linear.py::test_products_that_torch_is_slow_at",),
    ),
    "32-bit products are slow": Fault(
        PRODUCTS,
        'if matrix.device.type != "cpu" or matrix.element_size() != 2:',
        'if matrix.device.type != "cpu" or matrix.element_size() > 4:',
        ("tests/test_linear.py::test_products_that_torch_is_slow_at",),
    ),
    "products of other devices are slow": Fault(
        PRODUCTS,
        'if matrix.device.type != "cpu" or matrix.element_size() != 2:',
        "if matrix.element_size() != 2:",
        ("tests/test_linear.py::test_products_that_torch_is_slow_at",),
    ),
    "chunks of a GPU on a CPU": Fault(
        PRODUCTS,
        "CPU_ROWS, CPU_BYTES = 256, 100 << 20",
        "CPU_ROWS, CPU_BYTES = 4096, 100 << 20",
        ("tests/test_linear.py::test_limits_are_those_of_the_documentation",),
    ),
    "chunks of 4 GiB": Fault(
        PRODUCTS,
        "GPU_ROWS, GPU_BYTES = 4096, 1 << 30",
        "GPU_ROWS, GPU_BYTES = 4096, 1 << 32",
        ("tests/test_linear.py::test_limits_are_those_of_the_documentation",),
    ),
    "limits of the other device": Fault(
        PRODUCTS,
        "(CPU_ROWS, CPU_BYTES) if is_cpu else (GPU_ROWS, GPU_BYTES)",
        "(GPU_ROWS, GPU_BYTES) if is_cpu else (CPU_ROWS, CPU_BYTES)",
        CHUNKS,
    ),
    "weights of the statistics are positional": Fault(
        FUNCTIONAL,
        "if i > 2 else parameter",
        "if i > 3 else parameter",
        ("tests/test_extras.py::test_signature_of_the_statistics_is_that_of_the_loss",),
    ),
    "signature of a layer's statistics": Fault(
        LINEAR,
        "linear_cross_entropy_with_statistics.__signature__ = _SIGNATURE.replace(",
        "_SIGNATURE.replace(",
        ("tests/test_extras.py::test_signature_of_the_statistics_is_that_of_the_loss",),
    ),
    "a layer's statistics without a bias": Fault(
        LINEAR,
        "_NAMES = list(_SIGNATURE.parameters)[3:]",
        "_NAMES = list(_SIGNATURE.parameters)[4:]",
        STATISTICS,
    ),
    "argmax of probabilities over another dimension": Fault(
        FUNCTIONAL,
        "target = target.argmax(options.dim) if target.shape[options.dim] else argmax",
        "target = target.argmax(1) if target.shape[options.dim] else argmax",
        TOKENS,
    ),
    "the remedy for a target's shape is lost": Fault(
        CHECKS,
        "{tuple(target.shape)}: for classes elsewhere, see dim",
        "{tuple(target.shape)}",
        ("tests/test_errors.py::test_messages_in_full",),
    ),
    "the dimension in a message is the last": Fault(
        CHECKS,
        'f"dimension {dim}, got',
        'f"dimension {input.dim() - 1}, got',
        ("tests/test_errors.py::test_messages_in_full",),
    ),
    "the remedy for float16 is lost": Fault(
        CHECKS,
        "falls below float16's range; use inplace_backward",
        "falls below float16's range",
        ("tests/test_errors.py::test_messages_in_full",),
    ),
    "the strides in a message are the shape": Fault(
        CHECKS,
        'f"{input.stride()} of shape {tuple(input.shape)}: clone it"\n        )\n    if not _has',
        'f"{input.shape} of shape {tuple(input.shape)}: clone it"\n        )\n    if not _has',
        ("tests/test_errors.py::test_messages_in_full",),
    ),
    "the range in a message is a class too far": Fault(
        CHECKS,
        'f"target must be in [0, {n_classes}) or',
        'f"target must be in [0, {n_classes}] or',
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "the value of a bad target is the first": Fault(
        CHECKS,
        "{target[position].item()} at position",
        "{target.flatten()[0].item()} at position",
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "a GPU of too low a capability has kernels": Fault(
        MAIN,
        "if (properties.major, properties.minor) < (8, 0):",
        "if (properties.major, properties.minor) < (7, 0):",
        ("tests/test_fallback.py::test_report_of_gpus",),
    ),
    "a GPU of too low a capability is checked": Fault(
        MAIN,
        "torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)",
        "torch.cuda.is_available()",
        ("tests/test_fallback.py::test_report_of_gpus",),
    ),
    "a GPU is not checked": Fault(
        MAIN,
        '        devices.append("cuda")\n',
        "        pass\n",
        ("tests/test_fallback.py::test_report_of_gpus",),
    ),
    "clusters before capability 9.0": Fault(
        MAIN,
        "properties.major >= 9",
        "properties.major >= 8",
        ("tests/test_fallback.py::test_report_of_gpus",),
    ),
    "the first GPU alone is named": Fault(
        MAIN,
        "torch.cuda.device_count() if torch.cuda.is_available() else 0",
        "1 if torch.cuda.is_available() else 0",
        ("tests/test_fallback.py::test_report_of_gpus",),
    ),
    "the last device alone decides": Fault(
        MAIN,
        "n_wrong = sum(print_checks(device) for device in devices)",
        "n_wrong = [print_checks(device) for device in devices][0]",
        ("tests/test_fallback.py::test_exit_status_counts_every_device",),
    ),
    "no version": Fault(
        MAIN,
        'command.add_argument("--version", action="version", version=__version__)',
        "pass",
        ("tests/test_fallback.py::test_version",),
    ),
    "compiled gradients are the saved inputs": Fault(
        LINEAR_AUTOGRAD,
        "gradients = ctx.saved_tensors[7:] if ctx.has_gradients else None",
        "gradients = ctx.saved_tensors[:3] if ctx.has_gradients else None",
        ("tests/test_linear_doors.py::test_graphs_of_dynamic_shapes",),
    ),
    "lse of fused mode is its maximum": Fault(
        AUTOGRAD,
        "return memory, loss, row_max + log_sum, *rows",
        "return memory, loss, row_max, *rows",
        TOKENS,
    ),
    "zeros for gradients that never come in fused mode": Fault(
        AUTOGRAD,
        "ctx.view, ctx.options = view, options\n        ctx.set_materialize_grads(False)\n",
        "ctx.view, ctx.options = view, options\n",
        TOKENS,
    ),
}

FAULTS = (
    FUNCTIONAL_FAULTS
    | CHECKS_FAULTS
    | LINEAR_FAULTS
    | PRODUCTS_FAULTS
    | LINEAR_AUTOGRAD_FAULTS
    | AUTOGRAD_FAULTS
    | OPS_FAULTS
    | REFERENCE_FAULTS
    | NN_FAULTS
    | MAIN_FAULTS
    | MORE_FAULTS
    | FROM_OUTSIDE
)
