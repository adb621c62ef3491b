"""The benchmark's output: tables, Markdown, CSV, plots, and the tables of the README."""

import csv
import itertools
import json
import types

import pytest

from bench import linear, plots, readme, results, roofline, tables
from bench.results import Result, Run, Timing, cpu_name, environment

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")


def times(median):
    """Return samples with this median and quartiles of 0.75 and 1.25 times it; the mean differs."""
    return [median, 0.5 * median, 0.75 * median, 1.25 * median, 9 * median]


def loss_result(**changes):
    """Return a result of 100 rows and 1000 classes, in which all figures differ."""
    timings = [
        Timing("copy", "torch", 400_000_000, 0, seconds=times(0.008)),
        Timing("read", "torch", 200_000_000, 0, seconds=times(0.005)),
        Timing("forward", "torch eager", 200_000_000, 400, 7_500_000, times(0.040)),
        Timing("forward", "fused_xent", 200_000_000, 400, 250_000, times(0.010)),
        Timing("both", "torch eager", 600_000_000, 700, 90_000_000, times(0.100)),
        Timing("both", "torch.compile", 600_000_000, 700, None, times(0.060)),
        Timing("both", "fused_xent", 600_000_000, 700, 80_000_000, times(0.030)),
    ]
    result = Result("loss", "own", (100, 1000), "float32", timings=timings)
    result.errors = {"fused_xent": {"loss": 1e-7, "gradient": 3e-6, "scale": 2e-6}}
    result.absent = {"apex": "needs a GPU", "quack-kernels": "needs a GPU"}
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def linear_result():
    timings = [
        Timing("step", linear.BARE, 100_000, 6_000_000_000, None, times(0.1)),
        Timing("step", "torch eager", 100_000, 6_000_000_000, 50_000_000, times(0.4)),
        Timing("step", "fused_xent", 100_000, 6_000_000_000, 2_000_000, times(0.125)),
    ]
    result = Result("linear", "own", (10, 20, 30), "bfloat16", timings=timings)
    errors = {"grad_hidden": 1e-3, "grad_weight": 2e-3}
    result.errors = dict.fromkeys(("torch eager", "fused_xent"), errors)
    result.failures = {"faulty": "loss is 1.0e-01 off float64's"}
    return result


def shown(result, capsys):
    tables.show(result, tables.Output())
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_table_of_a_loss(capsys):
    """ms, MB and GB/s; shares of the copy, and ratios to eager in the same mode."""
    lines = shown(loss_result(), capsys)
    assert "own 100x1000 float32" in lines
    assert "only the logits: copy 8.00 ms, 50.0 GB/s; read 5.00 ms, 40.0 GB/s" in lines
    assert "ms ± MB GB/s of copy vs eager memory MB" in lines
    i, j = lines.index("forward (no grad)"), lines.index("forward + backward")
    assert lines[i + 1 : j] == [
        "torch eager 40.00 25% 200.0 5.0 10% 1.0x 7.5",
        "fused_xent 10.00 25% 200.0 20.0 40% 4.0x 0.2",
    ]
    assert lines[j + 1 :] == [
        "torch eager 100.00 25% 600.0 6.0 12% 1.0x 90.0",
        "torch.compile 60.00 25% 600.0 10.0 20% 1.7x -",
        "fused_xent 30.00 25% 600.0 20.0 40% 3.3x 80.0",
        "- apex, quack-kernels: needs a GPU",
    ]


def test_table_of_a_linear_layer(capsys):
    """GFLOP/s, the time as a multiple of the bare products, the error of grad_weight."""
    lines = shown(linear_result(), capsys)
    assert "ms ± GFLOP/s x bare vs eager memory MB error" in lines
    assert lines[-5:] == [
        "bare products 100.0 25% 60 1.00 4.0x - -",
        "torch eager 400.0 25% 15 4.00 1.0x 50.0 2.0e-03",
        "fused_xent 125.0 25% 48 1.25 3.2x 2.0 2.0e-03",
        "faulty - - - - - - -",
        "- faulty: loss is 1.0e-01 off float64's",
    ]


def test_the_fastest_of_each_mode_is_green(monkeypatch):
    rows = []
    known = tables.Table.add_row
    monkeypatch.setattr(
        tables.Table,
        "add_row",
        lambda table, *cells, style="": (
            rows.append((cells[0].strip(), style)) or known(table, *cells, style=style)
        ),
    )
    tables.show(loss_result(), tables.Output())
    green = [name for name, style in rows if "green" in style]
    assert green == ["fused_xent", "fused_xent"]
    assert [name for name, style in rows if "bold" in style] == green


def test_notes_explain_the_columns_in_use():
    of_loss, of_linear = (list(tables.notes([one])) for one in (loss_result(), linear_result()))
    assert of_loss[0] == of_linear[0]
    assert [of_loss[1][:4], of_linear[1][:7]] == ["MB: ", "x bare:"]
    both = list(tables.notes([loss_result(), loss_result(), linear_result()]))
    assert both == [*of_loss, of_linear[1]]


def test_markdown_of_losses():
    """One column per provider; speedups over eager and torch.compile in parentheses."""
    case = "own 100x1000 float32"
    assert list(tables.markdown([loss_result()])) == [
        "| case | one copy | torch eager | fused_xent | torch.compile |",
        "|---|---:|---:|---:|---:|",
        f"| {case}, forward (no grad) | 8.00 | 40.00 | 10.00 | - |",
        f"| {case}, forward + backward | 8.00 | 100.00 | 30.00 (3.3x / 2.0x) | 60.00 |",
    ]
    assert list(tables.markdown([loss_result()], "both")) == [
        "| forward + backward | one copy | torch eager | torch.compile | fused_xent |",
        "|---|---:|---:|---:|---:|",
        f"| {case} | 8.00 | 100.00 | 60.00 | 30.00 (3.3x / 2.0x) |",
    ]


def test_markdown_of_memory():
    """One row per provider; a dash where memory was not measured."""
    case = "own 100x1000 float32, forward + backward"
    assert list(tables.markdown([loss_result()], "both", has_memory=True)) == [
        "| case | | ms | memory, MB |",
        "|---|---|---:|---:|",
        f"| {case} | torch eager | 100.00 | 90.0 |",
        "|  | torch.compile | 60.00 | - |",
        "|  | fused_xent | 30.00 | 80.0 |",
    ]


def test_markdown_of_losses_and_linear_layers():
    lines = list(tables.markdown([linear_result(), loss_result()], "both"))
    assert lines[3] == ""
    title = "10x20x30 bfloat16"
    assert lines[4:] == [
        "| rows x features x classes |  | ms | x bare products | memory, MB "
        "| error of `grad_weight` |",
        "|---|---|---:|---:|---:|---:|",
        f"| {title} | bare products | 100.0 | 1.00 | - | - |",
        "|  | torch eager | 400.0 | 4.00 | 50.0 | 2.0e-03 |",
        "|  | fused_xent | 125.0 | 1.25 | 2.0 | 2.0e-03 |",
        "|  | faulty: loss is 1.0e-01 off float64's | - | - | - | - |",
    ]


def test_title_has_shape_dtype_labels_and_options():
    result = loss_result(labels="soft", options={"softcap": 2.5, "label_smoothing": 0.1})
    assert result.title == "own  100x1000  float32  soft labels  softcap 2.5  label_smoothing 0.1"


def test_files_have_every_sample(tmp_path):
    run = Run(environment("cpu"), [loss_result(options={"softcap": 2.0}), linear_result()])
    run.write_json(tmp_path / "x.json")
    assert Run.read_json(tmp_path / "x.json") == run
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["results"][0]["timings"][0]["seconds"] == times(0.008)


def test_lines_of_csv(tmp_path):
    run = Run(environment("cpu"), [loss_result(options={"softcap": 2.0}), linear_result()])
    run.write_csv(tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert len(rows) == 10
    first, ours, step = rows[0], rows[6], rows[9]
    assert first["share_of_copy"] == "1.0"
    assert first["times_faster_than_eager"] == first["peak_bytes"] == first["largest_error"] == ""
    assert first["kernels"] == ours.pop("kernels") == ""
    numbers = {name: float(ours.pop(name)) for name in list(ours)[8:]}
    assert list(ours.values()) == [
        *("loss", "own", "100x1000", "float32", "indices", "softcap=2", "both", "fused_xent"),
    ]
    assert numbers == pytest.approx(
        {
            **{"samples": 5, "median_s": 0.03, "first_quartile_s": 0.0225},
            **{"third_quartile_s": 0.0375, "bytes": 6e8, "bytes_per_s": 2e10},
            **{"share_of_copy": 0.4, "operations": 700, "times_faster_than_eager": 10 / 3},
            **{"peak_bytes": 8e7, "largest_error": 3e-6},
        }
    )
    assert (step["benchmark"], step["shape"], step["mode"]) == ("linear", "10x20x30", "step")
    assert (step["share_of_copy"], step["largest_error"]) == ("", "0.002")


def test_environment(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/bench", "loss", "--json", "a b"])
    monkeypatch.setattr("bench.results.gpu_environment", lambda: {"gpu": "H"})
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    env = environment("cpu")
    assert env["command"] == "python -m bench loss --json 'a b'"
    assert env["cores"] == 12
    assert "gpu" not in env
    assert environment("cuda") == env | {"gpu": "H"}
    summary = Run(env).summary
    for name in ("cpu", "fused_xent instruction set", "fused_xent", "torch", "python"):
        assert str(env[name]) in summary
    assert f"{env['threads']} threads of 12 cores" in summary
    assert env["cpu"] == cpu_name() != ""


def test_name_of_the_processor(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("cpu family\t: 6\nmodel\t\t: 1\nmodel name\t: Maker: 9\nmodel name\t: x\n")
    monkeypatch.setattr(results, "Path", lambda path: info)
    assert cpu_name() == "Maker: 9"
    info.unlink()
    monkeypatch.setattr(results.platform, "processor", lambda: "of Python")
    assert cpu_name() == "of Python"


def test_summary_of_a_gpu():
    env = environment("cpu") | {"gpu": "H", "driver": "580.1", "cuda": "13.0"}
    env["copy bytes a second"] = 3.25e12
    summary = Run(env).summary
    expected = (
        f"H, driver 580.1, CUDA 13.0, a large copy moves 3250 GB/s; fused_xent {env['fused_xent']}"
    )
    assert summary.startswith(expected)


def swept(n_classes, dtype="float32", factor=1, **changes):
    """Return a result of a sweep; seconds and memory differ by mode and provider."""
    timings = [Timing("copy", "torch", 2_000_000 * n_classes, 0, seconds=times(0.001 * factor))]
    for i, mode in enumerate(("forward", "both"), start=1):
        for j, provider in enumerate(("fused_xent", "torch eager")):
            seconds, peak = times(0.01 * factor * (i + 10 * j)), 1_000_000 * n_classes * (i + j)
            timings.append(Timing(mode, provider, 3_000_000 * n_classes, 7, peak, seconds))
    result = Result("loss", f"V={n_classes}", (10, n_classes), dtype, timings=timings)
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def lines_of(axis):
    """Return the y values of each line, by its label."""
    return {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}


def names_at_lines(axis):
    """Return the names at the right ends of lines, from the lowest one up."""
    return [text.get_text() for text in sorted(axis.texts, key=lambda text: text.xy[1])]


@pytest.fixture
def figures():
    """Draws figures of a run, and closes them after the test."""
    made = []

    def draw(draw, results):
        found = list(draw(Run(environment("cpu"), results)))
        made.extend(figure for _, figure in found)
        return dict(found)

    yield draw
    for figure in made:
        plots.plt.close(figure)


def test_plots_of_a_sweep(figures):
    """One axis per mode, with classes in ascending order, and fused_xent drawn last."""
    found = figures(plots.against_classes, [swept(20), swept(10), swept(40)])
    assert set(found) == {"throughput-float32", "memory-float32"}
    for i, mode in enumerate(("forward", "both"), start=1):
        axis = found["throughput-float32"].axes[i - 1]
        assert axis.get_title().startswith(tables.MODE_TITLES[mode])
        lines = lines_of(axis)
        assert list(lines) == ["one copy", "torch eager", "fused_xent"]
        assert lines["one copy"] == pytest.approx([20, 40, 80])  # GB/s
        assert lines["fused_xent"] == pytest.approx([3 / i, 6 / i, 12 / i])
        assert lines["torch eager"] == pytest.approx([3 / (i + 10), 6 / (i + 10), 12 / (i + 10)])
        edges = axis.collections[1].get_paths()[0].vertices[:, 1]
        assert edges.min() == pytest.approx(3 / i / 1.25)
        assert edges.max() == pytest.approx(12 / i / 0.75)
        assert {tuple(line.get_xdata()) for line in axis.get_lines()} == {(10, 20, 40)}
        lines = lines_of(found["memory-float32"].axes[i - 1])
        assert lines["the logits"] == [10, 20, 40]  # MB
        assert lines["fused_xent"] == [10 * i, 20 * i, 40 * i]
        assert lines["torch eager"] == [10 * (i + 1), 20 * (i + 1), 40 * (i + 1)]
    for figure in found.values():
        assert "MB" in figure.axes[0].get_ylabel() or "GB/s" in figure.axes[0].get_ylabel()
        assert figure.axes[0].get_xscale() == "log"
        for axis in figure.axes:
            assert set(names_at_lines(axis)) == set(lines_of(axis))
        assert figure.texts[0].get_text() == Run(environment("cpu")).summary


def test_names_of_lines_do_not_overlap(figures):
    """Names are in the order of the lines' last points, and move up if these are too close."""
    results = [swept(10), swept(20)]
    ours, eagers = results[1].timings[1:3]
    eagers.seconds = [0.999 * one for one in ours.seconds]
    axis = figures(plots.against_classes, results)["throughput-float32"].axes[0]
    assert names_at_lines(axis) == ["fused_xent", "torch eager", "one copy"]
    heights = sorted(text.xy[1] for text in axis.texts)
    least = 0.05 * (axis.get_ylim()[1] - axis.get_ylim()[0])
    assert all(high - low > least for low, high in itertools.pairwise(heights))
    at = {text.get_text(): text.xy[1] for text in axis.texts}
    lines = lines_of(axis)
    assert at["fused_xent"] == lines["fused_xent"][-1] < lines["torch eager"][-1]
    assert at["one copy"] == lines["one copy"][-1]


def test_timings_of_one_mode_and_provider():
    run = Run({}, [swept(10), swept(20)])
    for result in plots.chosen(run, ["both"], ["fused_xent"]).results:
        found = [(timing.mode, timing.provider) for timing in result.timings]
        assert found == [("copy", "torch"), ("both", "fused_xent")]
    assert plots.chosen(run, None, None) == run


def test_plots_of_one_mode_and_provider(tmp_path, monkeypatch, capsys):
    """The options apply to sweeps; a roofline needs the timings that define its roof."""
    Run(environment("cpu"), [swept(10), swept(20), *roofline_results()]).write_json(
        file := tmp_path / "a.json"
    )
    seen = {}
    for name in ("against_classes", "rooflines"):
        monkeypatch.setattr(plots, name, lambda run, name=name: seen.update({name: run}) or [])
    options = ["--mode", "both", "--provider", "fused_xent"]
    with pytest.raises(SystemExit):  # nothing is drawn
        plots.main([str(file), *options])
    assert seen["rooflines"] == Run.read_json(file)
    assert seen["against_classes"] == plots.chosen(seen["rooflines"], ["both"], ["fused_xent"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        plots.main([str(file), "--provider", "torch"])
    assert error.value.code == 2
    names = f"fused_xent, torch eager, torch.compile, {linear.BARE}"
    assert f"--provider must be one of {names}, got torch\n" in capsys.readouterr().err


def test_different_options_have_separate_plots(figures):
    """Results at a single number of classes, or not from a sweep, are not plotted."""
    results = [
        *(swept(n, dtype) for n in (10, 20) for dtype in ("float32", "bfloat16")),
        *(swept(n, labels="soft", options={"softcap": 2.5}) for n in (10, 20)),
        *(swept(10, options={"label_smoothing": 0.1}), swept(20, options={"softcap": 1.0})),
        *(swept(10, case="own"), swept(20, dtype="float16")),
    ]
    names = {"float32", "bfloat16", "float32-soft-labels-softcap-2_5"}
    expected = {f"{kind}-{name}" for kind in ("throughput", "memory") for name in names}
    assert set(figures(plots.against_classes, results)) == expected


def test_missing_measurements_are_not_plotted(figures):
    results = [swept(10), swept(20)]
    results[0].timings[3].peak_bytes = results[1].timings[3].peak_bytes = None
    results[1].timings = [one for one in results[1].timings if one.provider != "torch eager"]
    found = figures(plots.against_classes, results)
    throughput, memory = (found[f"{kind}-float32"].axes[1] for kind in ("throughput", "memory"))
    assert len(lines_of(throughput)["torch eager"]) == 1
    assert list(lines_of(memory)) == ["the logits", "torch eager"]


def test_ticks_of_classes(figures):
    counts = [1000, 1200, 2048, 2900, 128256]
    found = figures(plots.against_classes, [swept(n) for n in counts])
    axis = found["memory-float32"].axes[0]
    assert list(axis.get_xticks()) == [1000, 2048, 128256]
    assert [plots.thousands(n) for n in (10, 999, 1000, 128256)] == ["10", "999", "1k", "128k"]


def roofline_results(factor=1):
    """Return results with a roof of 50 GB/s and 60 GFLOP/s, times factor."""
    results = [loss_result(), linear_result()]
    results[1].dtype = "float32"
    for result in results:
        for timing in result.timings:
            timing.seconds = [one / factor for one in timing.seconds]
    return results


def test_plot_of_a_roofline(figures):
    others = [linear_result(), swept(10, "float16")]  # neither has a roof
    (found,) = figures(plots.rooflines, [*roofline_results(), *others]).items()
    assert found[0] == "roofline-float32"
    axis = found[1].axes[0]
    roof, *drawn = axis.get_lines()
    at = dict(zip(roof.get_xdata(), roof.get_ydata(), strict=True))
    for intensity, gigaflops in at.items():
        assert gigaflops == pytest.approx(min(50 * intensity, 60))
    points = [(line.get_label(), line.get_xdata()[0], line.get_ydata()[0]) for line in drawn]
    assert len(points) == 7
    expected = ("forward + backward, fused_xent", 700 / 6e8, 700 / 0.03 / 1e9)
    assert points[4] == (expected[0], *map(pytest.approx, expected[1:]))
    assert points[6] == ("linear, fused_xent", *map(pytest.approx, (6e4, 48)))
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["memory, 50 GB/s", "matrix products, 60 GFLOP/s"]
    assert axis.get_yscale() == axis.get_xscale() == "log"


def test_table_of_a_roofline(capsys):
    run = Run(environment("cpu"), roofline_results())
    roofline.show(run)
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "roofline float32: memory 50 GB/s, matrix products 60 GFLOP/s" in printed
    assert "op/byte GFLOP/s roof of roof" in printed
    assert "linear, fused_xent 6e+04 48.0 60.0 80%" in printed
    assert "linear, torch eager 6e+04 15.0 60.0 25%" in printed
    assert sum("fused_xent" in line for line in printed) == 3
    for line in printed:
        assert linear.BARE not in line


def test_files_of_plots(tmp_path, capsys):
    """Plots combine all files, go to the folder of the first or to --out, and are reproducible."""
    (tmp_path / "out").mkdir()
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, n_classes in zip(files, (10, 20), strict=True):
        Run(environment("cpu"), [swept(n_classes)]).write_json(file)
    names = {
        f"a-{kind}-float32.{suffix}"
        for kind in ("throughput", "memory")
        for suffix in ("png", "svg")
    }
    for folder, options in ((tmp_path, []), (tmp_path / "out", ["--out", str(tmp_path / "out")])):
        assert plots.main([*map(str, files), *options]) == 0
        assert set(capsys.readouterr().out.split()) == {str(folder / name) for name in names}
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert content == (tmp_path / "out" / name).read_bytes()
    with pytest.raises(SystemExit) as error:
        plots.main([str(files[0]), "--out", str(files[1])])
    assert error.value.code == 2
    assert "--out must be an existing folder" in capsys.readouterr().err


PAGE = "docs/guides/page.md"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a file of results, and a README and a page of docs with tables made from it."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "bench/results").mkdir(parents=True)
    Run(environment("cpu"), [loss_result()]).write_json(tmp_path / "bench/results/x.json")
    text = "# Name\n<!-- bench/results/x.json forward -->\nold\n<!-- end -->\nbetween\n"
    text += "<!-- bench/results/x.json -->\n<!-- end -->\nlast\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "docs/guides").mkdir(parents=True)
    text = "<!-- bench/results/x.json both memory -->\n<!-- end -->\n"
    (tmp_path / PAGE).write_text(text)
    return tmp_path


def test_tables_of_a_readme(project, capsys):
    assert readme.main() == 0
    assert capsys.readouterr().out == "3 tables, changed\n"
    results = [loss_result()]
    assert (project / "README.md").read_text().splitlines() == [
        *("# Name", "<!-- bench/results/x.json forward -->", ""),
        *(*tables.markdown(results, "forward"), "", "<!-- end -->"),
        *("between", "<!-- bench/results/x.json -->", ""),
        *(*tables.markdown(results), "", "<!-- end -->", "last"),
    ]
    assert (project / PAGE).read_text().splitlines() == [
        *("<!-- bench/results/x.json both memory -->", ""),
        *(*tables.markdown(results, "both", has_memory=True), "", "<!-- end -->"),
    ]
    assert readme.main() == 0
    assert capsys.readouterr().out == "3 tables, unchanged\n"


@pytest.mark.parametrize("content", [None, "{}"])
def test_pages_are_unchanged_if_a_file_is_broken(content, project, capsys):
    """Not even the README is written, whose own file is whole."""
    file, texts = project / "bench/results/y.json", {}
    (project / PAGE).write_text("<!-- bench/results/y.json -->\n<!-- end -->\n")
    if content:
        file.write_text(content)
    for page in readme.pages():
        texts[page] = page.read_text()
    assert len(texts) == 2
    assert readme.main() == 2
    assert "python -m bench.readme: error: " in capsys.readouterr().err
    assert {page: page.read_text() for page in texts} == texts


def test_width_without_a_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert tables.Output().width == 100
    monkeypatch.setattr("sys.stdout", types.SimpleNamespace(isatty=lambda: False))
    monkeypatch.setenv("COLUMNS", "70")
    assert tables.Output().width == 70


def test_a_broken_pipe_ends_the_output():
    with pytest.raises(BrokenPipeError):
        tables.Output().on_broken_pipe()


def test_zero_memory_differs_from_unknown_memory():
    assert (tables.megabytes(0), tables.megabytes(None)) == ("0.0", "-")
