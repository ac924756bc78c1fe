from __future__ import annotations

import pytest
import torch
from tests.ops.test_remainder import assert_near, draw
from torch import Tensor

from hashattention import ops
from hashattention.ops import reference, triton

CASES = [
    # heads (Hq, Hkv, Hsel), D, Dv, softcap
    ((8, 2, 2), 64, 64, 0.0),
    ((8, 2, 8), 128, 128, 0.0),
    ((6, 1, 1), 80, 80, 5.0),
    ((3, 3, 3), 80, 48, 0.0),
    ((4, 2, 4), 64, 100, 30.0),
    ((1, 1, 1), 1, 1, 0.0),
]


def exact(out: Tensor, logsumexp: Tensor, q: Tensor, *rest: Tensor, scale: float, softcap: float) -> Tensor:
    return reference.add_remainder(out.float(), logsumexp, q.float(), *rest, scale, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "dim", "dim_v", "softcap"), CASES)
def test_like_the_reference(
    heads: tuple[int, int, int], dim: int, dim_v: int, softcap: float, dtype: torch.dtype, device: str
) -> None:
    """Among the rows: none taken, all taken, and no block summed."""
    given = [tensor.to(device) for tensor in draw(3, heads, (dim, dim_v), dtype)]
    mixed = triton.add_remainder(*given, dim**-0.5, softcap)
    assert mixed.dtype == dtype
    assert_near(mixed, exact(*given, scale=dim**-0.5, softcap=softcap))
    out, sums, taken, lengths = given[0], given[3], given[4], given[5]
    each = taken.repeat_interleave(heads[0] // heads[2], 1)
    same = (each == 0) | (each == lengths[:, None])
    same |= (sums[..., -1] == 0).repeat_interleave(heads[0] // heads[1], 1)
    assert same.any() and torch.equal(mixed[same], out[same])


@pytest.mark.parametrize("how", ["rows", "entries"])
def test_strides(how: str, device: str) -> None:
    """A row of running sums, a query among others, and poison beside all of them."""
    given = [tensor.to(device) for tensor in draw(3, (8, 2, 4), (80, 48))]
    expected = exact(*given, scale=0.1, softcap=0.0)
    for place in range(len(given)):
        tensor = given[place]
        if how == "rows" and tensor.dim() > 2:
            poisoned = tensor.new_full((*tensor.shape[:2], 4, *tensor.shape[2:]), torch.nan)
            poisoned[:, :, -1] = tensor
            given[place] = poisoned[:, :, -1]
        elif how == "entries":
            poisoned = tensor.new_full((*tensor.shape, 2), torch.nan if tensor.is_floating_point() else -(2**31))
            poisoned[..., 0] = tensor
            given[place] = poisoned[..., 0]
    assert not given[3].is_contiguous() and not given[2].is_contiguous()
    assert_near(triton.add_remainder(*given, 0.1), expected)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_coefficients_do_what_the_reference_does(size: float, device: str) -> None:
    given = [tensor.to(device) for tensor in draw(3, (8, 2, 4), (16, 24))]
    given[-1] = size * given[-1]
    assert_near(triton.add_remainder(*given, 0.25), exact(*given, scale=0.25, softcap=0.0))


def test_the_op_asks_for_it_by_name(device: str) -> None:
    given = [tensor.to(device) for tensor in draw(2, (4, 2, 2), (16, 16))]
    mixed = ops.add_remainder(*given, scale=0.25, backend="triton")
    assert torch.equal(mixed, triton.add_remainder(*given, 0.25))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 8), (32, 8, 32), (14, 2, 2)])
def test_bfloat16_on_a_gpu(heads: tuple[int, int, int]) -> None:
    """As it is chosen there, of a slice of running sums; one launch."""
    given = [tensor.cuda() for tensor in draw(5, heads, (128, 128), torch.bfloat16)]
    given[3] = torch.stack([torch.full_like(given[3], torch.nan), given[3]], 2)[:, :, -1]
    expected = exact(*given, scale=0.1, softcap=0.0)
    assert_near(ops.add_remainder(*given, scale=0.1), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.add_remainder(*given, scale=0.1)
        torch.cuda.synchronize()
    seen = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(seen) == 1, seen
