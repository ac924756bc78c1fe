"""The remainder in the CUDA step's own launch: what the step and then `add_remainder` give, with one rounding less."""

from __future__ import annotations

import pytest
import torch
from tests.ops.cuda.test_mixture import redraw_queries
from tests.ops.cuda.test_step import expected, make, maps, page

from hashattention import ops
from hashattention.ops import cuda, reference
from hashattention.ops.cuda import layout, step

pytestmark = pytest.mark.gpu


def valid_of(made):
    """How many tokens each row may select from, and which, of a dense cache: int32 ``[B]``, bool ``[B, T]``."""
    position = torch.arange(made["k"].shape[2], device="cuda")
    valid = (position >= made["start"][:, None]) & (position < made["end"][:, None])
    return valid.sum(1, dtype=torch.int32), valid


def remainder_of(made):
    """Sums over what each row may select from, as one row of running sums between poison, its length, coefficients."""
    lengths, valid = valid_of(made)
    hidden = ~valid[:, None, :, None]
    sums = [made[name].masked_fill(hidden, 0).sum(2, dtype=torch.float32) for name in ("k", "v")]
    number = lengths.float()[:, None, None].expand(-1, made["k"].shape[1], 1)
    row = torch.cat([*sums, number], -1)
    running = torch.full((*row.shape[:2], 3, row.shape[2]), torch.nan, device="cuda")
    running[:, :, 1] = row
    # Shares from about nothing to that of all tokens left out.
    coefficients = torch.randn(made["q"].shape[1], 3, device="cuda")
    return running[:, :, 1], lengths, coefficients


def taken_of(made, lengths):
    wanted = made["budgets"].sum(-1).clamp(max=made["capacity"])
    return torch.minimum(wanted, lengths[:, None]).int()


def assert_fused(found, made, plain, logsumexp, remainder, softcap=0.0):
    """Within the two roundings that the step and then the op take: half a unit each of what they round, elementwise."""
    sums, lengths, coefficients = remainder
    known = made["q"].float(), sums, taken_of(made, lengths), lengths, coefficients
    wanted = reference.add_remainder(plain.float(), logsumexp, *known, made["scale"], softcap)
    unit = torch.finfo(found.dtype).eps / 2
    allowed = 1.01 * unit * (plain.float().abs() + wanted.abs()) + 2e-5
    off = (found.float() - wanted).abs() - allowed
    assert found.isfinite().all()
    assert off.max() <= 0, f"{off.max().item():.2e} beyond the roundings"


def check(made, pages=0, softcap=0.0):
    """The fused step against the step without, whose selection and attention other tests compare with the reference."""
    remainder = remainder_of(made)
    held = (page(made, pages) if pages else made) | {"softcap": softcap}
    plain, logsumexp = cuda.decode_step(**held)
    found, own = cuda.decode_step(**held, remainder=remainder)
    again, _ = cuda.decode_step(**held, remainder=remainder)
    assert torch.equal(found, again), "two runs differ"
    torch.testing.assert_close(own, logsumexp, rtol=1e-6, atol=1e-6)
    assert_fused(found, made, plain, logsumexp, remainder, softcap)
    left = (taken_of(made, remainder[1]) < remainder[1][:, None]).any()
    assert (found != plain).any() or not left, "nothing was added"


#: One launch, two, and two with several blocks a multiprocessor.
BATCHES = [1, 3, 40]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("budget", [(16, 64, 100), (0, 0, 50), (16, 64, 0), (1, 0, 0), (4, 8, 4000)])
@pytest.mark.parametrize("tokens", [704, 2056])
def test_what_the_step_and_the_op_give(tokens, budget, batch):
    """Ragged rows, NaN outside of them; the last budget takes every token."""
    check(make(batch, tokens, budget=budget))


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 1, "tokens": 4104, "hidden": (256, 256)},
        {"batch": 1, "tokens": 1000, "group": 1},
        {"batch": 1, "tokens": 2048, "heads": 2, "group": 7, "dim": 64, "dtype": torch.float16},
        {"batch": 40, "tokens": 1024, "heads": 2, "group": 7, "dim": 64, "dtype": torch.float16},
        {"batch": 3, "tokens": 2048, "heads": 2, "group": 8},
        {"batch": 40, "tokens": 1024, "heads": 2, "group": 8},
        {"batch": 1, "tokens": 2048, "heads": 2, "dim": 256},
        {"batch": 1, "tokens": 5000, "bits": 32},
        {"batch": 3, "tokens": 5000, "bits": 128},
        {"batch": 1, "tokens": 2048, "hidden": (512,)},
        {"batch": 8, "tokens": 2048, "levels": 0},
        {"batch": 3, "tokens": 2048, "mixture": 4},
    ],
)
def test_other_shapes(options):
    check(make(**options))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", [{"heads": 2, "group": 6}, {"heads": 2, "group": 7, "dim": 64}])
def test_mixtures_of_two(options, batch):
    """As the maps that ship, for 12 heads of 128 and 14 of 64."""
    check(make(batch, 3000, mixture=2, **options))


@pytest.mark.parametrize("pages", [8, 64])
@pytest.mark.parametrize("batch", BATCHES)
def test_pages(batch, pages):
    check(make(batch, 3072, mixture=2), pages)


@pytest.mark.parametrize("softcap", [2.0, 30.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_softcap(batch, softcap):
    check(make(batch, 2048), softcap=softcap)


@pytest.mark.parametrize(("tokens", "mixture"), [(1 << 17, 1), (100000, 2), (1 << 19, 2)])
def test_long_rows_in_clusters(tokens, mixture):
    check(make(1, tokens, heads=4, mixture=mixture, budget=(16, 64, 3000)))


@pytest.mark.parametrize("shape", [(256, 1), (256, 2), (256, 4), (256, 8), (256, 16)])
def test_every_number_of_blocks(shape):
    """Shares of one query head, of several, and of parts of two."""
    made = make(3, 2048, heads=2, group=6)
    remainder = remainder_of(made)
    given = {"shape": shape, "fused": False}
    plain, logsumexp = cuda.decode_step(**made, **given)
    found, _ = cuda.decode_step(**made, **given, remainder=remainder)
    assert_fused(found, made, plain, logsumexp, remainder)


@pytest.fixture
def wide(monkeypatch):
    """Every step of a test is one of wide.cu's."""
    loaded, load = set(), step.load
    monkeypatch.setattr(layout, "WIDE_SLOTS", 0)
    monkeypatch.setattr(step, "load", lambda name, **constants: (loaded.add(name), load(name, **constants))[1])
    yield
    assert loaded == {"wide"}


@pytest.mark.parametrize("pages", [0, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 4104},
        {"tokens": 88, "budget": (2, 4, 20)},
        {"tokens": 3000, "dim": 64, "heads": 2, "group": 7, "dtype": torch.float16},
        {"tokens": 2048, "batch": 4, "heads": 2},
        {"tokens": 704, "budget": (16, 64, 0)},
        {"tokens": 704, "budget": (4, 8, 4000)},
        {"tokens": 9000, "budget": (4, 8, 2000)},
        {"tokens": 1 << 19, "heads": 4, "budget": (16, 64, 1000)},
        {"tokens": 1 << 20, "heads": 2, "budget": (16, 64, 1000)},
    ],
)
def test_plain_blocks(options, pages, wide):
    check(make(**options), pages)


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 3}, {"batch": 40}, {"batch": 1, "mixture": 2}])
def test_the_whole_is_the_reference(options):
    """Selection, attention and remainder in float32; at most twice what storing the output alone costs."""
    made = make(tokens=4096, full=True, **options)
    redraw_queries(made)
    sums, lengths, coefficients = remainder = remainder_of(made)
    out, logsumexp = ops.decode(**made, remainder=remainder, backend="cuda")
    exact, lse = expected(made)
    known = made["q"].float(), sums, taken_of(made, lengths), lengths, coefficients
    wanted = reference.add_remainder(exact, lse, *known, made["scale"])
    torch.testing.assert_close(logsumexp, lse, atol=1e-4, rtol=1e-5)
    plain = (wanted.to(out.dtype).float() - wanted).norm()
    assert (out.float() - wanted).norm() <= 2 * plain


@pytest.mark.parametrize("batch", BATCHES)
def test_where_nothing_is_left_nothing_changes(batch):
    """No token taken, all of them taken, and none summed."""
    for change in ("empty", "all", "none summed"):
        made = make(batch, 1024, budget=(4, 8, 4000) if change == "all" else (4, 8, 50))
        if change == "empty":
            made["start"].copy_(made["end"])
        sums, lengths, coefficients = remainder_of(made)
        sums = torch.zeros_like(sums) if change == "none summed" else sums
        plain, logsumexp = cuda.decode_step(**made)
        found, own = cuda.decode_step(**made, remainder=(sums, lengths, coefficients))
        torch.testing.assert_close(own, logsumexp, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, plain, rtol=torch.finfo(found.dtype).eps, atol=0)
        if change == "empty":
            assert torch.all(found == 0)
            assert torch.all(own == -torch.inf)


def test_huge_coefficients_leave_the_output_between_its_two_parts():
    made = make(2, 2048, full=True)
    sums, lengths, coefficients = remainder_of(made)
    plain, _ = cuda.decode_step(**made)
    mean = (sums[:, :, 128:-1] / sums[..., -1:]).repeat_interleave(4, 1)[:, :, None]
    for size in (1e4, 1e30):
        found, _ = cuda.decode_step(**made, remainder=(sums, lengths, size * coefficients))
        low, high = torch.minimum(mean, plain.float()), torch.maximum(mean, plain.float())
        slack = torch.finfo(found.dtype).eps * torch.maximum(low.abs(), high.abs()) + 1e-6
        assert ((found >= low - slack) & (found <= high + slack)).all()


def new_key_of(made):
    weights, biases = maps(8, (128, 256, made["signatures"].shape[-1] * 32), torch.bfloat16)
    return made["k"][:, :, -1:], weights, [b.float() for b in biases]


@pytest.mark.parametrize("mixture", [1, 2])
@pytest.mark.parametrize(("batch", "most"), [(1, 1), (4, 2), (40, 2)])
def test_a_step_is_one_launch_or_two(batch, most, mixture):
    """By the public op, the newest key's signature included: what `HashSelector` calls."""
    made = make(batch, 2048, full=True, mixture=mixture)
    remainder, new_key = remainder_of(made), new_key_of(made)
    ops.decode(**made, new_key=new_key, remainder=remainder)
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        ops.decode(**made, new_key=new_key, remainder=remainder)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(launched) <= most, launched


@pytest.mark.parametrize("mixture", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_new_key(batch, mixture):
    """Signed as without a remainder, and the step that finds it in the cache gives the same."""
    made = make(batch, 2048, full=True, mixture=mixture)
    remainder, new_key, other = remainder_of(made), new_key_of(made), made["signatures"].clone()
    found, _ = ops.decode(**made, new_key=new_key, remainder=remainder, backend="cuda")
    plain, logsumexp = ops.decode(**{**made, "signatures": other}, new_key=new_key, backend="cuda")
    assert torch.equal(made["signatures"], other)
    assert_fused(found, made, plain, logsumexp, remainder)
    assert torch.equal(found, ops.decode(**made, remainder=remainder, backend="cuda")[0])


@pytest.mark.parametrize("batch", BATCHES)
def test_a_captured_graph_follows_its_inputs(batch):
    made, other = make(batch, 4096, seed=1), make(batch, 4096, seed=2)
    remainder, others = remainder_of(made), remainder_of(other)
    ops.decode(**made, remainder=remainder, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.decode(**made, remainder=remainder, backend="cuda")
    for name in ("q", "k", "v", "signatures", "start", "end", "budgets"):
        made[name].copy_(other[name])
    for tensor, source in zip(remainder, others, strict=True):
        tensor.copy_(source)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, ops.decode(**made, remainder=remainder, backend="cuda")[0])


def test_several_selection_heads_a_kv_head():
    """Two selection heads read the same keys, values and sums."""
    made = make(2, 2048, heads=4, group=2, full=True)
    for name in ("k", "v"):
        made[name] = made[name][:, ::2].contiguous()
    check(made)


def test_the_choice_by_itself_is_this_one():
    made = make(1, 2048, full=True, mixture=2)
    remainder = remainder_of(made)
    assert torch.equal(ops.decode(**made, remainder=remainder)[0], cuda.decode_step(**made, remainder=remainder)[0])
