"""Compile the GPU kernels for a card that need not be there, and read what the compilers made of them.

    python benchmarks/gpu_kernels.py [--capability 90]        writes benchmarks/results/kernels-sm90.md

Triton compiles its kernels, and NVRTC, through CuPy, those of ``qif.cu``. ``cuobjdump`` and ``nvdisasm``, from Triton,
read the machine code: registers and spills, which limit the threads that hide the memory's latency; the width of loads
and stores; and the instructions of a time step, which limit the neuron-steps a second however fast the memory is.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qif_plugins.ops import cupy_backend, triton_backend
from qif_plugins.ops.contract import Coefficient, Coefficients, Kind, Shape

BANDWIDTH = 4.3e12
"""Bytes a second that a copy reads and writes on an H200."""
ISSUED = 132 * 4 * 1.98e9
"""Instructions a second, each for 32 threads, that the 132 multiprocessors of an H200 issue at 1.98 GHz."""


class Target:
    """Answer what Triton's compiler asks of a driver; compiling needs no GPU."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled:
    """Compile a Triton kernel for the arguments of a launch, without launching it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.results: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.results.append(self.kernel.warmup(*args, grid=grid, **options))

    @property
    def ptx(self) -> str:
        return str(self.results[-1].asm["ptx"])


class Kernel(NamedTuple):
    """What the machine code of a kernel shows; ``instructions`` are those of a time step of a thread's four neurons."""

    registers: int
    spills: int
    loads: list[str]
    stores: list[str]
    instructions: float


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory: its address counts as aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def machine_code(shapes: tuple[Shape | None, ...], dtype: torch.dtype, capability: int) -> Iterator[tuple[Any, ...]]:
    """Compile forward (``None``) and backward of a hard-reset neuron; yield backend, shape and machine code."""
    from triton.runtime import driver

    from qif_plugins.ops import triton_kernels

    kept = driver._active, triton_kernels.forward, triton_kernels.backward, cupy_backend._launch
    code: list[bytes] = []

    def compile_only(name: str, flags: dict[str, int], *_: Any) -> None:
        binary, _ = cupy_backend.compile_kernel(name, flags, divmod(capability, 10))
        code.append(binary + b"\0")  # CuPy strips the last byte, which the tools miss

    try:
        driver._active = Target(capability)
        triton_kernels.forward, triton_kernels.backward = made = Compiled(kept[1]), Compiled(kept[2])
        cupy_backend._launch = compile_only
        numbers = Coefficients(*(Coefficient(1.0 + i) for i in range(9)))
        x, last, h = empty(4, 2**22, dtype=dtype), empty(2**22, dtype=dtype), empty(4, 2**22)
        for shape in shapes:
            kind = Kind(False, False, False, shape or Shape.WINDOW, False)
            for backend, module in (("Triton", triton_backend), ("CUDA", cupy_backend)):
                if shape is None:
                    module.forward(x, 0.0, numbers, kind, x, last, None, h)
                else:
                    module.backward(x, None, None, h, 0.0, None, numbers, kind, x, None, (False,) * 6)
                yield (
                    backend,
                    shape,
                    code[-1] if backend == "CUDA" else made[shape is not None].results[-1].asm["cubin"],
                )
    finally:
        driver._active, triton_kernels.forward, triton_kernels.backward, cupy_backend._launch = kept


def read(binary: bytes) -> Kernel:
    """Read the machine code of a kernel."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).with_name("bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[str] = []  # from the label that a later branch goes back to, where something is stored
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"BRA `\((\.L_x_\d+)\)", line)
            if back and back[1] in labels and any("STG" in one for one in lines[labels[back[1]] :]):
                loops.append("\n".join(lines[labels[back[1]] :]))
    loop = min(loops, key=len)
    registers, stack, local = map(int, re.findall(r"(?:REG|STACK|LOCAL):(\d+)", usage)[:3])
    loads, stores = (re.findall(rf"\b{name}\.E(?:\.(\d+))?", loop) for name in ("LDG", "STG"))
    steps = min(len(loads), len(stores))  # that the compiler takes at a time: each has one load or one store
    spills = stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Kernel(
        registers, spills, loads[: len(loads) // steps], stores[: len(stores) // steps], (loop.count("\n") + 1) / steps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the GPU kernels without a GPU, and read the machine code.")
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 90 for 9.0")
    capability = parser.parse_args().capability
    import cupy
    import triton

    nvrtc = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    lines = [
        f"# The kernels, compiled for sm_{capability}\n",
        f"Written by `python benchmarks/gpu_kernels.py` with Triton {triton.__version__} and NVRTC {nvrtc}; no GPU was "
        "needed. The neuron has plain numbers and a hard reset. *Loads* and *stores* are those of a time step of a "
        "thread's four neurons, in bits; *instructions* too, without the rare slow path of a division. *Issued over "
        "moved*: the neuron-steps a second that an H200 issues (132 multiprocessors, four instructions a cycle, "
        "1.98 GHz) over those whose bytes it moves at 4.3 TB/s. Near or below 1 the instructions are the limit; that "
        "comparisons and selections run at half rate is not counted.\n",
        "| | kernel | dtype | registers | spills | loads | stores | instructions | issued over moved |",
        "| --- | --- | --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for backend, shape, binary in machine_code((None, *Shape), dtype, capability):
            kernel = read(binary)
            name = "forward" if shape is None else f"backward, {shape.name.lower().replace('_', ' ')}"
            issued, moved = ISSUED * 4 * 32 / kernel.instructions, BANDWIDTH / (2 * dtype.itemsize + 4)
            cells = [backend, name, str(dtype)[6:], kernel.registers, kernel.spills, ", ".join(kernel.loads)]
            cells += [", ".join(kernel.stores), f"{kernel.instructions:g}", f"{issued / moved:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    out = Path(__file__).parent / "results" / f"kernels-sm{capability}.md"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
