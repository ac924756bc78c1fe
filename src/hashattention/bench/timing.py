"""Timing: interleaved rounds, so that a ratio compares calls a moment apart; a cold cache before every call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from hashattention.errors import ConfigError

#: More than the last-level cache of one socket: in a model, other layers pass through it between two calls.
FLUSH_BYTES = 128 * 2**20

#: The same for the second-level cache of a GPU.
GPU_FLUSH_BYTES = 384 * 2**20

#: The fewest samples of any function.
LEAST = 5

Functions = Mapping[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one function over its samples: 20th, 50th and 80th percentile, and how many there were.

    `floor_ms` is the median of nothing at all, timed the same way in the same rounds; it is part of the others.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    floor_ms: float = 0.0

    @classmethod
    def of(cls, milliseconds: list[float], nothing: Sequence[float] = (0.0,)) -> Timing:
        """From samples in any order; a percentile is a sample, never a mean of two."""
        ordered = sorted(milliseconds)
        low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return cls(low, middle, high, len(ordered), sorted(nothing)[len(nothing) // 2])


def time_on_cpu(functions: Functions, rounds: int, seconds: float) -> dict[str, Timing]:
    """Time every function once a round, in turn.

    Parameters
    ----------
    functions : mapping of str to callable
    rounds : int
        Samples of each, unless `seconds` are spent before.
    seconds : float
        Time for all; functions that are far slower than their share get `LEAST` samples.
    """
    flush = torch.ones(FLUSH_BYTES // 4)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    began = time.perf_counter()
    for turn in range(max(rounds, LEAST)):
        spent = time.perf_counter() - began
        if turn >= LEAST and spent > seconds:
            break
        for name, function in functions.items():
            slow = turn >= LEAST and sum(samples[name]) / 1e3 > seconds / len(functions)
            if slow:
                continue
            # Read, not written: other layers' weights leave no dirty lines behind.
            flush.sum()
            before = time.perf_counter()
            function()
            samples[name].append((time.perf_counter() - before) * 1e3)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def capture(function: Callable[[], object]) -> Callable[[], object]:
    """Replay of a CUDA graph of one call, after two calls that compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_on_cuda(functions: Functions, rounds: int, seconds: float) -> dict[str, Timing]:
    """As `time_on_cpu`, each function a captured graph between two events, queued behind a read of `GPU_FLUSH_BYTES`.

    The time of an empty pair of events (some microseconds of launch) is part of every sample, and is the floor.
    """
    flush = torch.randn(GPU_FLUSH_BYTES // 4, device="cuda")
    graphs = {name: capture(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    nothing: list[float] = []
    began = time.perf_counter()
    for turn in range(max(rounds, LEAST)):
        if turn >= LEAST and time.perf_counter() - began > seconds:
            break
        for name, replay in graphs.items():
            samples[name].append(_between_events(flush, replay))
        nothing.append(_between_events(flush, lambda: None))
    return {name: Timing.of(taken, nothing) for name, taken in samples.items()}


def _between_events(flush: torch.Tensor, replay: Callable[[], object]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.sum()
    before.record()
    replay()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after))


#: Device type -> how functions on it are timed.
TIMERS: dict[str, Callable[[Functions, int, float], dict[str, Timing]]] = {"cpu": time_on_cpu, "cuda": time_on_cuda}


def time_functions(device: str, functions: Functions, rounds: int, seconds: float) -> dict[str, Timing]:
    """Time `functions` as this device needs it.

    Raises
    ------
    ConfigError
        If no timer is known for the device.
    """
    kind = torch.device(device).type
    if kind not in TIMERS:
        raise ConfigError(f"no timer for device {device!r}; benchmarks run on {', '.join(TIMERS)}.")
    return TIMERS[kind](functions, rounds, seconds)
