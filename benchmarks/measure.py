"""Measuring: in turns, warm-up apart, on rotated inputs; time, memory, kernel launches."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[int], object]  # takes the number of the call, which picks the inputs


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel.

    By default every large tensor is mapped anew, and its page faults cost more than the work (for ours and for the
    rivals). Training processes run with allocators that keep their memory (jemalloc, tcmalloc, a warm heap).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never: a rival's peak may exceed the 2 GiB that the number could say


def map_large_tensors() -> None:
    """Make glibc map every tensor of 64 KiB or more apart, so that a peak of memory holds no freed one."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 64 << 10)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (L2 on a GPU)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [64 << 20]  # where the system does not tell
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()).groups()
        sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}[unit])
    return max(sizes[1:] or sizes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(run: Run, call: int, device: torch.device) -> float:
    """Wall time of one call, the work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    run(call)
    synchronize(device)
    return time.perf_counter() - start


def gpu_seconds(run: Run, call: int, head_start: float = 1e-3) -> float:
    """Time of one call on the GPU between two events. The GPU first sleeps for ``head_start`` seconds or a little less,
    so that the launches are queued before it begins and their cost is not in the time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(head_start * 1.5e9))  # in cycles
    start.record()
    run(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def take_turns(
    runs: dict[str, Run], device: torch.device, seconds: float, rounds: int, cold: bool = False
) -> dict[str, tuple[list[float], list[float]]]:
    """Time the runs in turns; return per run its times (on the device) and its wall times, which a CPU shares.

    All take part in every turn, so that a slow moment of the machine hits all. There are ``rounds`` turns, or as many
    as the slowest run makes in ``seconds``; a faster one makes up to 20 calls a turn, for as long as its share of the
    ``seconds`` lasts. The first two calls of each run are a warm-up and not counted.

    cold: one call a turn, and before each the processor's caches are filled with something else, as they are when a
    training step comes to its loss. A short call takes twice as long then, since its code is not there either; without
    it a time depends on which call came before.
    """
    warm = 2
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    calls = dict.fromkeys(runs, warm)
    usual = {name: min(wall_seconds(run, k, device) for k in range(warm)) for name, run in runs.items()}
    turns = max(rounds, int(seconds / max(5e-3, *usual.values())), 1)
    something_else = torch.ones(cache_bytes(torch.device("cpu")) // 4) if cold else None
    for _ in range(turns):
        for name, run in runs.items():
            for _ in range(1 if cold else min(20, max(1, int(seconds / turns / usual[name])))):
                if something_else is not None:
                    something_else.sum()
                wall = wall_seconds(run, calls[name], device)
                calls[name] += 1
                times[name][1].append(wall)
                if device.type == "cuda":
                    times[name][0].append(gpu_seconds(run, calls[name], 2 * usual[name]))
                    calls[name] += 1
                else:
                    times[name][0].append(wall)
    return times


class Disturbance:
    """Tells which share of the machine's CPU time other processes took since it was made; 0 where unknown."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float:
        if self.start is None:
            return 0.0
        used, own, since = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return max(0.0, used - own) / (since * os.cpu_count())

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """CPU seconds of everything, CPU seconds of this process and its ended children, seconds on the clock."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.perf_counter()


def median_iqr(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], 0.0
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, upper - lower


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of log(y) over log(x)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(axis) / len(logs) for axis in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def tensor_bytes(result: object) -> int:
    if isinstance(result, Tensor):
        return result.untyped_storage().nbytes()
    return sum(tensor_bytes(part) for part in result) if isinstance(result, (tuple, list)) else 0


def _status(key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


def extra_bytes(run: Run, device: torch.device) -> int | None:
    """Peak memory of one call beyond what was there before and the tensors that it returns; None if unknown."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run(0)
        synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before - tensor_bytes(result))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free pages of the heap must count when they are used again
        Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
        before = _status("VmRSS")
        result = run(0)
        return max(0, _status("VmHWM") - before - tensor_bytes(result))
    except (AttributeError, OSError, TypeError):  # not Linux with glibc
        return None


def copies(run: Run, shape: Sequence[int]) -> int:
    """Tensors of the shape that one call clones."""
    from torch.profiler import profile

    with profile(record_shapes=True) as profiled:
        run(0)
    return sum(event.name == "aten::clone" and event.input_shapes[0] == list(shape) for event in profiled.events())


def kernel_launches(run: Run, device: torch.device) -> int | None:
    """Kernels that one call launches on a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run(0)
        synchronize(device)
    on_gpu = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # Annotations, such as that of a compiled region, are shown on the GPU beside the kernels that they span.
    return sum(not (e.is_user_annotation or e.name.startswith(("Memcpy", "Memset"))) for e in on_gpu)


def as_cuda_graph(run: Run, sets: int) -> Run:
    """The run captured once per set of inputs; a call replays its graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in range(3):
            run(call)
    torch.cuda.current_stream().wait_stream(side)
    graphs, kept = [], []
    for k in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.append(run(k))  # the results must outlive the graph
        graphs.append(graph)
    replay: Run = lambda call: graphs[call % sets].replay() or kept  # noqa: E731
    return replay
