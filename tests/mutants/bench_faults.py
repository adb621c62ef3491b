"""Faults of the benchmark and of the tests' tolerances, and the tests that find them."""

from .fault import Fault


def tests_of(module):
    """Return a function that maps test names to tests of tests/test_bench_<module>.py."""
    return lambda *names: tuple(f"tests/test_bench_{module}.py::test_{name}" for name in names)


of_providers, of_adapters, of_results = map(tests_of, ("providers", "adapters", "results"))
of_timing, of_commands, of_tables = map(tests_of, ("timing", "command", "tables"))
of_demo, of_overhead, of_confident = map(tests_of, ("demo", "overhead", "confident"))
of_sparse = tests_of("sparse")

FAULTY_LOSSES = of_providers("check_finds_faulty_losses")
SMALL_ERRORS = of_providers("check_finds_small_errors")
CHUNKS = of_providers("check_in_chunks_gives_the_same_errors")
MANY_ROWS = of_providers("check_accepts_right_results_of_many_rows")

CHECK_FAULTS = {
    "a NaN loss passes": Fault(
        "bench/check.py", "if not error <= limit:", "if error > limit:", FAULTY_LOSSES
    ),
    "a scale may be 3 % off in bfloat16": Fault(
        "bench/check.py", "2e-1, 1e-2)", "2e-1, 3e-2)", SMALL_ERRORS
    ),
    "a scale may be 1e-4 off in float32": Fault(
        "bench/check.py", "1e-4, 1e-2, 1e-5", "1e-4, 1e-2, 1e-4", SMALL_ERRORS
    ),
    "a row may be 5 % off in float32": Fault(
        "bench/check.py", "1e-4, 1e-2, 1e-5", "1e-4, 5e-2, 1e-5", SMALL_ERRORS
    ),
    "a gradient may be 1e-3 off in float32": Fault(
        "bench/check.py", "Tolerance(1e-5, 1e-4", "Tolerance(1e-5, 1e-3", SMALL_ERRORS
    ),
    "a loss may be 2 % off in float16": Fault(
        "bench/check.py", "Tolerance(2e-3, ", "Tolerance(2e-2, ", SMALL_ERRORS
    ),
    "the loss has the gradient's tolerance": Fault(
        "bench/check.py", "tolerance.loss)", "tolerance.gradient)", SMALL_ERRORS
    ),
    "the first class of ignored rows is not checked": Fault(
        "bench/check.py",
        "t.gather(1, index) * ~is_counted)",
        "t.gather(1, index) * 0)",
        FAULTY_LOSSES,
    ),
    "too small a scale passes": Fault(
        "bench/check.py",
        "relative(abs(self.products - self.squares)",
        "relative(max(0.0, self.products - self.squares)",
        SMALL_ERRORS,
    ),
    "too small a loss passes": Fault(
        "bench/check.py",
        "relative(abs(loss.item() - self.loss)",
        "relative(max(0.0, loss.item() - self.loss)",
        SMALL_ERRORS,
    ),
    "the loss of a step is not checked": Fault(
        "bench/check.py", '"loss": step.loss}', '"loss": value}', FAULTY_LOSSES
    ),
    "the loss without a gradient is not checked": Fault(
        "bench/check.py", '{"loss without grad": value, ', "{", FAULTY_LOSSES
    ),
    "a target that is written to passes": Fault(
        "bench/check.py",
        "if not torch.equal(self.workload.target, self.workload.original_target):",
        "if not self.chunks:",
        of_providers("provider_that_fails_later_is_left_out"),
    ),
    "a shape is not checked": Fault(
        "bench/check.py", "if tensor.shape != shape:", "if tensor.ndim < len(shape):", FAULTY_LOSSES
    ),
    "the gradient overflows float16": Fault("bench/check.py", "- 1, 15)", "- 1, 20)", MANY_ROWS),
    "the gradient is not scaled up": Fault(
        "bench/check.py", "self.upstream = 2.0 **", "self.upstream = 1.0 **", MANY_ROWS
    ),
    "the rows of strided logits are miscounted": Fault(
        "bench/check.py", "logits.numel() // logits.size(1)", "len(logits)", CHUNKS
    ),
    "ignored rows are in the mean": Fault(
        "bench/check.py",
        "self.n_rows = int((target != IGNORE_INDEX).sum())",
        "self.n_rows = target.numel()",
        CHUNKS,
    ),
    "ignored rows are in the penalty": Fault(
        "bench/check.py", "squares = squares[target != IGNORE_INDEX]", "pass", CHUNKS
    ),
    "float64 has no label smoothing": Fault(
        "bench/check.py",
        "label_smoothing=options.label_smoothing",
        "label_smoothing=0.0",
        CHUNKS,
    ),
    "a softcap is not multiplied back": Fault(
        "bench/check.py", "options.softcap * torch.tanh", "torch.tanh", CHUNKS
    ),
    "classes are checked only in the last chunk": Fault(
        "bench/check.py",
        "self.class_errors = self.class_errors + errors",
        "self.class_errors = errors",
        SMALL_ERRORS,
    ),
    "rows are checked only in the last chunk": Fault(
        "bench/check.py",
        "max(self.worst_row, worst(errors.sum(1), squares.sum(1)))",
        "worst(errors.sum(1), squares.sum(1))",
        SMALL_ERRORS,
    ),
    "targets are checked only in the last chunk": Fault(
        "bench/check.py",
        "max(self.greatest_error, errors.max().item())",
        "errors.max().item()",
        SMALL_ERRORS,
    ),
    "a class is not checked": Fault(
        "bench/check.py",
        'errors["gradient of one class"] = (one.worst_class',
        'errors["gradient of one class"] = (one.worst_row',
        SMALL_ERRORS,
    ),
    "a row is not checked": Fault(
        "bench/check.py",
        'errors["gradient of one row"] = (one.worst_row',
        'errors["gradient of one row"] = (one.worst_class',
        SMALL_ERRORS,
    ),
    "a target is not checked": Fault(
        "bench/check.py",
        "(one.worst_entry, tolerance.part)",
        "(one.error, tolerance.part)",
        SMALL_ERRORS,
    ),
    "any error relative to 0 passes": Fault(
        "bench/check.py",
        'return 0.0 if error == 0 else float("inf")',
        "return 0.0",
        of_providers("relative_errors_of_zero"),
    ),
    "a NaN row passes": Fault(
        "bench/check.py",
        "ratios.nan_to_num(torch.inf, torch.inf)",
        "ratios.nan_to_num(0.0, torch.inf)",
        of_providers("relative_errors_of_zero"),
    ),
    "a norm has no square root": Fault(
        "bench/check.py",
        "return relative(self.errors, self.squares) ** 0.5",
        "return relative(self.errors, self.squares)",
        SMALL_ERRORS,
    ),
}

COMPARE_FAULTS = {
    "speedups count less than slowdowns": Fault(
        "bench/compare.py",
        "max(self.change, -self.change / (1 + self.change))",
        "abs(self.change)",
        of_results("compare"),
    ),
    "a difference of 3 % is noise": Fault(
        "bench/compare.py", "LEAST = 0.02", "LEAST = 0.03", of_results("compare")
    ),
    "the noise of the later run does not count": Fault(
        "bench/compare.py",
        "self.before.noise + self.after.noise",
        "2 * self.before.noise",
        of_results("noise_of_either_run_counts"),
    ),
    "before and after are swapped": Fault(
        "bench/compare.py",
        "yield Difference(result, timing, match, least)",
        "yield Difference(result, match, timing, least)",
        of_results("compare"),
    ),
    "a speedup is a failure": Fault(
        "bench/compare.py",
        "return 1 if slower else 0",
        "return 1 if faster else 0",
        of_results("compare"),
    ),
    "--least is not passed on": Fault(
        "bench/compare.py",
        "differences(before, after, options.least)",
        "differences(before, after, LEAST)",
        of_results("compare_of_some_providers_and_of_large_differences"),
    ),
    "the machine's copy is a missing timing": Fault(
        "bench/compare.py",
        "        for timing in result.timings\n        if timing.mode not in BASELINES\n",
        "        for timing in result.timings\n",
        of_results("compare_reports_other_machines_and_missing_timings"),
    ),
    "--provider does not choose what is missing": Fault(
        "bench/compare.py",
        "            if options.provider and provider not in options.provider:\n"
        "                continue\n",
        "",
        of_results("compare_reports_other_machines_and_missing_timings"),
    ),
    "missing timings are attributed to the other file": Fault(
        "bench/compare.py",
        "(options.after, timings_of(before) - timings_of(after))",
        "(options.before, timings_of(before) - timings_of(after))",
        of_results("compare_reports_other_machines_and_missing_timings"),
    ),
    "another number of threads is not reported": Fault(
        "bench/compare.py",
        '"cores", "threads", "gpu"',
        '"cores", "gpu"',
        of_results("compare_reports_each_difference_of_the_machines"),
    ),
    "the change of the copy is a mean": Fault(
        "bench/compare.py",
        "sorted(changes)[len(changes) // 2]",
        "sum(changes) / len(changes)",
        of_results("change_of_the_machines_copy_is_the_median"),
    ),
    "a comparison is in microseconds": Fault(
        "bench/compare.py",
        'f"{seconds * 1e3:.2f}" if seconds',
        'f"{seconds * 1e6:.2f}" if seconds',
        of_results("table_of_a_comparison"),
    ),
}

TIMING_FAULTS = {
    "a step finds warm caches": Fault(
        "bench/timing.py",
        "self.logits, received)\n        start = self.clock.start()",
        "self.logits, received)\n        start = self.clock.mark()",
        of_timing("caches_are_emptied_before_each_timing"),
    ),
    "a forward finds warm caches": Fault(
        "bench/timing.py",
        "        start = self.clock.start()\n        value = loss(self.logits",
        "        start = self.clock.mark()\n        value = loss(self.logits",
        of_timing("caches_are_emptied_before_each_timing"),
    ),
    "the copy finds warm caches": Fault(
        "bench/timing.py",
        "        start = self.clock.start()\n        self.logits.copy_(",
        "        start = self.clock.mark()\n        self.logits.copy_(",
        of_timing("caches_are_emptied_before_each_baseline"),
    ),
    "the read finds warm caches": Fault(
        "bench/timing.py",
        "        start = self.clock.start()\n        words.sum()",
        "        start = self.clock.mark()\n        words.sum()",
        of_timing("caches_are_emptied_before_each_baseline"),
    ),
    "the read is of an eighth of the logits": Fault(
        "bench/timing.py",
        "words[: words.numel() // 8 * 8]",
        "words[: words.numel() // 64 * 8]",
        of_timing("caches_are_emptied_before_each_baseline"),
    ),
    "the restore is timed": Fault(
        "bench/timing.py",
        "        self.restore()\n        start = self.clock.start()",
        "        start = self.clock.start()\n        self.restore()",
        of_timing("caches_are_emptied_before_each_timing"),
    ),
    "the target is not restored": Fault(
        "bench/timing.py",
        "        self.target.copy_(self.original_target)\n",
        "",
        of_results("inputs_are_restored_before_each_run"),
    ),
    "backward time includes forward time": Fault(
        "bench/timing.py",
        "seconds(middle, end)",
        "seconds(start, end)",
        of_timing("caches_are_emptied_before_each_timing"),
    ),
    "a forward has a graph": Fault("bench/timing.py", "    @torch.no_grad()\n", "", FAULTY_LOSSES),
    "a forward's memory is a step's": Fault(
        "bench/timing.py",
        '"forward": of_forward.bytes',
        '"forward": of_step.bytes',
        of_timing("memory_of_each_mode"),
    ),
    "there is one round too many": Fault(
        "bench/timing.py",
        "while n_rounds < min_rounds",
        "while n_rounds <= min_rounds",
        of_timing("minimum_of_rounds_and_seconds"),
    ),
    "either the rounds or the seconds suffice": Fault(
        "bench/timing.py",
        "min_rounds or perf",
        "min_rounds and perf",
        of_timing("minimum_of_rounds_and_seconds"),
    ),
    "providers are not interleaved": Fault(
        "bench/timing.py",
        "            for provider, timer in timers:",
        "            for provider, timer in timers[n_rounds % 2 :] + timers[: n_rounds % 2]:",
        of_results("interleaving"),
    ),
    "only the last sample is kept": Fault(
        "bench/timing.py",
        "samples.setdefault(key, []).append(seconds)",
        "samples[key] = [seconds]",
        of_timing("minimum_of_rounds_and_seconds"),
    ),
    "a provider that raises is called again": Fault(
        "bench/timing.py",
        "                if provider in raised:\n                    continue\n",
        "",
        of_timing("provider_that_raises_is_left_out_and_returned"),
    ),
    "a provider's error is lost": Fault(
        "bench/timing.py",
        "                    raised[provider] = error\n                    continue",
        "                    continue",
        of_timing("provider_that_raises_is_left_out_and_returned"),
    ),
    "a provider that raises ends the round": Fault(
        "bench/timing.py",
        "                    raised[provider] = error\n                    continue",
        "                    raised[provider] = error\n                    break",
        of_timing("provider_that_raises_is_left_out_and_returned"),
    ),
    "garbage is collected while it is timed": Fault(
        "bench/timing.py",
        "    gc.disable()\n",
        "",
        of_timing("garbage_collection_is_off_during_timing"),
    ),
    "garbage is never collected again": Fault(
        "bench/timing.py",
        "        gc.enable()\n",
        "        pass\n",
        of_timing("garbage_collection_is_off_during_timing"),
    ),
}

DEVICE_FAULTS = {
    "a GPU's milliseconds are taken for microseconds": Fault(
        "bench/device.py",
        "first.elapsed_time(last) / 1e3",
        "first.elapsed_time(last) / 1e6",
        of_timing("clocks"),
    ),
    "the clock does not wait for the GPU": Fault(
        "bench/device.py", "        last.synchronize()\n", "", of_timing("clocks")
    ),
    "the flush buffer fits into the cache": Fault(
        "bench/device.py", '"cpu": 1 << 27', '"cpu": 1 << 20', of_timing("clocks")
    ),
    "the flush buffer is not written": Fault(
        "bench/device.py",
        "        self._flushed.zero_()\n        return perf_counter()",
        "        return perf_counter()",
        of_results("caches_are_emptied"),
    ),
    "a GPU's memory includes what was in use before": Fault(
        "bench/device.py",
        "torch.cuda.max_memory_allocated() - self._before",
        "torch.cuda.max_memory_allocated()",
        of_timing("peak_memory_of_a_gpu"),
    ),
    "an earlier peak of a GPU counts": Fault(
        "bench/device.py",
        "            torch.cuda.reset_peak_memory_stats()\n",
        "",
        of_timing("peak_memory_of_a_gpu"),
    ),
    "an earlier peak of the process counts": Fault(
        "bench/device.py",
        '            PEAK_RESET.write_text("5")  # resets the peak to what is resident now\n',
        "",
        of_timing("peak_memory_of_a_process_starts_anew"),
    ),
    "reused memory is not counted": Fault(
        "bench/device.py",
        "            ctypes.CDLL(None).malloc_trim(0)  # freed memory",
        "            # freed memory",
        of_timing("peak_memory_of_a_process_starts_anew"),
    ),
    "memory is what remains, not the peak": Fault(
        "bench/device.py",
        '"VmHWM") - self',
        '"VmRSS") - self',
        of_results("peak_memory_of_a_process"),
    ),
    "a kilobyte has 1000 bytes": Fault(
        "bench/device.py", "* 1024 for line", "* 1000 for line", of_timing("free_memory")
    ),
    "the limit of the process is no limit": Fault(
        "bench/device.py",
        "return min(free, max(0, limit",
        "return max(free, max(0, limit",
        of_timing("free_memory"),
    ),
    "the limit leaves no room": Fault(
        "bench/device.py",
        "_allowed_bytes() * 9 // 10",
        "_allowed_bytes()",
        of_timing("memory_limit_leaves_room_and_is_removed"),
    ),
    "the limit stays after an error": Fault(
        "bench/device.py",
        "    try:\n        yield\n    finally:\n        resource.setrlimit",
        "    if limits:\n        yield\n        resource.setrlimit",
        of_timing("memory_limit_leaves_room_and_is_removed"),
    ),
    "Python's MemoryError is not recognized": Fault(
        "bench/device.py",
        "(torch.OutOfMemoryError, MemoryError)",
        "torch.OutOfMemoryError",
        of_timing("out_of_memory"),
    ),
    "a copy moves what it reads": Fault(
        "bench/device.py",
        "return 2 * source.nbytes",
        "return source.nbytes",
        of_timing("copy_bandwidth_counts_reads_and_writes"),
    ),
    "a GPU without kernels is measured": Fault(
        "bench/device.py",
        "is None or not has_kernel",
        "is None and not has_kernel",
        of_timing("why_a_device_is_not_measured"),
    ),
    "the CPU is measured without kernels": Fault(
        "bench/device.py",
        "if fused_xent.cpu_capability() is None:  # torch",
        'if fused_xent.cpu_capability() == "":  # torch',
        of_timing("why_a_device_is_not_measured"),
    ),
}

CASE_FAULTS = {
    "forward and backward read once": Fault(
        "bench/cases.py",
        '"both": (2, 1)}',
        '"both": (1, 1)}',
        of_results("bytes_and_operations"),
    ),
    "a backward has an operation more": Fault(
        "bench/cases.py",
        '"backward": 3, "both": 7',
        '"backward": 4, "both": 7',
        of_results("bytes_and_operations"),
    ),
    "soft labels cost a backward one operation": Fault(
        "bench/cases.py",
        'SOFT_OPERATIONS = {"forward": 2, "backward": 2',
        'SOFT_OPERATIONS = {"forward": 2, "backward": 1',
        of_results("bytes_and_operations"),
    ),
    "the classes are the last dimension": Fault(
        "bench/cases.py",
        "* logits.size(1)\n",
        "* logits.size(-1)\n",
        of_results("bytes_and_operations"),
    ),
    "the gradient of ignored rows is not written": Fault(
        "bench/cases.py",
        "writes * logits.nbytes",
        "writes * counted",
        of_results("ignored_rows_are_not_read_and_their_gradient_is_written"),
    ),
    "gpt2 has a class less": Fault(
        "bench/cases.py",
        'Case("gpt2", (512, 50257))',
        'Case("gpt2", (512, 50256))',
        of_results("cases_have_the_classes_of_their_model_or_dataset"),
    ),
    "the last class is never a target": Fault(
        "bench/cases.py",
        "torch.randint(self.shape[1],",
        "torch.randint(self.shape[1] - 1,",
        of_results("inputs_of_a_case_are_the_same_in_every_run"),
    ),
    "inputs differ between runs": Fault(
        "bench/cases.py",
        'manual_seed(0), "device"',
        'manual_seed(int(torch.randint(1 << 30, ()))), "device"',
        of_results("inputs_of_a_case_are_the_same_in_every_run"),
    ),
    "soft labels are over the rows": Fault(
        "bench/cases.py",
        ".softmax(1).to(dtype)",
        ".softmax(0).to(dtype)",
        of_results("inputs_of_a_case_are_the_same_in_every_run"),
    ),
    "the first rows are ignored": Fault(
        "bench/cases.py",
        "torch.randperm(target.numel(), **source)",
        'torch.arange(target.numel(), device=source["device"])',
        of_results("inputs_of_a_case_are_the_same_in_every_run"),
    ),
    "all rows are ignored": Fault(
        "bench/cases.py", "target.numel() - 1)\n", "target.numel())\n", of_results("ignored_share")
    ),
    "a sweep has no options": Fault(
        "bench/cases.py",
        "(n_rows, vocab), soft, dtypes, options)",
        "(n_rows, vocab), soft, dtypes)",
        of_results("cases_of_a_sweep_have_equally_many_logits"),
    ),
    "gpt2 is no default case": Fault(
        "bench/cases.py",
        'default=("llama3", "llama2", "gpt2", "imagenet"',
        'default=("llama3", "llama2", "imagenet"',
        of_results("cases_have_the_classes_of_their_model_or_dataset"),
    ),
}

COMMAND_FAULTS = {
    "a missing device is measured": Fault(
        "bench/command.py",
        "if reason := why_not(options.device):",
        "if (reason := why_not(options.device)) and not options.quick:",
        of_commands("missing_device_is_refused"),
    ),
    "a failure is printed to stdout": Fault(
        "bench/command.py",
        '{provider}: {reason}", file=sys.stderr)',
        '{provider}: {reason}")',
        of_commands("exit_status_and_written_cases"),
    ),
    "a wrong provider is no failure": Fault(
        "bench/command.py",
        "                status = status or 1\n",
        "",
        of_commands("exit_status_and_written_cases"),
    ),
    "a wrong provider hides an out-of-memory case": Fault(
        "bench/command.py",
        "status = status or 1",
        "status = 1",
        of_commands("exit_status_and_written_cases"),
    ),
    "running out of memory ends the run": Fault(
        "bench/command.py",
        "            status = 2\n            continue",
        "            status = 2\n            break",
        of_commands("exit_status_and_written_cases"),
    ),
    "running out of memory is no failure": Fault(
        "bench/command.py",
        "            status = 2\n            continue",
        "            continue",
        of_commands("exit_status_and_written_cases"),
    ),
    "any error is swallowed": Fault(
        "bench/command.py",
        "            if not is_out_of_memory(error):\n                raise\n",
        "",
        of_commands("errors_of_the_benchmark_itself_are_raised"),
    ),
    "Ctrl-C continues with the next case": Fault(
        "bench/command.py",
        'these results are partial", file=sys.stderr)\n            break',
        'these results are partial", file=sys.stderr)',
        of_commands("exit_status_and_written_cases"),
    ),
    "Ctrl-C loses the case in progress": Fault(
        "bench/command.py",
        "if job.result.timings or job.result.failures or status != INTERRUPTED:",
        "if status != INTERRUPTED:",
        of_commands("exit_status_and_written_cases"),
    ),
    "files are written at the end": Fault(
        "bench/command.py",
        "            _write(command, options, run)  # after",
        "            i < len(jobs) - 1 or _write(command, options, run)  # after",
        of_commands("files_are_written_after_each_case"),
    ),
    "a file that cannot be written is no error": Fault(
        "bench/command.py",
        "    except OSError as error:\n        command.error(str(error))",
        "    except OSError:\n        pass",
        of_commands("file_that_becomes_unwritable"),
    ),
    "an earlier file is emptied before results exist": Fault(
        "bench/command.py",
        'path.open("ab").close()',
        'path.open("wb").close()',
        of_commands("existing_files_are_kept_until_there_are_results"),
    ),
    "an empty file is left where nothing fits": Fault(
        "bench/command.py",
        "            if not was_there:\n                path.unlink()\n",
        "",
        of_commands("cases_too_large_for_memory_are_not_started"),
    ),
    "a case that exactly fits memory is refused": Fault(
        "bench/command.py",
        "job.bytes_needed > free",
        "job.bytes_needed >= free",
        of_commands("cases_too_large_for_memory_are_not_started"),
    ),
    "a gigabyte is 2^30 bytes": Fault(
        "bench/command.py",
        "job.bytes_needed / 1e9",
        "job.bytes_needed / 2**30",
        of_commands("memory_is_reported_in_gigabytes"),
    ),
    "memory is not limited": Fault(
        "bench/command.py",
        'limited_memory if options.device == "cpu"',
        'limited_memory if options.device != "cpu"',
        of_commands("memory_is_limited_during_measurements"),
    ),
    "the least number is too small": Fault(
        "bench/command.py",
        "int(text) < minimum:",
        "int(text) <= minimum:",
        of_commands("limits_of_numeric_options"),
    ),
    "a NaN option passes": Fault(
        "bench/command.py",
        "if not least <= value <= most:",
        "if value < least or value > most:",
        of_commands("limits_of_numeric_options"),
    ),
    "Markdown does not name its command": Fault(
        "bench/command.py",
        "{run.summary}. `{run.environment['command']}`",
        "{run.summary}.",
        of_commands("markdown_names_the_machine_and_the_command"),
    ),
    "a closed pipe is a success": Fault(
        "bench/__main__.py", "return 141", "return 0", of_commands("exit_status_of_the_program")
    ),
    "Ctrl-C without results is a success": Fault(
        "bench/__main__.py",
        "        return 130\n",
        "        return 0\n",
        of_commands("exit_status_of_the_program"),
    ),
    "the status of the command is lost": Fault(
        "bench/__main__.py",
        "    return command(arguments)\n",
        "    command(arguments)\n    return 0\n",
        of_commands("the_default_command_is_loss"),
    ),
    "a missing module of the benchmark is reported as a package to install": Fault(
        "bench/__main__.py",
        "        if error.name not in NEEDED:\n            raise\n",
        "",
        of_commands("the_default_command_is_loss"),
    ),
}

LOSS_FAULTS = {
    "absent providers are not reported": Fault(
        "bench/loss.py",
        "candidates, result.absent = gather(",
        "candidates, _ = gather(",
        of_commands("timed_and_absent_providers_of_a_case"),
    ),
    "providers get float32 instead of the case's dtype": Fault(
        "bench/loss.py",
        "Request(case, result.dtype, options.device)",
        'Request(case, "float32", options.device)',
        of_commands("timed_and_absent_providers_of_a_case"),
    ),
    "--quick has no effect on the rounds": Fault(
        "bench/loss.py",
        'if options.quick or options.device == "cuda" else LIMITS',
        'if options.device == "cuda" else LIMITS',
        of_commands("rounds_of_the_loss"),
    ),
    "--rounds is a minimum": Fault(
        "bench/loss.py",
        "limits = (options.rounds, 0.0)",
        "limits = (options.rounds, limits[1])",
        of_commands("rounds_of_the_loss"),
    ),
    "each mode's memory is a step's": Fault(
        "bench/loss.py",
        "peaks.get(name, {}).get(mode)",
        'peaks.get(name, {}).get("both")',
        of_commands("memory_work_and_modes_of_each_timing"),
    ),
    "a provider without a requested mode is measured": Fault(
        "bench/loss.py",
        "    candidates = [one for one in candidates if set(modes) & set(one.modes)]\n",
        "",
        of_commands("memory_work_and_modes_of_each_timing"),
    ),
    "a provider that repeats an earlier result passes": Fault(
        "bench/loss.py",
        "    workload.original.neg_()\n",
        "",
        of_providers("provider_that_fails_later_is_left_out"),
    ),
    "results are not checked after timing": Fault(
        "bench/loss.py",
        "        check_again(workload, passed, case, result, show)\n",
        "",
        of_providers("provider_that_fails_later_is_left_out"),
    ),
    "a provider that fails later is timed": Fault(
        "bench/loss.py",
        "{**result.failures, **result.absent}",
        "{**result.absent}",
        of_providers("provider_that_fails_later_is_left_out"),
    ),
    "a provider's error during timing is lost": Fault(
        "bench/loss.py",
        "for name, error in raised.items():",
        "for name, error in {}.items():",
        of_providers("provider_that_fails_later_is_left_out"),
    ),
    "an error of the fused form is no failure": Fault(
        "bench/loss.py",
        'elif provider.startswith("fused_xent"):',
        'elif provider == "fused_xent":',
        of_providers("errors_of_this_package_are_failures"),
    ),
    "the fused form moves as many bytes as the others": Fault(
        "bench/loss.py",
        "bytes_moved(*inputs, mode, name in fused)",
        "bytes_moved(*inputs, mode)",
        ("tests/test_bench.py::test_loss",),
    ),
    "--ignored is lost": Fault(
        "bench/loss.py",
        "options.label_smoothing, options.ignored, options.lse",
        "options.label_smoothing, 0.0, options.lse",
        of_commands("options_reach_the_measured_cases"),
    ),
    "a sweep has no soft labels": Fault(
        "bench/loss.py",
        "options.device, options.soft, loss_options)",
        "options.device, False, loss_options)",
        of_commands("soft_labels_reach_the_measured_cases"),
    ),
    "a sweep measures every mode": Fault(
        "bench/loss.py",
        'options.mode or ["forward", "both"]',
        "options.mode or list(MODES)",
        of_commands("cases_of_a_sweep"),
    ),
    "--quick sweeps all": Fault(
        "bench/loss.py",
        "(QUICK_VOCABS if options.quick else SWEPT_VOCABS)",
        "SWEPT_VOCABS",
        of_commands("cases_of_a_sweep"),
    ),
    "--dtype is of the first case alone": Fault(
        "bench/loss.py",
        "dict.fromkeys(options.dtype or case.dtypes)",
        "dict.fromkeys(case.dtypes)",
        of_commands("cases_of_the_loss"),
    ),
    "rows and classes of a case are swapped": Fault(
        "bench/loss.py",
        '"custom", (options.rows, options.vocab)',
        '"custom", (options.vocab, options.rows)',
        of_commands("cases_of_the_loss"),
    ),
    "the memory that float64 needs is halved": Fault(
        "bench/loss.py",
        "FLOAT32, FLOAT64 = 4, 8 * 8",
        "FLOAT32, FLOAT64 = 4, 4 * 8",
        of_commands("memory_estimate_of_a_loss"),
    ),
}

LINEAR_FAULTS = {
    "the memory of a linear layer is lost": Fault(
        "bench/linear.py",
        "*work, peaks.get(name), seconds",
        "*work, None, seconds",
        of_commands("memory_of_each_linear_layer"),
    ),
    "every linear layer is of float32": Fault(
        "bench/linear.py",
        "Workload(result.shape, DTYPES[result.dtype]",
        'Workload(result.shape, DTYPES["float32"]',
        of_commands("memory_of_each_linear_layer"),
    ),
    "the logits of a linear layer grow with its features": Fault(
        "bench/linear.py",
        " * n_features**-0.5",
        "",
        of_results("inputs_of_a_linear_layer_are_the_same_in_every_run"),
    ),
    "a NaN gradient of a linear layer passes": Fault(
        "bench/linear.py",
        "if not error <= tolerance:",
        "if error > tolerance:",
        of_providers("check_of_a_linear_layer"),
    ),
    "too small a loss of a linear layer passes": Fault(
        "bench/linear.py",
        "abs(loss.item() / exact_loss - 1)",
        "loss.item() / exact_loss - 1",
        of_providers("check_of_a_linear_layer"),
    ),
    "a linear layer may be 6 % off in bfloat16": Fault(
        "bench/linear.py",
        "torch.bfloat16: 3e-2",
        "torch.bfloat16: 6e-2",
        of_providers("check_of_a_linear_layer"),
    ),
    "the gradient of the last chunk stands for all": Fault(
        "bench/linear.py",
        "grad_weight += for_weight",
        "grad_weight = for_weight",
        of_providers("check_of_a_linear_layer"),
    ),
    "a linear layer's target that is written to passes": Fault(
        "bench/linear.py",
        "if not torch.equal(target, self.target):",
        "if target.shape != self.target.shape:",
        of_providers("linear_provider_that_fails_later_is_left_out"),
    ),
    "a linear layer's target is not restored": Fault(
        "bench/linear.py",
        "            self.target.copy_(target)\n",
        "",
        of_providers("linear_provider_that_fails_later_is_left_out"),
    ),
    "a linear layer that repeats an earlier result passes": Fault(
        "bench/linear.py",
        "        self.hidden.neg_()\n",
        "",
        of_providers("linear_provider_that_fails_later_is_left_out"),
    ),
    "a linear layer is not checked after timing": Fault(
        "bench/linear.py",
        "        for name, loss_function in passed:",
        "        for name, loss_function in passed[:0]:",
        of_providers("linear_provider_that_fails_later_is_left_out"),
    ),
    "a linear layer's error during timing is lost": Fault(
        "bench/linear.py",
        "for name, error in raised.items():",
        "for name, error in {}.items():",
        of_providers("linear_provider_that_fails_later_is_left_out"),
    ),
    "a linear layer that fails later is timed": Fault(
        "bench/linear.py",
        "{**result.failures, **result.absent}",
        "{**result.absent}",
        of_providers("linear_provider_that_fails_later_is_left_out"),
    ),
    "memory of a linear layer includes its outputs": Fault(
        "bench/linear.py",
        "max(0, memory.bytes - sum(output.nbytes for output in outputs))",
        "max(0, memory.bytes)",
        of_results("memory_of_a_linear_layer_excludes_its_outputs"),
    ),
    "the third product is the second": Fault(
        "bench/linear.py",
        "logits[0].t() @ self.hidden",
        "logits[0] @ self.weight",
        of_timing("bare_products_are_those_of_a_linear_layer"),
    ),
    "a linear step finds warm caches": Fault(
        "bench/linear.py",
        "        start = self.clock.start()\n        outputs = run()",
        "        start = self.clock.mark()\n        outputs = run()",
        of_timing("a_linear_step_is_timed_with_cold_caches"),
    ),
    "a linear layer has two products": Fault(
        "bench/linear.py",
        "self.operations = 2 * (self.logits_products + 2) *",
        "self.operations = 4 *",
        ("tests/test_bench.py::test_linear",),
    ),
    "--quick has no effect on a linear layer's rounds": Fault(
        "bench/linear.py",
        "(QUICK_ROUNDS if options.quick else ROUNDS)",
        "ROUNDS",
        of_commands("rounds_of_a_linear_layer"),
    ),
    "cut-cross-entropy is never exact": Fault(
        "bench/linear.py",
        "partial(linear_cross_entropy, filter_eps=None)",
        "linear_cross_entropy",
        of_adapters("adapters_of_linear_peers"),
    ),
    "code compiled for the previous case is kept": Fault(
        "bench/linear.py",
        "    torch.compiler.reset()\n",
        "",
        of_adapters("torch_compile_compiles_for_each_case"),
    ),
    "memory of a linear layer is for all logits": Fault(
        "bench/linear.py",
        "min(n_rows * n_classes, max(CHUNK, n_classes))",
        "(n_rows * n_classes)",
        of_commands("memory_estimate_of_a_linear_layer"),
    ),
}

OVERHEAD_FAULTS = {
    "calls are timed in forms that overwrite the logits": Fault(
        "bench/overhead.py",
        '    candidates = [one for one in candidates if "forward" in one.modes]\n',
        "",
        of_overhead("every_case_in_both_modes"),
    ),
    "a call has as many threads as torch": Fault(
        "bench/overhead.py",
        "    torch.set_num_threads(1)\n",
        "",
        of_overhead("every_case_in_both_modes"),
    ),
    "torch keeps one thread": Fault(
        "bench/overhead.py",
        "        torch.set_num_threads(n_threads)\n",
        "        pass\n",
        of_overhead("every_case_in_both_modes"),
    ),
    "--quick has no effect on the samples of calls": Fault(
        "bench/overhead.py",
        "(QUICK_ROUNDS if options.quick else ROUNDS)",
        "ROUNDS",
        of_overhead("cases_and_rounds"),
    ),
    "the first calls are timed": Fault(
        "bench/overhead.py",
        '        interleave(timers, 1, 0.0, lambda _: show("warming up"), {})\n',
        "",
        of_overhead("cases_and_rounds"),
    ),
    "the module of torch is measured as that of fused_xent": Fault(
        "bench/overhead.py",
        'Provider("fused_xent", fused_xent.CrossEntropyLoss())',
        'Provider("fused_xent", torch.nn.CrossEntropyLoss())',
        of_overhead("the_case_module_calls_modules"),
    ),
    "an error of a call is lost": Fault(
        "bench/overhead.py",
        "for name, error in raised.items():",
        "for name, error in {}.items():",
        of_overhead("provider_that_raises_while_timed_is_left_out"),
    ),
    "a call that fails later is timed": Fault(
        "bench/overhead.py",
        "left_out = {**result.failures, **result.absent}",
        "left_out = {}",
        of_overhead("provider_that_raises_while_timed_is_left_out"),
    ),
    "a call without a gradient makes a graph": Fault(
        "bench/overhead.py",
        'torch.set_grad_enabled(mode != "forward")',
        "torch.set_grad_enabled(True)",
        of_overhead("forward_has_no_graph_and_both_has_fresh_gradients"),
    ),
    "gradients of calls add up": Fault(
        "bench/overhead.py",
        "            leaf.grad = None\n",
        "            pass\n",
        of_overhead("forward_has_no_graph_and_both_has_fresh_gradients"),
    ),
    "providers share their inputs": Fault(
        "bench/overhead.py",
        "one.detach().clone() for one",
        "one.detach() for one",
        of_overhead("providers_do_not_share_inputs"),
    ),
    "a sample on a CPU is of all calls": Fault(
        "bench/overhead.py",
        "return {(mode, provider): (issued - start) / CALLS}",
        "return {(mode, provider): issued - start}",
        of_overhead("samples_of_a_cpu"),
    ),
    "the host's time is the GPU's": Fault(
        "bench/overhead.py",
        'of_host = {(f"host {mode}", provider): (issued - start) / CALLS}',
        'of_host = {(f"host {mode}", provider): (done - start) / CALLS}',
        of_overhead("samples_of_a_gpu_have_host_time"),
    ),
    "every event is a kernel": Fault(
        "bench/overhead.py",
        '"LaunchKernel" in event.name for',
        "bool(event.name) for",
        of_overhead("kernel_count_is_that_of_one_call"),
    ),
    "a call is shown as how many times faster it is": Fault(
        "bench/tables.py",
        'f"{timing.median / eager.median:.2f}" if eager else',
        'f"{eager.median / timing.median:.2f}" if eager else',
        of_overhead("table", "markdown"),
    ),
    "Markdown of calls has every mode": Fault(
        "bench/tables.py",
        "overhead_markdown(found, modes)",
        "overhead_markdown(found, list(MODE_TITLES))",
        of_overhead("markdown"),
    ),
    "compared calls have too few digits": Fault(
        "bench/compare.py",
        "if seconds > 1e-3 else",
        "if seconds > 1e-6 else",
        of_overhead("compared_short_times_keep_their_digits"),
    ),
}

PROVIDER_FAULTS = {
    "the form in place is not in place": Fault(
        "bench/providers.py",
        "inplace = partial(loss, inplace_backward=True)",
        "inplace = partial(loss)",
        of_adapters("options_passed_to_this_package"),
    ),
    "the fused form is not fused": Fault(
        "bench/providers.py",
        "fused = partial(loss, grad_in_forward=True)",
        "fused = partial(loss)",
        of_adapters("options_passed_to_this_package"),
    ),
    "this package is not given the options": Fault(
        "bench/providers.py",
        "loss = partial(fused_xent.cross_entropy, **wanted)",
        "loss = partial(fused_xent.cross_entropy)",
        of_adapters("options_passed_to_this_package"),
    ),
    "flash-attention is not given the options": Fault(
        "bench/providers.py",
        'Provider("flash-attn", CrossEntropyLoss(**wanted))',
        'Provider("flash-attn", CrossEntropyLoss())',
        of_adapters("adapters_of_peers"),
    ),
    "QuACK's form in place is not in place": Fault(
        "bench/providers.py",
        "partial(cross_entropy, inplace_backward=True)",
        "partial(cross_entropy)",
        of_adapters("peers_are_measured_in_place_too"),
    ),
    "Transformer Engine is given float16": Fault(
        "bench/providers.py",
        'if request.dtype == "float16":\n        raise',
        'if request.dtype == "half":\n        raise',
        of_adapters("transformer_engine_has_no_float16"),
    ),
    "forward + backward has only the backward": Fault(
        "bench/providers.py",
        '"both": step.forward + step.backward',
        '"both": step.backward',
        of_results("a_step_is_forward_and_backward"),
    ),
    "a mode that was not requested is timed": Fault(
        "bench/providers.py",
        'if "forward" in wanted:',
        'if "forward" in self.modes:',
        of_timing("only_requested_modes_are_timed"),
    ),
    "torch.compile gets dynamic sizes": Fault(
        "bench/providers.py",
        "torch.compile(loss, dynamic=False)",
        "torch.compile(loss)",
        of_adapters("torch_compile_compiles_for_each_case"),
    ),
    "--provider has no effect": Fault(
        "bench/providers.py",
        "if names and name not in names:",
        "if names and not name:",
        of_adapters("providers_are_selected_by_name"),
    ),
    "a package that does not load ends the run": Fault(
        "bench/providers.py",
        "except Exception as error:  # a package",
        "except ImportError as error:  # a package",
        of_adapters("providers_are_selected_by_name"),
    ),
}

RESULT_FAULTS = {
    "the processor is its family": Fault(
        "bench/results.py",
        'line.startswith("model name")',
        'line.startswith("cpu")',
        of_tables("name_of_the_processor"),
    ),
    "the median is a mean": Fault(
        "bench/results.py",
        "return statistics.median(self.seconds)",
        "return statistics.mean(self.seconds)",
        of_results("figures_of_a_timing"),
    ),
    "the quartiles of few samples are extrapolated": Fault(
        "bench/results.py",
        "if len(self.seconds) < 4:",
        "if len(self.seconds) < 2:",
        of_results("figures_of_a_timing"),
    ),
    "a ratio is inverted": Fault(
        "bench/results.py",
        "other.median / timing.median if other",
        "timing.median / other.median if other",
        of_results("figures_of_a_timing"),
    ),
    "a file has only the median": Fault(
        "bench/results.py",
        'path.write_text(json.dumps(asdict(self), indent=1) + "\\n")',
        "path.write_text(json.dumps(asdict(self, dict_factory=lambda pairs: {k: v[:1] "
        'if k == "seconds" else v for k, v in pairs}), indent=1))',
        of_tables("files_have_every_sample"),
    ),
    "the least error is the largest": Fault(
        "bench/results.py",
        "max(errors.values()) if errors",
        "min(errors.values()) if errors",
        of_tables("lines_of_csv"),
    ),
    "CSV has the share of the read": Fault(
        "bench/results.py",
        'result.share(t, "copy"), t.operations',
        'result.share(t, "read"), t.operations',
        of_tables("lines_of_csv"),
    ),
    "results with other options are the same": Fault(
        "bench/results.py",
        "self.dtype, self.labels, options\n",
        "self.dtype, self.labels\n",
        of_results("key_has_shape_dtype_labels_and_options"),
    ),
    "a title has no options": Fault(
        "bench/results.py",
        '        parts += [f"{name} {value:g}" for name, value in self.options.items()]\n',
        "",
        of_tables("title_has_shape_dtype_labels_and_options"),
    ),
    "a command is not written as it was typed": Fault(
        "bench/results.py",
        'shlex.join(["python", "-m", "bench", *sys.argv[1:]])',
        '" ".join(["python", "-m", "bench", *sys.argv[1:]])',
        of_tables("environment"),
    ),
    "negative bytes are read": Fault(
        "bench/results.py",
        "if timing.bytes < 0 or timing.operations < 0:",
        "if timing.operations < 0:",
        of_results("broken_files"),
    ),
    "true is a number of seconds": Fault(
        "bench/results.py",
        "if not isinstance(one, of) or isinstance(one, bool):",
        "if not isinstance(one, of):",
        of_results("broken_files"),
    ),
    "an unknown benchmark is read": Fault(
        "bench/results.py",
        '"benchmark", BENCHMARKS)',
        '"benchmark")',
        of_results("broken_files"),
    ),
    "a GPU is not in the environment": Fault(
        "bench/results.py",
        'env | gpu_environment() if device == "cuda"',
        'env | gpu_environment() if device == "gpu"',
        of_tables("environment"),
    ),
}

SHOWN_FAULTS = {
    "the README knows one mode": Fault(
        "bench/readme.py",
        r"(?: (\w+))?",
        r"(?: (both))?",
        of_tables("tables_of_a_readme"),
    ),
    "a roofline's table is printed only with --markdown": Fault(
        "bench/roofline.py",
        "    if not options.markdown:\n        show(run)",
        "    if options.markdown:\n        show(run)",
        of_commands("markdown_has_no_roofline_table"),
    ),
    "a megabyte is 2^20 bytes": Fault(
        "bench/tables.py",
        'f"{size / 1e6:.1f}"',
        'f"{size / 2**20:.1f}"',
        of_tables("table_of_a_loss"),
    ),
    "a table is in microseconds": Fault(
        "bench/tables.py",
        'return (\n        f"{timing.median * 1e3:.2f}",',
        'return (\n        f"{timing.median * 1e6:.2f}",',
        of_tables("table_of_a_loss"),
    ),
    "GB/s are GiB/s": Fault(
        "bench/tables.py",
        'f"{timing.bandwidth / 1e9:.1f}",\n        percent',
        'f"{timing.bandwidth / 2**30:.1f}",\n        percent',
        of_tables("table_of_a_loss"),
    ),
    "the share is of the read": Fault(
        "bench/tables.py",
        'result.share(timing, "copy")',
        'result.share(timing, "read")',
        of_tables("table_of_a_loss"),
    ),
    "the slowest is green": Fault(
        "bench/tables.py",
        "fastest = min(",
        "fastest = max(",
        of_tables("the_fastest_of_each_mode_is_green"),
    ),
    "the error is grad_hidden's": Fault(
        "bench/tables.py",
        '.get("grad_weight")',
        '.get("grad_hidden")',
        of_tables("table_of_a_linear_layer"),
    ),
    "the ratio to bare products is inverted": Fault(
        "bench/tables.py",
        "{timing.median / bare.median:.2f}",
        "{bare.median / timing.median:.2f}",
        of_tables("table_of_a_linear_layer"),
    ),
    "a failure is not in the table": Fault(
        "bench/tables.py",
        "{**result.absent, **result.failures}.items()",
        "result.absent.items()",
        of_tables("table_of_a_linear_layer"),
    ),
    "the README's ratios are swapped": Fault(
        "bench/tables.py",
        '(" eager", ".compile")',
        '(".compile", " eager")',
        of_tables("markdown_of_losses"),
    ),
    "the README has every mode": Fault(
        "bench/readme.py",
        ".results, mode, ",
        ".results, None, ",
        of_tables("tables_of_a_readme"),
    ),
    "a table of memory has every mode": Fault(
        "bench/tables.py",
        "if timing.mode == mode:",
        "if timing.mode:",
        of_tables("markdown_of_memory"),
    ),
    "the README has no memory": Fault(
        "bench/readme.py",
        "bool(memory)",
        "False",
        of_tables("tables_of_a_readme"),
    ),
    "the README's first table is in all places": Fault(
        "bench/readme.py",
        "begin, file, mode, memory, end = match.groups()",
        "begin, file, mode, memory, end = TABLE.search(text).groups()",
        of_tables("tables_of_a_readme"),
    ),
    "a README that cannot be made is no error": Fault(
        "bench/readme.py",
        "file=sys.stderr)\n        return 2",
        "file=sys.stderr)\n        return 0",
        of_tables("pages_are_unchanged_if_a_file_is_broken"),
    ),
    "tables of a page are written before those of the next are made": Fault(
        "bench/readme.py",
        "written = {page: with_tables(text) for page, text in texts.items()}",
        "written = {page: page.write_text(t) and t for page, t in\n"
        "                   ((page, with_tables(text)) for page, text in texts.items())}",
        of_tables("pages_are_unchanged_if_a_file_is_broken"),
    ),
    "pages in folders of docs/ have no tables": Fault(
        "bench/readme.py",
        '.rglob("*.md")',
        '.glob("*.md")',
        of_tables("tables_of_a_readme"),
    ),
    "a plot has the classes in the order of the file": Fault(
        "bench/plots.py",
        "        one.sort(key=lambda result: result.n_classes)\n",
        "        pass\n",
        of_tables("plots_of_a_sweep"),
    ),
    "every axis is of the first mode": Fault(
        "bench/plots.py",
        "draw(axis, results, mode)",
        "draw(axis, results, modes[0])",
        of_tables("plots_of_a_sweep"),
    ),
    "the logits are as large as their copy": Fault(
        "bench/plots.py",
        "timing.bytes / 2 / 1e6",
        "timing.bytes / 1e6",
        of_tables("plots_of_a_sweep"),
    ),
    "different options share a plot": Fault(
        "bench/plots.py",
        '(result.dtype, f"{labels} {options}".strip())',
        "(result.dtype, labels)",
        of_tables("different_options_have_separate_plots"),
    ),
    "the quartiles are not drawn": Fault(
        "bench/plots.py",
        "for seconds in t.quartiles[::-1]]",
        "for seconds in (t.median, t.median)]",
        of_tables("plots_of_a_sweep"),
    ),
    "names of lines overlap": Fault(
        "bench/plots.py",
        "at = max(at + line_height, line.get_ydata()[-1])",
        "at = line.get_ydata()[-1]",
        of_tables("names_of_lines_do_not_overlap"),
    ),
    "names are at the first points of lines": Fault(
        "bench/plots.py",
        "key=lambda line: line.get_ydata()[-1])",
        "key=lambda line: line.get_ydata()[0])",
        of_tables("names_of_lines_do_not_overlap"),
    ),
    "every mode is plotted": Fault(
        "bench/plots.py",
        "of_mode = not modes or timing.mode in modes",
        "of_mode = True",
        of_tables("timings_of_one_mode_and_provider"),
    ),
    "a chosen provider leaves out the copy": Fault(
        "bench/plots.py",
        "return timing.mode in BASELINES or (",
        "return timing.mode is None or (",
        of_tables("timings_of_one_mode_and_provider"),
    ),
    "a roofline has lost its roof": Fault(
        "bench/plots.py",
        "*rooflines(run)):",
        "*rooflines(swept)):",
        of_tables("plots_of_one_mode_and_provider"),
    ),
    "only the first file is plotted": Fault(
        "bench/plots.py",
        "for one in runs for result in one.results",
        "for one in runs[:1] for result in one.results",
        of_tables("files_of_plots"),
    ),
    "--out has no effect": Fault(
        "bench/plots.py",
        "folder = options.out or options.file[0].parent",
        "folder = options.file[0].parent",
        of_tables("files_of_plots"),
    ),
    "SVG files are not reproducible": Fault(
        "bench/plots.py",
        'plt.rcParams["svg.hashsalt"] = "bench"',
        'plt.rcParams["svg.hashsalt"] = None',
        of_tables("files_of_plots"),
    ),
    "rates of the roofline are by bytes": Fault(
        "bench/plots.py",
        "timing.rate / 1e9,\n                MARKERS",
        "timing.bandwidth / 1e9,\n                MARKERS",
        of_tables("plot_of_a_roofline"),
    ),
    "the roof is the larger of both limits": Fault(
        "bench/roofline.py",
        "return min(self.bandwidth * intensity, self.rate)",
        "return max(self.bandwidth * intensity, self.rate)",
        of_results("roof"),
    ),
    "the roof is of the slowest read": Fault(
        "bench/roofline.py",
        "Roof(max(bandwidths), max(rates))",
        "Roof(bandwidths[1], max(rates))",
        of_results("roof"),
    ),
    "the roof is of every dtype": Fault(
        "bench/roofline.py",
        "            for timing in result.timings if result.dtype == dtype else ():\n"
        "                if timing.mode in BASELINES",
        "            for timing in result.timings:\n                if timing.mode in BASELINES",
        of_tables("plot_of_a_roofline"),
    ),
    "--quick has no effect on a roofline": Fault(
        "bench/roofline.py",
        "        linear_case = QUICK_LINEAR[options.device]\n",
        '        cases, linear_case = linear.CASES["cpu"], "llama3"\n',
        of_commands("cases_of_a_roofline"),
    ),
}

DEMO_FAULTS = {
    "NaN curves agree": Fault(
        "bench/demo.py",
        "return max(differences) if all(map(math.isfinite, differences)) else math.inf",
        "return max(filter(math.isfinite, differences))",
        of_demo("curves_must_agree"),
    ),
    "a smaller loss agrees": Fault(
        "bench/demo.py", "abs(a - b) for a, b", "a - b for a, b", of_demo("curves_must_agree")
    ),
    "the demo's status is always 0": Fault(
        "bench/demo.py", "return 0 if agree else 1", "return 0", of_demo("curves_must_agree")
    ),
    "one curve of several must agree": Fault(
        "bench/demo.py", "agree = all(", "agree = any(", of_demo("curves_must_agree")
    ),
    "the demo's times are means": Fault(
        "bench/demo.py",
        "statistics.median(run.column(key))",
        "statistics.mean(run.column(key))",
        of_demo("table_of_the_demo"),
    ),
    "the demo's ratios are inverted": Fault(
        "bench/demo.py",
        "{medians[0] / t:.1f}",
        "{t / medians[0]:.1f}",
        of_demo("table_of_the_demo"),
    ),
    "the time of a step is the loss's": Fault(
        "bench/demo.py",
        '("time per step", "step_seconds")',
        '("time per step", "loss_seconds")',
        of_demo("table_of_the_demo"),
    ),
    "the demo has no time limit": Fault(
        "bench/demo.py",
        "if perf_counter() - start > MAX_SECONDS:",
        "if perf_counter() - start < 0:",
        of_demo("runs_take_turns"),
    ),
    "the demo's text has the library's tests": Fault(
        "bench/demo.py",
        '"dist-packages", "test", "tests"',
        '"dist-packages", "test"',
        of_demo("text_excludes_tests_of_the_library"),
    ),
    "the demo drops words that it does not know": Fault(
        "bench/demo.py",
        "                tokens.extend(number[character] for character in word)",
        "                pass",
        of_demo("words_and_characters"),
    ),
    "a failed run is waited for": Fault(
        "bench/demo.py",
        "        if not line:\n            raise SystemExit("
        'f"bench.demo: the run with {self.loss} ended early, see above")\n',
        '        line = line or "{}"\n',
        of_demo("a_run_that_fails_ends_the_demo"),
    ),
    "the demo's inputs are its targets": Fault(
        "bench/demo_training.py",
        "windows[:, 1:].flatten()",
        "windows[:, :-1].flatten()",
        of_demo("targets_are_the_next_words"),
    ),
    "the demo's model is not causal": Fault(
        "bench/demo_training.py",
        "self.block(hidden, src_mask=self.mask, is_causal=True)",
        "self.block(hidden)",
        of_demo("model_is_causal"),
    ),
    "the demo's fused form is not fused": Fault(
        "bench/demo_training.py",
        "partial(fused_xent.cross_entropy, grad_in_forward=True)",
        "partial(fused_xent.cross_entropy)",
        of_demo("losses_of_the_demo"),
    ),
    "the demo's loss has the model's backward in it": Fault(
        "bench/demo_training.py",
        "seconds(backward_start, arrivals[0])",
        "seconds(backward_start, end)",
        of_demo("seconds_of_a_step"),
    ),
    "the demo's gradients accumulate": Fault(
        "bench/demo_training.py",
        "        self.optimizer.zero_grad()\n",
        "",
        of_demo("step_clears_gradients_and_updates_parameters"),
    ),
    "the demo's runs start with different weights": Fault(
        "bench/demo_training.py",
        "        torch.manual_seed(0)\n",
        "",
        of_demo("each_loss_gives_the_same_training"),
    ),
    "the demo's peak is in kilobytes": Fault(
        "bench/demo_training.py",
        "peak * 1024",
        "peak",
        of_demo("a_run_is_a_process"),
    ),
}

CONFIDENT_FAULTS = {
    "the exact loss of certain rows is added to 1": Fault(
        "bench/confident.py",
        "others.log1p()",
        "(1 + others).log()",
        of_confident("exact_loss_has_all_digits_of_certain_rows"),
    ),
    "the target is among the other classes": Fault(
        "bench/confident.py",
        ".scatter(1, target.unsqueeze(1), 0)",
        "",
        of_confident("exact_loss_has_all_digits_of_certain_rows"),
    ),
    "the runs start from different weights": Fault(
        "bench/confident.py",
        "    torch.manual_seed(0)\n",
        "",
        of_confident("both_losses_train_alike_while_rows_are_uncertain"),
    ),
    "the folder is not checked": Fault(
        "bench/confident.py",
        "if not options.out.is_dir():",
        "if False:",
        of_confident("folder_must_exist"),
    ),
}

COMPARISON = "tests/test_compare.py::test_"
TERMS = (f"{COMPARISON}terms_of_loss_and_gradient",)
TOLERANCE_FAULTS = {
    "every test tolerates four times as much": Fault(
        "tests/compare.py",
        "ERROR = 5e-6",
        "ERROR = 2e-5",
        (f"{COMPARISON}twice_the_tolerance_is_found",),
    ),
    "every test tolerates ten times as much in float64": Fault(
        "tests/compare.py",
        "1e-13 + n_classes",
        "1e-12 + n_classes",
        (f"{COMPARISON}twice_the_tolerance_is_found",),
    ),
    "a truncation is a rounding": Fault(
        "tests/compare.py",
        "torch.finfo(dtype).eps / 2\n\n",
        "torch.finfo(dtype).eps\n\n",
        (f"{COMPARISON}truncation_is_found",),
    ),
    "one rounding more is tolerated": Fault(
        "tests/compare.py",
        "relative = 1.01 * roundings *",
        "relative = 1.01 * (roundings + 1) *",
        (f"{COMPARISON}truncation_is_found",),
    ),
    "the gradient of an ignored row may be slightly off 0": Fault(
        "tests/compare.py",
        "tolerance.masked_fill(truth.gradient_terms == 0, 0)",
        "tolerance",
        (f"{COMPARISON}wrong_gradient_is_found",),
    ),
    "NaN is within the tolerance": Fault(
        "tests/compare.py",
        "unequal & ~((actual - exact).abs() <= tolerance)",
        "unequal & ((actual - exact).abs() > tolerance)",
        (f"{COMPARISON}wrong_gradient_is_found", f"{COMPARISON}wrong_loss_is_found"),
    ),
    "a right NaN is reported as wrong": Fault(
        "tests/compare.py",
        "~((actual == exact) | (actual.isnan() & exact.isnan()))",
        "~(actual == exact)",
        (f"{COMPARISON}nan_and_infinity_may_be_right",),
    ),
    "a loss of another dtype is right": Fault(
        "tests/compare.py",
        "    assert loss.dtype == dtype\n",
        "",
        (f"{COMPARISON}wrong_dtype_or_shape_is_found",),
    ),
    "a gradient of another shape is right": Fault(
        "tests/compare.py",
        "    assert gradient.shape == truth.gradient.shape\n",
        "    gradient = gradient.expand_as(truth.gradient) if gradient.ndim == 2 and "
        "gradient.shape[1] == truth.gradient.shape[1] else truth.gradient.to(dtype)\n",
        (f"{COMPARISON}wrong_dtype_or_shape_is_found",),
    ),
    "the terms of a loss are larger": Fault(
        "tests/compare.py",
        "torch.where(q > 0, log_p, 0) / 10",
        "torch.where(q > 0, log_p, 0)",
        TERMS,
    ),
    "the terms of a mean are a sum's": Fault(
        "tests/compare.py",
        "row_terms = row_terms.sum() / divisor",
        "row_terms = row_terms.sum()",
        TERMS,
    ),
    "the terms of a gradient are a sum's": Fault(
        "tests/compare.py", "q * row_upstream.abs() / divisor", "q * row_upstream.abs()", TERMS
    ),
    "the terms have no upstream": Fault(
        "tests/compare.py", "q * row_upstream.abs() / divisor", "q / divisor", TERMS
    ),
    "smoothed labels are without class weights": Fault(
        "tests/compare.py",
        "(1 - label_smoothing)) + weight * spread",
        "(1 - label_smoothing)) + spread",
        TERMS,
    ),
    "soft labels are smoothed by a sum": Fault(
        "tests/compare.py",
        "label_smoothing) + label_smoothing / n_classes)",
        "label_smoothing) + label_smoothing)",
        TERMS,
    ),
    "the mean's divisor has no weights": Fault(
        "tests/compare.py",
        "return weight.double()[kept].sum() if weight is not None else",
        "return",
        TERMS,
    ),
    "the mean's divisor has ignored rows": Fault(
        "tests/compare.py",
        "target[target != ignore_index].long()",
        "target.clamp(min=0).long().flatten()",
        TERMS,
    ),
}

FROM_OUTSIDE = {
    "--json and --csv are compared as text": Fault(
        "bench/command.py",
        "options.json.resolve() == options.csv.resolve()",
        "options.json == options.csv",
        ("tests/test_bench.py::test_errors",),
    ),
    "a mode that is given twice is measured twice": Fault(
        "bench/loss.py",
        "modes = list(dict.fromkeys(options.mode or MODES))",
        "modes = list(options.mode or MODES)",
        ("tests/test_bench_command.py::test_memory_work_and_modes_of_each_timing",),
    ),
    "no memory is unknown memory": Fault(
        "bench/tables.py",
        'return DASH if size is None else f"{size / 1e6:.1f}"',
        'return f"{size / 1e6:.1f}" if size else DASH',
        ("tests/test_bench_tables.py::test_zero_memory_differs_from_unknown_memory",),
    ),
    "a row longer than a chunk makes empty chunks": Fault(
        "bench/check.py",
        "step = max(1, CHUNK * len(logits) // logits.numel())",
        "step = CHUNK * len(logits) // logits.numel()",
        of_providers("a_row_longer_than_a_chunk_is_a_chunk"),
    ),
}

SPARSE_FAULTS = {
    "labels of a class do not add up": Fault(
        "bench/cases.py",
        "torch.zeros_like(logits).scatter_add(1, target, labels)",
        "torch.zeros_like(logits).scatter(1, target, labels)",
        of_sparse("dense_labels_add_up"),
    ),
    "each class of a row counts as a row": Fault(
        "bench/cases.py",
        "if target.is_floating_point() or is_sparse(logits, target):",
        "if target.is_floating_point():",
        of_sparse("figures_of_several_classes"),
    ),
    "the check divides by the number of classes": Fault(
        "bench/check.py",
        "        if not target.is_floating_point() and not is_sparse(logits, target):\n",
        "        if not target.is_floating_point():\n",
        of_sparse("right_results_pass"),
    ),
    "labels have no title": Fault(
        "bench/results.py",
        "        parts += [LABELS[self.labels]] if LABELS[self.labels] else []\n",
        "",
        of_sparse("command"),
    ),
    "the logits of log-probabilities are computed once": Fault(
        "bench/linear.py",
        "self.logits_products = 2 if n_labels else 1",
        "self.logits_products = 1",
        of_sparse("a_linear_layer_is_checked_and_its_logits_are_computed_twice"),
    ),
    "our labels add up to K": Fault(
        "bench/sparse.py",
        "torch.full((), 1 / classes.size(1), device=logits.device)",
        "torch.ones((), device=logits.device)",
        of_sparse("right_results_pass"),
    ),
    "the fused mode of log-probabilities": Fault(
        "bench/sparse.py",
        'if not request.case.selected and request.dtype != "float16":',
        'if request.dtype != "float16":',
        of_sparse("providers_of_16_bit_logits"),
    ),
    "labels are measured as log-probabilities": Fault(
        "bench/sparse.py",
        'selected = name == "selected"',
        "selected = True",
        of_sparse("command"),
    ),
    "any number of classes": Fault(
        "bench/sparse.py",
        "    if options.k > MOST_LABELS:\n",
        "    if False:\n",
        of_sparse("errors"),
    ),
    "quick cases are as large as all": Fault(
        "bench/sparse.py",
        "cases = QUICK if options.quick else",
        "cases = QUICK if False else",
        of_sparse("quick_cases_are_small"),
    ),
}

PARALLEL_TESTS = "tests/test_bench_parallel.py::"
PARALLEL_FAULTS = {
    "a wrong loss of a split vocabulary is timed": Fault(
        "bench/parallel.py",
        "if not error < max(tolerance, 1e-5):",
        "if error < 0:",
        (f"{PARALLEL_TESTS}test_a_wrong_provider_is_not_timed",),
    ),
    "the bytes of a split vocabulary are those of all processes": Fault(
        "bench/parallel.py",
        "traffic = 3 * rows * classes // n * size",
        "traffic = 3 * rows * classes * size",
        (f"{PARALLEL_TESTS}test_measures_every_provider_in_turn",),
    ),
    "the bare products have no communication": Fault(
        "bench/parallel.py",
        "        dist.all_reduce(total)\n        return total.to",
        "        return total.to",
        (f"{PARALLEL_TESTS}test_measures_a_linear_layer",),
    ),
    "three reductions take a target of another process": Fault(
        "bench/parallel.py",
        ".masked_fill(is_other, 0)\n        dist.all_reduce(target_logit)",
        "\n        dist.all_reduce(target_logit)",
        (f"{PARALLEL_TESTS}test_measures_every_provider_in_turn",),
    ),
}

FAULTS = {
    **SPARSE_FAULTS,
    **CHECK_FAULTS,
    **COMPARE_FAULTS,
    **TIMING_FAULTS,
    **DEVICE_FAULTS,
    **CASE_FAULTS,
    **COMMAND_FAULTS,
    **LOSS_FAULTS,
    **LINEAR_FAULTS,
    **OVERHEAD_FAULTS,
    **PROVIDER_FAULTS,
    **RESULT_FAULTS,
    **SHOWN_FAULTS,
    **DEMO_FAULTS,
    **CONFIDENT_FAULTS,
    **TOLERANCE_FAULTS,
    **FROM_OUTSIDE,
    **PARALLEL_FAULTS,
}
