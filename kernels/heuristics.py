"""Launch parameters by (n, m, D, dtype), good without tuning."""

from __future__ import annotations

from dataclasses import dataclass

import triton

OLDER_COMPILER = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


@dataclass(frozen=True, slots=True)
class Config:
    """SPLIT warps share a row's columns, WIDTH columns each at a time."""

    split: int
    width: int
    warps: int
    unroll: int  # blocks of columns whose loads are in flight together
    max_registers: int = 0  # per thread; 0: as many as the compiler likes

    def arguments(self) -> dict[str, int]:
        """As keyword arguments of alp_kernel."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"SPLIT": self.split, "WIDTH": self.width, "UNROLL": self.unroll, "num_warps": self.warps, **limit}


def padded(m: int, n: int, teacher_grads: bool) -> tuple[int, int]:
    """Layers on the N and M side of the products; a side that is summed over is at least 16 long."""
    return max(_power_of_2(m), 16 if teacher_grads else 8), max(_power_of_2(n), 16)


def choose_config(m: int, n: int, D: int, operand_bytes: int, teacher_grads: bool, target: str) -> Config:
    """The target is an architecture as NVIDIA counts, such as "90", or AMD's name for its own."""
    students, teachers = padded(m, n, teacher_grads)
    if teachers > 32 or students > 32:
        return Config(split=1, width=64 if operand_bytes == 2 else 32, warps=8, unroll=1)
    # A block of columns holds (students + teachers) * width elements per warp: keep it within 64 registers a thread.
    width = 64
    while width > 16 and (students + teachers) * width * operand_bytes > 4096:
        width //= 2
    small = teachers == 16 and students == 8
    if target == "90":  # measured on an H100
        split, limit = 2 if small and operand_bytes == 2 else 4, 0
    else:
        # Beside that much the compiler spills the parts of fp32 operands for sm_8x and sm_1xx, and the larger Gram
        # matrices for sm_8x; that of an older Triton does for all.
        narrow = (operand_bytes > 2 and (OLDER_COMPILER or target[0] in "81")) or (
            teachers > 16 and (OLDER_COMPILER or target[0] == "8")
        )
        if narrow:
            width = max(width // 2, 16)
        # 168 registers a thread leave room for three programs on a multiprocessor; below three student layers the
        # compiler needs a few more and would spill. For sm_1xx, as an older Triton for all, it spills under the limit
        # and stays below it without.
        split, limit = 4, 168 if not OLDER_COMPILER and target[0] == "8" and not narrow and small and m > 2 else 0
    # 768 columns are three blocks of 256, not one of 1024; short rows take narrower blocks.
    while width > 16 and split * width > _power_of_2(D):
        width //= 2
    blocks = -(-D // (split * width))
    all_blocks = blocks if blocks <= 4 else 2
    unroll = all_blocks if target != "90" else 2 if split == 2 and m > 4 else 1
    return Config(split, width, split, unroll, max_registers=limit)


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
