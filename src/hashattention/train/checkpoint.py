"""Checkpoint: a half-finished group of layers as one safetensors file, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from hashattention.train.optimise import Optimiser, RunningMean
from hashattention.train.student import Student
from hashattention.train.watch import Watch


def save(
    path: Path, student: Student, optimiser: Optimiser, mean: RunningMean | None, watch: Watch | None, step: int
) -> None:
    """Write everything that the steps after `step` depend on."""
    from safetensors.torch import save_file

    tensors = {f"weight.{name}": tensor.detach() for name, tensor in student.tensors.items()} | optimiser.state()
    metadata = {"step": str(step)}
    if mean is not None:
        tensors |= {f"mean.{name}": tensor for name, tensor in mean.tensors.items()}
    if watch is not None:
        best, numbers = watch.state()
        tensors, metadata = tensors | best, metadata | numbers
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def load(path: Path, student: Student, optimiser: Optimiser, mean: RunningMean | None, watch: Watch | None) -> int:
    """Continue from a checkpoint: the steps it has seen; 0 if there is none, or one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return 0
    for name, tensor in student.tensors.items():
        tensor.data.copy_(held[f"weight.{name}"])
        if mean is not None:
            mean.tensors[name].copy_(held[f"mean.{name}"])
    step = int(metadata["step"])
    optimiser.restore(held, step)
    if watch is not None:
        watch.restore(held, metadata)
    return step
