"""Read from the machine code of a CUDA kernel what an element costs. Needs cuobjdump and nvdisasm, and no GPU.

The hot loop is the innermost loop among those that move more than half as many bytes as any other. Each of its instructions takes one
issue slot of a warp. Left out are stretches that a branch jumps over and that call a function: the slow paths of divisions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.a-z]+)\s*(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+|\$?[\w$]+):\s*$")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}  # bytes of a load or store, by a part of its name
SLOW_PATH = 24  # instructions; a longer stretch that a branch jumps over is no slow path


class Instruction(NamedTuple):
    """An instruction of the machine code."""

    predicate: str  # such as "@!P0", or ""
    name: str  # such as "LDG.E.128"
    operands: str

    @property
    def kind(self) -> str:
        """First part of the name."""
        return self.name.partition(".")[0]

    @property
    def loads(self) -> bool:
        """Whether it loads from global memory."""
        return self.kind in ("LDG", "LD")

    @property
    def moved(self) -> int:
        """Bytes that it loads from or stores to global memory; 0 for the volatile accesses to partial sums."""
        return self.width if (self.loads or self.kind in ("STG", "ST")) and "STRONG" not in self.name else 0

    @property
    def width(self) -> int:
        """Bytes of a load or store."""
        return next((WIDTHS[part] for part in self.name.split(".") if part in WIDTHS), 4)

    @property
    def registers(self) -> list[int]:
        """Numbers of the registers among the operands, in their order."""
        return [int(number) for number in REGISTER.findall(self.operands)]

    @property
    def target(self) -> str:
        """Label that a branch goes to, or ""."""
        found = TARGET.search(self.operands) if self.kind == "BRA" else None
        return found[1] if found else ""


@dataclass(frozen=True)
class Budget:
    """What a kernel takes of a multiprocessor, and what its hot loop costs."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes of shared memory
    slots: int  # instructions of the hot loop
    moved: int  # bytes that the hot loop loads and stores
    loads_ahead: int  # loads before the first instruction that uses one of them
    widths: tuple[int, ...]  # bytes of the loads and stores of the loop, without repetition


def read(code: bytes) -> Budget:
    """Return the budget of a kernel's machine code."""
    loop = hot_loop(*parse(run("nvdisasm", "-c", code)))
    widths = tuple(sorted({x.moved for x in loop} - {0}))
    moved = sum(x.moved for x in loop)
    return Budget(**resources(code), slots=len(loop), moved=moved, loads_ahead=loads_ahead(loop), widths=widths)


def resources(code: bytes) -> dict[str, int]:
    """Return a kernel's registers, and its bytes of spilled registers and of shared memory."""
    shown = run("cuobjdump", "-res-usage", code)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": used["SHARED"]}


def run(name: str, option: str, code: bytes) -> str:
    """Run a tool of CUDA's toolkit, from its Python package, on machine code, and return what it prints."""
    tool = next(Path(str(file.locate())) for file in files(f"nvidia-cuda-{name}") or [] if file.name == name)
    tool.chmod(0o755)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of the kernel's own section, and the positions of labels."""
    code, labels, is_inside = list[Instruction](), dict[str, int](), False
    for line in text.splitlines():
        if line.split()[:1] == [".section"]:
            is_inside = ".text." in line
        elif is_inside and (label := LABEL.match(line)):
            labels[label[1]] = len(code)
        elif is_inside and (found := LINE.match(line)):
            code.append(Instruction((found[1] or "").strip(), found[2], found[3].strip()))
    return code, labels


def hot_loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """Return the instructions of the hot loop."""
    loops = [(labels[x.target], k) for k, x in enumerate(code) if x.target and labels[x.target] <= k]
    moved = {(first, last): sum(x.moved for x in code[first : last + 1]) for first, last in loops}
    most = max(moved.values(), default=0)
    if not most:
        raise ValueError("the kernel has no loop that moves bytes")
    first, last = min((loop for loop, count in moved.items() if count > most / 2), key=lambda loop: loop[1] - loop[0])
    skipped = slow_paths(code, labels, first, last)
    return [code[k] for k in range(first, last + 1) if k not in skipped]


def slow_paths(code: list[Instruction], labels: dict[str, int], first: int, last: int) -> set[int]:
    """Return the positions of slow paths in a loop."""
    skipped: set[int] = set()
    for k in range(first, last):
        end = labels.get(code[k].target, k)
        if k < end <= min(last, k + SLOW_PATH - 1) and any(x.kind == "CALL" for x in code[k + 1 : end]):
            skipped |= set(range(k + 1, end))
    return skipped


def loads_ahead(loop: list[Instruction]) -> int:
    """Return how many loads come before the first instruction that uses what one of them loads."""
    pending, count = set[int](), 0
    for x in loop:
        used = x.registers[1:] if x.loads else x.registers
        if pending.intersection(used):
            break
        if x.loads:
            pending |= set(range(x.registers[0], x.registers[0] + max(1, x.width // 4)))
            count += 1
    return count
