"""Faults of the Python package, and the tests that find them."""

from .fault import Fault

OPTIONS = "fused_xent/_options.py"
PROBLEM = "fused_xent/_problem.py"
OVERWRITING = "fused_xent/_overwriting.py"
FUNCTIONAL = "fused_xent/functional.py"
LINEAR = "fused_xent/linear.py"
LINEAR_CHECKS = "fused_xent/_linear_checks.py"
LINEAR_ROWS = "fused_xent/_linear_rows.py"
LINEAR_OPS = "fused_xent/_linear.py"
PRODUCTS = "fused_xent/_products.py"
LINEAR_AUTOGRAD = "fused_xent/_linear_autograd.py"
AUTOGRAD = "fused_xent/_autograd.py"
GRAD_IN_FORWARD = "fused_xent/_grad_in_forward.py"
FORMULAS = "fused_xent/_formulas.py"
DECOMPOSITIONS = "fused_xent/_decompositions.py"
PRIVATE = "fused_xent/_torch_private.py"
OPS = "fused_xent/_ops.py"
META = "fused_xent/_meta.py"
REFERENCE = "fused_xent/reference.py"
SELECTED = "fused_xent/selected.py"
SELECTED_AUTOGRAD = "fused_xent/_selected.py"
PARALLEL = "fused_xent/_parallel.py"
PARALLEL_ROWS = "fused_xent/_parallel_rows.py"
DTENSOR = "fused_xent/_dtensor.py"
DTENSOR_LAYOUT = "fused_xent/_dtensor_layout.py"
PARALLEL_LINEAR = "fused_xent/_parallel_linear.py"
PARALLEL_SELECTED = "fused_xent/_parallel_selected.py"
NN = "fused_xent/nn.py"
MAIN = "fused_xent/__main__.py"

SELECTED_TESTS = "tests/test_selected.py::"
LINEAR_SELECTED = "tests/test_linear_selected.py::"
SPLIT_LOSSES = ("tests/test_parallel_linear.py::test_losses[2]",)
SPLIT_CALLS = ("tests/test_parallel_linear.py::test_calls[2]",)
SPLIT_SELECTED = ("tests/test_parallel_selected.py::test_selected[2]",)
SPLIT_ERRORS = ("tests/test_parallel_linear.py::test_errors",)
TOKENS = ("tests/test_token_weight.py::test_token_weights",)
CANCEL = ("tests/test_token_weight.py::test_mean_by_weights_that_cancel",)
POSITION = ("tests/test_token_weight.py::test_position_of_a_target_out_of_range",)
NARROW = ("tests/test_linear_dtypes.py::test_narrow_targets",)
PROBABILITIES = ("tests/test_linear_dtypes.py::test_probabilities_of_another_dtype",)
REFUSED = ("tests/test_errors.py::test_refused",)
TAKEN = ("tests/test_errors.py::test_accepted",)
FULL = ("tests/test_errors.py::test_messages_in_full",)
LINEAR_ERRORS = ("tests/test_linear_errors.py::test_errors",)
MODULES = ("tests/test_nn.py::test_every_option_reaches_the_function",)
REPORT = ("tests/test_fallback.py::test_report_of_a_wrong_kernel",)
CHUNKS = ("tests/test_linear.py::test_rows_of_a_chunk",)
SHIFT = ("tests/test_linear.py::test_shift_and_drop_ignored",)
STATISTICS = ("tests/test_linear.py::test_statistics",)
TRANSFORMS = ("tests/test_autograd_features.py::test_transforms_of_torch_func",)
BATCHES = ("tests/test_autograd_features.py::test_vmap_over_upstream_gradients",)
FORMULA = ("tests/test_options.py::test_formula",)
SUBCLASSES = ("tests/test_functional.py::test_torch_function_takes_precedence",)
USED_BEFORE = ("tests/test_overwriting_shared.py::test_logits_used_before_the_loss",)
OPERATORS = ("tests/test_ops.py::test_meta_implementations_agree_in_strides",)
DECOMPOSED = ("tests/test_export.py::test_decompositions_equal_the_operators",)
DECOMPOSED_PROGRAMS = ("tests/test_export.py::test_decomposed_programs",)
TRACED = ("tests/test_export.py::test_make_fx_of_the_forward",)

OPTIONS_FAULTS = {
    "inplace_backward may be any object": Fault(
        OPTIONS,
        "inplace_backward: Annotated[bool, check_flag] = False",
        "inplace_backward: Annotated[bool, lambda _, value: bool(value)] = False",
        REFUSED,
    ),
    "a scale may be 0": Fault(
        OPTIONS,
        "logit_scale: Annotated[float, Number(1e-30, 1e30)] = 1.0",
        "logit_scale: Annotated[float, Number(0, 1e30)] = 1.0",
        REFUSED,
    ),
    "z-loss at most 1": Fault(
        OPTIONS,
        "lse_square_scale: Annotated[float, Number(0, 1e30)] = 0.0",
        "lse_square_scale: Annotated[float, Number(0, 1)] = 0.0",
        TAKEN,
    ),
    "scale and cap are not compared": Fault(
        OPTIONS,
        "        _check_softcap(options.softcap, options.logit_scale)\n",
        "        pass\n",
        REFUSED,
    ),
    "loss_dtype has no effect": Fault(
        OPTIONS,
        "        options.loss_dtype,\n        statistics,\n",
        "        None,\n        statistics,\n",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "a bool is an index": Fault(
        OPTIONS,
        "if isinstance(value, bool) or not isinstance(value, (int, SupportsIndex)):",
        "if not isinstance(value, (int, SupportsIndex)):",
        REFUSED,
    ),
    "an index of numpy is refused": Fault(
        OPTIONS, "not isinstance(value, (int, SupportsIndex))", "not isinstance(value, int)", TAKEN
    ),
    "2**63 fits in 64 bits": Fault(
        OPTIONS, "if not -(2**63) <= value < 2**63:", "if not -(2**63) <= value <= 2**63:", REFUSED
    ),
    "the least number of 64 bits is refused": Fault(
        OPTIONS, "if not -(2**63) <= value < 2**63:", "if not -(2**63) < value < 2**63:", TAKEN
    ),
    "a dimension beyond the last": Fault(
        OPTIONS,
        "    if not -n_dims <= dim < n_dims:",
        "    if not -n_dims <= dim <= n_dims:",
        REFUSED,
    ),
    "a dimension from the end is kept negative": Fault(
        OPTIONS,
        "    return dim % n_dims\n",
        "    return dim\n",
        ("tests/test_options.py::test_dim",),
    ),
    "NaN is in every interval": Fault(
        OPTIONS,
        "        if not self.least <= number <= self.most:\n",
        "        if number < self.least or number > self.most:\n",
        REFUSED,
    ),
    "the ends of an interval are refused": Fault(
        OPTIONS,
        "        if not self.least <= number <= self.most:\n",
        "        if not self.least < number < self.most:\n",
        TAKEN,
    ),
    "a bool is a number": Fault(
        OPTIONS,
        "if isinstance(value, bool) or not isinstance(value, (float, Real)):",
        "if not isinstance(value, (float, Real)):",
        REFUSED,
    ),
    "the value is lost in a message": Fault(
        OPTIONS,
        "{name} must be in [{self.least:g}, {self.most:g}], got {value}",
        "{name} must be in [{self.least:g}, {self.most:g}]",
        REFUSED,
    ),
    "scale far below the cap": Fault(
        OPTIONS, "    if not 1e-30 <= ratio <= 1e30:", "    if not ratio <= 1e30:", REFUSED
    ),
    "loss of any dtype": Fault(
        OPTIONS,
        "    if value not in DTYPES:\n",
        "    if not isinstance(value, torch.dtype):\n",
        REFUSED,
    ),
    "both modes at once": Fault(
        OPTIONS,
        "    if options.inplace_backward and options.grad_in_forward:\n",
        "    if False:\n",
        REFUSED,
    ),
    "float16 is no dtype": Fault(
        OPTIONS,
        "torch.float64, torch.bfloat16, torch.float16)",
        "torch.float64, torch.bfloat16)",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "mean and sum are swapped": Fault(
        OPTIONS, '"mean": 1, "sum": 2', '"mean": 2, "sum": 1', TOKENS
    ),
    "an index is not converted to int": Fault(
        OPTIONS,
        "    value = operator.index(value)\n    if not -(2**63)",
        "    if not -(2**63)",
        ("tests/test_errors.py::test_objects_with_index_are_integers",),
    ),
    "a cap may be 0": Fault(
        OPTIONS,
        "softcap: Annotated[float | None, Number(1e-30, 1e30)] = None",
        "softcap: Annotated[float | None, Number(-1e30, 1e30)] = None",
        REFUSED,
    ),
    "a cap is at most 1e29": Fault(
        OPTIONS,
        "softcap: Annotated[float | None, Number(1e-30, 1e30)] = None",
        "softcap: Annotated[float | None, Number(1e-30, 1e29)] = None",
        TAKEN,
    ),
    "a cap may be beyond float32": Fault(
        OPTIONS,
        "softcap: Annotated[float | None, Number(1e-30, 1e30)] = None",
        "softcap: Annotated[float | None, Number(1e-38, 1e30)] = None",
        REFUSED,
    ),
    "a scale may be beyond float32": Fault(
        OPTIONS,
        "logit_scale: Annotated[float, Number(1e-30, 1e30)] = 1.0",
        "logit_scale: Annotated[float, Number(1e-30, 1e38)] = 1.0",
        REFUSED,
    ),
    "z-loss may be negative": Fault(
        OPTIONS,
        "lse_square_scale: Annotated[float, Number(0, 1e30)] = 0.0",
        "lse_square_scale: Annotated[float, Number(-1, 1e30)] = 0.0",
        REFUSED,
    ),
    "z-loss may be beyond float32": Fault(
        OPTIONS,
        "lse_square_scale: Annotated[float, Number(0, 1e30)] = 0.0",
        "lse_square_scale: Annotated[float, Number(0, 1e38)] = 0.0",
        REFUSED,
    ),
    "focal loss of a negative gamma": Fault(
        OPTIONS,
        "focal_gamma: Annotated[float, Number(0, 1e30)] = 0.0",
        "focal_gamma: Annotated[float, Number(-1, 1e30)] = 0.0",
        REFUSED,
    ),
    "focal loss beyond float32": Fault(
        OPTIONS,
        "focal_gamma: Annotated[float, Number(0, 1e30)] = 0.0",
        "focal_gamma: Annotated[float, Number(0, 1e38)] = 0.0",
        REFUSED,
    ),
    "smoothing above 1": Fault(
        OPTIONS,
        "label_smoothing: Annotated[float, Number(0, 1)] = 0.0",
        "label_smoothing: Annotated[float, Number(0, 2)] = 0.0",
        REFUSED,
    ),
    "smoothing below 0": Fault(
        OPTIONS,
        "label_smoothing: Annotated[float, Number(0, 1)] = 0.0",
        "label_smoothing: Annotated[float, Number(-1, 1)] = 0.0",
        REFUSED,
    ),
    "smoothing is at most a half": Fault(
        OPTIONS,
        "label_smoothing: Annotated[float, Number(0, 1)] = 0.0",
        "label_smoothing: Annotated[float, Number(0, 0.5)] = 0.0",
        TAKEN,
    ),
    "another ignored index by default": Fault(
        OPTIONS,
        "ignore_index: Annotated[int, check_index] = -100",
        "ignore_index: Annotated[int, check_index] = -1",
        ("tests/test_linear.py::test_all_rows_ignored",),
    ),
    "numbers are compared before the conversion to float": Fault(
        OPTIONS,
        "        number = float(value)  # before comparing: numpy's float16 warns about 1e30\n",
        "        number = value\n",
        ("tests/test_errors.py::test_numpy_numbers_and_scalar_tensors",),
    ),
    "tensors with one element are refused as numbers": Fault(
        OPTIONS,
        "            value = value.item()\n",
        "            pass\n",
        ("tests/test_errors.py::test_numpy_numbers_and_scalar_tensors",),
    ),
    "a tensor of True is a number": Fault(OPTIONS, " and value.dtype != torch.bool:", ":", REFUSED),
    "tensors of several elements are accepted as numbers": Fault(
        OPTIONS,
        "isinstance(value, Tensor) and value.dim() == 0 and",
        "isinstance(value, Tensor) and",
        REFUSED,
    ),
    "any reduction": Fault(
        OPTIONS,
        "    if not isinstance(value, str) or value not in REDUCTIONS:\n",
        "    if not isinstance(value, str):\n",
        REFUSED,
    ),
    "a list for reduction raises Python's own error": Fault(
        OPTIONS,
        "    if not isinstance(value, str) or value not in REDUCTIONS:\n",
        "    if value not in REDUCTIONS:\n",
        REFUSED,
    ),
    "flags may be numbers": Fault(
        OPTIONS,
        '    if not isinstance(value, bool):\n        raise TypeError(f"{name} must be a bool',
        '    if not isinstance(value, int):\n        raise TypeError(f"{name} must be a bool',
        REFUSED,
    ),
    "None is accepted for every option": Fault(
        OPTIONS,
        "value if value is None and DEFAULTS[name] is None else",
        "value if value is None else",
        REFUSED,
    ),
    "None is refused as a default": Fault(
        OPTIONS,
        "value if value is None and DEFAULTS[name] is None else CHECKS[name](name, value)",
        "CHECKS[name](name, value)",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "tensors are remembered as options": Fault(
        OPTIONS,
        "    if any(isinstance(value, Tensor) for value in values):\n",
        "    if False:\n",
        ("tests/test_errors.py::test_numpy_numbers_and_scalar_tensors",),
    ),
    "True is remembered as 1": Fault(
        OPTIONS,
        "@functools.lru_cache(maxsize=256, typed=True)\n",
        "@functools.lru_cache(maxsize=256)\n",
        ("tests/test_errors.py::test_a_bool_is_refused_after_an_equal_number",),
    ),
    "options are remembered for all dimensions": Fault(
        OPTIONS,
        "return resolve_once(n_dims, statistics, tuple(given), *given.values())",
        "return resolve_once(2, statistics, tuple(given), *given.values())",
        TOKENS,
    ),
    "options are remembered for both functions": Fault(
        OPTIONS,
        "return resolve_once(n_dims, statistics, tuple(given), *given.values())",
        "return resolve_once(n_dims, False, tuple(given), *given.values())",
        ("tests/test_options.py::test_argmax_is_the_first_maximum",),
    ),
    "the ratio of scale and cap is inverted": Fault(
        OPTIONS, "    ratio = logit_scale / softcap\n", "    ratio = softcap / logit_scale\n", FULL
    ),
    "scale far beyond the cap": Fault(
        OPTIONS, "    if not 1e-30 <= ratio <= 1e30:", "    if not 1e-30 <= ratio:", REFUSED
    ),
    "classes of a vector are its second dimension, as options": Fault(
        OPTIONS,
        "        return 0 if n_dims == 1 else 1\n",
        "        return 1\n",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
    "classes are torch's whatever dim says": Fault(
        OPTIONS,
        "    if dim is None:  # torch's",
        "    if True:  # torch's",
        ("tests/test_options.py::test_dim",),
    ),
    "a scalar has classes": Fault(OPTIONS, "    if n_dims == 0:\n", "    if False:\n", REFUSED),
    "options that are defaults reach the operators as None": Fault(
        OPTIONS,
        "            if value != DEFAULTS[name] and name not in OF_PYTHON\n",
        "            if name not in OF_PYTHON\n",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "ignore_index is not passed on": Fault(
        OPTIONS, "        options.ignore_index,\n", "        -100,\n", TOKENS
    ),
    "modes are swapped": Fault(
        OPTIONS,
        "        options.inplace_backward,\n        options.grad_in_forward,\n",
        "        options.grad_in_forward,\n        options.inplace_backward,\n",
        (
            "tests/test_overwriting.py::test_second_backward_is_refused",
            "tests/test_overwriting.py::test_gradient_equals_default_mode_and_overwrites_logits",
            "tests/test_overwriting.py::test_leaves_are_refused",
        ),
    ),
    "any option name is accepted": Fault(
        OPTIONS,
        "        if name not in known:\n",
        "        if False:\n",
        ("tests/test_errors.py::test_unknown_arguments",),
    ),
}

PROBLEM_FAULTS = {
    "token weights in float32 beside float64 probabilities": Fault(
        PROBLEM,
        "token_weight = token_weight.to(accumulation_dtype(logits.dtype))",
        "token_weight = token_weight.to(accumulation_dtype(input.dtype))",
        TOKENS,
    ),
    "range of targets without the rows of weight 0": Fault(
        PROBLEM,
        'f"equal to ignore_index ({padding})", kept)',
        'f"equal to ignore_index ({padding})")',
        TOKENS,
    ),
    "ignore_index of the range is the default": Fault(
        PROBLEM,
        "    padding = settings.ignore_index\n",
        "    padding = -100\n",
        TOKENS,
    ),
    "logits not promoted beside float64 probabilities": Fault(
        PROBLEM,
        "return input.to(dtype), target.to(dtype), dtype",
        "return input, target.to(dtype), dtype",
        TOKENS,
    ),
    "class weights do not promote": Fault(
        PROBLEM,
        "dtype = torch.promote_types(dtype, weight.dtype)",
        "pass",
        ("tests/test_functional.py::test_dtype_of_mixed_probabilities",),
    ),
    "float32 probabilities rounded to 16 bits": Fault(
        PROBLEM,
        "target = target.to(torch.float32)",
        "target = target.to(input.dtype)",
        PROBABILITIES,
    ),
    "float64 loss cast under autocast": Fault(
        PROBLEM,
        "    elif input.dtype != torch.float64 and is_autocast(input):\n",
        "    elif is_autocast(input):\n",
        ("tests/test_functional.py::test_autocast",),
    ),
    "loss in 16 bits under autocast": Fault(
        PROBLEM,
        "    elif input.dtype != torch.float64 and is_autocast(input):\n",
        "    elif False:\n",
        ("tests/test_functional.py::test_autocast",),
    ),
    "normalizer keeps its dtype": Fault(
        PROBLEM,
        "return normalizer.reshape(()).to(input.device, torch.float64)",
        "return normalizer.reshape(()).to(input.device)",
        (
            "tests/test_options.py::test_normalizer",
            "tests/test_functional.py::test_normalizer_goes_to_the_logits_device",
        ),
    ),
    "normalizer stays on its device": Fault(
        PROBLEM,
        "return normalizer.reshape(()).to(input.device, torch.float64)",
        "return normalizer.reshape(()).to(torch.float64)",
        ("tests/test_functional.py::test_normalizer_goes_to_the_logits_device",),
    ),
    "normalizer of a number on the default device": Fault(
        PROBLEM,
        "return input.new_full((), float(normalizer), dtype=torch.float64)",
        "return torch.full((), float(normalizer), dtype=torch.float64)",
        ("tests/test_functional.py::test_normalizer_goes_to_the_logits_device",),
    ),
    "normalizer is truncated to an integer": Fault(
        PROBLEM,
        "input.new_full((), float(normalizer)",
        "input.new_full((), int(normalizer)",
        ("tests/test_options.py::test_any_combination_of_many_options",),
    ),
    "logits of inplace_backward are not checked": Fault(
        OVERWRITING,
        "    if not (settings.inplace_backward or settings.grad_in_forward):\n",
        "    if not settings.grad_in_forward:\n",
        ("tests/test_overwriting.py::test_leaves_are_refused",),
    ),
    "autocast of a device that has none": Fault(
        PROBLEM,
        "return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)",
        "return torch.is_autocast_enabled(device.type)",
        ("tests/test_functional.py::test_meta_tensors_have_shapes_and_dtypes",),
    ),
    "sparse tensors are accepted": Fault(
        PROBLEM, "if tensor.layout != torch.strided:", "if False:", REFUSED
    ),
    "the name of a sparse tensor is lost": Fault(
        PROBLEM,
        "{name} must be a dense tensor, got layout",
        "input must be a dense tensor, got layout",
        REFUSED,
    ),
    "targets of other devices": Fault(
        PROBLEM, '    check_device("target", target, input)\n', "", REFUSED
    ),
    "class weights of other devices": Fault(
        PROBLEM, '    check_device("weight", weight, input)\n', "", REFUSED
    ),
    "token weights of other devices": Fault(
        PROBLEM, '    check_device("token_weight", token_weight, input)\n', "", REFUSED
    ),
    "int16 targets are accepted": Fault(
        PROBLEM,
        "(torch.int64, torch.int32, torch.uint8)",
        "(torch.int64, torch.int32, torch.int16, torch.uint8)",
        REFUSED,
    ),
    "int32 targets are refused": Fault(
        PROBLEM, "(torch.int64, torch.int32, torch.uint8)", "(torch.int64, torch.uint8)", NARROW
    ),
    "class 0 is ignored beside probabilities": Fault(
        PROBLEM,
        "        if settings.ignore_index >= 0:\n",
        "        if settings.ignore_index > 0:\n",
        REFUSED,
    ),
    "integer class weights beside probabilities": Fault(
        PROBLEM, '    check_floating("weight", weight)\n', "", REFUSED
    ),
    "complex token weights": Fault(
        PROBLEM, "    if token_weight.dtype.is_complex:", "    if False:", REFUSED
    ),
    "complex normalizer": Fault(
        PROBLEM,
        "if normalizer.numel() != 1 or normalizer.dtype.is_complex:",
        "if normalizer.numel() != 1:",
        REFUSED,
    ),
    "several normalizers": Fault(
        PROBLEM,
        "if normalizer.numel() != 1 or normalizer.dtype.is_complex:",
        "if normalizer.dtype.is_complex:",
        REFUSED,
    ),
    "normalizer of a sum": Fault(
        PROBLEM, '    if reduction != REDUCTIONS["mean"]:\n', "    if False:\n", REFUSED
    ),
    "normalizer of minus infinity": Fault(
        PROBLEM,
        "    if not math.isfinite(normalizer):\n",
        "    if not normalizer < math.inf:\n",
        REFUSED,
    ),
    "negative normalizer is refused": Fault(
        PROBLEM,
        "    if not math.isfinite(normalizer):\n",
        "    if not 0 <= normalizer < math.inf:\n",
        TAKEN,
    ),
    "five row dimensions are written": Fault(
        OVERWRITING,
        "return len(merged) <= 4",
        "return len(merged) <= 5",
        ("tests/test_errors.py::test_five_row_dimensions_are_refused",),
    ),
    "four row dimensions are refused": Fault(
        OVERWRITING,
        "return len(merged) <= 4",
        "return len(merged) <= 3",
        ("tests/test_errors.py::test_four_row_dimensions",),
    ),
    "dimensions of size 1 are counted": Fault(
        OVERWRITING,
        "if d == dim or size == 1:",
        "if d == dim:",
        ("tests/test_errors.py::test_four_row_dimensions",),
    ),
    "the dimension of the classes is counted": Fault(
        OVERWRITING,
        "if d == dim or size == 1:",
        "if size == 1:",
        ("tests/test_errors.py::test_four_row_dimensions",),
    ),
    "dimensions that merge are counted": Fault(
        OVERWRITING,
        "if merged and merged[-1] == size * stride:",
        "if False:",
        ("tests/test_errors.py::test_many_row_dimensions_that_merge",),
    ),
    "a target in the logits' memory": Fault(
        OVERWRITING,
        "        if _torch_private.share_memory(tensor, input):\n",
        "        if False:\n",
        ("tests/test_overwriting_shared.py::test_target_in_the_memory_of_the_logits",),
    ),
    "the mode in a message is the other": Fault(
        OVERWRITING,
        'name = "grad_in_forward" if settings.grad_in_forward else "inplace_backward"',
        'name = "grad_in_forward"',
        ("tests/test_overwriting.py::test_leaves_are_refused",),
    ),
    "views of a leaf are overwritten": Fault(
        OVERWRITING,
        ("if input.is_leaf or (memory.is_leaf and memory.requires_grad):"),
        "if input.is_leaf:",
        (
            "tests/test_overwriting.py::test_leaves_are_refused",
            "tests/test_export.py::test_traced_programs_do_not_overwrite_leaves",
        ),
    ),
    "shared elements are overwritten": Fault(
        OVERWRITING, "stride == 0 < size - 1 for", "stride < 0 for", FULL
    ),
    "a dimension of size 1 and stride 0 is refused": Fault(
        OVERWRITING,
        "stride == 0 < size - 1 for",
        "stride == 0 < size for",
        ("tests/test_errors.py::test_a_dimension_of_size_1_shares_no_memory",),
    ),
    "a negated view is overwritten": Fault(
        OVERWRITING,
        "    if not is_compiling and input.is_neg():",
        "    if False:",
        ("tests/test_errors.py::test_overwriting_modes_refuse_negated_views",),
    ),
    "overwriting under torch.func": Fault(
        OVERWRITING,
        "    if not is_compiling and _torch_private.is_under_torch_func():\n",
        "    if False:\n",
        ("tests/test_errors.py::test_overwriting_modes_refuse_torch_func",),
    ),
    "probabilities that require a gradient are accepted in fused mode": Fault(
        OVERWRITING,
        ("            if tensor is not None and tensor.requires_grad:\n                raise"),
        "            if False:\n                raise",
        (
            "tests/test_overwriting.py::test_gradient_of_probabilities_in_fused_mode",
            "tests/test_overwriting.py::test_gradient_of_other_tensors_in_fused_mode",
        ),
    ),
    "float16 is accepted in fused mode": Fault(
        OVERWRITING,
        "    if input.dtype == torch.float16:\n",
        "    if False:\n",
        ("tests/test_errors.py::test_grad_in_forward_refuses_float16",),
    ),
    "a part of a tensor in fused mode": Fault(
        OVERWRITING,
        "    if memory.numel() != input.numel() or memory.dtype != input.dtype:\n",
        "    if memory.dtype != input.dtype:\n",
        ("tests/test_overwriting_shared.py::test_grad_in_forward_refuses_parts_of_a_tensor",),
    ),
    "memory of another dtype in fused mode": Fault(
        OVERWRITING,
        "    if memory.numel() != input.numel() or memory.dtype != input.dtype:\n",
        "    if memory.numel() != input.numel():\n",
        ("tests/test_overwriting_shared.py::test_grad_in_forward_refuses_real_parts",),
    ),
    "the range in fewer bits": Fault(
        PROBLEM,
        "    index = index.to(torch.int64)  # a narrower",
        "    # a narrower",
        ("tests/test_linear_dtypes.py::test_narrow_targets_out_of_range",),
    ),
    "negative targets are classes": Fault(
        PROBLEM,
        "((index < 0) | (index >= n_classes))",
        "(index >= n_classes)",
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "the index after the last class is accepted as a target": Fault(
        PROBLEM,
        "(index >= n_classes))",
        "(index > n_classes))",
        (
            "tests/test_fallback.py::test_target_out_of_range",
            *POSITION,
        ),
    ),
    "the last bad target is named": Fault(
        PROBLEM, "bad.nonzero()[0].tolist()", "bad.nonzero()[-1].tolist()", POSITION
    ),
    "targets of rows of weight 0 are checked": Fault(
        PROBLEM,
        "        bad = bad & kept\n",
        "        pass\n",
        POSITION,
    ),
    "rows of weight 0 alone are checked": Fault(
        PROBLEM, "else token_weight != 0\n", "else token_weight == 0\n", POSITION
    ),
    "sums of float64 in float32": Fault(
        PROBLEM,
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return torch.float32",
        TOKENS,
    ),
    "the remedy for a target's shape is lost": Fault(
        PROBLEM, 'return "if the classes are in another dimension, pass dim"', 'return ""', FULL
    ),
    "the dimension in a message is the last": Fault(
        PROBLEM, 'f"dimension {dim}, got', 'f"dimension {input.dim() - 1}, got', FULL
    ),
    "the remedy for float16 is lost": Fault(
        OVERWRITING,
        "falls below float16's range; use inplace_backward",
        "falls below float16's range",
        FULL,
    ),
    "the strides in a message are the shape": Fault(
        OVERWRITING,
        'strides = f"got strides {input.stride()} of shape',
        'strides = f"got strides {input.shape} of shape',
        FULL,
    ),
    "the range in a message is a class too far": Fault(
        PROBLEM,
        'f"{name} must be in [0, {n_classes}) or',
        'f"{name} must be in [0, {n_classes}] or',
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "the value of a bad target is the first": Fault(
        PROBLEM,
        "got {index[position].item()} at ",
        "got {index.flatten()[0].item()} at ",
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "float64 class weights alone do not promote the sums": Fault(
        PROBLEM,
        "    if dtype == torch.float64:\n        return input.to(dtype)",
        "    if torch.float64 in (input.dtype, target.dtype):\n        return input.to(dtype)",
        ("tests/test_functional.py::test_float64_class_weights_promote_the_sums",),
    ),
    "token weights of any shape of as many numbers": Fault(
        PROBLEM,
        "    if token_weight.shape != rows:\n",
        "    if token_weight.numel() != rows.numel():\n",
        REFUSED,
    ),
    "logits are checked before they are promoted": Fault(
        PROBLEM,
        "    return Problem(logits, target, weight",
        "    from ._overwriting import check_overwritable\n\n"
        "    check_overwritable(Problem(input, target, None, None, None, None, settings))\n"
        "    return Problem(logits, target, weight",
        ("tests/test_overwriting.py::test_promoted_leaves_are_not_overwritten",),
    ),
    "range of targets by the last dimension": Fault(
        PROBLEM,
        "n_classes = problem.logits.shape[settings.dim] if n_classes is None else n_classes",
        "n_classes = problem.logits.shape[-1] if n_classes is None else n_classes",
        ("tests/test_linear.py::test_several_positions_per_row",),
    ),
    "a target that is not a tensor is accepted": Fault(
        PROBLEM, '    check_dense("target", target)\n', "", REFUSED
    ),
    "class weights may be sparse": Fault(
        PROBLEM, '    check_dense("weight", weight)\n', "", REFUSED
    ),
    "token weights may be sparse": Fault(
        PROBLEM, '    check_dense("token_weight", token_weight)\n', "", REFUSED
    ),
    "nested tensors are accepted": Fault(
        PROBLEM,
        " and not tensor.is_nested:\n",
        ":\n",
        ("tests/test_errors.py::test_nested_tensors_are_refused",),
    ),
    "logits of integers": Fault(PROBLEM, '    check_floating("input", input)\n', "", REFUSED),
    "complex logits": Fault(
        PROBLEM,
        "    if tensor.dtype not in DTYPES:\n",
        "    if tensor.dtype not in (*DTYPES, torch.complex64):\n",
        REFUSED,
    ),
    "class weights of any shape of as many numbers": Fault(
        PROBLEM,
        "    if weight.shape != (n_classes,):\n",
        "    if weight.numel() != n_classes:\n",
        ("tests/test_fallback.py::test_weights_of_wrong_shape_are_refused",),
    ),
    "a target of one more dimension has no hint": Fault(
        PROBLEM, "    if ones:\n", "    if False:\n", REFUSED
    ),
    "integer probabilities": Fault(
        PROBLEM,
        '        check_probabilities(target, f"input\'s shape {tuple(input.shape)}")\n',
        "",
        REFUSED,
    ),
    "a bool is a normalizer": Fault(
        PROBLEM,
        "isinstance(normalizer, bool) or not isinstance(normalizer, Real)",
        "not isinstance(normalizer, Real)",
        REFUSED,
    ),
    "a normalizer of one number has a dimension": Fault(
        PROBLEM, "normalizer.reshape(()).to", "normalizer.to", TAKEN
    ),
    "class indices keep the loss's dtype under autocast": Fault(
        PROBLEM,
        "        loss_dtype = torch.float32\n",
        "        pass\n",
        ("tests/test_functional.py::test_autocast",),
    ),
    "probabilities keep the loss's dtype under autocast": Fault(
        PROBLEM,
        "loss_dtype = torch.float32 if dtype != torch.float64 and is_autocast(input) else dtype",
        "loss_dtype = dtype",
        ("tests/test_functional.py::test_autocast",),
    ),
    "promotion overrides loss_dtype": Fault(
        PROBLEM,
        "loss_dtype is not None and settings.loss_dtype is None and",
        "loss_dtype is not None and",
        ("tests/test_functional.py::test_loss_dtype_beside_probabilities_and_under_autocast",),
    ),
    "the loss of probabilities has the logits' dtype": Fault(
        PROBLEM,
        "    if loss_dtype is not None and settings.loss_dtype is None and loss_dtype != "
        "logits.dtype:\n",
        "    if False:\n",
        ("tests/test_functional.py::test_dtype_of_mixed_probabilities",),
    ),
    "outputs of unbind are overwritten": Fault(
        OVERWRITING,
        "        if not is_compiling and _torch_private.is_one_of_several_views(input):\n",
        "        if False:\n",
        ("tests/test_overwriting_shared.py::test_one_of_several_views",),
    ),
    "views of unrecorded tensors are overwritten": Fault(
        OVERWRITING,
        "        if memory.is_leaf:\n",
        "        if False:\n",
        ("tests/test_overwriting_shared.py::test_view_of_an_unrecorded_tensor",),
    ),
    "leaves are refused without grad mode": Fault(
        OVERWRITING,
        "    if torch.is_grad_enabled() and input.requires_grad:\n        if input",
        "    if input.requires_grad:\n        if input",
        ("tests/test_overwriting.py::test_without_grad_nothing_is_overwritten",),
    ),
    "many row dimensions are overwritten": Fault(
        OVERWRITING, "    if not _has_layout(input, settings.dim):\n", "    if False:\n", FULL
    ),
    "targets on a GPU are waited for": Fault(
        PROBLEM,
        "return index.is_cpu and _torch",
        "return _torch",
        ("tests/test_fallback.py::test_target_out_of_range",),
        unseen="Of all devices here, the CPU alone has tensors with values.",
    ),
    "autocast of CUDA's for the CPU": Fault(
        PROBLEM,
        '        return torch.is_autocast_enabled("cpu")\n',
        '        return torch.is_autocast_enabled("cuda")\n',
        ("tests/test_functional.py::test_autocast",),
    ),
    "the unreduced loss is without the next dimension": Fault(
        PROBLEM,
        "    return shape[:dim] + shape[dim + 1 :]\n",
        "    return shape[:dim] + shape[dim + 2 :]\n",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
    "at most 1023 sparse labels": Fault(
        PROBLEM,
        "MAX_LABELS = 1024 ",
        "MAX_LABELS = 1023 ",
        ("tests/test_sparse_labels.py::test_long_rows",),
    ),
    "any number of sparse labels": Fault(
        PROBLEM,
        "        and 1 <= shape[n_before] <= MAX_LABELS\n",
        "",
        ("tests/test_sparse_labels.py::test_errors",),
    ),
    "the shape of sparse labels after the classes is not checked": Fault(
        PROBLEM,
        "        and shape[n_before + 1 :] == after\n",
        "",
        ("tests/test_sparse_labels.py::test_errors",),
    ),
    "indices of any dtype": Fault(
        PROBLEM,
        "    if target_indices.dtype not in _SPARSE_INDEX_DTYPES:",
        "    if False:",
        ("tests/test_sparse_labels.py::test_errors",),
    ),
    "probabilities of another shape than their indices": Fault(
        PROBLEM,
        "    if target.shape != target_indices.shape:",
        "    if False:",
        ("tests/test_sparse_labels.py::test_errors",),
    ),
    "sparse labels in float64 copy the logits": Fault(
        PROBLEM,
        "    if is_sparse:\n",
        "    if is_sparse and dtype != torch.float64:\n",
        (
            "tests/test_sparse_labels.py::test_allocates_only_the_gradient",
            "tests/test_sparse_labels.py::test_linear_memory",
        ),
    ),
    "indices in the logits' memory": Fault(
        OVERWRITING,
        "if _torch_private.share_memory(tensor, input):",
        'if other != "target_indices" and _torch_private.share_memory(tensor, input):',
        ("tests/test_sparse_labels.py::test_labels_in_the_memory_of_the_logits",),
    ),
    "the range of sparse labels is that of targets": Fault(
        PROBLEM,
        "    index = target if target_indices is None else target_indices\n",
        "    index = target\n",
        (
            "tests/test_sparse_labels.py::test_without_kernels",
            "tests/test_sparse_labels.py::test_linear_indices_out_of_range",
        ),
    ),
}

FUNCTIONAL_FAULTS = {
    "reduce without size_average is ignored": Fault(
        FUNCTIONAL,
        "if size_average is not None or reduce is not None:",
        "if size_average is not None:",
        ("tests/test_functional.py::test_legacy_reduction",),
    ),
    "__torch_function__ of weights is ignored": Fault(
        FUNCTIONAL,
        "(input, target, weight, token_weight, normalizer, target_indices)\n    options = {",
        "(input, target, None, token_weight, normalizer, target_indices)\n    options = {",
        SUBCLASSES,
    ),
    "names of options are not checked": Fault(
        FUNCTIONAL,
        '    check_names("cross_entropy_with_statistics", options, _SIGNATURE.parameters)\n',
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
        "    size_average: bool | None = None,\n"
        "    ignore_index: int = -100,\n"
        "    reduce: bool | None = None,\n"
        '    reduction: str = "mean",\n'
        "    label_smoothing: float = 0.0,\n"
        "    *,",
        "    size_average: bool | None = None,\n"
        "    ignore_index: int = -1,\n"
        "    reduce: bool | None = None,\n"
        '    reduction: str = "mean",\n'
        "    label_smoothing: float = 0.0,\n"
        "    *,",
        ("tests/test_functional.py::test_torchs_arguments_come_first_with_torchs_defaults",),
    ),
    "signature of the statistics is the loss's": Fault(
        FUNCTIONAL,
        "    return_annotation=CrossEntropyStatistics,\n",
        "",
        ("tests/test_options.py::test_statistics_have_the_signature_of_the_loss",),
    ),
    "weights of the statistics are positional": Fault(
        FUNCTIONAL,
        "if i > 2 else parameter",
        "if i > 3 else parameter",
        ("tests/test_options.py::test_statistics_have_the_signature_of_the_loss",),
    ),
    "deprecated arguments of the statistics are ignored": Fault(
        FUNCTIONAL,
        "    if legacy != (None, None):\n",
        "    if False:\n",
        ("tests/test_functional.py::test_legacy_reduction",),
    ),
    "subclasses' deprecated arguments are lost": Fault(
        FUNCTIONAL,
        "return _overridden(cross_entropy, tensors, **legacy, **options, **of_shard)",
        "return _overridden(cross_entropy, tensors, **options, **of_shard)",
        ("tests/test_functional.py::test_torch_function_gets_all_arguments",),
    ),
    "modes take the fast path": Fault(
        FUNCTIONAL,
        "is_whole and is_plain(*tensors) and not (inplace_backward or grad_in_forward):",
        "is_whole and is_plain(*tensors):",
        ("tests/test_overwriting.py::test_gradient_equals_default_mode_and_overwrites_logits",),
    ),
    "the fast path's errors are the kernels'": Fault(
        FUNCTIONAL, "        except CALL_ERRORS:\n", "        except KeyError:\n", REFUSED
    ),
    "the loss alone is computed with statistics": Fault(
        FUNCTIONAL,
        "    return _evaluate(tensors, False, options, shard)[0]\n",
        "    return _evaluate(tensors, True, options, shard)[0].clone()\n",
        ("tests/test_autograd.py::test_allocates_only_the_gradient",),
    ),
    "__torch_function__ gets no indices": Fault(
        FUNCTIONAL,
        "Problem._fields[2:-1], others, strict=True",
        "Problem._fields[2:-2], others, strict=False",
        ("tests/test_sparse_labels.py::test_torch_function_of_indices",),
    ),
}

LINEAR_FAULTS = {
    "layers of other devices": Fault(
        LINEAR_CHECKS,
        '    check_device("linear_weight", linear_weight, input)\n',
        "",
        LINEAR_ERRORS,
    ),
    "biases of other devices": Fault(
        LINEAR_CHECKS,
        '        check_device("linear_bias", linear_bias, input)\n',
        "",
        LINEAR_ERRORS,
    ),
    "a layer of one dimension": Fault(
        LINEAR_CHECKS,
        "    if linear_weight.dim() < 2:",
        "    if linear_weight.dim() < 1:",
        LINEAR_ERRORS,
    ),
    "features that do not fit": Fault(
        LINEAR_CHECKS,
        "    if linear_weight.shape[-1] != input.shape[-1]:",
        "    if False:",
        LINEAR_ERRORS,
    ),
    "a bias of another shape": Fault(
        LINEAR_CHECKS,
        "        if linear_bias.shape != linear_weight.shape[:-1]:",
        "        if False:",
        LINEAR_ERRORS,
    ),
    "a bias of another dtype": Fault(
        LINEAR_CHECKS,
        '(("linear_weight", linear_weight), ("linear_bias", linear_bias))',
        '(("linear_weight", linear_weight),)',
        LINEAR_ERRORS,
    ),
    "ignore_index beside probabilities of a layer": Fault(
        LINEAR_CHECKS, "        if ignore_index is not None:", "        if False:", LINEAR_ERRORS
    ),
    "a negative shift": Fault(LINEAR_CHECKS, "    if shift < 0:", "    if False:", LINEAR_ERRORS),
    "a shift of no sequence": Fault(
        LINEAR_CHECKS, "    if input.dim() < 2:\n", "    if input.dim() < 1:\n", LINEAR_ERRORS
    ),
    "a shift of True is refused": Fault(
        LINEAR_CHECKS,
        'shift = int(shift) if isinstance(shift, bool) else check_index("shift", shift)',
        'shift = check_index("shift", shift)',
        ("tests/test_linear.py::test_next_tokens_without_weights",),
    ),
    "torch's chunk size is ignored": Fault(
        LINEAR_CHECKS, "    if chunk_rows is None and is_given:", "    if False:", CHUNKS
    ),
    "torch's chunk size goes before chunk_rows": Fault(
        LINEAR_CHECKS, "    if chunk_rows is None and is_given:", "    if is_given:", CHUNKS
    ),
    "chunks of no rows": Fault(
        LINEAR_CHECKS, "    if chunk_rows < 1:", "    if chunk_rows < 0:", LINEAR_ERRORS
    ),
    "a row is dropped where any of its positions is ignored": Fault(
        LINEAR_ROWS,
        "counts.flatten(1).any(1)",
        "counts.flatten(1).all(1)",
        ("tests/test_linear_dtypes.py::test_row_is_dropped_if_all_its_positions_are",),
    ),
    "kept rows by an ignored index of fewer bits": Fault(
        LINEAR_ROWS,
        "target.to(torch.int64) != problem.settings.ignore_index",
        "target != problem.settings.ignore_index",
        NARROW,
    ),
    "ignored rows of a token weight are kept": Fault(
        LINEAR_ROWS,
        "counts = is_label if counts is None else counts & is_label",
        "counts = is_label if counts is None else counts | is_label",
        ("tests/test_linear_dtypes.py::test_row_is_dropped_if_all_its_positions_are",),
    ),
    "rows of token weight 0 are kept": Fault(
        LINEAR_ROWS,
        "counts = None if token_weight is None else token_weight != 0",
        "counts = None",
        ("tests/test_linear_dtypes.py::test_row_is_dropped_if_all_its_positions_are",),
    ),
    "float64 layers are cast by autocast": Fault(
        LINEAR_AUTOGRAD,
        "tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)",
        "tensor if tensor is None else tensor.to(dtype)",
        ("tests/test_linear_dtypes.py::test_autocast_of_layers_of_any_dtype",),
    ),
    "layers are not cast by autocast": Fault(
        LINEAR_AUTOGRAD,
        "        if not is_autocast(self.hidden):\n",
        "        if True:\n",
        ("tests/test_linear_dtypes.py::test_autocast_of_layers_of_any_dtype",),
    ),
    "autocast's dtype is another device's": Fault(
        LINEAR_AUTOGRAD,
        "torch.get_autocast_dtype(self.hidden.device.type)",
        'torch.get_autocast_dtype("cuda")',
        ("tests/test_linear_dtypes.py::test_autocast_of_layers_of_any_dtype",),
    ),
    "chunks of a float32 layer beside float64 probabilities": Fault(
        LINEAR,
        "        or (target.dtype == torch.float64 and layer.hidden.dtype != torch.float64)\n",
        "",
        PROBABILITIES,
    ),
    "probabilities that require a gradient get none": Fault(
        LINEAR,
        "or _autograd.needs_graph(target, weight, token_weight, normalizer)",
        "or _autograd.needs_graph(weight, token_weight, normalizer)",
        ("tests/test_linear_autograd.py::test_gradients_of_probabilities",),
    ),
    "chunks under torch.func": Fault(
        LINEAR,
        "        or (not is_compiling and is_under_torch_func())\n",
        "",
        ("tests/test_linear_autograd.py::test_transforms_of_torch_func",),
    ),
    "chunks of no positions": Fault(
        LINEAR,
        "        or 0 in problem.logits.shape\n",
        "",
        ("tests/test_linear.py::test_empty_layers",),
    ),
    "labels beyond a sequence are the next one's": Fault(
        LINEAR_ROWS,
        "return torch.cat([torch.zeros_like(first), others], dim - 1)",
        "return torch.cat([first, others], dim - 1)",
        SHIFT,
    ),
    "labels before the shift are checked": Fault(
        LINEAR,
        "    if shift > 0:\n"
        "        problem = problem._replace(token_weight=without_first(problem, shift))\n"
        "    check_range(problem, None",
        "    check_range(problem)\n"
        "    if shift > 0:\n"
        "        problem = problem._replace(token_weight=without_first(problem, shift))\n"
        "    check_range(problem, None",
        ("tests/test_linear_errors.py::test_position_of_a_target_out_of_range",),
    ),
    "token weights are not shifted": Fault(
        LINEAR_ROWS, "flat(tokens)[shift:]", "flat(tokens)[: len(target)]", SHIFT
    ),
    "targets are not shifted": Fault(
        LINEAR_ROWS, "flat(problem.target)[shift:]", "flat(problem.target)[: len(hidden)]", SHIFT
    ),
    "argmax of a dropped row is 0": Fault(
        LINEAR_ROWS, "restore(argmax, -1)", "restore(argmax)", STATISTICS
    ),
    "a dropped row is correct": Fault(
        LINEAR_ROWS, "restore(correct, False)", "restore(correct, True)", STATISTICS
    ),
    "kept rows are put first": Fault(
        LINEAR_ROWS,
        "whole.index_copy(0, self.kept, values)",
        "whole.index_copy(0, torch.arange(len(self.kept)), values)",
        SHIFT,
    ),
    "the loss of no reduction is not restored": Fault(
        LINEAR_ROWS, "            loss = self._restore(loss)\n", "            pass\n", SHIFT
    ),
    "the target of all rows beside kept ones": Fault(
        LINEAR_ROWS,
        "target=problem.target.index_select(0, kept)",
        "target=problem.target[: kept.numel()]",
        NARROW,
    ),
    "the token weight of all rows beside kept ones": Fault(
        LINEAR_ROWS,
        "None if tokens is None else tokens.index_select(0, kept)",
        "None if tokens is None else tokens[: kept.numel()]",
        SHIFT,
    ),
    "rows are dropped unasked": Fault(
        LINEAR,
        "if drop_ignored and has_values(problem.target):",
        "if has_values(problem.target):",
        ("tests/test_linear_dtypes.py::test_drop_ignored_of_the_module",),
    ),
    "rows are dropped in compiled code": Fault(
        LINEAR,
        "if drop_ignored and has_values(problem.target):",
        "if drop_ignored:",
        ("tests/test_linear_autograd.py::test_compiles_to_one_graph",),
    ),
    "any object drops rows": Fault(
        LINEAR, '    check_flag("drop_ignored", drop_ignored)\n', "", LINEAR_ERRORS
    ),
    "dtypes of a layer are not compared": Fault(
        LINEAR_CHECKS,
        "        if tensor is not None and tensor.dtype != dtype:\n",
        "        if False:\n",
        LINEAR_ERRORS,
    ),
    "dtypes are compared before autocast": Fault(
        LINEAR,
        "    layer = Layer(input, linear_weight, linear_bias).autocast()\n"
        "    logits_dtype = check_dtypes(layer, logits_dtype)\n",
        "    layer = Layer(input, linear_weight, linear_bias)\n"
        "    logits_dtype = check_dtypes(layer, logits_dtype)\n"
        "    layer = layer.autocast()\n",
        ("tests/test_linear_dtypes.py::test_autocast_of_a_layer_of_several_dtypes",),
    ),
    "targets of a layer are not checked": Fault(
        LINEAR,
        "        check_target(target, rows, classes, ignore_index, shift)\n",
        "        pass\n",
        LINEAR_ERRORS,
    ),
    "classes are still behind all rows": Fault(
        LINEAR_ROWS,
        "        settings=problem.settings._replace(dim=1),\n",
        "",
        ("tests/test_linear.py::test_rows_of_any_shape",),
    ),
    "chunk_rows has no effect": Fault(
        LINEAR,
        "_linear_autograd.evaluate(layer, problem, chunk_rows)",
        "_linear_autograd.evaluate(layer, problem, None)",
        CHUNKS,
    ),
    "__torch_function__ of a layer's token weights is ignored": Fault(
        LINEAR,
        "    if has_torch_function_variadic(*tensors, *others):\n"
        "        return _overridden(linear_cross_entropy_with_statistics, ",
        "    if has_torch_function_variadic(*tensors, *others[:2]):\n"
        "        return _overridden(linear_cross_entropy_with_statistics, ",
        ("tests/test_linear_autograd.py::test_torch_function_takes_precedence",),
    ),
    "statistics of a layer take any name": Fault(
        LINEAR,
        '    check_names("linear_cross_entropy_with_statistics", options, _NAMES)\n',
        "",
        ("tests/test_linear_errors.py::test_unknown_arguments_of_the_layer",),
    ),
    "logits of all rows are not promoted": Fault(
        LINEAR,
        "layer.logits(logits_dtype).to(problem.logits.dtype)",
        "layer.logits(logits_dtype)",
        PROBABILITIES,
    ),
    "signature of a layer's statistics": Fault(
        LINEAR,
        "    _SIGNATURE.replace(return_annotation=CrossEntropyStatistics)\n",
        "    _SIGNATURE\n",
        ("tests/test_options.py::test_statistics_have_the_signature_of_the_loss",),
    ),
    "a layer's statistics know no reduction": Fault(
        LINEAR, "[3:]", "[6:]", ("tests/test_linear_autograd.py::test_finite_differences",)
    ),
    "a layer's ignored index is the default": Fault(
        LINEAR, '        loss_options["ignore_index"] = ignore_index\n', "        pass\n", NARROW
    ),
    "__torch_function__ of a layer's bias is ignored": Fault(
        LINEAR,
        "    if has_torch_function_variadic(*tensors, *others):\n        given =",
        "    if has_torch_function_variadic(*tensors, *others[1:]):\n        given =",
        ("tests/test_linear_autograd.py::test_torch_function_takes_precedence",),
    ),
    "biases of a layer may be sparse": Fault(
        LINEAR_CHECKS, '        check_dense("linear_bias", linear_bias)\n', "", LINEAR_ERRORS
    ),
    "weights of a layer may be sparse": Fault(
        LINEAR_CHECKS, '    check_dense("linear_weight", linear_weight)\n', "", LINEAR_ERRORS
    ),
    "layers of integers": Fault(
        LINEAR_CHECKS, '    check_floating("input", input)\n', "", LINEAR_ERRORS
    ),
    "a shift of all of a sequence": Fault(
        LINEAR_CHECKS,
        "    if shift >= input.shape[-2]:",
        "    if shift > input.shape[-2]:",
        LINEAR_ERRORS,
    ),
    "labels that are shifted already have no hint": Fault(
        LINEAR_CHECKS,
        "if shift and target.shape == (*_shifted(rows, shift), *classes[1:]):",
        "if False:",
        LINEAR_ERRORS,
    ),
    "the hint for shifted labels forgets positions": Fault(
        LINEAR_CHECKS,
        "target.shape == (*_shifted(rows, shift), *classes[1:])",
        "target.shape == _shifted(rows, shift)",
        LINEAR_ERRORS,
    ),
    "a class of options is taken for options": Fault(
        LINEAR_CHECKS, "isinstance(options, type) or not hasattr", "not hasattr", LINEAR_ERRORS
    ),
    "any object is torch's options": Fault(
        LINEAR_CHECKS,
        '(isinstance(options, type) or not hasattr(options, "batch_chunk_size"))',
        "isinstance(options, type)",
        LINEAR_ERRORS,
    ),
    "logits of a layer in any dtype": Fault(
        LINEAR_CHECKS,
        "    if logits_dtype != torch.float32 or dtype == torch.float64:\n",
        "    if dtype == torch.float64:\n",
        LINEAR_ERRORS,
    ),
    "logits narrower than a float64 layer": Fault(
        LINEAR_CHECKS,
        "    if logits_dtype != torch.float32 or dtype == torch.float64:\n",
        "    if logits_dtype != torch.float32:\n",
        LINEAR_ERRORS,
    ),
    "logits_dtype has no effect": Fault(
        LINEAR_CHECKS,
        "    return torch.float32\n",
        "    return dtype\n",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "the logits to be checked ignore logits_dtype": Fault(
        LINEAR,
        "layer.hidden.new_zeros((), dtype=logits_dtype).expand(*rows, *classes)",
        "layer.hidden.new_zeros(()).expand(*rows, *classes)",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "flattened rows have logits of the layer's dtype": Fault(
        LINEAR_ROWS,
        "problem.logits.new_zeros(()).expand(len(target),",
        "hidden.new_zeros(()).expand(len(target),",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "all logits at once are in the layer's dtype": Fault(
        LINEAR,
        "layer.logits(logits_dtype).to(problem.logits.dtype)",
        "layer.logits(layer.hidden.dtype).to(problem.logits.dtype)",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "few logits are in chunks": Fault(
        LINEAR,
        "    return problem.logits.numel() <= FEW_LOGITS\n",
        "    return False\n",
        ("tests/test_linear.py::test_few_logits_are_computed_at_once",),
    ),
    "logits are always few": Fault(
        LINEAR,
        "    return problem.logits.numel() <= FEW_LOGITS\n",
        "    return True\n",
        ("tests/test_linear.py::test_few_logits_are_computed_at_once",),
    ),
    "few logits are a number of rows": Fault(
        LINEAR,
        "    return problem.logits.numel() <= FEW_LOGITS\n",
        "    return problem.logits.shape[0] <= FEW_LOGITS\n",
        ("tests/test_linear.py::test_few_logits_are_computed_at_once",),
    ),
    "few logits in spite of chunk_rows": Fault(
        LINEAR,
        "    if chunk_rows is not None or torch.compiler.is_compiling():\n",
        "    if torch.compiler.is_compiling():\n",
        ("tests/test_linear.py::test_few_logits_are_computed_at_once",),
    ),
    "few logits make two graphs": Fault(
        LINEAR,
        "    if chunk_rows is not None or torch.compiler.is_compiling():\n",
        "    if chunk_rows is not None:\n",
        ("tests/test_linear_autograd.py::test_one_graph_of_few_logits_and_of_many",),
    ),
    "class weights that require a gradient get none": Fault(
        LINEAR,
        "or _autograd.needs_graph(target, weight, token_weight, normalizer)",
        "or _autograd.needs_graph(target, token_weight, normalizer)",
        ("tests/test_linear_autograd.py::test_gradient_of_one_option_alone",),
    ),
    "a normalizer that requires a gradient gets none": Fault(
        LINEAR,
        "or _autograd.needs_graph(target, weight, token_weight, normalizer)",
        "or _autograd.needs_graph(target, weight, token_weight)",
        ("tests/test_linear_autograd.py::test_gradient_of_one_option_alone",),
    ),
    "chunks where torch operations compute": Fault(
        LINEAR,
        "        _autograd.is_for_torch(problem)\n        or ",
        "        ",
        ("tests/test_linear_autograd.py::test_dual_numbers",),
    ),
    "the last rows of sequences have a place in the loss": Fault(
        LINEAR_ROWS, "self.shape[-1] - shift)\n", "self.shape[-1])\n", SHIFT
    ),
    "any layer takes the fast path": Fault(
        LINEAR, "        and isinstance(linear_weight, Tensor)\n", "", LINEAR_ERRORS
    ),
    "layers that are not ordinary take the fast path": Fault(
        LINEAR, "        and are_ordinary(input, linear_weight)\n", "", LINEAR_ERRORS
    ),
    "sequences and positions take the fast path": Fault(
        LINEAR,
        "        and input.dim() == linear_weight.dim() == 2\n",
        "",
        ("tests/test_linear.py::test_few_logits_are_right",),
    ),
    "any number of logits takes the fast path": Fault(
        LINEAR,
        "        and 0 < input.size(0) * linear_weight.size(0) <= FEW_LOGITS\n",
        "",
        ("tests/test_linear.py::test_few_logits_are_computed_at_once",),
    ),
    "a bias that is expanded takes the fast path": Fault(
        LINEAR,
        "(isinstance(linear_bias, Tensor) and linear_bias.shape == linear_weight.shape[:1])",
        "isinstance(linear_bias, Tensor)",
        LINEAR_ERRORS,
    ),
    "a shift takes the fast path": Fault(
        LINEAR,
        "    if is_default and type(shift) is int and shift == 0 and _is_plain",
        "    if is_default and _is_plain",
        ("tests/test_linear.py::test_few_logits_are_right",),
    ),
    "drop_ignored may be anything on the fast path": Fault(
        LINEAR, "    is_default = is_default and drop_ignored is False\n", "", LINEAR_ERRORS
    ),
    "chunk_rows takes the fast path": Fault(
        LINEAR,
        "    is_default = options is None and logits_dtype is None and chunk_rows is None\n",
        "    is_default = options is None and logits_dtype is None\n",
        ("tests/test_linear.py::test_few_logits_are_computed_at_once",),
    ),
    "logits_dtype takes the fast path": Fault(
        LINEAR,
        "    is_default = options is None and logits_dtype is None and chunk_rows is None\n",
        "    is_default = options is None and chunk_rows is None\n",
        (
            "tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",
            *LINEAR_ERRORS,
        ),
    ),
    "the fast path has no bias": Fault(
        LINEAR,
        "F.linear(input, linear_weight, linear_bias)",
        "F.linear(input, linear_weight)",
        ("tests/test_linear.py::test_few_logits_are_right",),
    ),
    "the fast path's errors of a layer are torch's": Fault(
        LINEAR, "        except CALL_ERRORS:\n", "        except KeyError:\n", LINEAR_ERRORS
    ),
    "the fast path has no ignored index": Fault(
        LINEAR,
        '        of_loss["ignore_index"] = ignore_index\n',
        "        pass\n",
        (
            "tests/test_linear.py::test_few_logits_are_right",
            *NARROW,
        ),
    ),
    "__torch_function__ gets no indices of a layer": Fault(
        LINEAR,
        'named = dict(zip(("linear_bias", *Problem._fields[2:-1]), others, strict=True))',
        'named = dict(zip(("linear_bias", *Problem._fields[2:-2]), others, strict=False))',
        ("tests/test_sparse_labels.py::test_torch_function_of_indices",),
    ),
    "indices are not shifted": Fault(
        LINEAR_ROWS,
        "else flat(indices)[shift:],",
        "else flat(indices)[: n_rows - shift],",
        ("tests/test_sparse_labels.py::test_shift_and_drop_ignored",),
    ),
    "indices of the first rows, not of those that count": Fault(
        LINEAR_ROWS,
        "else indices.index_select(0, kept),",
        "else indices[: kept.numel()],",
        ("tests/test_sparse_labels.py::test_shift_and_drop_ignored",),
    ),
    "shifted indices have no hint": Fault(
        LINEAR_CHECKS,
        "is_shifted = shift and is_labels_shape(shape, _shifted(rows, shift), positions)",
        "is_shifted = False",
        ("tests/test_sparse_labels.py::test_linear_errors",),
    ),
}

LINEAR_OPS_FAULTS = {
    "chunks' sums in loss_dtype": Fault(
        LINEAR_OPS,
        "loss_dtype = self.loss_dtype if is_none else torch.float64",
        "loss_dtype = self.loss_dtype",
        ("tests/test_linear_dtypes.py::test_loss_dtype",),
    ),
    "chunks' sums in float32": Fault(
        LINEAR_OPS,
        "loss_dtype = self.loss_dtype if is_none else torch.float64",
        "loss_dtype = self.loss_dtype if is_none else torch.float32",
        ("tests/test_linear.py::test_against_float64",),
    ),
    "loss of no reduction in float64": Fault(
        LINEAR_OPS,
        "loss_dtype = self.loss_dtype if is_none else torch.float64",
        "loss_dtype = torch.float64",
        ("tests/test_linear_dtypes.py::test_loss_dtype",),
    ),
    "chunk_rows is not read": Fault(
        LINEAR_OPS, "most = inputs.chunk_rows or most_rows", "most = most_rows", CHUNKS
    ),
    "chunks of any number of bytes": Fault(
        LINEAR_OPS, "max(1, min(most, n_bytes // row_bytes))", "max(1, most)", CHUNKS
    ),
    "chunks of very unequal sizes": Fault(
        LINEAR_OPS, "    size = -(-n_rows // n_chunks)\n", "    size = most\n", CHUNKS
    ),
    "bytes of a row of features": Fault(
        LINEAR_OPS,
        "row_bytes = math.prod(inputs.classes) * inputs.logits_dtype.itemsize",
        "row_bytes = inputs.linear_weight.shape[-1] * inputs.logits_dtype.itemsize",
        CHUNKS,
    ),
    "16-bit gradients are summed in 16 bits": Fault(
        LINEAR_OPS,
        "sums = torch.float32 if self.hidden.element_size() == 2 else self.hidden.dtype",
        "sums = self.hidden.dtype",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "float64 gradients are summed in float32": Fault(
        LINEAR_OPS,
        "sums = torch.float32 if self.hidden.element_size() == 2 else self.hidden.dtype",
        "sums = torch.float32",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "sums of gradients are returned": Fault(
        LINEAR_OPS,
        "return tuple(gradient.to(self.hidden.dtype) for gradient in gradients)",
        "return gradients",
        ("tests/test_linear_autograd.py::test_unneeded_gradients_are_empty",),
    ),
    "every chunk's weight gradient is the first": Fault(
        LINEAR_OPS,
        "beta=0 if is_first else 1",
        "beta=0",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "every chunk's bias gradient is the first": Fault(
        LINEAR_OPS,
        "self.grad_bias = summed if is_first else self.grad_bias.add_(summed)",
        "self.grad_bias = summed",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "slabs of the inner dimension forget the first": Fault(
        PRODUCTS,
        "beta if slab.start == 0 else 1)",
        "beta)",
        ("tests/test_linear.py::test_16_bit_and_float32_products",),
    ),
    "class-by-class layout without a gradient of the weight": Fault(
        LINEAR_OPS,
        "        and inputs.needs[1]\n",
        "",
        ("tests/test_linear.py::test_when_logits_are_not_stored_class_by_class",),
    ),
    "class-by-class layout in spite of chunk_rows": Fault(
        LINEAR_OPS,
        "        and inputs.chunk_rows is None\n",
        "",
        ("tests/test_linear.py::test_when_logits_are_not_stored_class_by_class",),
    ),
    "class-by-class layout with several positions": Fault(
        LINEAR_OPS,
        "        and len(inputs.classes) == 1\n",
        "",
        ("tests/test_linear.py::test_when_logits_are_not_stored_class_by_class",),
    ),
    "class-by-class layout of many rows": Fault(
        LINEAR_OPS,
        "        and n_rows <= most\n",
        "",
        ("tests/test_linear.py::test_float32_with_more_rows_than_features_uses_chunks",),
    ),
    "the class-by-class layout is never used": Fault(
        LINEAR_OPS,
        "        and n_rows * n_classes * size > FEW_BYTES\n",
        "        and n_rows * n_classes * size < 0\n",
        ("tests/test_linear.py::test_logits_of_few_rows_use_the_gradients_memory",),
    ),
    "logits at the start of the gradient's memory": Fault(
        LINEAR_OPS,
        "grad_weight.view(-1)[n_classes * (n_features - n_first) :].view(n_classes, n_first)",
        "grad_weight.view(-1)[: n_classes * n_first].view(n_classes, n_first)",
        ("tests/test_linear.py::test_16_bit_and_float32_products",),
    ),
    "products are cast by autocast": Fault(
        LINEAR_OPS,
        "with below_autograd(), torch.autocast(inputs.hidden.device.type, enabled=False):",
        "with below_autograd():",
        ("tests/test_linear_autograd.py::test_autocast_casts_the_layer_and_nothing_else",),
    ),
    "the backward has no entropy": Fault(
        LINEAR_OPS,
        "_replace(statistics=upstream.entropy is not None)",
        "_replace(statistics=False)",
        ("tests/test_linear_autograd.py::test_finite_differences",),
    ),
    "token weights of the first chunk for all": Fault(
        LINEAR_OPS,
        "else self.token_weight[rows]",
        "else self.token_weight[: rows.stop - rows.start]",
        SHIFT,
    ),
    "statistics of other dtypes in compiled code": Fault(
        LINEAR_OPS,
        "for dtype in (acc, acc, torch.int64)]",
        "for dtype in (acc, acc, torch.int32)]",
        ("tests/test_linear_autograd.py::test_operators",),
    ),
    "a scalar loss in compiled code": Fault(
        LINEAR_OPS,
        'shape = inputs.row_shape if inputs.reduction == REDUCTIONS["none"] else []',
        "shape = []",
        ("tests/test_linear_autograd.py::test_compiles_to_one_graph",),
    ),
    "gradients that are not needed in compiled code": Fault(
        LINEAR_OPS,
        "inputs.hidden.new_empty(tensor.shape if needed else [0])",
        "inputs.hidden.new_empty([0] if tensor is None else tensor.shape)",
        ("tests/test_linear_autograd.py::test_unneeded_gradients_are_empty",),
    ),
    "32-bit products are slow": Fault(
        PRODUCTS,
        "matrix.is_cpu and matrix.element_size() == 2 and",
        "matrix.is_cpu and",
        ("tests/test_linear.py::test_detection_of_slow_products",),
    ),
    "products of other devices are slow": Fault(
        PRODUCTS,
        "matrix.is_cpu and matrix.element_size() == 2 and",
        "matrix.element_size() == 2 and",
        ("tests/test_linear.py::test_detection_of_slow_products",),
    ),
    "chunks of a GPU on a CPU": Fault(
        LINEAR_OPS,
        "CPU_ROWS, CPU_BYTES = 512, 128 << 20",
        "CPU_ROWS, CPU_BYTES = 4096, 128 << 20",
        ("tests/test_linear.py::test_documented_limits",),
    ),
    "chunks of 4 GiB": Fault(
        LINEAR_OPS,
        "GPU_ROWS, GPU_BYTES = 4096, 1 << 30",
        "GPU_ROWS, GPU_BYTES = 4096, 1 << 32",
        ("tests/test_linear.py::test_documented_limits",),
    ),
    "limits of the other device": Fault(
        LINEAR_OPS,
        "(CPU_ROWS, CPU_BYTES) if is_cpu else (GPU_ROWS, GPU_BYTES)",
        "(GPU_ROWS, GPU_BYTES) if is_cpu else (CPU_ROWS, CPU_BYTES)",
        CHUNKS,
    ),
    "the first chunk's gradient adds to what was in memory": Fault(
        LINEAR_OPS,
        "beta=0 if is_first else 1",
        "beta=1",
        (
            "tests/test_linear.py::test_16_bit_and_float32_products",
            "tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",
        ),
    ),
    "products without the bias": Fault(
        PRODUCTS,
        "        out.copy_(bias)\n        beta = 1\n",
        "        out.copy_(bias)\n",
        ("tests/test_linear.py::test_16_bit_and_float32_products",),
    ),
    "chunks have the upstream gradients of the first": Fault(
        LINEAR_OPS,
        "else x[rows] for x in upstream",
        "else x[: rows.stop - rows.start] for x in upstream",
        ("tests/test_linear_autograd.py::test_finite_differences",),
    ),
    "the sum of chunks is not cast": Fault(
        LINEAR_OPS,
        "torch.stack(losses).sum().to(inputs.loss_dtype)",
        "torch.stack(losses).sum()",
        ("tests/test_linear_dtypes.py::test_loss_dtype",),
    ),
    "chunks have the targets of the first": Fault(
        LINEAR_OPS,
        "self.target[rows], self.weight",
        "self.target[: len(logits)], self.weight",
        ("tests/test_linear.py::test_against_float64",),
    ),
    "a normalizer divides all chunks and each": Fault(
        LINEAR_OPS,
        "return _formulas.total_weight(inputs.problem(logits, slice(None), inputs.normalizer))",
        "return _formulas.total_weight(inputs.problem(logits, slice(None), None))",
        ("tests/test_linear.py::test_against_float64",),
    ),
    "an ignored index of a layer is the default": Fault(
        LINEAR_OPS, 'self.options.get("ignore_index",', 'self.options.get("",', NARROW
    ),
    "without gradients the logits are overwritten": Fault(
        LINEAR_OPS,
        "        if not any(inputs.needs):\n",
        "        if False:\n",
        ("tests/test_linear_autograd.py::test_no_grad_skips_the_gradient_products",),
    ),
    "the loss of all logits is in float64": Fault(
        LINEAR_OPS,
        "_replace(settings=problem.settings._replace(loss_dtype=self.loss_dtype))",
        "_replace()",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "all logits are divided by their own weights": Fault(
        LINEAR_OPS,
        "problem = self.problem(logits, slice(None), self.normalizer)",
        "problem = self.problem(logits, slice(None), None)",
        ("tests/test_linear_autograd.py::test_second_derivatives_of_several_positions",),
    ),
    "class-by-class layout of float32 logits of a 16-bit layer": Fault(
        LINEAR_OPS,
        "        and inputs.logits_dtype == inputs.hidden.dtype\n",
        "",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "memory of chunks in the layer's dtype": Fault(
        LINEAR_OPS,
        "linear_weight.shape[0], dtype=inputs.logits_dtype)",
        "linear_weight.shape[0])",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "bytes of a row of the layer's dtype": Fault(
        LINEAR_OPS,
        "inputs.logits_dtype.itemsize",
        "inputs.hidden.element_size()",
        ("tests/test_linear_dtypes.py::test_chunks_of_float32_logits_have_half_as_many_rows",),
    ),
    "one chunk's weight gradient in float32": Fault(
        LINEAR_OPS,
        "dtypes = (None, sums if n_chunks > 1 else None, sums)",
        "dtypes = (None, sums, sums)",
        ("tests/test_linear.py::test_one_chunk_needs_no_float32_gradient_sums",),
    ),
    "many chunks' weight gradient in 16 bits": Fault(
        LINEAR_OPS,
        "dtypes = (None, sums if n_chunks > 1 else None, sums)",
        "dtypes = (None, None, sums)",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "the bias's gradient in 16 bits": Fault(
        LINEAR_OPS,
        "dtypes = (None, sums if n_chunks > 1 else None, sums)",
        "dtypes = (None, sums if n_chunks > 1 else None, None)",
        ("tests/test_linear.py::test_sums_over_many_chunks_are_not_rounded",),
    ),
    "the rows' slabs are those of the first": Fault(
        PRODUCTS,
        "out[slab] = multiplied(one[slab], other, out[slab], beta)",
        "out[slab] = multiplied(one[slab], other, out[: slab.stop - slab.start], beta)",
        ("tests/test_linear.py::test_16_bit_and_float32_products",),
    ),
    "the columns' slabs add nothing": Fault(
        PRODUCTS,
        "out[:, slab] = multiplied(one, other[:, slab], out[:, slab], beta)",
        "out[:, slab] = multiplied(one, other[:, slab], out[:, slab], 0)",
        ("tests/test_linear.py::test_16_bit_and_float32_products",),
    ),
    "products of 16 bits are summed in 16 bits": Fault(
        PRODUCTS,
        "torch.addmm(out.float(), one.float(), other.float(), beta=beta)",
        "torch.addmm(out, one.to(out.dtype), other.to(out.dtype), beta=beta)",
        ("tests/test_linear.py::test_16_bit_and_float32_products",),
    ),
    "slabs of any length": Fault(
        PRODUCTS,
        "size = max(1, (GPU_SLAB_BYTES if is_cuda else SLAB_BYTES) // max(1, item_bytes))",
        "size = length",
        ("tests/test_linear.py::test_slabs_fill_their_byte_limit",),
    ),
    "no fake of a layer's backward": Fault(
        LINEAR_OPS,
        "_backward, _fake_backward)",
        "_backward, _fake_forward)",
        ("tests/test_linear_autograd.py::test_operators",),
    ),
    "no fake of a layer's forward": Fault(
        LINEAR_OPS,
        "_forward, _fake_forward)\n    of",
        "_forward, _fake_backward)\n    of",
        ("tests/test_linear_autograd.py::test_compiles_to_one_graph",),
    ),
    "indices of the first chunk for all": Fault(
        LINEAR_OPS,
        "else self.target_indices[rows]",
        "else self.target_indices[: rows.stop - rows.start]",
        ("tests/test_sparse_labels.py::test_linear",),
    ),
}

LINEAR_AUTOGRAD_FAULTS = {
    "the bias of all logits is lost": Fault(
        LINEAR_AUTOGRAD,
        "return F.linear(hidden, weight, bias)",
        "return F.linear(hidden, weight)",
        ("tests/test_linear_autograd.py::test_transforms_of_torch_func",),
    ),
    "float16 gradients without a loss scale": Fault(
        LINEAR_AUTOGRAD,
        " and layer.hidden.dtype != torch.float16\n",
        "\n",
        ("tests/test_linear_autograd.py::test_loss_scale",),
    ),
    "gradients of no reduction are made in the forward": Fault(
        LINEAR_AUTOGRAD,
        'is_fused = reduction != REDUCTIONS["none"] and layer',
        "is_fused = layer",
        ("tests/test_linear_autograd.py::test_batched_upstream_gradients",),
    ),
    "gradients are kept beside the loss": Fault(
        LINEAR_AUTOGRAD,
        "gradients, ctx.gradients = ctx.gradients, None",
        "gradients = ctx.gradients",
        ("tests/test_linear_autograd.py::test_gradients_are_freed_by_backward",),
    ),
    "zeros for missing upstream gradients": Fault(
        LINEAR_AUTOGRAD,
        "    ctx.set_materialize_grads(False)\n",
        "",
        ("tests/test_linear.py::test_logits_are_computed_once",),
    ),
    "gradients are not scaled": Fault(
        LINEAR_AUTOGRAD, "        _ops.multiply_(gradient, grad_loss)\n", "        pass\n", SHIFT
    ),
    "batches of upstream gradients in place": Fault(
        LINEAR_AUTOGRAD,
        "    if is_batched_by_autograd(grad_loss):\n",
        "    if False:\n",
        ("tests/test_linear_autograd.py::test_batched_upstream_gradients",),
    ),
    "a second derivative under autocast": Fault(
        LINEAR_AUTOGRAD,
        "    with _no_casts(inputs.hidden):  # also",
        "    with nullcontext():  # also",
        ("tests/test_linear_autograd.py::test_autocast_casts_the_layer_and_nothing_else",),
    ),
    "gradients of statistics are left out": Fault(
        LINEAR_AUTOGRAD,
        "        or any(grad is not None for grad in of_statistics)\n",
        "",
        STATISTICS,
    ),
    "gradients for a graph have none": Fault(
        LINEAR_AUTOGRAD,
        "        torch.is_grad_enabled()\n        or gradients is None\n",
        "        gradients is None\n",
        ("tests/test_linear_autograd.py::test_batched_upstream_gradients",),
    ),
    "lse and entropy of a graph are swapped": Fault(
        LINEAR_AUTOGRAD,
        "    return results.loss, results.lse, results.entropy, results.argmax\n",
        "    return results.loss, results.entropy, results.lse, results.argmax\n",
        ("tests/test_linear_autograd.py::test_expanded_upstream_gradients",),
    ),
    "a gradient that is not needed for a graph": Fault(
        LINEAR_AUTOGRAD,
        "    return [next(found) if needed else None for needed in needs]\n\n\ndef by_all",
        "    return [next(found, None) for needed in needs]\n\n\ndef by_all",
        ("tests/test_linear_autograd.py::test_second_derivatives_of_any_subset",),
    ),
    "the bias requires no gradient": Fault(
        LINEAR_AUTOGRAD,
        "    elif needs_graph(*layer):\n",
        "    elif needs_graph(*layer[:2]):\n",
        ("tests/test_linear.py::test_any_subset_of_gradients",),
    ),
    "all of the layer must require a gradient": Fault(
        LINEAR_AUTOGRAD,
        "    elif needs_graph(*layer):\n",
        "    elif all(map(needs_graph, layer)):\n",
        ("tests/test_linear.py::test_any_subset_of_gradients",),
    ),
    "compiled gradients are the saved inputs": Fault(
        LINEAR_AUTOGRAD,
        "_backward(ctx, upstream[:3], ctx.saved_tensors[_N_TENSORS:], _multiplied)",
        "_backward(ctx, upstream[:3], ctx.saved_tensors[:3], _multiplied)",
        ("tests/test_linear_autograd.py::test_graphs_of_dynamic_shapes",),
    ),
    "the same tensor as input and weight gets both gradients twice": Fault(
        LINEAR_AUTOGRAD,
        "tensor.view_as(tensor) for tensor in inputs[:3]",
        "tensor for tensor in inputs[:3]",
        ("tests/test_linear_autograd.py::test_same_tensor_as_input_and_weight",),
    ),
    "all logits are multiplied in the layer's dtype": Fault(
        LINEAR_AUTOGRAD,
        "None if tensor is None else tensor.to(torch.promote_types(dtype, tensor.dtype))",
        "None if tensor is None else tensor",
        ("tests/test_linear_dtypes.py::test_logits_in_float32_of_a_layer_in_16_bits",),
    ),
    "positions of all logits lie in one dimension": Fault(
        LINEAR_AUTOGRAD,
        "return logits.unflatten(-1, weight.shape[:-1])",
        "return logits",
        ("tests/test_linear_autograd.py::test_second_derivatives_of_several_positions",),
    ),
    "positions' bias of all logits is lost": Fault(
        LINEAR_AUTOGRAD,
        "logits = F.linear(hidden, weight.flatten(0, -2), flat_bias)",
        "logits = F.linear(hidden, weight.flatten(0, -2))",
        ("tests/test_linear_autograd.py::test_second_derivatives_of_several_positions",),
    ),
    "a gradient not made with the loss is none": Fault(
        LINEAR_AUTOGRAD,
        "        or any(needed and not made for needed, made in zip(needs, ctx.made, "
        "strict=True))\n",
        "",
        ("tests/test_linear_autograd.py::test_repeated_backward",),
    ),
    "the operator's lse has no gradient": Fault(
        LINEAR_AUTOGRAD,
        "n_differentiable = 3 if Inputs(*inputs).statistics else 1",
        "n_differentiable = 1",
        ("tests/test_linear_autograd.py::test_statistics_compile_to_one_graph",),
    ),
    "a layer's loss in a graph has no formula": Fault(
        LINEAR_AUTOGRAD,
        '    _ops.register_formula("linear_forward", _forward_formula)\n',
        "",
        ("tests/test_linear_autograd.py::test_gradients_of_linear_forward",),
    ),
    "a layer's backward has no formula": Fault(
        LINEAR_AUTOGRAD,
        '    _ops.register_formula("linear_backward", _backward_formula)\n',
        "",
        ("tests/test_linear_autograd.py::test_linear_backward_has_no_derivative",),
    ),
    "a layer's backward has a silent derivative": Fault(
        LINEAR_AUTOGRAD,
        "    if needs_graph(*upstream, *inputs[:_N_TENSORS]):\n",
        "    if False:\n",
        ("tests/test_linear_autograd.py::test_linear_backward_has_no_derivative",),
    ),
    "class weights in a graph have no gradient": Fault(
        LINEAR_AUTOGRAD,
        "    if needs_graph(*inputs[3:_N_TENSORS]):\n",
        "    if False:\n",
        ("tests/test_linear_autograd.py::test_gradients_of_linear_forward",),
    ),
    "a graph of all logits lacks gradients' places": Fault(
        LINEAR_AUTOGRAD,
        "return *results, *_linear.empty_results(inputs)[len(results) :]",
        "return results",
        ("tests/test_linear_autograd.py::test_gradients_of_linear_forward",),
    ),
    "traces have no operator of a layer": Fault(
        LINEAR_AUTOGRAD,
        "    if is_traced():\n",
        "    if False:\n",
        (
            "tests/test_linear_autograd.py::test_compiles_to_one_graph",
            "tests/test_export.py::test_jit_trace",
        ),
    ),
    "results of no elements have a gradient": Fault(
        LINEAR_AUTOGRAD,
        "n_differentiable = 3 if Inputs(*inputs).statistics else 1",
        "n_differentiable = 3",
        ("tests/test_linear_autograd.py::test_non_differentiable_results_of_the_layer",),
    ),
    "a layer's Function starts at the outermost level": Fault(
        LINEAR_AUTOGRAD,
        "return apply_at_this_level(LinearCrossEntropy, *inputs)",
        "return LinearCrossEntropy.apply(*inputs)",
        ("tests/test_linear_autograd.py::test_linear_operator_under_torch_func_grad",),
    ),
    "class indices beside sparse ones take the fast path": Fault(
        AUTOGRAD,
        "        weight is token_weight is normalizer is target_indices is None\n",
        "        weight is token_weight is normalizer is None\n",
        ("tests/test_sparse_labels.py::test_class_indices_beside_target_indices",),
    ),
    "correct is the place of the greatest sparse label": Fault(
        AUTOGRAD,
        "        target = _formulas.top_label(problem, problem.logits.shape[settings.dim])\n",
        "        target = target.argmax(settings.dim)\n",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
    "a fused gradient is scaled by sparse labels": Fault(
        GRAD_IN_FORWARD,
        "target = problem.target if problem.target_indices is None else None",
        "target = problem.target",
        ("tests/test_sparse_labels.py::test_options",),
    ),
    "formulas of operators have no sparse labels": Fault(
        AUTOGRAD,
        "loss_dtype, target_indices, *_ = (*arguments[7:], None, None)",
        "loss_dtype, target_indices, *_ = (*arguments[7:8], None, None)",
        ("tests/test_sparse_labels.py::test_opcheck",),
    ),
    "formulas of the backward have no sparse labels": Fault(
        AUTOGRAD,
        "*of_problem, None, *arguments[12:], **options)",
        "*of_problem, **options)",
        ("tests/test_sparse_labels.py::test_meta_and_decompositions",),
    ),
}

AUTOGRAD_FAULTS = {
    "z-loss of an ignored row of NaN weight": Fault(
        AUTOGRAD,
        "z_loss * token_weight.masked_fill(argmax < 0, 0)",
        "z_loss * token_weight",
        TOKENS,
    ),
    "z-loss without its token weight": Fault(
        AUTOGRAD, "z_loss = z_loss * token_weight.masked_fill(argmax < 0, 0)", "pass", TOKENS
    ),
    "z-loss of the lse, not squared": Fault(
        AUTOGRAD,
        'settings.of_operators.get("lse_square_scale", 0.0) * lse.square()',
        'settings.of_operators.get("lse_square_scale", 0.0) * lse',
        TOKENS,
    ),
    "ignored rows are correct where ignore_index is -1": Fault(
        AUTOGRAD,
        "correct = (argmax == target) & (argmax >= 0)",
        "correct = argmax == target",
        TOKENS,
    ),
    "no range of targets by torch operations": Fault(
        AUTOGRAD,
        "    check_range(problem)\n",
        "",
        ("tests/test_fallback.py::test_target_out_of_range",),
    ),
    "loss by torch operations in their dtype": Fault(
        AUTOGRAD,
        "loss = results.loss.to(problem.settings.loss_dtype or problem.logits.dtype)",
        "loss = results.loss",
        TOKENS,
    ),
    "all scales must require a gradient": Fault(
        AUTOGRAD,
        "    if any(needs[1:]) or (needs",
        "    if all(needs[1:]) or (needs",
        ("tests/test_autograd.py::test_gradient_to_a_weight",),
    ),
    "focal loss of probabilities that require a gradient": Fault(
        AUTOGRAD,
        (
            '    if any(needs[1:]) or (needs[0] and "focal_gamma" in '
            "problem.settings.of_operators):\n"
        ),
        "    if any(needs[1:]):\n",
        ("tests/test_autograd_features.py::test_all_options",),
    ),
    "no classes reach the kernels": Fault(
        AUTOGRAD,
        " or logits.size(settings.dim) == 0",
        "",
        ("tests/test_functional.py::test_probabilities_of_no_classes",),
    ),
    "offset of the overwritten logits is lost": Fault(
        GRAD_IN_FORWARD,
        "logits.stride(), logits.storage_offset())",
        "logits.stride(), 0)",
        ("tests/test_layouts.py::test_nothing_is_written_outside_the_logits",),
    ),
    "strides of the overwritten logits are lost": Fault(
        GRAD_IN_FORWARD,
        "view = (logits.size(), logits.stride(),",
        "view = (logits.size(), logits.contiguous().stride(),",
        ("tests/test_layouts.py::test_strides_of_overwritten_logits",),
    ),
    "compiled fused mode overwrites nothing": Fault(
        AUTOGRAD,
        "is_inplace = settings.inplace_backward or settings.grad_in_forward",
        "is_inplace = settings.inplace_backward",
        ("tests/test_compile.py::test_logits_of_the_graph_are_overwritten",),
    ),
    "logits without a gradient are overwritten": Fault(
        AUTOGRAD,
        "    elif settings.grad_in_forward and needs_graph(problem.logits):\n",
        "    elif settings.grad_in_forward and torch.is_grad_enabled():\n",
        ("tests/test_overwriting.py::test_logits_without_a_gradient_are_not_overwritten",),
    ),
    "logits are overwritten without grad mode": Fault(
        AUTOGRAD,
        "    elif settings.grad_in_forward and needs_graph(problem.logits):\n",
        "    elif settings.grad_in_forward and problem.logits.requires_grad:\n",
        ("tests/test_overwriting.py::test_without_grad_nothing_is_overwritten",),
    ),
    "lse and entropy are swapped": Fault(
        AUTOGRAD,
        "return CrossEntropyStatistics(loss, lse, z_loss, entropy, argmax, correct)",
        "return CrossEntropyStatistics(loss, entropy, z_loss, lse, argmax, correct)",
        TOKENS,
    ),
    "gradients without grad mode": Fault(
        AUTOGRAD,
        "return torch.is_grad_enabled() and any(x is not",
        "return any(x is not",
        ("tests/test_linear_autograd.py::test_no_grad_skips_the_gradient_products",),
    ),
    "probabilities alone want no graph": Fault(
        AUTOGRAD,
        "    elif needs_graph(*tensors):\n",
        "    elif needs_graph(tensors[0]):\n",
        ("tests/test_autograd.py::test_only_the_gradients_that_are_needed",),
    ),
    "a graph of overwritten logits": Fault(
        AUTOGRAD,
        "    if problem.settings.inplace_backward:\n        raise",
        "    if False:\n        raise",
        ("tests/test_overwriting.py::test_gradient_of_gradient_is_refused",),
    ),
    "inplace backward without memory": Fault(
        AUTOGRAD,
        "    logits = overwritable(problem.logits) if is_inplace else None\n",
        "    logits = None\n",
        ("tests/test_overwriting.py::test_gradient_equals_default_mode_and_overwrites_logits",),
    ),
    "a gradient for a graph that has none": Fault(
        AUTOGRAD,
        "        return _gradients_with_graph(problem, saved, upstream, needs)\n",
        "        pass\n",
        ("tests/test_autograd.py::test_second_derivative_of_other_dtypes",),
    ),
    "a batch of gradients for a graph that has none": Fault(
        AUTOGRAD,
        "    if any(needs[1:]) or any(map(is_batched_by_autograd, (problem.target, *upstream))):\n",
        "    if any(needs[1:]):\n",
        ("tests/test_autograd_features.py::test_batched_gradients_with_create_graph",),
    ),
    "every gradient with create_graph uses torch operations": Fault(
        AUTOGRAD,
        "    if any(needs[1:]) or any(map(is_batched_by_autograd, (problem.target, *upstream))):\n",
        "    if True:\n",
        ("tests/test_autograd_features.py::test_create_graph_gives_the_same_gradient",),
    ),
    "gradients that are not needed": Fault(
        AUTOGRAD,
        "    if needs[0] and upstream.loss is not None:\n",
        "    if problem.target.is_floating_point() and upstream.loss is not None:\n",
        ("tests/test_autograd.py::test_allocates_only_the_gradient",),
    ),
    "no vmap of a gradient's gradient": Fault(
        AUTOGRAD, "    generate_vmap_rule = True\n", "    generate_vmap_rule = False\n", TRANSFORMS
    ),
    "no second derivative of probabilities": Fault(
        AUTOGRAD,
        "needs = (*ctx.needs_input_grad[:N_TENSORS], *ctx",
        "needs = (True, *NO_OTHERS, *ctx",
        (
            "tests/test_ops.py::test_derivatives_of_backward",
            "tests/test_autograd_features.py::test_all_options",
        ),
    ),
    "second derivative of the gradient's upstream": Fault(
        AUTOGRAD,
        "needs = (*ctx.needs_input_grad[:N_TENSORS], *ctx.needs_input_grad[N_TENSORS + 3 :])",
        "needs = (*ctx.needs_input_grad[:N_TENSORS], False, False, False)",
        ("tests/test_autograd_features.py::test_all_options",),
    ),
    "the overwritten memory is not marked": Fault(
        GRAD_IN_FORWARD,
        "        ctx.mark_dirty(memory)\n",
        "",
        ("tests/test_overwriting_shared.py::test_logits_used_after_the_loss",),
    ),
    "gradients of statistics in fused mode are lost": Fault(
        GRAD_IN_FORWARD,
        "        if any(grad is not None for grad in grads):\n            raise",
        "        if False:\n            raise",
        ("tests/test_overwriting.py::test_gradient_of_statistics_in_fused_mode",),
    ),
    "another use of overwritten logits is lost": Fault(
        GRAD_IN_FORWARD,
        "        if grad_memory is not None:",
        "        if False:",
        ("tests/test_overwriting_shared.py::test_logits_used_after_the_loss",),
    ),
    "a graph in fused mode": Fault(
        GRAD_IN_FORWARD,
        '        if torch.is_grad_enabled():\n            raise RuntimeError("grad_in_forward',
        '        if False:\n            raise RuntimeError("grad_in_forward',
        ("tests/test_overwriting.py::test_gradient_of_gradient_is_refused",),
    ),
    "changes of the gradient in the logits' memory are not detected": Fault(
        GRAD_IN_FORWARD,
        "ctx.save_for_backward(memory, target, problem.token_weight)",
        "ctx.save_for_backward(memory.data, target, problem.token_weight)",
        ("tests/test_overwriting.py::test_logits_changed_between_forward_and_backward",),
    ),
    "rows of weight 0 are scaled": Fault(
        GRAD_IN_FORWARD,
        "rows = (target, token_weight, ctx.settings.dim, ctx.settings.ignore_index)",
        "rows = (target, None, ctx.settings.dim, ctx.settings.ignore_index)",
        ("tests/test_overwriting.py::test_each_row_has_its_own_upstream_gradient",),
    ),
    "ignored rows are scaled": Fault(
        GRAD_IN_FORWARD,
        "rows = (target, token_weight, ctx.settings.dim, ctx.settings.ignore_index)",
        "rows = (target, token_weight, ctx.settings.dim, -1)",
        ("tests/test_overwriting.py::test_each_row_has_its_own_upstream_gradient",),
    ),
    "the gradient in fused mode is that of a loss": Fault(
        GRAD_IN_FORWARD,
        "                _ops.scale_gradient_(logits, grad_loss, *rows)\n",
        "                _ops.scale_gradient_(logits * 1, grad_loss, *rows)\n",
        ("tests/test_overwriting.py::test_scalar_upstream_is_applied_once",),
    ),
    "argmax of probabilities over another dimension": Fault(
        AUTOGRAD,
        "target = target.argmax(settings.dim) if target.shape[settings.dim] else argmax",
        "target = target.argmax(1) if target.shape[settings.dim] else argmax",
        TOKENS,
    ),
    "zeros for missing upstream gradients in fused mode": Fault(
        GRAD_IN_FORWARD,
        "        ctx.set_materialize_grads(False)\n        ctx.mark_dirty(memory)\n",
        "        ctx.mark_dirty(memory)\n",
        TOKENS,
    ),
    "the second derivative forgets the normalizer": Fault(
        AUTOGRAD,
        "    of_mean = problem._replace(normalizer=saved.total_weight)\n",
        "    of_mean = problem._replace(normalizer=None)\n",
        ("tests/test_autograd.py::test_second_derivative_under_a_normalizer",),
    ),
    "a gradient in the logits' memory has their graph": Fault(
        AUTOGRAD,
        "    return logits.detach()\n",
        "    return logits\n",
        ("tests/test_overwriting.py::test_gradients_have_no_graph",),
    ),
    "the saved state is in another order": Fault(
        AUTOGRAD,
        "Saved(total_weight, state, entropy)\n        return *",
        "Saved(total_weight, state.flip(0), entropy)\n        return *",
        ("tests/test_options.py::test_any_combination_of_many_options",),
    ),
    "the formulas' loss lacks its statistics": Fault(
        AUTOGRAD,
        "    return complete(problem, loss, *statistics) if",
        "    return complete(problem, loss, *statistics[::-1]) if",
        TOKENS,
    ),
    "the loss has no formula": Fault(
        AUTOGRAD,
        '    _ops.register_formula("loss", _loss_formula)\n',
        "",
        ("tests/test_ops.py::test_derivatives_of_forward",),
    ),
    "the forward has no formula": Fault(
        AUTOGRAD,
        '    _ops.register_formula("forward", _forward_formula)\n',
        "",
        ("tests/test_ops.py::test_derivatives_of_forward",),
    ),
    "the statistics have no formula": Fault(
        AUTOGRAD,
        '    _ops.register_formula("forward_with_statistics", with_statistics)\n',
        "",
        ("tests/test_ops.py::test_derivatives_of_forward",),
    ),
    "the backward has no formula": Fault(
        AUTOGRAD,
        '    _ops.register_formula("backward", _backward_formula)\n',
        "",
        ("tests/test_ops.py::test_derivatives_of_backward",),
    ),
    "the statistics' formula is that without": Fault(
        AUTOGRAD,
        "with_statistics = partial(_forward_formula, statistics=True)",
        "with_statistics = _forward_formula",
        DECOMPOSED,
    ),
    "saved numbers have a gradient": Fault(
        AUTOGRAD,
        "        ctx.mark_non_differentiable(*output[1:3], *output[5:])\n",
        "",
        ("tests/test_ops.py::test_non_differentiable_results",),
    ),
    "lse and entropy of operators have no gradient": Fault(
        AUTOGRAD,
        "ctx.mark_non_differentiable(*output[1:3], *output[5:])",
        "ctx.mark_non_differentiable(*output[1:])",
        ("tests/test_ops.py::test_non_differentiable_results",),
    ),
    "gradients of lse and entropy of operators are swapped": Fault(
        AUTOGRAD,
        "*(grads[2:4] or (None, None))",
        "*(grads[3:1:-1] or (None, None))",
        ("tests/test_ops.py::test_derivatives_of_forward", *TOKENS),
    ),
    "an ignored index of operators is the default": Fault(
        AUTOGRAD,
        '        options.get("ignore_index",',
        '        options.get("",',
        (
            "tests/test_ops.py::test_gradients_of_forward_equal_the_reference",
            *DECOMPOSED,
        ),
    ),
    "operators forget that they overwrite": Fault(
        AUTOGRAD,
        "        inplace_backward,\n        False,\n        options,\n",
        "        False,\n        False,\n        options,\n",
        ("tests/test_ops.py::test_gradient_of_forward_in_the_logits_memory",),
    ),
    "a loss of operators is of the logits' dtype": Fault(
        AUTOGRAD,
        "        reduction,\n        loss_dtype,\n",
        "        reduction,\n        None,\n",
        ("tests/test_ops.py::test_differentiable_losses_have_the_requested_dtype",),
    ),
    "the backward's gradient of a mean is that of a sum": Fault(
        AUTOGRAD,
        "            return _ops.backward(problem, saved, upstream)\n\n    @static",
        (
            "            return _ops.backward(problem._replace(settings=problem.settings._replace("
            "reduction=2)), saved, upstream)\n\n    @static"
        ),
        (
            "tests/test_ops.py::test_derivatives_of_backward",
            "tests/test_autograd_features.py::test_create_graph_gives_the_same_gradient",
        ),
    ),
    "derivatives of the backward forget its upstream": Fault(
        AUTOGRAD,
        "None, None, None, *grads[N_TENSORS:]\n",
        "None, None, None, None, None, None\n",
        ("tests/test_ops.py::test_derivatives_of_backward",),
    ),
    "no gradient at all is an error": Fault(
        AUTOGRAD,
        "    if all(grad is None for grad in upstream):\n",
        "    if False:\n",
        ("tests/test_autograd.py::test_undefined_upstream_gradient",),
    ),
    "probabilities' gradient is of overwritten logits": Fault(
        AUTOGRAD,
        (
            "    of_others = _other_gradients(problem, saved, upstream, others)\n"
            "    # Last: it may overwrite the logits.\n"
            "    return _logits_gradient(problem, saved, upstream) if needs_logits "
            "else None, *of_others\n"
        ),
        (
            "    grad_logits = _logits_gradient(problem, saved, upstream) if "
            "needs_logits else None\n"
            "    return grad_logits, *_other_gradients(problem, saved, upstream, "
            "others)\n"
        ),
        ("tests/test_overwriting.py::test_gradient_of_probabilities_inplace",),
    ),
    "the gradient of probabilities without one of the loss": Fault(
        AUTOGRAD,
        "    if needs[0] and upstream.loss is not None:\n",
        "    if needs[0]:\n",
        ("tests/test_autograd.py::test_gradient_of_a_statistic_alone_beside_probabilities",),
    ),
    "batches overwrite the logits": Fault(
        AUTOGRAD,
        "    if is_inplace and any(map(is_batched_by_autograd, (problem.target, *upstream))):\n",
        "    if False:\n",
        ("tests/test_errors.py::test_overwriting_modes_refuse_batched_gradients",),
    ),
    "batches overwrite the logits in fused mode": Fault(
        GRAD_IN_FORWARD,
        "        if is_batched_by_autograd(grad_loss):\n",
        "        if False:\n",
        ("tests/test_errors.py::test_overwriting_modes_refuse_batched_gradients",),
    ),
    "a gradient in fused mode without one of the loss": Fault(
        GRAD_IN_FORWARD,
        "        if grad_loss is not None:\n",
        "        if True:\n",
        ("tests/test_autograd.py::test_undefined_upstream_gradient",),
    ),
    "class weights take the fast path": Fault(
        AUTOGRAD,
        "        weight is token_weight is normalizer is target_indices is None\n",
        "        token_weight is normalizer is target_indices is None\n",
        ("tests/test_functional.py::test_torchs_samples",),
    ),
    "token weights take the fast path": Fault(
        AUTOGRAD,
        "        weight is token_weight is normalizer is target_indices is None\n",
        "        weight is normalizer is target_indices is None\n",
        ("tests/test_token_weight.py::test_token_weights_of_the_loss_alone",),
    ),
    "a normalizer takes the fast path": Fault(
        AUTOGRAD,
        "        weight is token_weight is normalizer is target_indices is None\n",
        "        weight is token_weight is target_indices is None\n",
        ("tests/test_options.py::test_normalizer",),
    ),
    "targets of fewer bits take the fast path": Fault(
        AUTOGRAD,
        "        and target.dtype is torch.int64\n",
        "",
        (
            "tests/test_functional.py::test_ignore_index_beyond_the_targets_type",
            "tests/test_autograd.py::test_gradcheck",
            *TOKENS,
        ),
    ),
    "any mode takes the fast path": Fault(AUTOGRAD, "        and is_eager()\n", "", TRANSFORMS),
    "any tensors take the fast path": Fault(
        AUTOGRAD,
        "        and are_ordinary(input, target)\n",
        "",
        (
            "tests/test_errors.py::test_overwriting_modes_refuse_negated_views",
            "tests/test_functional.py::test_meta_tensors_have_shapes_and_dtypes",
        ),
    ),
    "the fast path without kernels": Fault(
        AUTOGRAD,
        "        and _ops.has_kernels(input)\n",
        "",
        ("tests/test_fallback.py::test_package_without_a_working_library",),
    ),
    "the fast path under autocast": Fault(
        AUTOGRAD,
        "        and not is_autocast(input)\n",
        "",
        ("tests/test_functional.py::test_autocast_of_logits_and_class_indices_alone",),
    ),
    "no call takes the fast path": Fault(
        AUTOGRAD,
        "        and is_eager()\n",
        "        and False\n",
        ("tests/test_autograd.py::test_small_calls_take_the_fast_path",),
    ),
    "the fast path records nothing": Fault(
        AUTOGRAD,
        "    if torch.is_grad_enabled() and logits.requires_grad:\n",
        "    if False:\n",
        ("tests/test_autograd.py::test_second_backward_under_retain_graph",),
    ),
    "a graph of the fast path has none": Fault(
        AUTOGRAD,
        "        if not torch.is_grad_enabled() and is_eager() and are_ordinary(grad_loss, "
        "logits):\n",
        "        if is_eager() and are_ordinary(grad_loss, logits):\n",
        (
            "tests/test_autograd_features.py::test_third_derivative",
            "tests/test_autograd.py::test_gradcheck",
        ),
    ),
    "any upstream gradient takes the fast path": Fault(
        AUTOGRAD,
        "        if not torch.is_grad_enabled() and is_eager() and are_ordinary(grad_loss, "
        "logits):\n",
        "        if not torch.is_grad_enabled() and is_eager():\n",
        (
            "tests/test_autograd_features.py::test_batched_gradients_with_create_graph",
            "tests/test_autograd_features.py::test_every_mode_of_gradcheck",
        ),
    ),
    "the fast path saves another order": Fault(
        AUTOGRAD,
        "ctx.save_for_backward(logits, target, total_weight, state)",
        "ctx.save_for_backward(logits, target, state, total_weight)",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
}

FORMULAS_FAULTS = {
    "weights of narrow targets": Fault(
        FORMULAS,
        "        target = target.to(torch.int64)  # a narrower",
        "        # a narrower",
        NARROW,
    ),
    "rows of weight 0 have a part in the mean": Fault(
        FORMULAS,
        "left_out = (target == ignore_index) | (weights == 0)",
        "left_out = target == ignore_index",
        ("tests/test_linear.py::test_dropped_row_is_not_in_the_mean",),
    ),
    "ignored rows have a part in the mean": Fault(
        FORMULAS,
        "left_out = (target == ignore_index) | (weights == 0)",
        "left_out = weights == 0",
        NARROW,
    ),
    "mean without token weights": Fault(
        FORMULAS,
        "weights = token_weight.double()",
        "weights = torch.ones_like(token_weight).double()",
        SHIFT,
    ),
    "mean without class weights": Fault(
        FORMULAS,
        "            weights = weights * weight[target.clamp(0, weight.shape[0] - 1)]\n",
        "            pass\n",
        NARROW,
    ),
    "an ignored index is looked up": Fault(
        FORMULAS, "weight[target.clamp(0, weight.shape[0] - 1)]", "weight[target]", NARROW
    ),
    "normalizer has no effect": Fault(
        FORMULAS,
        "    if normalizer is not None:\n        return normalizer\n",
        "",
        ("tests/test_linear.py::test_against_float64",),
    ),
    "gradient of probabilities of weight 0 at NaN": Fault(
        FORMULAS,
        "        gradient = gradient.masked_fill((token_weight == 0).unsqueeze(dim), 0)\n",
        "        pass\n",
        TOKENS,
    ),
    "gradient of probabilities without token weights": Fault(
        FORMULAS, "        scale = scale * token_weight\n", "        pass\n", TOKENS
    ),
    "gradient of probabilities without the mean": Fault(
        FORMULAS,
        "scale = reference.divided(scale, saved.total_weight)",
        "pass",
        TOKENS,
    ),
    "gradient of probabilities without smoothing": Fault(
        FORMULAS,
        "scale = grad_loss.to(row_max.dtype) * (1 - smoothing)",
        "scale = grad_loss.to(row_max.dtype)",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
    "gradient of probabilities without class weights": Fault(
        FORMULAS,
        "minus_log_prob, q = minus_log_prob * weight, q * weight",
        "pass",
        ("tests/test_autograd.py::test_gradcheck",),
    ),
    "gradient of probabilities at minus infinity": Fault(
        FORMULAS,
        "minus_log_prob = minus_log_prob.masked_fill((q == 0) & seen.isneginf(), 0)",
        "pass",
        ("tests/test_functional.py::test_gradient_of_probabilities_at_logits_of_minus_infinity",),
    ),
    "gradient of probabilities of logits without a cap": Fault(
        FORMULAS,
        'logits.to(row_max.dtype), options.get("softcap"), options',
        "logits.to(row_max.dtype), None, options",
        ("tests/test_autograd_features.py::test_all_options",),
    ),
    "torch operations in the dtype of the logits": Fault(
        FORMULAS,
        "    acc = accumulation_dtype(problem.logits.dtype)\n    logits",
        "    acc = problem.logits.dtype\n    logits",
        TOKENS,
    ),
    "focal loss is lost by torch operations": Fault(
        FORMULAS,
        "        **settings.of_operators,\n",
        '        **{k: v for k, v in settings.of_operators.items() if k != "focal_gamma"},\n',
        ("tests/test_autograd_features.py::test_all_options",),
    ),
    "dimension of the classes is torch's by torch operations": Fault(
        FORMULAS, "        dim=settings.dim,\n", "", TOKENS
    ),
    "a mean by 0 makes infinite gradients of probabilities": Fault(
        FORMULAS,
        "reference.divided(scale, saved.total_weight)",
        "scale / saved.total_weight",
        ("tests/test_token_weight.py::test_gradients_of_a_mean_by_weights_that_cancel",),
    ),
    "reduction of torch operations is torch's": Fault(
        FORMULAS, "        reduction=REDUCTION_NAMES[settings.reduction],\n", "", TOKENS
    ),
    "normalizer is lost by torch operations": Fault(
        FORMULAS,
        "        normalizer=normalizer,\n",
        "",
        ("tests/test_autograd_features.py::test_gradients_of_weights_and_normalizer",),
    ),
    "token weights are lost by torch operations": Fault(
        FORMULAS, "        token_weight=token_weight,\n", "", TOKENS
    ),
    "lse and entropy are swapped by torch operations": Fault(
        FORMULAS,
        "(results.loss, results.lse, results.entropy)\n        pairs",
        "(results.loss, results.entropy, results.lse)\n        pairs",
        ("tests/test_autograd_features.py::test_all_options",),
    ),
    "gradients go to the next tensor that needs one": Fault(
        FORMULAS,
        "    return [next(found) if needed else None for needed in needs]\n",
        "    return [*found, *[None] * (len(needs) - sum(needs))]\n",
        ("tests/test_autograd_features.py::test_gradients_of_weights_and_normalizer",),
    ),
    "tensors that need no gradient are lost": Fault(
        FORMULAS,
        "*(next(given) if needed else x for",
        "*(next(given) if needed else None for",
        ("tests/test_autograd_features.py::test_gradients_of_weights_and_normalizer",),
    ),
    "gradient of probabilities of logits without a scale": Fault(
        FORMULAS,
        'options.get("softcap"), options.get("logit_scale", 1.0)',
        'options.get("softcap"), 1.0',
        ("tests/test_autograd_features.py::test_all_options",),
    ),
    "sums of weights in the dtype of the logits": Fault(
        FORMULAS,
        "weights = token_weight.double()",
        "weights = token_weight",
        (
            "tests/test_linear_dtypes.py::test_loss_dtype",
            "tests/test_linear.py::test_against_float64",
        ),
    ),
    "padding has a gradient": Fault(
        FORMULAS,
        "        gradient = gradient.masked_fill(sparse.is_padding, 0)\n",
        "",
        ("tests/test_sparse_labels.py::test_gradient_of_probabilities",),
    ),
    "the gradient of sparse labels has the weight of class 0": Fault(
        FORMULAS,
        "weight[sparse.classes]",
        "weight[sparse.classes * 0]",
        ("tests/test_sparse_labels.py::test_gradient_of_probabilities",),
    ),
    "padding has the greatest label": Fault(
        FORMULAS,
        "masked_fill(~is_class | is_padding, n_classes)",
        "masked_fill(~is_class, n_classes)",
        ("tests/test_sparse_labels.py::test_correct_where_a_class_is_padding",),
    ),
    "labels of all classes add up": Fault(
        FORMULAS, ".masked_fill(~is_same, 0)", "", ("tests/test_sparse_labels.py::test_correct",)
    ),
    "four labels of a class do not add up": Fault(
        FORMULAS,
        "while step < index.shape[-1]:",
        "while step < min(2, index.shape[-1]):",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
    "a part of a class's labels is the greatest": Fault(
        FORMULAS,
        "is_last = torch.cat([differs, is_new], -1) & is_class",
        "is_last = is_class",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
    "negative labels are above 0": Fault(
        FORMULAS,
        "((top < 0) | ((top == 0) & (other < label)))",
        "((top == 0) & (other < label))",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
    "labels of 0 come after all other classes": Fault(
        FORMULAS,
        "((top == 0) & (other < label))",
        "(top == 0)",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
    "all classes have a label": Fault(
        FORMULAS,
        "is_other = (other < n_classes) & ",
        "is_other = ",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
    "repeated classes count twice in the search for one without a label": Fault(
        FORMULAS,
        "is_first = torch.cat([is_new, differs], -1) & is_class",
        "is_first = is_class",
        ("tests/test_sparse_labels.py::test_correct",),
    ),
}

DECOMPOSITIONS_FAULTS = {
    "no decomposition of the loss": Fault(
        DECOMPOSITIONS,
        "        operators.loss.default: _loss,\n",
        "",
        ("tests/test_export.py::test_decompositions_cover_all_but_overwriting_operators",),
    ),
    "no decomposition of the forward": Fault(
        DECOMPOSITIONS, "        operators.forward.default: _forward,\n", "", DECOMPOSED_PROGRAMS
    ),
    "no decomposition of the statistics": Fault(
        DECOMPOSITIONS,
        "        operators.forward_with_statistics.default: partial(_forward, statistics=True),\n",
        "",
        DECOMPOSED_PROGRAMS,
    ),
    "no decomposition of the backward": Fault(
        DECOMPOSITIONS, "        operators.backward.default: _backward,\n", "", DECOMPOSED
    ),
    "no decomposition of a layer": Fault(
        DECOMPOSITIONS,
        "        operators.linear_forward.default: _linear_forward,\n",
        "",
        DECOMPOSED_PROGRAMS,
    ),
    "no decomposition of a layer's backward": Fault(
        DECOMPOSITIONS,
        "        operators.linear_backward.default: _linear_backward,\n",
        "",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed loss in the dtype of its sums": Fault(
        DECOMPOSITIONS,
        "loss = results.loss.to(settings.loss_dtype or logits.dtype)",
        "loss = results.loss",
        ("tests/test_export.py::test_decompositions_have_the_dtypes_of_the_operators",),
    ),
    "a decomposed state has the numbers of class indices": Fault(
        DECOMPOSITIONS,
        "size = state_size(target, target_indices, options)",
        "size = 2",
        DECOMPOSED,
    ),
    "a decomposed state in the dtype of the logits": Fault(
        DECOMPOSITIONS,
        "torch.nan, dtype=acc)",
        "torch.nan)",
        ("tests/test_export.py::test_decompositions_have_the_dtypes_of_the_operators",),
    ),
    "decomposed lse and entropy are swapped": Fault(
        DECOMPOSITIONS,
        "of_statistics = (results.lse, results.entropy, results.argmax)",
        "of_statistics = (results.entropy, results.lse, results.argmax)",
        DECOMPOSED,
    ),
    "a decomposed total weight is 1": Fault(
        DECOMPOSITIONS,
        "_formulas.total_weight(problem), state",
        "torch.ones_like(_formulas.total_weight(problem)), state",
        DECOMPOSED,
    ),
    "a decomposed mean is a sum": Fault(
        DECOMPOSITIONS,
        '        if settings.reduction == REDUCTIONS["mean"]:',
        "        if False:",
        DECOMPOSED,
    ),
    "a decomposed mean by 0 is infinite": Fault(
        DECOMPOSITIONS,
        "g = reference.divided(g, saved.total_weight)",
        "g = g / saved.total_weight",
        ("tests/test_export.py::test_decompositions_of_a_mean_by_0",),
    ),
    "decomposed gradients without token weights": Fault(
        DECOMPOSITIONS, "            g = g * rows(token_weight)\n", "            pass\n", DECOMPOSED
    ),
    "decomposed gradients of a cross-entropy": Fault(
        DECOMPOSITIONS,
        "gradient = g * slope * difference",
        "gradient = g * difference",
        DECOMPOSED,
    ),
    "decomposed gradients without the mass": Fault(
        DECOMPOSITIONS,
        "mass * p - q)",
        "p - q)",
        DECOMPOSED,
    ),
    "decomposed gradients without the labels": Fault(
        DECOMPOSITIONS,
        "mass * p - q)",
        "mass * p)",
        DECOMPOSED,
    ),
    "decomposed gradients of confident rows are rounded": Fault(
        DECOMPOSITIONS,
        "mass * log_p.expm1() + (mass - q)",
        "mass * p - q",
        ("tests/test_export.py::test_decompositions_of_confident_rows",),
    ),
    "decomposed gradients of confident rows are the target's": Fault(
        DECOMPOSITIONS,
        "mass * log_p.expm1() + (mass - q)",
        "mass * log_p.expm1()",
        DECOMPOSED,
    ),
    "decomposed gradients by rounded log-probabilities": Fault(
        DECOMPOSITIONS,
        "log_p = reference.log_softmax(z, dim)",
        "log_p = z.log_softmax(dim)",
        ("tests/test_export.py::test_decompositions_of_confident_rows",),
    ),
    "decomposed focal loss of a masked target": Fault(
        FORMULAS,
        ".masked_fill(zero, 0).masked_fill(infinite, 1)",
        ".masked_fill(zero, 0)",
        ("tests/test_export.py::test_decomposed_focal_loss_of_a_masked_target",),
    ),
    "decomposed gradients of half the z-loss": Fault(
        DECOMPOSITIONS,
        'gradient + 2 * options.get("lse_square_scale", 0.0) * g * lse * p',
        'gradient + options.get("lse_square_scale", 0.0) * g * lse * p',
        DECOMPOSED,
    ),
    "decomposed gradients of the lse are lost": Fault(
        DECOMPOSITIONS,
        "        gradient = gradient + rows(grad_lse) * p\n",
        "        pass\n",
        DECOMPOSED,
    ),
    "decomposed gradients of the entropy rise": Fault(
        DECOMPOSITIONS,
        "gradient - rows(grad_entropy) * p * (finite_log_p + entropy)",
        "gradient + rows(grad_entropy) * p * (finite_log_p + entropy)",
        DECOMPOSED,
    ),
    "decomposed gradients of the entropy without it": Fault(
        DECOMPOSITIONS, "* p * (finite_log_p + entropy)", "* p * finite_log_p", DECOMPOSED
    ),
    "decomposed gradients without the scale": Fault(
        DECOMPOSITIONS,
        '    gradient = gradient * options.get("logit_scale", 1.0)\n',
        "",
        DECOMPOSED,
    ),
    "decomposed gradients without the cap": Fault(
        DECOMPOSITIONS,
        "        gradient = gradient * (1 - (z / softcap).square())\n",
        "        pass\n",
        DECOMPOSED,
    ),
    "decomposed gradients of rows left out": Fault(
        DECOMPOSITIONS,
        "    return gradient.masked_fill(~kept, 0).to(logits.dtype)\n",
        "    return gradient.to(logits.dtype)\n",
        DECOMPOSED,
    ),
    "decomposed gradients in the dtype of sums": Fault(
        DECOMPOSITIONS,
        "gradient.masked_fill(~kept, 0).to(logits.dtype)",
        "gradient.masked_fill(~kept, 0)",
        ("tests/test_export.py::test_decompositions_have_the_dtypes_of_the_operators",),
    ),
    "decomposed gradients at minus infinity": Fault(
        DECOMPOSITIONS,
        "finite_log_p = log_p.masked_fill(log_p.isneginf(), 0)",
        "finite_log_p = log_p",
        ("tests/test_export.py::test_decompositions_at_logits_of_minus_infinity",),
    ),
    "decomposed labels without class weights": Fault(
        DECOMPOSITIONS,
        "w = x.new_ones(n_classes) if weight is None else weight.to(x.dtype)",
        "w = x.new_ones(n_classes)",
        DECOMPOSED,
    ),
    "decomposed class weights along the last dimension": Fault(
        DECOMPOSITIONS,
        "    w = w.reshape([-1] + [1] * (x.dim() - dim - 1))\n    kept",
        "    w = w.reshape([-1])\n    kept",
        DECOMPOSED,
    ),
    "decomposed rows of weight 0 count": Fault(
        DECOMPOSITIONS,
        "        kept = token_weight != 0\n",
        "        pass\n",
        ("tests/test_export.py::test_decompositions_skip_dropped_rows",),
    ),
    "decomposed ignored rows count": Fault(
        DECOMPOSITIONS,
        "(kept & (index != settings.ignore_index)).unsqueeze(dim)",
        "kept.unsqueeze(dim)",
        DECOMPOSED,
    ),
    "decomposed ignored index of fewer bits": Fault(
        DECOMPOSITIONS,
        "    index = target.to(torch.int64)\n",
        "    index = target\n",
        ("tests/test_export.py::test_decompositions_with_narrow_targets",),
    ),
    "decomposed probabilities without smoothing": Fault(
        DECOMPOSITIONS,
        "w * ((1 - smoothing) * target.to(x.dtype) + smoothing / n_classes)",
        "w * target.to(x.dtype)",
        DECOMPOSED,
    ),
    "a decomposed target that is no class has a gradient": Fault(
        DECOMPOSITIONS,
        "scatter(dim, index, 1).masked_fill(~is_class, torch.nan)",
        "scatter(dim, index, 1)",
        ("tests/test_export.py::test_decomposed_gradient_of_targets_out_of_range_is_nan",),
    ),
    "decomposed infinite weights of other classes": Fault(
        DECOMPOSITIONS,
        "torch.where(one_hot == 0, 0, w * one_hot)",
        "w * one_hot",
        ("tests/test_export.py::test_decompositions_with_an_infinite_weight",),
    ),
    "decomposed labels without smoothing": Fault(
        DECOMPOSITIONS, "        q = q + smoothing / n_classes * w\n", "        pass\n", DECOMPOSED
    ),
    "decomposed labels are smoothed twice": Fault(
        DECOMPOSITIONS, "q = (1 - smoothing) * torch.where(", "q = torch.where(", DECOMPOSED
    ),
    "decomposed focal loss without the rise": Fault(
        FORMULAS, "one_minus_p**gamma * (1 + rise)", "one_minus_p**gamma", DECOMPOSED
    ),
    "decomposed focal loss without the mass": Fault(
        FORMULAS,
        "cross_entropy.masked_fill(at_limit, 1) / mass.masked_fill(at_limit, 1)",
        "cross_entropy.masked_fill(at_limit, 1)",
        DECOMPOSED,
    ),
    "a decomposed layer has no gradients": Fault(
        DECOMPOSITIONS,
        "    return *found, *_linear.empty_results(inputs)[len(found) : 4], *gradients\n",
        "    return *found, *_linear.empty_results(inputs)[len(found) :]\n",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "decomposed gradients of a layer that are not needed": Fault(
        DECOMPOSITIONS,
        "(grad_logits @ flat).to(hidden.dtype) if needs_hidden else none",
        "(grad_logits @ flat).to(hidden.dtype)",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed layer's gradients in the logits' dtype": Fault(
        DECOMPOSITIONS,
        "(grad_logits @ flat).to(hidden.dtype) if",
        "(grad_logits @ flat) if",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed bias has the shape of all classes": Fault(
        DECOMPOSITIONS,
        "grad_logits.sum(0).view_as(bias).to(bias.dtype)",
        "grad_logits.sum(0).to(bias.dtype)",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed backward of a layer without the entropy": Fault(
        DECOMPOSITIONS,
        "_ops.saved_of(results), upstream",
        "_ops.saved_of(results[:3]), upstream",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed layer's upstream gradients are swapped": Fault(
        DECOMPOSITIONS,
        "_linear_gradients(inputs, problem, _ops.forward(problem), upstream)",
        "_linear_gradients(inputs, problem, _ops.forward(problem), upstream[::-1])",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed layer's logits in its own dtype": Fault(
        DECOMPOSITIONS,
        "    problem = inputs.problem_of_all(Layer(*inputs[:3]).logits(inputs.logits_dtype))\n"
        "    loss,",
        "    problem = inputs.problem_of_all(Layer(*inputs[:3]).logits(inputs.hidden.dtype))\n"
        "    loss,",
        ("tests/test_export.py::test_linear_decompositions_equal_the_operators",),
    ),
    "a decomposed backward of padding at -100": Fault(
        DECOMPOSITIONS,
        "target.to(x.dtype), target_indices, n_classes, dim, settings.ignore_index",
        "target.to(x.dtype), target_indices, n_classes, dim, -100",
        ("tests/test_sparse_labels.py::test_meta_and_decompositions",),
    ),
}

PRIVATE_FAULTS = {
    "compiled code does not see that it is under forward-mode differentiation": Fault(
        PRIVATE,
        "        return is_dual\n",
        "        return False\n",
        ("tests/test_forward_mode.py::test_of_a_compiled_function",),
    ),
    "parts of logits are overwritten in a graph": Fault(
        PRIVATE,
        "        return None\n    return FunctionalTensor",
        "        return tensor\n    return FunctionalTensor",
        ("tests/test_compile.py::test_parts_of_logits_of_dynamic_shapes",),
    ),
    "operators overwrite leaves": Fault(
        AUTOGRAD,
        "        check_overwritable(problem)\n",
        "",
        ("tests/test_export.py::test_traced_programs_do_not_overwrite_leaves",),
    ),
    "the base of a view is read under a compiler": Fault(
        OVERWRITING,
        "memory = input if is_compiling else",
        "memory = input if False else",
        ("tests/test_compile.py::test_inputs_of_the_graph_that_are_views",),
    ),
    "the gradient of an option is lost": Fault(
        OPTIONS,
        "if value.requires_grad and torch.is_grad_enabled():",
        "if False:",
        ("tests/test_errors.py::test_options_that_require_a_gradient_are_refused",),
    ),
    "logits that a graph returns are overwritten in it": Fault(
        PRIVATE,
        "return FunctionalTensor.to_functional(tensor.from_functional())",
        "return tensor",
        ("tests/test_compile.py::test_returned_logits_keep_their_values",),
    ),
    "inputs of a graph are overwritten": Fault(
        PRIVATE,
        "        return None\n    return FunctionalTensor",
        "        return tensor\n    return FunctionalTensor",
        ("tests/test_compile.py::test_inputs_of_the_graph_have_other_uses_in_it",),
    ),
    "a tensor used after its transform counts as one inside it": Fault(
        AUTOGRAD,
        "CrossEntropy, *unwrap_dead_wrappers(problem)",
        "CrossEntropy, *problem",
        ("tests/test_autograd.py::test_tensors_used_after_their_transform",),
    ),
    "values of targets are looked at under vmap": Fault(
        PRIVATE,
        "    return not is_under_vmap_or_jvp() and get_proxy_mode() is None\n",
        "    return get_proxy_mode() is None\n",
        TOKENS,
    ),
    "vmap reaches the kernels": Fault(
        PRIVATE, "in (kinds.Vmap, kinds.Jvp)", "in (kinds.Jvp,)", TRANSFORMS
    ),
    "all levels must be vmap or jvp": Fault(
        PRIVATE,
        "return is_dual or any(layer.key() in",
        "return is_dual or all(layer.key() in",
        TRANSFORMS,
    ),
    "dual numbers reach the kernels": Fault(
        PRIVATE,
        "    is_dual = forward_ad._current_level >= 0\n",
        "    is_dual = forward_ad._current_level > 0\n",
        ("tests/test_autograd_features.py::test_dual_numbers",),
    ),
    "values of meta tensors are looked at": Fault(
        PRIVATE,
        "tensor.is_meta or isinstance(tensor, FakeTensor)",
        "isinstance(tensor, FakeTensor)",
        ("tests/test_linear_autograd.py::test_meta_tensors",),
    ),
    "values of fake tensors are looked at": Fault(
        PRIVATE,
        "tensor.is_meta or isinstance(tensor, FakeTensor)",
        "tensor.is_meta",
        ("tests/test_linear_autograd.py::test_fake_tensors_outside_fake_mode",),
    ),
    "the view is marked dirty, not its owner": Fault(
        PRIVATE,
        "return tensor if tensor._base is None else tensor._base",
        "return tensor",
        ("tests/test_overwriting_shared.py::test_logits_used_after_the_loss",),
    ),
    "16-bit products by the other dtype's processor": Fault(
        PRIVATE,
        'name = "bf16" if dtype == torch.bfloat16 else "fp16"',
        'name = "fp16" if dtype == torch.bfloat16 else "bf16"',
        ("tests/test_linear.py::test_detection_of_slow_products",),
    ),
    "batched gradients are not detected": Fault(
        PRIVATE,
        "return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)",
        "return False",
        ("tests/test_autograd_features.py::test_batched_gradients_with_create_graph",),
    ),
    "values of traced tensors are looked at": Fault(
        PRIVATE,
        "    return not is_under_vmap_or_jvp() and get_proxy_mode() is None\n",
        "    return not is_under_vmap_or_jvp()\n",
        ("tests/test_export.py::test_drop_ignored_does_not_bake_rows_into_a_trace",),
    ),
    "transforms of torch.func are not detected": Fault(
        PRIVATE,
        "    return _innermost_transform() is not None\n",
        "    return False\n",
        ("tests/test_errors.py::test_overwriting_modes_refuse_torch_func",),
    ),
    "outputs of unbind are treated like other views": Fault(
        PRIVATE,
        "return tensor._is_view() and torch._C._autograd._get_creation_meta(tensor) == several",
        "return False",
        ("tests/test_overwriting_shared.py::test_one_of_several_views",),
    ),
    "only tensors with one address count as sharing memory": Fault(
        PRIVATE,
        "one.untyped_storage()._cdata == other.untyped_storage()._cdata",
        "one.data_ptr() == other.data_ptr()",
        ("tests/test_overwriting_shared.py::test_target_in_the_storage_of_the_logits",),
    ),
    "16-bit products are fast on every processor": Fault(
        PRIVATE,
        "    return is_supported is not None and is_supported()\n",
        "    return True\n",
        ("tests/test_linear.py::test_detection_of_slow_products",),
    ),
    "operators that overwrite raise the version twice": Fault(
        PRIVATE,
        "        below = keyset & torch._C._after_ADInplaceOrView_keyset\n",
        "        below = keyset\n",
        ("tests/test_ops.py::test_version_of_the_overwritten_tensor",),
    ),
    "a fast-path call of what a mode sees": Fault(
        PRIVATE, "        and _n_dispatch_modes() == 0\n", "", TRACED
    ),
    "a fast-path call in a trace of torch.jit": Fault(
        PRIVATE,
        "        and is_jit_tracing() is None\n",
        "",
        ("tests/test_export.py::test_jit_trace",),
    ),
    "a fast-path call of dual numbers": Fault(
        PRIVATE,
        "        and forward_ad._current_level < 0\n",
        "",
        ("tests/test_autograd_features.py::test_dual_numbers",),
    ),
    "every tensor is ordinary": Fault(
        PRIVATE,
        "    return keys in _ORDINARY and _dispatch_keys(other).raw_repr() == keys\n",
        "    return True\n",
        (
            "tests/test_errors.py::test_overwriting_modes_refuse_negated_views",
            "tests/test_functional.py::test_meta_tensors_have_shapes_and_dtypes",
        ),
    ),
    "no tensor is ordinary": Fault(
        PRIVATE,
        "    return keys in _ORDINARY and _dispatch_keys(other).raw_repr() == keys\n",
        "    return False\n",
        ("tests/test_autograd.py::test_small_calls_take_the_fast_path",),
    ),
    "one of two tensors is ordinary": Fault(
        PRIVATE,
        "    return keys in _ORDINARY and _dispatch_keys(other).raw_repr() == keys\n",
        "    return keys in _ORDINARY\n",
        (
            *REFUSED,
            *LINEAR_ERRORS,
            "tests/test_autograd_features.py::test_every_mode_of_gradcheck",
        ),
    ),
    "a Function at a level of torch.func is refused": Fault(
        PRIVATE,
        "    with enable_single_level_autograd_function():\n",
        "    if True:\n",
        ("tests/test_ops.py::test_forward_under_torch_func",),
    ),
    "a Function at a level of torch.func starts at the outermost": Fault(
        PRIVATE,
        "function():\n        return super(torch.autograd.Function, function).apply(*inputs)",
        "function():\n        return function.apply(*inputs)",
        (
            "tests/test_ops.py::test_backward_under_torch_func",
            "tests/test_ops.py::test_forward_under_torch_func",
        ),
    ),
    "a fast-path call of what a transform sees": Fault(
        PRIVATE,
        "        and _innermost_transform() is None\n",
        "",
        ("tests/test_torch_private.py::test_is_eager",),
    ),
    "the dispatch keys of the first tensor are ignored": Fault(
        PRIVATE,
        "    return keys in _ORDINARY and _dispatch_keys(other).raw_repr() == keys\n",
        "    return _dispatch_keys(other).raw_repr() in _ORDINARY\n",
        ("tests/test_torch_private.py::test_ordinary_tensors",),
    ),
}

OPS_FAULTS = {
    "tangents of operators are lost": Fault(
        OPS,
        "if not has_tangent(arguments):",
        "if True:",
        ("tests/test_forward_mode.py::test_of_an_operator",),
    ),
    "samples of vmap along the first dimension": Fault(
        OPS,
        "argument.select(dim, i) if isinstance(dim, int)",
        "argument.select(0, i) if isinstance(dim, int)",
        BATCHES,
    ),
    "the first sample of vmap for all": Fault(
        OPS,
        "argument.select(dim, i) if isinstance(dim, int)",
        "argument.select(dim, 0) if isinstance(dim, int)",
        BATCHES,
    ),
    "no vmap of the backward": Fault(
        OPS,
        'torch.library.register_vmap("fused_xent::backward", _in_turn(_ops.backward.default))',
        "pass",
        BATCHES,
    ),
    "argmax of meta tensors is a number": Fault(
        META, '"argmax": (rows, torch.int64)', '"argmax": (rows, acc)', OPERATORS
    ),
    "masses of class indices, of meta tensors": Fault(
        META, "return 2 + has_mass + ", "return 3 + ", OPERATORS
    ),
    "slopes without a focal loss, of meta tensors": Fault(
        META,
        'options.get("focal_gamma", 0) != 0',
        'options.get("lse_square_scale", 0) != 0',
        ("tests/test_ops.py::test_meta_implementations_agree_by_each_option_alone",),
    ),
    "total weight of meta tensors in the rows' dtype": Fault(
        META,
        '"total_weight": ([], torch.float64)',
        '"total_weight": ([], acc)',
        OPERATORS,
    ),
    "gradient of meta tensors is contiguous": Fault(
        META,
        "not is_inner:\n        return torch.empty_like(logits)\n",
        "not is_inner:\n        return logits.new_empty(logits.shape)\n",
        OPERATORS,
    ),
    "gradient of fake CUDA tensors begins at an aligned address": Fault(
        META,
        "offset = logits.storage_offset() % vector",
        "offset = 0",
        ("tests/test_cuda.py::test_fake_gradients_are_laid_out_like_real_ones",),
    ),
    "loss of meta tensors in float32": Fault(
        META,
        '(loss_shape, given.get("loss_dtype"))',
        "(loss_shape, torch.float32)",
        ("tests/test_functional.py::test_meta_tensors_have_shapes_and_dtypes",),
    ),
    "no fake of the fused mode": Fault(
        META,
        "memory[0] if len(memory) == 1 else tuple(memory)",
        "tuple(memory)",
        OPERATORS,
    ),
    "versions of what is overwritten stay": Fault(
        OPS, "        increment_version(overwritten)  # after", "        pass  # after", USED_BEFORE
    ),
    "versions of refused arguments are raised": Fault(
        OPS,
        "        results = redispatch_below_inplace(",
        "        increment_version(overwritten)\n        results = redispatch_below_inplace(",
        ("tests/test_errors.py::test_target_out_of_range",),
    ),
    "kernels without a library": Fault(
        OPS,
        "return LOAD_ERROR is None and (tensor.is_cpu or tensor.is_meta)",
        "return tensor.is_cpu or tensor.is_meta",
        ("tests/test_fallback.py::test_package_without_a_working_library",),
    ),
    "CUDA kernels without a library": Fault(
        OPS,
        "return CUDA_LOAD_ERROR is None",
        "return True",
        ("tests/test_fallback.py::test_broken_cuda_library",),
    ),
    "a broken library is an error": Fault(
        OPS,
        "            except OSError as error:\n",
        "            except KeyError as error:\n",
        ("tests/test_fallback.py::test_package_without_a_working_library",),
    ),
    "an instruction set without a library": Fault(
        OPS,
        "return _ops.cpu_capability() if LOAD_ERROR is None else None",
        "return _ops.cpu_capability()",
        ("tests/test_fallback.py::test_package_without_a_working_library",),
    ),
    "a cache without a library": Fault(
        OPS,
        "return _ops.empty_cache() if LOAD_ERROR is None else 0",
        "return _ops.empty_cache()",
        ("tests/test_fallback.py::test_package_without_a_working_library",),
    ),
    "versions of fused mode's memory stay": Fault(
        OPS,
        "    for _name in OVERWRITING:\n",
        '    for _name in ("backward_", "scale_gradient_", "multiply_"):\n',
        ("tests/test_ops.py::test_version_of_the_overwritten_tensor",),
    ),
    "versions of a scaled gradient stay": Fault(
        OPS,
        "    for _name in OVERWRITING:\n",
        "    for _name in OVERWRITING[:3]:\n",
        ("tests/test_ops.py::test_version_of_the_overwritten_tensor",),
    ),
    "no fake of the backward in place": Fault(
        META,
        ("        if not results:\n            return None\n"),
        ("        if not results:\n            return arguments[0]\n"),
        ("tests/test_ops.py::test_overwriting_operators_accept_meta_tensors",),
    ),
    "rows of meta tensors without the first dimension": Fault(
        META,
        "row_shape(logits, dim)\n        loss_shape",
        "row_shape(logits, 1 + dim)\n        loss_shape",
        OPERATORS,
    ),
    "the CUDA library is loaded without the schemas": Fault(
        OPS,
        "    if LOAD_ERROR is not None:  # the schemas",
        "    if False:  # the schemas",
        ("tests/test_fallback.py::test_cuda_needs_the_library_with_the_schemas",),
    ),
    "meta tensors have no kernels": Fault(
        OPS,
        "return LOAD_ERROR is None and (tensor.is_cpu or tensor.is_meta)",
        "return LOAD_ERROR is None and tensor.is_cpu",
        ("tests/test_functional.py::test_normalizer_goes_to_the_logits_device",),
    ),
    "the state of meta tensors in float32": Fault(
        META,
        '"state": ([state_size(*labels, options), *rows], acc)',
        '"state": ([state_size(*labels, options), *rows], torch.float32)',
        (
            *OPERATORS,
            "tests/test_ops.py::test_meta_implementations_agree_in_dtypes",
        ),
    ),
    "what overwrites has a silent derivative": Fault(
        OPS,
        "        if recorded and torch.is_grad_enabled():\n",
        "        if False:\n",
        ("tests/test_ops.py::test_overwriting_operators_have_no_derivative",),
    ),
    "what overwrites is refused without grad mode": Fault(
        OPS,
        "        if recorded and torch.is_grad_enabled():\n",
        "        if recorded:\n",
        ("tests/test_ops.py::test_overwriting_operators_without_gradients",),
    ),
    "what overwrites has no formula": Fault(
        OPS,
        "        register_formula(_name, _refusal(_name))\n",
        "",
        ("tests/test_ops.py::test_overwriting_operators_have_no_derivative",),
    ),
    "class weights beside what overwrites have a silent derivative": Fault(
        OPS,
        "recorded = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]",
        "recorded = [x for x in arguments[:1] if x.requires_grad]",
        ("tests/test_ops.py::test_overwriting_operators_have_no_derivative",),
    ),
    "a normalizer goes where token weights do": Fault(
        OPS,
        "        token_weight,\n        normalizer,\n        settings.dim,\n",
        "        normalizer,\n        token_weight,\n        settings.dim,\n",
        ("tests/test_options.py::test_normalizer",),
    ),
    "the backward divides by the normalizer": Fault(
        OPS,
        "        weight,\n        token_weight,\n        total_weight,\n",
        "        weight,\n        token_weight,\n        problem.normalizer,\n",
        (
            "tests/test_autograd.py::test_gradcheck",
            "tests/test_options.py::test_normalizer",
            "tests/test_functional.py::test_torchs_samples",
        ),
    ),
    "the backward never overwrites": Fault(
        OPS,
        "    _call_backward(_backward_, problem",
        "    _call_backward(_backward, problem",
        ("tests/test_overwriting.py::test_gradient_equals_default_mode_and_overwrites_logits",),
    ),
    "the backward has no options": Fault(
        OPS,
        "*upstream,\n        *(() if target_indices is None else (target_indices,)),\n"
        "        **settings.of_operators,\n",
        "*upstream,\n        *(() if target_indices is None else (target_indices,)),\n",
        (
            "tests/test_autograd.py::test_gradcheck",
            "tests/test_options.py::test_any_combination_of_many_options",
        ),
    ),
    "statistics are returned unasked": Fault(
        OPS,
        "_call(_of_loss[problem.settings.statistics], problem, **inplace)",
        "_call(_of_loss[1], problem, **inplace)",
        (
            "tests/test_autograd.py::test_saves_only_inputs_and_a_few_numbers_per_row",
            *TOKENS,
        ),
    ),
    "the fused mode has no statistics": Fault(
        OPS,
        "_call(_fused[problem.settings.statistics], problem)",
        "_call(_fused[0], problem)",
        TOKENS,
    ),
    "the loss is in the logits' dtype": Fault(
        OPS,
        "        settings.loss_dtype,\n",
        "        None,\n",
        ("tests/test_functional.py::test_loss_dtype_beside_probabilities_and_under_autocast",),
    ),
    "the fast path's loss is in the logits' dtype": Fault(
        OPS,
        "dim, reduction, loss_dtype, **options)",
        "dim, reduction, None, **options)",
        ("tests/test_functional.py::test_loss_dtype",),
    ),
    "the fast path has no options": Fault(
        OPS,
        "dim, reduction, loss_dtype, **options)",
        "dim, reduction, loss_dtype)",
        ("tests/test_functional.py::test_torchs_samples",),
    ),
    "the forward has no options": Fault(
        OPS,
        ("        **inplace,\n        **settings.of_operators,\n"),
        "        **inplace,\n",
        (
            *FORMULA,
            "tests/test_options.py::test_any_combination_of_many_options",
            "tests/test_functional.py::test_torchs_samples",
        ),
    ),
    "the fast path's backward has no options": Fault(
        OPS,
        "None,\n        *(() if target_indices is None else (target_indices,)),\n"
        "        **settings.of_operators,\n",
        "None,\n        *(() if target_indices is None else (target_indices,)),\n",
        (
            "tests/test_functional.py::test_torchs_samples",
            "tests/test_autograd.py::test_gradcheck",
        ),
    ),
    "masses of sparse labels, of meta tensors": Fault(
        META,
        "has_mass = target.is_floating_point() and target_indices is None",
        "has_mass = target.is_floating_point()",
        ("tests/test_sparse_labels.py::test_meta_and_decompositions",),
    ),
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
        "        target = target.to(torch.int64)  # a narrower",
        "        # a narrower",
        ("tests/test_functional.py::test_ignore_index_beyond_the_targets_type",),
    ),
    "NaN weights of ignored rows by torch operations": Fault(
        REFERENCE, "    token_weight = token_weight.masked_fill(~kept, 0)\n", "", TOKENS
    ),
    "NaN logits of ignored rows by torch operations": Fault(
        REFERENCE, "logits = input.masked_fill(~kept.unsqueeze(dim), 0)", "logits = input", TOKENS
    ),
    "NaN probabilities of rows of weight 0": Fault(
        REFERENCE,
        "        target = target.masked_fill(~kept.unsqueeze(dim), 0)\n",
        "",
        ("tests/test_token_weight.py::test_gradients_of_weights_beside_dropped_rows",),
    ),
    "scale after the cap": Fault(
        REFERENCE,
        "softcap * (logits / softcap).tanh()",
        "softcap * (input / softcap).tanh() * logit_scale",
        ("tests/test_options.py::test_softcap_of_scaled_logits",),
    ),
    "focal loss at probability 1": Fault(
        REFERENCE,
        "minus_log_p = cross_entropy.masked_fill(at_limit, 1) / mass.masked_fill(at_limit, 1)",
        "minus_log_p = cross_entropy / mass",
        ("tests/test_options.py::test_focal_loss_of_certain_rows",),
    ),
    "focal loss without the mass": Fault(
        REFERENCE,
        "/ mass.masked_fill(at_limit, 1)",
        "",
        ("tests/test_options.py::test_any_combination_of_many_options",),
    ),
    "torch operations round the log-probability of a confident row": Fault(
        REFERENCE,
        "torch.where(is_close, exact, log_prob.gather(dim, top))",
        "log_prob.gather(dim, top)",
        (
            "tests/test_reference.py::test_digits_of_confident_rows",
            "tests/test_accuracy.py::test_other_derivatives_as_p_approaches_1",
        ),
    ),
    "the rest of an improbable class has a logarithm": Fault(
        REFERENCE,
        "rest.masked_fill(~is_close, 0)",
        "rest",
        ("tests/test_reference.py::test_equals_torch",),
    ),
    "smoothing of 1 times an infinite loss": Fault(
        REFERENCE,
        "row_loss, mass = -weighted_sum(q, log_prob.gather(dim, index), dim), q.squeeze(dim)",
        "row_loss, mass = -(q * log_prob.gather(dim, index)).sum(dim), q.squeeze(dim)",
        ("tests/test_reference.py::test_smoothing_of_1_where_the_target_is_masked",),
    ),
    "focal loss of a masked target has a slope of NaN": Fault(
        REFERENCE,
        "at_limit = zero | infinite",
        "at_limit = zero",
        ("tests/test_reference.py::test_focal_loss_of_a_masked_target",),
    ),
    "0 times minus infinity": Fault(
        REFERENCE,
        "(q * log_prob.masked_fill((q == 0) & log_prob.isneginf(), 0)).sum(dim)",
        "(q * log_prob).sum(dim)",
        ("tests/test_reference.py::test_probability_or_weight_0_of_a_masked_class_adds_0",),
    ),
    "a target out of range has a loss": Fault(
        REFERENCE,
        "    row_loss = row_loss * torch.where(is_class | ~kept, 1.0, torch.nan)\n",
        "",
        ("tests/test_reference.py::test_target_out_of_range_is_nan",),
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
    "argmax of dropped rows by torch operations": Fault(
        REFERENCE, "argmax.masked_fill(~kept, -1), ", "argmax, ", TOKENS
    ),
    "dropped rows are correct by torch operations": Fault(
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
        "smooth_loss = -weighted_sum(class_weight, log_prob, dim)",
        "smooth_loss = -weighted_sum(torch.ones_like(log_prob), log_prob, dim)",
        ("tests/test_reference.py::test_equals_torch",),
    ),
    "entropy of probabilities that are 0": Fault(
        REFERENCE,
        "-weighted_sum(log_prob.exp(), log_prob, dim)",
        "-(log_prob.exp() * log_prob).sum(dim)",
        ("tests/test_reference.py::test_entropy_of_masked_classes",),
    ),
    "classes of a vector are its second dimension": Fault(
        REFERENCE,
        "return 0 if input.dim() == 1 else 1",
        "return 1",
        ("tests/test_reference.py::test_equals_torch",),
    ),
    "a z-loss of scale 0 is added": Fault(
        REFERENCE,
        "    if lse_square_scale != 0:\n        row_loss = row_loss + z_loss\n",
        "    row_loss = row_loss + z_loss\n",
        ("tests/test_reference.py::test_no_z_loss_of_an_infinite_square",),
    ),
    "an index that is no class is class 0": Fault(
        REFERENCE,
        ".masked_fill(is_wrong, torch.nan)",
        ".masked_fill(is_wrong, 1)",
        ("tests/test_sparse_labels.py::test_vmap_over_the_indices",),
    ),
    "labels of padding count": Fault(
        REFERENCE,
        "    target = target.masked_fill(is_padding, 0)\n",
        "",
        ("tests/test_sparse_labels.py::test_transforms_of_torch_func",),
    ),
    "the gradient of padding is NaN": Fault(
        REFERENCE,
        "is_wrong = ~is_class & ~is_padding",
        "is_wrong = ~is_class",
        ("tests/test_sparse_labels.py::test_first_and_second_derivatives",),
    ),
    "indices of rows left out are read": Fault(
        REFERENCE,
        ".masked_fill(~kept.unsqueeze(dim), ignore_index)",
        "",
        ("tests/test_sparse_labels.py::test_gradient_of_probabilities_of_rows_left_out",),
    ),
}

NN_FAULTS = {
    "modes are dropped before the kernels": Fault(
        NN,
        "        check_names(type(self).__name__, options, self.DEFAULTS)\n        for name",
        '        options = {k: v for k, v in options.items() if k != "grad_in_forward"}\n'
        "        for name",
        ("tests/test_nn.py::test_copies_keep_all_options",),
    ),
    "the module drops a batch's tensors": Fault(
        NN,
        "            weight=self.weight,\n"
        "            token_weight=token_weight,\n"
        "            normalizer=normalizer,\n"
        "            target_indices=target_indices,\n"
        "            **self._options(),\n"
        "        )\n"
        "\n"
        "\n"
        "class Linear",
        "            weight=self.weight,\n"
        "            **self._options(),\n"
        "        )\n"
        "\n"
        "\n"
        "class Linear",
        MODULES,
    ),
    "arguments of torch's module are swapped": Fault(
        NN,
        "super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)",
        "super().__init__(weight, reduce, ignore_index, size_average, reduction, label_smoothing)",
        ("tests/test_nn.py::test_positional_arguments_match_torch",),
    ),
    "a linear module without its class weights": Fault(
        NN, "        super().__init__(weight)\n", "        super().__init__()\n", MODULES
    ),
    "a linear module of one position": Fault(
        NN,
        "n_outputs = math.prod(self.out_features, start=n_own)",
        "n_outputs = n_own",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module on the default device": Fault(
        NN,
        "in_features, n_outputs, bias, device=device, dtype=dtype",
        "in_features, n_outputs, bias, dtype=dtype",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module of the default dtype": Fault(
        NN,
        "in_features, n_outputs, bias, device=device, dtype=dtype",
        "in_features, n_outputs, bias, device=device",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module always with a bias": Fault(
        NN,
        "in_features, n_outputs, bias, device=device, dtype=dtype",
        "in_features, n_outputs, device=device, dtype=dtype",
        ("tests/test_nn.py::test_parameters_of_the_linear_module",),
    ),
    "a linear module that forgets its bias": Fault(
        NN,
        "            linear_bias=linear_bias,\n",
        "",
        ("tests/test_linear_autograd.py::test_module",),
    ),
    "positions before classes": Fault(
        NN,
        "shape = (-1 if is_split else self.num_classes, *self.out_features)",
        "shape = (*self.out_features, self.num_classes)",
        ("tests/test_linear_autograd.py::test_module",),
    ),
    "repr shows defaults": Fault(
        NN,
        "            if not _is_default(value, self.DEFAULTS[name])\n",
        "",
        ("tests/test_nn.py::test_repr_shows_options",),
    ),
    "old modules have no later option": Fault(
        NN,
        "return {name: getattr(self, name, value) for name, value in self.DEFAULTS.items()}",
        "return {name: getattr(self, name) for name in self.DEFAULTS}",
        ("tests/test_nn.py::test_old_modules_without_newer_options",),
    ),
    "modules forget their options": Fault(
        NN,
        "setattr(self, name, options.get(name, default))",
        "setattr(self, name, default)",
        MODULES,
    ),
    "modules take any name": Fault(
        NN,
        "        check_names(type(self).__name__, options, self.DEFAULTS)\n",
        "",
        ("tests/test_nn.py::test_unknown_options",),
    ),
    "modules pass defaults on": Fault(
        NN,
        "        return {name: getattr(self, name, value) for name, value in "
        "self.DEFAULTS.items()}\n",
        "        return dict(self.DEFAULTS)\n",
        MODULES,
    ),
    "a module keeps a batch's tensors": Fault(
        NN, "and name not in (*OF_A_BATCH, *DEPRECATED,", "and name not in (*DEPRECATED,", MODULES
    ),
    "the reduction of deprecated arguments is lost": Fault(
        NN,
        '"reduction": self.reduction,',
        '"reduction": reduction,',
        ("tests/test_nn.py::test_positional_arguments_match_torch",),
    ),
    "repr compares tensors": Fault(
        NN,
        "return value is default or (isinstance(value, (int, float, str)) and value == default)",
        "return bool(value == default)",
        ("tests/test_nn.py::test_repr_of_a_subclass_with_tensor_attributes",),
    ),
    "repr shows equal defaults": Fault(
        NN,
        "return value is default or (isinstance(value, (int, float, str)) and value == default)",
        "return value is default",
        ("tests/test_nn.py::test_repr_shows_options",),
    ),
    "the linear module drops a batch's tensors": Fault(
        NN,
        "                normalizer=normalizer,\n"
        "                target_indices=target_indices,\n"
        "                num_classes=",
        "                num_classes=",
        MODULES,
    ),
    "modules' signatures have no options": Fault(
        NN,
        "CrossEntropyLoss.__init__.__signature__ = _signature_of(CrossEntropyLoss, cross_entropy)",
        "pass",
        ("tests/test_nn.py::test_signatures_name_all_options",),
    ),
    "the linear module's signature has no options": Fault(
        NN,
        "LinearCrossEntropyLoss.__init__.__signature__ = ",
        "_ = ",
        ("tests/test_nn.py::test_signatures_name_all_options",),
    ),
    "the modules drop indices": Fault(
        NN,
        'OF_A_BATCH = ("token_weight", "normalizer", "target_indices")',
        'OF_A_BATCH = ("token_weight", "normalizer")',
        ("tests/test_sparse_labels.py::test_modules",),
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
        (
            "tests/test_fallback.py::test_report_of_one_wrong_shape",
            *REPORT,
        ),
    ),
    "one error within the limits is enough": Fault(
        MAIN, "return all(error <= limit * slack", "return any(error <= limit * slack", REPORT
    ),
    "slack where there are kernels": Fault(
        MAIN,
        "slack = 1 if _ops.has_kernels(torch.empty(0, device=device)) else 1000",
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
        MAIN, "(False, True), DTYPES, (False, True)", "(False, True), DTYPES, (False,)", REPORT
    ),
    "dtypes are not tried": Fault(
        MAIN,
        "(False, True), DTYPES, (False, True)",
        "(False, True), DTYPES[:2], (False, True)",
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
        ("tests/test_fallback.py::test_unknown_instruction_set",),
    ),
    "an unknown instruction set is no failure": Fault(
        MAIN,
        'print(f"CPU: no kernels, because {error}")\n        return 1',
        'print(f"CPU: no kernels, because {error}")\n        return 0',
        ("tests/test_fallback.py::test_unknown_instruction_set",),
    ),
    "a closed pipe is an error": Fault(
        MAIN,
        '    if hasattr(signal, "SIGPIPE"):',
        "    if False:",
        ("tests/test_fallback.py::test_report_into_a_closed_pipe",),
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
}

SELECTED_FAULTS = {
    "results are rounded to 16 bits": Fault(
        SELECTED,
        'names, acc = ("reduction", "loss_dtype", *options), accumulation_dtype(dtype)',
        'names, acc = ("reduction", "loss_dtype", *options), dtype',
        (f"{SELECTED_TESTS}test_cases_of_trl",),
    ),
    "an operator's name in errors of the range": Fault(
        SELECTED,
        "        _selected.check_range(problem.target, problem.logits.shape[problem.settings.dim])",
        "        pass",
        (f"{SELECTED_TESTS}test_classes_out_of_range",),
    ),
    "the range is checked with the logits": Fault(
        SELECTED,
        "    _selected.check_range(index, n_classes if split is None else split.shard.n_classes)\n",
        "",
        (f"{LINEAR_SELECTED}test_refused",),
    ),
    "no dimension means torch's rule": Fault(
        SELECTED,
        '    check_index("dim", options["dim"])  # the loss has a default for None\n',
        "",
        (f"{SELECTED_TESTS}test_refused",),
    ),
    "bytes are classes": Fault(
        SELECTED,
        "if index.dtype not in (torch.int64, torch.int32):",
        "if index.dtype.is_floating_point:",
        (f"{SELECTED_TESTS}test_refused",),
    ),
    "positions of a layer": Fault(
        SELECTED,
        "    if linear_weight.dim() != 2:\n",
        "    if linear_weight.dim() < 2:\n",
        (f"{LINEAR_SELECTED}test_refused",),
    ),
    "few logits are stored whatever chunk_rows says": Fault(
        SELECTED,
        "is_few = chunk_rows is None and problem.logits.numel()",
        "is_few = problem.logits.numel()",
        (f"{LINEAR_SELECTED}test_all_logits_never_exist_at_once",),
    ),
    "torch.func sees chunks": Fault(
        SELECTED,
        "    return is_few or is_under_torch_func()\n",
        "    return is_few\n",
        (f"{LINEAR_SELECTED}test_transforms_of_torch_func",),
    ),
    "log-probabilities of logits used after their transform": Fault(
        SELECTED_AUTOGRAD,
        "unwrap_dead_wrappers((logits, index, settings))",
        "(logits, index, settings)",
        ("tests/test_selected.py::test_logits_used_after_their_transform",),
    ),
    "-0 for padding": Fault(
        SELECTED_AUTOGRAD,
        "    return 0 - loss\n",
        "    return -loss\n",
        (f"{SELECTED_TESTS}test_rows_of_padding_are_not_read",),
    ),
    "kernels under vmap": Fault(
        SELECTED_AUTOGRAD,
        "    if _autograd.is_for_torch(problem):\n",
        "    if logits.size(settings.dim) == 0:\n",
        (f"{SELECTED_TESTS}test_transforms_of_torch_func",),
    ),
    "in place without a check": Fault(
        SELECTED_AUTOGRAD,
        "    check_overwritable(problem)\n",
        "",
        (f"{SELECTED_TESTS}test_refused",),
    ),
    "torch.func cannot see the Function": Fault(
        SELECTED_AUTOGRAD,
        "        found = Selected.apply(logits, index, settings)\n",
        "        found = _forward(logits, index, settings)\n",
        (f"{SELECTED_TESTS}test_transforms_of_torch_func",),
    ),
    "the loss's sign": Fault(
        SELECTED_AUTOGRAD,
        "token_weight.new_full((), -1).expand",
        "token_weight.new_full((), 1).expand",
        (f"{SELECTED_TESTS}test_values_and_gradients",),
    ),
    "one upstream gradient for all rows": Fault(
        SELECTED_AUTOGRAD,
        "token_weight.new_full((), -1).expand(token_weight.shape)",
        "token_weight.new_full((), -1)",
        (f"{SELECTED_TESTS}test_finite_differences",),
    ),
    "the loss's sign in plain calls": Fault(
        SELECTED_AUTOGRAD,
        "minus_one = token_weight.new_full((), -1)",
        "minus_one = token_weight.new_full((), 1)",
        (f"{SELECTED_TESTS}test_values_and_gradients",),
    ),
    "the loss's sign for one class in plain calls": Fault(
        SELECTED_AUTOGRAD,
        "PlainCrossEntropy.backward(ctx, -grad_log_probs)",
        "PlainCrossEntropy.backward(ctx, grad_log_probs)",
        (f"{SELECTED_TESTS}test_values_and_gradients",),
    ),
    "saved tensors are read twice": Fault(
        SELECTED_AUTOGRAD,
        "_of_gradient(ctx.settings, grad_log_probs, saved_tensors)",
        "_of_gradient(ctx.settings, grad_log_probs, ctx.saved_tensors)",
        (f"{SELECTED_TESTS}test_checkpoints",),
    ),
    "compiled code does not overwrite": Fault(
        SELECTED_AUTOGRAD,
        'inplace = {"inplace_backward": True} if settings.inplace_backward else {}',
        "inplace: dict[str, bool] = {}",
        (f"{SELECTED_TESTS}test_logits_of_a_compiled_graph_are_overwritten",),
    ),
    "an operator that overwrites whatever it is given": Fault(
        SELECTED_AUTOGRAD,
        "    if inplace_backward:\n",
        "    if False:\n",
        (f"{SELECTED_TESTS}test_the_operator_refuses_to_overwrite_a_leaf",),
    ),
    "a plain gradient has no graph": Fault(
        SELECTED_AUTOGRAD,
        "if not torch.is_grad_enabled() and is_eager() and are_ordinary(grad_log_probs, logits):",
        "if is_eager() and are_ordinary(grad_log_probs, logits):",
        (f"{SELECTED_TESTS}test_finite_differences",),
    ),
    "no gradient of the entropy": Fault(
        SELECTED_AUTOGRAD,
        "        upstream = Upstream(grad_loss, None, grad_entropy)\n",
        "        upstream = Upstream(grad_loss, None, None)\n",
        (f"{SELECTED_TESTS}test_values_and_gradients",),
    ),
    "rows of padding are read in the backward": Fault(
        SELECTED_AUTOGRAD,
        "problem = Problem(logits, of_labels, None, token_weight, None, index, settings)",
        "problem = Problem(logits, of_labels, None, None, None, index, settings)",
        (f"{SELECTED_TESTS}test_rows_of_padding_are_not_read",),
    ),
    "ignore_index of the operator has no effect": Fault(
        SELECTED_AUTOGRAD,
        "        counts: Tensor = (self.target_indices != ignore_index).any(1)\n",
        "        counts = self.target_indices.new_ones(self.target_indices.shape[0])\n",
        (f"{LINEAR_SELECTED}test_rows_of_padding",),
    ),
    "chunks select from the first rows": Fault(
        SELECTED_AUTOGRAD,
        "logits, selected.target_indices[rows], settings",
        "logits, selected.target_indices[: len(logits)], settings",
        (f"{LINEAR_SELECTED}test_values_and_gradients",),
    ),
    "the backward of a layer leaves the entropy out": Fault(
        SELECTED_AUTOGRAD,
        "        upstream = (grad_loss, None, grad_entropy)\n",
        "        upstream = (grad_loss, None, None)\n",
        (f"{LINEAR_SELECTED}test_the_gradient_of_the_entropy_alone",),
    ),
    "no autograd formula of the operator": Fault(
        SELECTED_AUTOGRAD,
        '    _ops.register_formula("selected_log_probs", _formula)\n',
        "",
        (f"{SELECTED_TESTS}test_exported_and_decomposed_programs",),
    ),
    "no autograd formula of the layer's operator": Fault(
        SELECTED_AUTOGRAD,
        '    _ops.register_formula("linear_selected_log_probs", _linear_formula)\n',
        "",
        (f"{LINEAR_SELECTED}test_exported_and_decomposed_programs",),
    ),
    "rows of padding have an entropy": Fault(
        REFERENCE,
        "entropy.masked_fill(left_out.squeeze(dim), 0)",
        "entropy",
        (f"{SELECTED_TESTS}test_without_kernels",),
    ),
    "classes out of range count as the first": Fault(
        REFERENCE,
        "log_probs.masked_fill(padding, 0) * torch.where(is_wrong, torch.nan, 1.0)",
        "log_probs.masked_fill(padding, 0)",
        (f"{SELECTED_TESTS}test_vmap_marks_classes_out_of_range",),
    ),
    "the derivative by padded labels is NaN": Fault(
        REFERENCE,
        "is_wrong = ~is_class & ~is_padding",
        "is_wrong = ~is_class",
        (f"{SELECTED_TESTS}test_finite_differences",),
    ),
    "the decomposition counts rows of padding": Fault(
        DECOMPOSITIONS,
        "token_weight = (index != ignore_index).any(dim).to(log_probs.dtype)",
        "token_weight = (index == index).any(dim).to(log_probs.dtype)",
        (f"{SELECTED_TESTS}test_the_decomposition_equals_the_operator",),
    ),
    "autocast rounds float32 logits of small layers": Fault(
        LINEAR_AUTOGRAD,
        "        with _no_casts(hidden):  # autocast",
        "        with nullcontext():  # autocast",
        (f"{LINEAR_SELECTED}test_float32_logits_of_16_bit_layers",),
    ),
}

SPLIT_FAULTS = {
    "chunks of so many rows of each rank": Fault(
        PARALLEL_LINEAR, "max(1, most // split.n_parts)", "max(1, most)", SPLIT_CALLS
    ),
    "chunks by the number of all classes": Fault(
        PARALLEL_LINEAR,
        "n_classes = -(-split.shard.n_classes // dist.get_world_size(split.shard.group))",
        "n_classes = split.shard.n_classes",
        SPLIT_CALLS,
    ),
    "gathered rows are taken in another order": Fault(
        PARALLEL_LINEAR,
        "return self._parts(tensor)[:, rows].flatten(0, 1)",
        "return self._parts(tensor)[:, rows].transpose(0, 1).flatten(0, 1)",
        SPLIT_LOSSES,
    ),
    "rows of chunks are joined one after another": Fault(
        PARALLEL_LINEAR,
        "return torch.cat([self._parts(chunk) for chunk in chunks], 1).flatten(0, 1)",
        "return torch.cat(list(chunks))",
        SPLIT_LOSSES,
    ),
    "padded classes have logits": Fault(
        PARALLEL_LINEAR,
        "own = linear_weight[: split.n_own].t()",
        "own = linear_weight.t()",
        SPLIT_CALLS,
    ),
    "the gradient of padded classes is not written": Fault(
        PARALLEL_LINEAR,
        "            self.grad_weight[split.n_own :] = 0\n",
        "            self.grad_weight[split.n_own :] = torch.nan\n",
        SPLIT_CALLS,
    ),
    "the next chunk's rows are those of this one": Fault(
        PARALLEL_LINEAR,
        "of_chunk, (found, work) = found, start(following)",
        "of_chunk, (found, work) = found, start(slices[0])",
        SPLIT_LOSSES,
    ),
    "autocast rounds float32 logits of split layers": Fault(
        PARALLEL_LINEAR,
        "torch.autocast(hidden.device.type, enabled=False)",
        "torch.autocast(hidden.device.type, torch.bfloat16)",
        SPLIT_LOSSES,
    ),
    "parts of hidden's gradient are rounded before they are added": Fault(
        PARALLEL_LINEAR,
        "part = grad_hidden.new_empty(len(grad_logits), own.shape[1], dtype=self.sums)",
        "part = grad_hidden.new_empty(len(grad_logits), own.shape[1])",
        SPLIT_LOSSES,
    ),
    "chunks' weight gradients are not added": Fault(
        PARALLEL_LINEAR, "beta = 0 if rows.start == 0 else 1", "beta = 0", SPLIT_LOSSES
    ),
    "the last chunk's sum is not waited for": Fault(
        PARALLEL_LINEAR,
        "        self._finish()\n        dtype",
        "        dtype",
        SPLIT_LOSSES,
    ),
    "hidden's gradient is summed where the caller does that": Fault(
        PARALLEL_LINEAR,
        "        if not self.split.reduce_grad_hidden:",
        "        if False:",
        SPLIT_CALLS,
    ),
    "float16 gradients of split layers are made in forward": Fault(
        PARALLEL_LINEAR,
        "needs = made_in_forward(layer, problem.settings.reduction)",
        "needs = tuple(map(needs_graph, layer))",
        SPLIT_LOSSES,
    ),
    "a second backward of a split layer scales again": Fault(
        PARALLEL_LINEAR,
        "gradients, ctx.gradients = ctx.gradients, None",
        "gradients = ctx.gradients",
        SPLIT_CALLS,
    ),
    "gradients of statistics are left out": Fault(
        PARALLEL_LINEAR,
        "if gradients is None or not is_made or any(grad is not None for grad in of_statistics):",
        "if gradients is None or not is_made:",
        SPLIT_LOSSES,
    ),
    "a split layer takes a graph of gradients": Fault(
        PARALLEL_LINEAR, "    _parallel.check_first_derivative()\n", "", SPLIT_CALLS
    ),
    "the mean divides by this rank's class weights": Fault(
        PARALLEL_LINEAR,
        "_parallel_rows.all_gather(weights.sum(dtype=torch.float64).view(1), shard.group)",
        "weights.sum(dtype=torch.float64)",
        SPLIT_LOSSES,
    ),
    "probabilities of a split layer may need a gradient": Fault(
        PARALLEL_LINEAR, "    if needs_graph(problem.target):", "    if False:", SPLIT_ERRORS
    ),
    "rows whose classes are on other ranks are not read": Fault(
        PARALLEL_SELECTED,
        "    asked.select(dim, 0).masked_fill_(is_unread, 0)\n",
        "",
        SPLIT_SELECTED,
    ),
    "a shard of masked classes has no log-probability": Fault(
        PARALLEL_SELECTED,
        "log_probs.masked_fill(state[1].isneginf().unsqueeze(dim), -torch.inf)",
        "log_probs.masked_fill(state[1].isneginf().unsqueeze(dim), torch.nan)",
        ("tests/test_parallel_selected.py::test_selected[3]",),
    ),
    "classes of other ranks add their shard's sums": Fault(
        PARALLEL_SELECTED,
        "masked_fill(sent == NOT_OWN, 0)",
        "masked_fill(sent > 0, 1)",
        SPLIT_SELECTED,
    ),
    "the entropy of padded rows is not 0": Fault(
        PARALLEL_SELECTED,
        "entropy = entropy.masked_fill(known.is_bad, torch.nan).masked_fill(~known.kept, 0)",
        "entropy = entropy.masked_fill(known.is_bad, torch.nan)",
        SPLIT_SELECTED,
    ),
    "selected classes of other ranks have no part in the gradient": Fault(
        PARALLEL_SELECTED,
        "others = labels.masked_fill(~known.is_other, 0).sum(dim)",
        "others = labels.masked_fill(known.is_other, 0).sum(dim)",
        SPLIT_SELECTED,
    ),
    "smoothed 16-bit labels of a shard are rounded again": Fault(
        PARALLEL_ROWS,
        "target=target if factor == 1 else target.to(acc) * factor,",
        "target=target if factor == 1 else target * factor,",
        ("tests/test_parallel.py::test_numbers[2]",),
    ),
    "a shard of masked classes has the loss NaN": Fault(
        PARALLEL_ROWS,
        "part = part.masked_fill(state[1].isneginf(), 0)",
        "part = part.masked_fill(state[1].isnan(), 0)",
        ("tests/test_parallel.py::test_numbers[2]",),
    ),
    "the mass of one row is float64": Fault(
        PARALLEL_ROWS,
        "return ((1 - smoothing) * sums + of_smoothing).to(sums.dtype)",
        "return (1 - smoothing) * sums + of_smoothing",
        ("tests/test_parallel.py::test_numbers[2]",),
    ),
    "a module of several positions is split": Fault(
        NN,
        "is_split = self._classes_of_all_ranks() is not None",
        "is_split = False",
        ("tests/test_parallel_linear.py::test_errors",),
    ),
    "the gradient of a chunk is not written in compiled code": Fault(
        PARALLEL,
        "    if problem.logits.numel():\n        _ops.backward_(",
        "    if problem.logits.numel() and not is_compiling():\n        _ops.backward_(",
        SPLIT_CALLS,
    ),
    "shift goes on on another rank": Fault(
        LINEAR,
        "        check_sequence_parallel(shift, drop_ignored)\n",
        "        pass\n",
        SPLIT_ERRORS,
    ),
    "the module's layer has all classes on each rank": Fault(
        NN,
        'n_own = -(-num_classes // _n_ranks(options.get("process_group")))',
        "n_own = num_classes",
        SPLIT_CALLS,
    ),
}

OF_DTENSORS = ("tests/test_dtensor.py::test_placements[2]",)
DTENSOR_CALLS = ("tests/test_dtensor.py::test_calls",)
DTENSOR_LINEAR = ("tests/test_dtensor.py::test_linear[2]",)
PARALLEL_MODULES = ("tests/test_dtensor.py::test_parallel_modules",)
DTENSOR_FAULTS = {
    "each process divides by the weight of its own rows": Fault(
        DTENSOR,
        'return reduction == "mean" and labels.normalizer is None and layout.has_own_rows',
        "return False",
        OF_DTENSORS,
    ),
    "ignored rows count in the mean of split rows": Fault(
        DTENSOR,
        "sum_of_weights(target, weight, token_weight, ignore_index)",
        "sum_of_weights(target, weight, token_weight, None)",
        OF_DTENSORS,
    ),
    "the mean of split rows leaves class weights out": Fault(
        DTENSOR,
        "weight = _local(labels.weight, layout.whole, layout) if is_index else None",
        "weight = None",
        OF_DTENSORS,
    ),
    "shards of DTensors are of rounded down sizes": Fault(
        DTENSOR_LAYOUT,
        "most = -(-size // self.mesh.size(mesh_dim))",
        "most = size // self.mesh.size(mesh_dim)",
        OF_DTENSORS,
    ),
    "a row dimension after the classes keeps its number": Fault(
        DTENSOR_LAYOUT,
        "Shard(placement.dim - (placement.dim > dim))",
        "Shard(placement.dim)",
        DTENSOR_CALLS,
    ),
    "gradients of replicated tensors are not summed": Fault(
        DTENSOR,
        "[of_sum if of_sum.is_partial() and not p.is_shard() else p for p, of_sum in pairs]",
        "[p for p, _ in pairs]",
        DTENSOR_CALLS,
    ),
    "the version of overwritten DTensors stays": Fault(
        DTENSOR,
        "            torch.autograd.graph.increment_version(input)\n",
        "            pass\n",
        DTENSOR_CALLS,
    ),
    "the version of a DTensor is not checked": Fault(
        DTENSOR,
        "if not (torch.is_grad_enabled() and input.requires_grad)",
        "if True",
        DTENSOR_CALLS,
    ),
    "Partial logits are taken as they are": Fault(
        DTENSOR_LAYOUT,
        "    if any(placement.is_partial() for placement in placements):\n",
        "    if False:\n",
        DTENSOR_CALLS,
    ),
    "the rows of a process are taken for all rows": Fault(
        DTENSOR,
        "        if shape == layout.own_rows(rows) != rows:\n",
        "        if False:\n",
        DTENSOR_CALLS,
    ),
    "shift counts the first labels in a mean of split rows": Fault(
        DTENSOR,
        "counted = _without_first(own, shift, layout)",
        "counted = own",
        DTENSOR_LINEAR,
    ),
    "the loss module reads the weight outside of its layer": Fault(
        NN,
        "        if isinstance(self.linear, Linear):\n",
        "        if False:\n",
        PARALLEL_MODULES,
    ),
    "fake states of shards have no own mass": Fault(
        "fused_xent/_meta.py",
        "n_state = 2 + (has_loss and keeps_mass) +",
        "n_state = 2 +",
        ("tests/test_shards.py::test_opcheck",),
    ),
    "decomposed: the others have this rank's mass": Fault(
        "fused_xent/_decompositions.py",
        "torch.cat([q[:rank], q[rank + 1 :]]).sum(0)",
        "q.sum(0)",
        ("tests/test_shards.py::test_rows[decomposed-two-torch.float64]",),
    ),
    "decomposed: a shard of -inf makes the entropy NaN": Fault(
        "fused_xent/_decompositions.py",
        "(share * (entropy + rise)).masked_fill(share == 0, 0).sum(0)",
        "(share * (entropy + rise)).sum(0)",
        ("tests/test_shards.py::test_infinite_logits[decomposed]",),
    ),
    "the gradient of a replicated weight is added up twice": Fault(
        "fused_xent/_dtensor.py",
        "if tensor.placements != placements:",
        "if True:",
        ("tests/test_dtensor.py::test_linear[2]",),
    ),
    "compiled code waits for the ranges of the shards": Fault(
        PARALLEL_ROWS,
        "    if found.is_cpu and has_values(found):\n",
        "    if found.is_cpu:\n",
        ("tests/test_dtensor.py::test_compiled",),
    ),
}

FAULTS = (
    OPTIONS_FAULTS
    | PROBLEM_FAULTS
    | FUNCTIONAL_FAULTS
    | LINEAR_FAULTS
    | LINEAR_OPS_FAULTS
    | LINEAR_AUTOGRAD_FAULTS
    | AUTOGRAD_FAULTS
    | FORMULAS_FAULTS
    | DECOMPOSITIONS_FAULTS
    | PRIVATE_FAULTS
    | OPS_FAULTS
    | REFERENCE_FAULTS
    | SELECTED_FAULTS
    | SPLIT_FAULTS
    | DTENSOR_FAULTS
    | NN_FAULTS
    | MAIN_FAULTS
)
