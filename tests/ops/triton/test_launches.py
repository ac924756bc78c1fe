"""How many launches an op is: kernels of Triton's and of torch's, fills and copies counted with them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hashattention import ops
from hashattention.ops import triton
from hashattention.ops.triton.select import _score_count

CODES = [
    # bits, levels (0: bit code), code heads of a selection head
    *[(bits, 7, 1) for bits in (32, 64, 128)],
    *[(bits, 0, share) for bits in (32, 64, 128) for share in (1, 4)],
    (32, 127, 1),
]


class Launches(TorchDispatchMode):
    """Names of what a call launches on a device, in order: kernels, and torch ops that neither view nor allocate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False
        kind = type(_score_count)
        run = kind.run

        def count(kernel: Any, *arguments: Any, **options: Any) -> Any:
            self.names.append(kernel.__name__)
            self.inside = True
            try:
                return run(kernel, *arguments, **options)
            finally:
                self.inside = False

        monkeypatch.setattr(kind, "run", count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self.inside or func.is_view or "empty" in func.__name__ or "split" in func.__name__):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape).int()


def score_select_call(
    bits: int, levels: int, share: int, device: str, run: Callable[..., Any] = triton.score_select
) -> Callable[[], Any]:
    heads, tokens = 2, 1500
    if levels:
        code = torch.randint(-levels, levels + 1, (1, heads * share, 1, bits)).to(torch.int8)
    else:
        code = random_words(1, heads * share, 1, bits // 32)
    signatures = random_words(1, heads, tokens, bits // 32)
    bounds = torch.tensor([0]).int(), torch.tensor([tokens]).int()
    budgets = torch.tensor([4, 16, 90]).int().repeat(1, heads, 1)
    tensors = [t.to(device) for t in (code, signatures, *bounds, budgets)]
    return lambda: run(*tensors, 110, levels=levels or 127)


def decode_call(
    bits: int, levels: int, share: int, device: str, run: Callable[..., Any] = triton.decode_step
) -> Callable[[], Any]:
    """The whole step with a newest key; few rows, so that encoding and attention are split and merged."""
    heads, tokens, dim, hidden = 2, 300, 16, 64
    maps = heads * share
    q = torch.randn(1, heads * 4, 1, dim)
    k, v = torch.randn(2, 1, heads, tokens, dim).unbind()
    drawn = []
    for count, width in ((maps, 4 * dim // share), (heads, dim)):
        sizes = itertools.pairwise([width, hidden, bits])
        drawn += [[torch.randn(count, a, b).to(device) for a, b in sizes], []]
        drawn[-1] += [torch.randn(count, b).to(device) for b in (hidden, bits)]
    bounds = torch.tensor([0]).int(), torch.tensor([tokens]).int()
    budgets = torch.tensor([4, 16, 44]).int().repeat(1, heads, 1)
    new_key = (torch.randn(1, heads, 1, dim).to(device), *drawn[2:])
    caches = [t.to(device) for t in (q, k, v, random_words(1, heads, tokens, bits // 32))]
    rows = [t.to(device) for t in (*bounds, budgets)]
    return lambda: run(*caches, *drawn[:2], *rows, 64, levels=levels, scale=0.25, new_key=new_key)


@pytest.mark.parametrize(("bits", "levels", "share"), CODES)
def test_score_and_select_are_two_launches(
    bits: int, levels: int, share: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = score_select_call(bits, levels, share, device)
    with Launches(monkeypatch) as launches:
        call()
    assert launches.names == ["_score_count", "_write_indices"]


@pytest.mark.parametrize(("bits", "levels", "share"), CODES)
def test_the_whole_step_is_four_launches(
    bits: int, levels: int, share: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = decode_call(bits, levels, share, device)
    with Launches(monkeypatch) as launches:
        call()
    assert launches.names == ["_encode_pair", "_score_count", "_write_indices", "_attend"]


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "levels", "share"), CODES)
@pytest.mark.parametrize(
    ("make", "op", "most"), [(score_select_call, ops.score_select, 2), (decode_call, ops.decode, 4)]
)
def test_the_device_sees_no_more(
    make: Callable[..., Any], op: Callable[..., Any], most: int, bits: int, levels: int, share: int
) -> None:
    """What the profiler saw run of the public op, fills and copies included."""
    call = make(bits, levels, share, "cuda", functools.partial(op, backend="triton"))
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    seen = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(seen) == most, seen
