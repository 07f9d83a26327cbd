"""What the compiler made of a GPU kernel: registers, spills, shared memory, load widths, matrix instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Report:
    """One kernel. Spilled bytes are those of its frame in local memory."""

    registers: int
    spilled_bytes: int
    local_accesses: int  # loads and stores of local memory
    shared_bytes: int
    loads: dict[str, int]  # global loads by bits per thread
    matrix: dict[str, int]  # matrix instructions by name
    instructions: int

    @property
    def narrow_loads(self) -> int:
        """Global loads under 16 bytes per thread."""
        return sum(count for bits, count in self.loads.items() if int(bits) < 128)

    def row(self) -> str:
        loads = " ".join(f"{count}x{bits}" for bits, count in sorted(self.loads.items(), key=lambda x: int(x[0])))
        matrix = " ".join(f"{count}x{name}" for name, count in sorted(self.matrix.items()))
        return (
            f"{self.registers:4d} registers {self.spilled_bytes:5d} B spilled {self.shared_bytes:7d} B shared "
            f"{self.instructions:6d} instructions | loads {loads or '-'} | matrix {matrix or '-'}"
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def inspect_cubin(path: Path, shared_bytes: int = 0) -> dict[str, Report]:
    """Report on every kernel in a cubin, whoever compiled it, by its name.

    Args:
        path: a cubin for one architecture.
        shared_bytes: dynamic shared memory that the launch adds to what the cubin declares.
    """
    usage = _run("cuobjdump", "-res-usage", path)
    sass = _run("nvdisasm", "-c", path)
    functions = re.split(r"^\.text\.(\S+):$", sass, flags=re.M)
    bodies = dict(zip(functions[1::2], functions[2::2], strict=True))
    reports = {}
    for name, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        instructions = [
            match[1] for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", bodies[name])
        ]
        reports[name] = Report(
            registers=int(registers),
            spilled_bytes=int(stack) + int(local),
            local_accesses=sum(op.split(".")[0] in ("LDL", "STL") for op in instructions),
            shared_bytes=int(shared) + shared_bytes,
            loads=dict(Counter(_width(op) for op in instructions if op.split(".")[0] in ("LDG", "LDGSTS"))),
            matrix=dict(Counter(op for op in instructions if op.split(".")[0] in _MATRIX)),
            instructions=len(instructions),
        )
    return reports


def inspect_gcn(assembly: str, shared_bytes: int) -> Report:
    """Report on an AMD kernel from its assembly text."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    instructions = re.findall(r"^\s+([a-z]\w+)", assembly, flags=re.M)
    widths = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "ushort": "16", "ubyte": "8"}
    loads = Counter(widths.get(op.split("_")[2], "16") for op in instructions if re.match(r"(global|buffer)_load_", op))
    return Report(
        registers=number("vgpr_count"),
        spilled_bytes=number("private_segment_fixed_size"),
        local_accesses=sum(op.startswith("scratch_") for op in instructions),
        shared_bytes=shared_bytes,
        loads=dict(loads),
        matrix=dict(Counter(op for op in instructions if op.startswith("v_mfma"))),
        instructions=len(instructions),
    )


_MATRIX = ("HMMA", "DMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")


def _width(op: str) -> str:
    """Bits per thread of LDG.E.128.CONSTANT and the like; a plain LDG.E loads 32."""
    return next((part.lstrip("SU") for part in op.split(".") if re.fullmatch(r"[SU]?(8|16|64|128|256)", part)), "32")


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([_tool(tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    """A CUDA binary utility: Triton's own, else that of the toolkit."""
    try:
        import triton

        packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if packaged.exists():
            return str(packaged)
    except ImportError:
        pass
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is missing: pip install triton, or put the CUDA toolkit's bin on PATH")
    return found
