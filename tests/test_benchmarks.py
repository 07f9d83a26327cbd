"""The benchmarks measure what they say: rivals are right, wrong ones are refused, floors and reports add up."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import alpkd_fast

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
pytest.importorskip("benchmarks", reason="the benchmarks are not part of an installed package")

from benchmarks import cases, gpu_report, measure, providers, results, runner, steps  # noqa: E402
from benchmarks import floor as floor_module  # noqa: E402
from benchmarks.floor import Machine, Stream  # noqa: E402
from benchmarks.results import Row  # noqa: E402

CPU = torch.device("cpu")
ALL = {**cases.LOSS, **cases.CLS, **cases.POOLING, **cases.PROJECTION}
BOTH = "forward+backward"


def small(name: str, **changes) -> cases.Case:
    case = ALL[name]
    return replace(case, **{"batch": 3, "seq": 12, "D": 40, "teacher_dim": case.teacher_dim and 24, **changes})


def session() -> runner.Session:
    streams = [Stream("copy", 1, 1, 1e-10), Stream("sum", 1, 0, 4e-11)]
    machine = Machine(streams, CPU, 0.0, dict.fromkeys(cases.DTYPES.values(), 1e11))
    return runner.Session(CPU, "quick", 0.0, 2, machine, Row(run="2000-01-01T00:00:00+00:00", device="a machine"))


@pytest.mark.parametrize("padding", [0.0, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_rivals_compute_the_loss(name, padding):
    """In float64 every form equals the reference; form A counts the padding, so it does only where there is none."""
    by_token = ALL[name].pooling == "token" and not ALL[name].views
    case = small(name, padding=padding if by_token else ALL[name].padding)
    given = cases.make_inputs(case, torch.float64, CPU, 0)[0]
    truth = runner.Truth.of(case, given)
    for rival in providers.rivals(case):
        errors = truth.errors(*runner.run(rival, [given], True, None)(0))
        counts_padding = rival.name == "public A" and by_token and case.padding > 0
        assert (max(errors) < 1e-5) != counts_padding, (rival.name, errors)  # the forms sum their squares in fp32


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_wrong_provider_is_not_timed(dtype, monkeypatch):
    """A form with a wrong scale is refused in every dtype, gets no time, and its row says why."""

    def attention(case, *given):
        return providers.bmm(replace(case, scale=0.9 / math.sqrt(case.D)), *given)

    monkeypatch.setattr(providers, "attention", attention)
    rows = runner.run_case(session(), small("bert-base-2", D=256), dtype, BOTH)
    (wrong,) = [row for row in rows if row.provider == "attention"]
    assert wrong.status.startswith("wrong")
    assert wrong.median_s is None
    timed = [row for row in rows if row.provider in ("bmm", "einsum", "public A")]
    assert timed
    assert all(row.status == "ok" and row.median_s > 0 for row in timed)


def test_a_dropped_gradient_term_is_noticed():
    """Detaching the attention keeps the loss and changes the gradient: the check looks at both."""
    case = small("bert-base-6", scale=0.5)
    given = cases.make_inputs(case, torch.float32, CPU, 0)[0]

    def detached(inputs):
        return alpkd_fast.alp_loss(
            inputs.student, inputs.teacher, scale=0.5, detach_attention=True, backend="reference"
        )

    *_, reason = runner.Checker(case, torch.float32, given)(providers.Provider("detached", "ours", detached))
    assert reason is not None
    assert "gradient" in reason


def test_rows_hold_their_own_arithmetic():
    """× floor, × best rival and the floor's bytes and operations follow from the other columns of the row."""
    rows = [row for row in runner.run_case(session(), small("bert-base-4"), "fp32", BOTH) if row.median_s]
    one = [row for row in rows if row.gradient == "1"]
    fastest = min((row for row in one if row.kind != "ours"), key=lambda row: row.median_s)
    for row in one:
        assert row.x_floor == pytest.approx(row.median_s / row.floor_s)
        assert row.best_rival == fastest.provider
        assert row.x_best_rival == pytest.approx(fastest.median_s / row.median_s)
        assert row.bytes_read == (12 + 4) * 36 * 40 * 4
        assert row.bytes_written == 4 * 36 * 40 * 4
        assert row.operations == 8 * 12 * 4 * 36 * 40
    assert {row.gradient for row in rows if row.kind == "ours"} == {"1", str(runner.OTHER_GRADIENT)}


def test_floor_mixes_streams():
    """3 read : 1 written is a copy and two sums; a mix that one stream has alone costs that stream."""
    machine = Machine([Stream("copy", 1, 1, 3.0), Stream("sum", 1, 0, 1.0), Stream("fill", 0, 1, 9.0)], CPU)
    assert machine.stream_seconds(3, 1) == pytest.approx(3.0 + 2 * 1.0)
    assert machine.stream_seconds(5, 0) == pytest.approx(5.0)
    assert machine.stream_seconds(0, 2) == pytest.approx(18.0)
    assert Machine([Stream("add", 2, 1, 1.0)], CPU).stream_seconds(4, 2) == pytest.approx(2.0)


def test_peak_is_measured(monkeypatch):
    """Twice the multiply-adds a second of the fastest of them: between a small and an absurd number."""
    machine = Machine([], CPU)
    assert 1e8 < machine.peak(torch.float32) <= machine.peak(torch.bfloat16) < 1e15
    products = {torch.float32: 2.0, torch.bfloat16: 3.0}
    monkeypatch.setattr(floor_module, "_product_rate", lambda dtype, device, size=None: products[dtype])
    for convolution, fp32, bf16 in ((1.0, 2.0, 3.0), (2.5, 2.5, 3.0), (4.0, 4.0, 4.0)):
        monkeypatch.setattr(floor_module, "_convolution_rate", lambda rate=convolution: rate)
        machine = Machine([], CPU)
        assert (machine.peak(torch.float32), machine.peak(torch.bfloat16)) == (fp32, bf16)


@pytest.mark.parametrize("padding", [0.3, 0.6])
def test_padding_is_what_it_says(padding):
    case = replace(cases.LOSS["bert-base-6"], padding=padding)
    assert case.valid_rows / case.rows == pytest.approx(1 - padding, abs=0.02)
    assert len(set(case.lengths().tolist())) > 1
    assert cases.make_inputs(replace(case, D=8), torch.float32, CPU, 0)[0].weights.sum() == case.valid_rows


def test_inputs_rotate_beyond_the_cache():
    case = small("cls-6")
    given = cases.make_inputs(case, torch.float32, CPU, 60_000)
    assert len(given) * sum(case.bytes_moved(torch.float32, True)) >= 60_000
    assert len({inputs.student[0].data_ptr() for inputs in given}) == len(given)
    assert not any((h == 0).any() for inputs in given for h in inputs.student + inputs.teacher)


def test_disturbance_is_what_others_took(monkeypatch):
    disturbance = measure.Disturbance()
    disturbance.start = (10.0, 5.0, 100.0)  # CPU seconds of all, of ours, clock
    monkeypatch.setattr(disturbance, "_now", lambda: (14.0, 7.0, 102.0))
    assert disturbance.share() == pytest.approx((4.0 - 2.0) / (2.0 * os.cpu_count()))


def test_runs_take_turns(monkeypatch):
    """All take part to the end: a fast run does not go on alone, it makes more calls a turn."""
    seen: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def calls(name, seconds):
        def call(k):
            clock[0] += seconds
            seen.append(name)

        return call

    times = measure.take_turns({"slow": calls("slow", 2**-5), "fast": calls("fast", 2**-9)}, CPU, 2**-3, 3)
    assert times == {name: ([seconds] * count,) * 2 for name, seconds, count in
                     (("slow", 2**-5, 4), ("fast", 2**-9, 4 * 16))}  # fmt: skip
    turns = [(name, len(list(calls))) for name, calls in itertools.groupby(seen[4:])]  # after the warm-up
    assert turns == [("slow", 1), ("fast", 16)] * 4
    seen.clear()
    runs = {"slow": calls("slow", 2**-5), "fast": calls("fast", 2**-9)}
    assert measure.take_turns(runs, CPU, 2**-3, 3, cold=True) == {
        "slow": ([2**-5] * 4,) * 2,
        "fast": ([2**-9] * 4,) * 2,
    }
    assert seen[4:] == ["slow", "fast"] * 4
    least = measure.take_turns({"a": calls("a", 1.0), "b": calls("b", 1.0)}, CPU, 0.0, 40)
    assert [len(wall) for _, wall in least.values()] == [40, 40]


def test_launches_are_kernels_alone(monkeypatch):
    """Neither copies, nor the annotation of a compiled region, which the profiler shows on the GPU too."""
    cuda, event = torch.autograd.DeviceType.CUDA, torch.autograd.profiler_util.FunctionEvent
    made = [
        event(k, name, 0, 0, 1, device_type=device, is_user_annotation=annotation)
        for k, (name, device, annotation) in enumerate(
            [("alp_matrix", cuda, False), ("Memcpy DtoD", cuda, False), ("## Call CompiledFxGraph f0 ##", cuda, True),
             ("triton_poi_fused_mul_0", cuda, False), ("aten::mul", torch.autograd.DeviceType.CPU, False)]
        )
    ]  # fmt: skip

    class Profile(contextlib.nullcontext):
        def __init__(self, activities):
            super().__init__(self)

        def events(self):
            return made

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    assert measure.kernel_launches(lambda k: None, torch.device("cuda")) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_extra_memory_sees_a_temporary_and_not_the_result():
    size, slack = 32 << 20, 2 << 20
    assert measure.extra_bytes(lambda _: torch.ones(size, dtype=torch.uint8), CPU) < slack
    with_temporary = measure.extra_bytes(lambda _: torch.ones(size, dtype=torch.uint8).amax(), CPU)
    assert size - slack < with_temporary < size + slack


@pytest.mark.parametrize(
    ("code", "line", "status"),
    [(0, "SKIPPED: compute-sanitizer was not found", "skipped"), (0, "SKIPPED [1] tests/test_x.py:3: no", "passed"),
     (1, "", "failed"), (124, "", "timed out")],
)  # fmt: skip
def test_a_stage_is_reported_where_git_is_missing(code, line, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ALPKD_FAST_COMMIT", "1234567")
    (tmp_path / "test.log").write_text(line + "\n")
    gpu_report.write_stage(tmp_path, "test", code, 3)
    report = json.loads((tmp_path / "test.json").read_text())
    assert (report["status"], report["commit"]) == (status, "1234567")
    assert status in capsys.readouterr().out


def test_results_come_back_as_they_were_written(tmp_path):
    rows = [Row(run="1", case="a", m=2, error=1e-7, status="wrong, by 3"), Row(run="2", case="a", m=2, median_s=0.5)]
    results.append(tmp_path / "r.csv", rows[:1])
    results.append(tmp_path / "r.csv", rows[1:])
    assert results.read([tmp_path / "r.csv"]) == rows
    assert results.latest(rows) == rows[1:]
    (tmp_path / "old.csv").write_text("case\na\n")
    with pytest.raises(ValueError, match="columns"):
        results.read([tmp_path / "old.csv"])


@pytest.mark.parametrize(
    ("then", "now", "served"),
    [
        ("--full", "--full", True),
        ("--full", "--full --ours-only", True),
        ("--full --ours-only", "--full", False),
        ("--full --default-malloc", "--full", False),
        ("--full", "--full --default-malloc", False),
        ("", "--full", False),
        ("--quick", "", False),
        ("", "", True),
    ],
)
def test_a_run_resumes_what_was_measured_alike(then, now, served):
    row = Row(command=f"pytest benchmarks/ {then}", commit="a", device="b", threads=2)
    run = replace(row, command=f"pytest benchmarks/ {now}")
    assert results.serves(row, run) == served
    assert not any(results.serves(row, replace(run, **other)) for other in ({"commit": "c"}, {"threads": 1}))


def test_slope_of_a_power_is_its_exponent():
    assert measure.slope([(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)


DOCUMENT = ROOT / "docs" / "benchmarks.md"


def result_files() -> list[Path]:
    """The files that the document says it was made from."""
    return [ROOT / name for name in re.findall(r"benchmarks/results/[\w.-]+\.csv", DOCUMENT.read_text())]


def timed_rows() -> list[dict[str, str]]:
    """The published rows of the loss and [CLS] suites, read without our own reader."""
    rows: list[dict[str, str]] = []
    for path in result_files():
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["suite"] in ("loss", "cls") and row["median_s"]]
    return rows


def claims(path: Path, header: str, devices: set[str]) -> list[list[str]]:
    """The tables with this header, a list of cells per line: first the device whose name stands above it."""
    lines: list[list[str]] = []
    device, in_table = "", False
    for line in path.read_text().splitlines():
        device = next((name for name in devices if line.removeprefix("## ").startswith(name)), device)
        if header in line:
            in_table = True
        elif in_table and line.startswith("| ") and not line.startswith("| ---"):
            lines.append([device, *(cell.strip() for cell in line.strip("|").split("|"))])
        elif not line.startswith("|"):
            in_table = False
    return lines


def newest(timed: list[dict[str, str]], other_gradient: bool = False, **wanted: str) -> dict[str, str]:
    found = [row for row in timed if all(row[k] == v for k, v in {"mode": BOTH, "padding": "0", **wanted}.items())]
    return max(
        (row for row in found if (row["gradient"] not in ("1", "65536") if other_gradient else row["gradient"] == "1")),
        key=lambda row: row["run"],
    )


def assert_time(said: str, row: dict[str, str]) -> None:
    value, unit = said.split()
    assert float(value) == pytest.approx(float(row["median_s"]) * {"s": 1, "ms": 1e3, "µs": 1e6}[unit], rel=6e-3)


@pytest.mark.skipif(not DOCUMENT.exists(), reason="no results are published yet")
def test_claims_equal_the_rows():
    """Every figure of the claims is that of a row, "reached" stands only where it is."""
    rows = timed_rows()
    table = claims(DOCUMENT, "| against the floor |", {row["device"] for row in rows})
    assert table
    for device, case, _, n, m, width, dtype, version, took, floor, line, rival, rival_line, best, other in table:
        wanted = {"device": device, "case": case, "n": n, "m": m, "D": width, "dtype": dtype, "provider": version}
        one = newest(rows, **wanted)
        assert_time(took, one)
        if floor.endswith("×"):
            assert floor == f"{float(one['x_floor']):.2f} ×"
            assert line.endswith("reached") == (float(one["x_floor"]) <= float(re.findall(r"[\d.]+", line)[0]))
        elif floor:
            share = (int(one["bytes_read"]) + int(one["bytes_written"])) / float(one["copy_bandwidth"])
            share /= float(one["median_s"])
            assert floor.startswith(f"{share:.1%}")
            assert line.endswith("reached") == (100 * share >= float(re.findall(r"[\d.]+", line)[0]))
        assert rival == f"{float(one['x_best_rival']):.1f}"
        limit = float(re.findall(r"[\d.]+", rival_line)[0])
        assert rival_line.endswith("reached") == (float(one["x_best_rival"]) >= limit)
        assert best == one["best_rival"]
        if other:
            again = newest(rows, other_gradient=True, **wanted)
            assert other == f"{float(again['x_floor']):.2f} / {float(again['x_best_rival']):.1f}"


@pytest.mark.skipif(not DOCUMENT.exists(), reason="no results are published yet")
def test_the_readme_says_what_the_rows_say():
    rows = timed_rows()
    table = claims(ROOT / "README.md", "| time / floor |", {row["device"] for row in rows})
    assert table
    cases_of = {"tokens": "bert-base-", "[CLS] rows": "cls-", "[CLS] rows of whole hidden states": "cls-{}-dense"}
    for device, what, dtype, version, took, floor, rival, with_factor in table:
        count, suite, n, m, width = re.fullmatch(r"(\d+) (.+), (\d+) → (\d+) layers of (\d+)", what).groups()
        case = cases_of[suite].format(m) if "{}" in cases_of[suite] else cases_of[suite] + m
        wanted = {"device": device, "case": case, "dtype": dtype, "provider": version}
        one = newest(rows, **wanted, rows=count, n=n, m=m, D=width)
        assert_time(took, one)
        assert floor == (f"{float(one['x_floor']):.2f} ×" if suite == "tokens" else "")
        beside = [
            row for row in rows if row["kind"] != "ours"
            and all(row[k] == one[k] for k in ("run", "case", "dtype", "mode", "gradient", "padding"))
        ]  # fmt: skip
        assert rival == f"{float(one['x_best_rival']):.1f} × over {one['best_rival']}, the best of {len(beside)}"
        if with_factor:
            again = newest(rows, other_gradient=True, **wanted)
            time_said, speed_up = with_factor.split(", ")
            assert_time(time_said, again)
            assert speed_up == f"{float(again['x_best_rival']):.1f} ×"


@pytest.mark.skipif(not DOCUMENT.exists(), reason="no results are published yet")
def test_the_document_is_what_the_report_writes(monkeypatch):
    from benchmarks import report

    def drawn(rows, folder, name):  # the pictures are there already
        return {path.name.removeprefix(f"{name}-").removesuffix("-light.png") for path in folder.glob(f"{name}-*")}

    monkeypatch.setattr(report.pictures, "draw_all", drawn)
    text, folder = DOCUMENT.read_text(), DOCUMENT.parent / "pictures"
    rows = report.published(result_files())
    assert report.document(rows, result_files(), folder) == text
    readme = (ROOT / "README.md").read_text()
    assert report.with_claims(readme, report.in_short(rows, "docs/pictures")) == readme
    for picture in re.findall(r'src(?:set)?="([^"]+)"', text):
        assert (DOCUMENT.parent / picture).exists(), picture


def test_the_readme_takes_results_without_its_cases():
    """As after `pytest benchmarks -m overhead` on a machine of one's own."""
    from benchmarks import report

    assert report.in_short([Row(device="a machine", suite="overhead", case="tiny", kind="ours")], "docs/pictures") == (
        "No row for these yet."
    )


@pytest.mark.parametrize(("on_device", "time_said"), [(14e-6, "reached"), (16e-6, "missed")])
@pytest.mark.parametrize(("factor", "replay_said"), [(12.0, "reached"), (8.0, "missed")])
def test_cls_lines_of_a_gpu(on_device, time_said, factor, replay_said):
    from benchmarks import report

    common = {"suite": "cls", "case": "cls-6", "dtype": "bf16", "kind": "ours", "provider": "cuda", "wall_s": 2e-5}
    rows = [
        Row(versions="torch 2, CUDA 13.0", mode=BOTH, median_s=on_device, **common),
        Row(versions="torch 2, CUDA 13.0", mode=f"{BOTH} (CUDA graph)", median_s=1e-5, x_best_rival=factor, **common),
    ]
    alone, replay = report.small_claims(rows)
    assert alone.endswith(f"of GPU time (line: 15 µs: {time_said}).")
    assert f"20 µs, {factor} times less" in replay
    assert replay.endswith(f"(line: 10: {replay_said}).")
    assert report.small_claims([replace(row, versions="torch 2") for row in rows]) == []


def step_rows(case: str, base: dict, **others: dict) -> list[Row]:
    common = {"suite": "step", "kind": "step", "case": case, "m": 2, "D": 8, "rows": 16, "dtype": "fp32", "rounds": 4}
    return [Row(provider=name, **common, **values) for name, values in {"KD": base, **others}.items()]


@pytest.mark.parametrize(
    ("added", "iqr", "said"),
    [(0.02, 0.001, "reached"), (0.04, 0.001, "missed"), (0.02, 0.1, "not distinguishable"), (-0.01, 0.001, "reached")],
)
def test_a_steps_time_line(added, iqr, said):
    fused = {"median_s": 1 + added, "added_s": added, "iqr_s": iqr}
    rows = step_rows("step-2-token", {"median_s": 1.0, "added_s": 0.0, "iqr_s": 0.5}, **{"KD + fused ALP": fused})
    base, pair = steps.pairs(rows, "step-")
    assert base.row is base.base
    assert pair.time_line == f"≤ 3%: {said}"
    assert f"{added:+.1%} ± {1.57 * iqr / 2:.1%} | ≤ 3%: {said}" in steps.step_table(rows)


@pytest.mark.parametrize("provider", ["KD + fused ALP", "KD + fused ALP, teacher in parts of 4"])
@pytest.mark.parametrize(("extra", "said"), [(0, "reached"), (1, "missed")])
def test_a_steps_memory_line(extra, said, provider):
    """KD and the gradients to two layers of 32 rows of 8 float32 values, and not more than the resolution beyond."""
    times = {"median_s": 1.0, "added_s": 0.0, "iqr_s": 0.0}
    fused = {**times, "extra_bytes": 4096 + 2 * 32 * 8 * 4 + steps.RESOLUTION + extra}
    rows = step_rows("step-2-cls", {**times, "extra_bytes": 4096}, **{provider: fused})
    assert steps.pairs(rows, "step-")[1].memory_line == ""  # 16 sequences
    for row in rows:
        row.rows = 32
    assert steps.pairs(rows, "step-")[1].memory_line == f"≤ 6 KiB: {said}"
    assert steps.step_table(rows).endswith(f"| ≤ 6 KiB: {said} |")


def test_a_chains_line_is_on_what_the_eager_form_adds():
    rows = [Row(suite="step", case="chain-6-cls", provider=name, median_s=0.03, added_s=added) for name, added in
            {"chain": 0.0, "eager": 0.012, "fused": 0.01, "tap in place": 0.002}.items()]  # fmt: skip
    assert steps.chain_table(rows).splitlines()[-2:] == [
        "| chain-6-cls | fused | 30 ms | +10.0 ms | 1.2 |  |",
        "| chain-6-cls | tap in place | 30 ms | +2.0 ms | 6.0 | ≥ 5: reached |",
    ]


def test_what_a_chain_adds_is_told_as_a_share_of_a_step_of_the_same_size():
    base, others = {"suite": "step", "rows": 32, "m": 6}, {"median_s": 1.0, "added_s": 0.0}
    rows = [
        Row(case="chain-6-cls", provider="chain", **base, **others),
        Row(case="chain-6-cls", provider="chain + eager ALP", **base, median_s=1.1, added_s=0.1),
        Row(case="chain-6-cls", provider="chain + fused ALP", **base, median_s=1.05, added_s=0.05),
        Row(case="chain-6-cls", provider="chain + fused ALP, tap in place", **base, median_s=1.02, added_s=0.02),
    ]
    assert steps.chain_shares(rows) == []
    rows += [Row(case="step-2-cls", provider="KD", suite="step", rows=4, median_s=1.0)]
    assert steps.chain_shares(rows) == []
    rows += [Row(case=f"step-{m}-cls", provider="KD", suite="step", rows=32, median_s=2.0 * m) for m in (2, 6)]
    (said,) = steps.chain_shares(rows)
    assert "cls rows of 6 layers the loss adds 20.0 ms to the chain" in said
    assert "0.50% of the shortest KD step of as many sequences (4 s; line: 1%)" in said
