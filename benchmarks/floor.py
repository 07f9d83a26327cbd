"""What the machine can do, measured in the same run: memory streams and multiply-add peak; the floor from both."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import torch

from .measure import Disturbance, gpu_seconds, wall_seconds


@dataclass(frozen=True)
class Stream:
    """A plain pass over memory: bytes read and written, and the seconds it took (best of several)."""

    name: str
    read: int
    written: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        return (self.read + self.written) / self.seconds


@dataclass
class Machine:
    streams: list[Stream]
    device: torch.device
    disturbed: float = 0.0  # share of the CPU time that other processes took meanwhile
    _peaks: dict[torch.dtype, float] = field(default_factory=dict)

    def stream_seconds(self, read: int, written: int) -> float:
        """Least time for a mix of reads and writes, as a combination of two measured streams."""
        best = float("inf")
        for p, q in combinations_with_replacement(self.streams, 2):
            determinant = p.read * q.written - q.read * p.written
            if determinant == 0:  # the same mix of reads and writes
                x, y = (read + written) / (p.read + p.written), 0.0
                if p.read * written != p.written * read:
                    continue
            else:
                x = (read * q.written - q.read * written) / determinant
                y = (p.read * written - read * p.written) / determinant
            if x >= 0 and y >= 0:
                best = min(best, x * p.seconds + y * q.seconds)
        return best

    @property
    def copy_bandwidth(self) -> float:
        return max(s.bandwidth for s in self.streams if s.name.startswith("copy"))

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second of a large matrix product in the dtype or in fp32, or on a CPU of a convolution in
        fp32, whichever is fastest. The two come from different libraries, of which one may not use all the processor
        has: on AMD the matrix product runs at half the rate of the convolution."""
        if torch.float32 not in self._peaks:
            rate = _product_rate(torch.float32, self.device)
            if self.device.type == "cpu":
                rate = max(rate, _convolution_rate())
            self._peaks[torch.float32] = rate
        plain = self._peaks[torch.float32]
        if dtype not in self._peaks:
            # A CPU without instructions for the dtype takes seconds for a large product; a small one tells.
            small = _product_rate(dtype, self.device, 256) if self.device.type == "cpu" else plain
            self._peaks[dtype] = small if small < plain / 4 else _product_rate(dtype, self.device)
        return max(self._peaks[dtype], plain)

    def floor(self, read: int, written: int, operations: int, dtype: torch.dtype) -> tuple[float, str]:
        """Least seconds, and what bounds them: "memory" or "compute"."""
        memory, compute = self.stream_seconds(read, written), operations / self.peak(dtype)
        return (memory, "memory") if memory >= compute else (compute, "compute")


def _best(run: Callable[[int], object], device: torch.device) -> float:
    run(0)
    return min(gpu_seconds(run, k) if device.type == "cuda" else wall_seconds(run, k, device) for k in range(5))


def _product_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    size = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda _: a @ b, device)


def _convolution_rate() -> float:
    """In fp32, channels last: the convolution is computed as it is written, with every multiply-add."""
    batch, channels, size, kernel = 4, 256, 64, 3
    images = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, kernel, kernel)
    outputs = batch * channels * (size - kernel + 1) ** 2
    best = _best(lambda _: torch.nn.functional.conv2d(images, weight), images.device)
    return 2 * outputs * channels * kernel**2 / best


def measure_machine(device: torch.device) -> Machine:
    """Time plain streams over buffers far beyond the caches, with as many threads as torch has."""
    count = (512 << 20 if device.type == "cuda" else 128 << 20) // 4
    size = 4 * count
    a, b, c, out = (torch.randn(count, device=device) for _ in range(4))
    streams: dict[str, tuple[int, int, Callable[[int], object]]] = {
        "sum": (size, 0, lambda _: a.sum()),
        "dot": (2 * size, 0, lambda _: torch.dot(a, b)),
        "fill": (0, size, lambda _: out.fill_(1.5)),
        "copy": (size, size, lambda _: out.copy_(a)),
        "add": (2 * size, size, lambda _: torch.add(a, b, out=out)),
        "addcmul": (3 * size, size, lambda _: torch.addcmul(a, b, c, out=out)),
    }
    if device.type != "cpu":
        return Machine([Stream(name, r, w, _best(run, device)) for name, (r, w, run) in streams.items()], device)
    disturbance = Disturbance()
    threads = torch.get_num_threads()
    part = size // threads
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL

        def memmove(_: int) -> None:  # the C library copies and fills large blocks with non-temporal stores
            list(pool.map(lambda k: ctypes.memmove(out.data_ptr() + k * part, a.data_ptr() + k * part, part),
                          range(threads)))  # fmt: skip

        def memset(_: int) -> None:
            list(pool.map(lambda k: ctypes.memset(out.data_ptr() + k * part, 1, part), range(threads)))

        streams["copy (memmove)"] = (part * threads, part * threads, memmove)
        streams["fill (memset)"] = (0, part * threads, memset)
        measured = [Stream(name, r, w, _best(run, device)) for name, (r, w, run) in streams.items()]
        return Machine(measured, device, disturbance.share())
