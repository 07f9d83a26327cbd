"""Options, markers and fixtures of ``pytest benchmarks/``."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from . import measure, results, steps, tables
from .floor import measure_machine
from .results import Row
from .runner import LEVELS, Session

SESSION = pytest.StashKey[Session]()
PASSED = pytest.StashKey[bool]()
SUITES = ("loss", "cls", "pooling", "projection", "memory", "overhead", "step", "scaling")


def pytest_addoption(parser):
    group = parser.getgroup("alpkd_fast benchmarks")
    group.addoption("--quick", action="store_true", help="the main cases only, in about a minute")
    group.addoption("--full", action="store_true", help="everything that the results file does not hold yet")
    group.addoption("--resume", action="store_true", help="only what the results file does not hold yet, at any level")
    group.addoption("--results", type=Path, default=results.RESULTS / "local.csv", help="the CSV that grows")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--default-malloc", action="store_true", help="leave the C library's allocator as it is")
    group.addoption("--ours-only", action="store_true", help="time no rivals")


def pytest_configure(config):
    for suite in SUITES:
        config.addinivalue_line("markers", f"{suite}: benchmarks of this suite")
    config.addinivalue_line("markers", "level(name): the least level that runs it: quick, default or full")


def level(config) -> str:
    return "full" if config.option.full else "quick" if config.option.quick else "default"


def command(config) -> str:
    """What was run, without the paths of the machine."""
    given = ["pytest benchmarks/"]
    given += [f"--{name}" for name in ("quick", "full", "default-malloc", "ours-only") if config.getoption(f"--{name}")]
    given += [f'-m "{config.option.markexpr}"'] if config.option.markexpr else []
    given += [f'-k "{config.option.keyword}"'] if config.option.keyword else []
    return " ".join(given)


def pytest_collection_modifyitems(config, items):
    levels = list(LEVELS)
    wanted = levels.index(level(config))
    kept, dropped = [], []
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replay_timer))
        marker = item.get_closest_marker("level")
        least = marker.args[0] if marker else "default"
        (kept if levels.index(least) <= wanted else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(scope="session")
def session(request):
    """Device, machine figures and the run's own fields; at the end its table is printed."""
    config = request.config
    device = torch.device(config.option.device)
    if not config.option.default_malloc:
        measure.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._inductor.config.force_disable_caches = True  # so that compile times are those of a first call
    torch._dynamo.config.recompile_limit = 64  # the forms of a case share one function
    stamp = Row(
        run=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command(config),
        commit=results.commit(),
        device=results.device_name(device),
        versions=results.versions(device),
    )
    chosen = level(config)
    seconds, rounds = LEVELS[chosen]
    if device.type == "cuda":  # calls are short there, and their times steady
        seconds /= 4
    note = " (default malloc)" if config.option.default_malloc else ""
    config.stash[SESSION] = Session(
        device, chosen, seconds, rounds, measure_machine(device), stamp, config.option.ours_only, note
    )
    return config.stash[SESSION]


@pytest.fixture
def record(request, session):
    """The session with the suite's name in its rows; on leaving, the test's rows go to the results file."""
    suite = next(name for name in SUITES if request.node.get_closest_marker(name))
    before, session.stamp = len(session.rows), replace(session.stamp, suite=suite)
    if before and session.device.type == "cpu":  # whose pace changes within minutes where others share the host
        session.machine = measure_machine(session.device)
    yield session
    if request.node.stash.get(PASSED, False):  # what failed or was cut short is to be measured again
        results.append(request.config.option.results, session.rows[before:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def done(request, session):
    """Skips a test whose case the results file of a full or resumed run holds: done(case, dtype, mode)."""
    option = request.config.option
    held: list[Row] = []
    if (option.full or option.resume) and option.results.exists():
        stamp = replace(session.stamp, threads=torch.get_num_threads())
        held = [row for row in results.read([option.results]) if results.serves(row, stamp)]

    def skip(**fields):
        if "mode" in fields:
            fields["mode"] += session.note
        if any(all(getattr(row, name) == value for name, value in fields.items()) for row in held):
            pytest.skip("the results file holds it already")

    return skip


_replayed: list[float] = []


def replay_timer() -> float:
    """A timer that tells pytest-benchmark times measured before: it times one function at a time, we take turns."""
    return _replayed.pop(0)


@pytest.fixture
def report(benchmark):
    """report(times, **info) hands measured times to pytest-benchmark."""

    def hand_over(seconds, **info):
        benchmark.extra_info.update(info)
        _replayed[:] = [moment for value in seconds for moment in (0.0, value)]
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return hand_over


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash.get(SESSION, None)
    if session is not None and session.rows:
        terminalreporter.section("alpkd_fast benchmarks")
        terminalreporter.write_line(f"{session.stamp.device}; {session.stamp.versions}; commit {session.stamp.commit}")
        for stream in session.machine.streams:
            terminalreporter.write_line(f"{stream.name:<16}{stream.bandwidth / 1e9:8.1f} GB/s")
        terminalreporter.write_line(tables.text(session.rows))
        for table in (steps.step_table, steps.chain_table, steps.memory_table):
            terminalreporter.write_line(table(session.rows))
        terminalreporter.write_line(f"added to {config.option.results.name}")
