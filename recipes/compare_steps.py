"""Time versions of the CUDA step in turn, in one process, or say when their blocks pass each `MARK`.

    python recipes/compare_steps.py 1x128K,8x32K,8x32Kx64x2x1 HEAD~1 . .:fused ../other:MODE_OF_MINE=1
    python recipes/compare_steps.py --marks 8x32K HEAD .

A case is batch x context, then bits of a signature (64), codes a query (1), and 1 for a remainder. A version is a git
revision or a folder: a checkout, or a copy of `ops/cuda`. After it may stand constants for nvcc, and `fused` or
`split`: one launch or two whatever the number of rows. Outputs are compared with the first version's. Marks are of
block medians and the latest block, in cycles from each block's start; starts and ends in ns from the first start.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import importlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattention.bench.cases import Case, Inputs, make_inputs
from hashattention.bench.methods import remainder_of
from hashattention.bench.timing import GPU_FLUSH_BYTES, capture, time_on_cuda

PLACE = "src/hashattention/ops/cuda"
#: `MOST_BLOCKS` and `MARKS` of common.cuh.
BLOCKS, MARKS = 2048, 32


def parse(text: str, shape: str) -> tuple[Case, bool]:
    """A case and whether it has a remainder, from ``8x32Kx64x2x1``."""
    numbers = [int(part.removesuffix("K")) * (1024 if part.endswith("K") else 1) for part in text.split("x")]
    batch, context, bits, mixture, remainder = numbers + [64, 1, 0][len(numbers) - 2 :]
    return Case(shape, context, batch, 1 / 32, bits, mixture=mixture), bool(remainder)


def copy_sources(version: str, to: Path) -> None:
    """The sources of a revision or folder to the package `to`, which imports itself in place of ours."""
    folder = Path(version)
    if folder.is_dir():
        inside = folder / PLACE
        shutil.copytree(inside if inside.is_dir() else folder, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        done = subprocess.run(["git", "archive", version, PLACE], capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(to.parent / "archive", filter="data")
        shutil.move(to.parent / "archive" / PLACE, to)
    for file in to.glob("*.py"):
        file.write_text(file.read_text(encoding="utf-8").replace("hashattention.ops.cuda", to.name), encoding="utf-8")


@dataclasses.dataclass
class Version:
    """One version: its call, and the libraries that it loaded."""

    name: str
    package: Any
    fused: bool | None
    libraries: dict[str, ctypes.CDLL]

    def __call__(self, x: Inputs, remainder: Any) -> Tensor:
        """The output of one step."""
        arguments = x.q, x.k, x.v, x.signatures, x.weights, x.biases, x.start, x.end, x.budgets, x.capacity
        rest = {"new_key": x.new_key, "fused": self.fused, "remainder": remainder}
        out: Tensor = self.package.decode_step(*arguments, x.case.levels, x.scale, **rest)[0]
        return out


def load(text: str, number: int, folder: Path, marks: bool) -> Version:
    """The version that `text` names, as package ``version_<number>`` of `folder`."""
    name, *flags = text.split(":")
    copy_sources(name, folder / f"version_{number}")
    package = importlib.import_module(f"version_{number}")
    step: Any = importlib.import_module(f"version_{number}.step")
    options = {key: int(value) for key, value in (flag.split("=") for flag in flags if "=" in flag)}
    options |= {"PROFILE": 1} if marks else {}
    fused = True if "fused" in flags else False if "split" in flags else None
    version, build = Version(text, package, fused, {}), step.load

    def load_library(source: str, **constants: int) -> ctypes.CDLL:
        version.libraries[source] = build(source, **constants | options)
        return version.libraries[source]

    step.load = load_library
    return version


def compare(calls: Mapping[str, Callable[[], Tensor]], rounds: int) -> None:
    """Print the median of each in microseconds, and who gives other outputs than the first."""
    outs = {name: call().float() for name, call in calls.items()}
    first = next(iter(outs.values()))
    off = {
        name: ((out - first).abs().amax((2, 3)) > 0.02 * first.abs().max()).float().mean() for name, out in outs.items()
    }
    for name, timing in time_on_cuda(calls, rounds, 20).items():
        note = f"  differs in {off[name]:.0%} of the heads" if off[name] else ""
        print(f"  {name:<32} {timing.p50_ms * 1e3:8.2f} us (p20 {timing.p20_ms * 1e3:.2f}){note}", flush=True)


def show_marks(version: Version, call: Callable[[], Tensor], rounds: int) -> None:
    """Print when the blocks of each launch of one replayed step pass their marks."""
    flush, replay = torch.randn(GPU_FLUSH_BYTES // 4, device="cuda"), capture(call)
    seen: dict[str, list[Tensor]] = {}
    for _ in range(rounds):
        flush.sum()
        replay()
        torch.cuda.synchronize()
        for source, library in version.libraries.items():
            held = (ctypes.c_longlong * (BLOCKS * MARKS))()
            library.read_profile(held)
            seen.setdefault(source, []).append(torch.frombuffer(held, dtype=torch.int64).view(BLOCKS, MARKS).clone())
    zero = None
    for source in sorted(seen):
        marks = torch.stack(seen[source])
        marks = marks[:, (marks[0, :, 0] > 0) & (marks[0, :, 15] > 0)]
        cycles, begin, end = (marks - marks[:, :, :1]).double(), marks[:, :, 31], marks[:, :, 30]
        zero = begin.amin(1, keepdim=True) if zero is None else zero
        times = [f"{(t - zero).double().median():.0f}/{(t - zero).amax(1).double().median():.0f}" for t in (begin, end)]
        passed = [i for i in range(1, 30) if (marks[:, :, i] > 0).all()]
        line = [f"{i}:{cycles[:, :, i].median():.0f}/{cycles[:, :, i].amax(1).median():.0f}" for i in passed]
        print(
            f"  {version.name} {source}, {marks.shape[1]} blocks, start {times[0]} end {times[1]} ns |",
            *line,
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases")
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--marks", action="store_true")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--rounds", type=int, default=120)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        versions = [load(text, i, Path(folder), given.marks) for i, text in enumerate(given.versions)]
        for text in given.cases.split(","):
            case, filled = parse(text, given.shape)
            x = make_inputs(case, "cuda")
            remainder = remainder_of(x) if filled else None
            calls = {version.name: functools.partial(version, x, remainder) for version in versions}
            print(text, flush=True)
            if given.marks:
                for version in versions:
                    show_marks(version, calls[version.name], min(given.rounds, 15))
            else:
                compare(calls, given.rounds)


if __name__ == "__main__":
    main()
