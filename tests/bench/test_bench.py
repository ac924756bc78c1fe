from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from hashattention import ops
from hashattention.bench import paged, paper
from hashattention.bench import run as running
from hashattention.bench.cases import SHAPES, SUITES, Case, make_inputs
from hashattention.bench.methods import BASELINES, OURS, Method, choose
from hashattention.bench.roofline import bytes_of
from hashattention.bench.run import check, run
from hashattention.bench.timing import LEAST, Timing, time_functions, time_on_cpu
from hashattention.cli.app import app
from hashattention.errors import BackendError, ConfigError

CASE = Case("qwen2.5-1.5b", 600, batch=2, density=1 / 4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashattention.bench.timing.FLUSH_BYTES", 4096)
    monkeypatch.setattr("hashattention.bench.roofline.COPY_BYTES", 2**20)


def test_inputs_fit_the_ops_and_fill_the_budget() -> None:
    inputs = make_inputs(CASE)
    assert inputs.k.shape == (2, 2, 600, 128)
    assert inputs.q.dtype == torch.bfloat16
    chosen = choose(inputs)
    assert chosen.counts.tolist() == [[150, 150]] * 2
    assert make_inputs(Case("llama-2-7b", 5000)).k.shape == (1, 32, 5000, 128)


def test_every_method_computes_what_it_says() -> None:
    inputs = make_inputs(CASE)
    chosen = choose(inputs)
    dense = BASELINES["cpu"]["dense SDPA, group as rows"].prepare(inputs, chosen)()
    gqa = BASELINES["cpu"]["dense SDPA, enable_gqa"].prepare(inputs, chosen)()
    torch.testing.assert_close(dense.flatten(1, 2).unsqueeze(2), gqa, rtol=2e-2, atol=2e-3)
    step, attended = OURS["step"].prepare(inputs, chosen)()[0], OURS["attend"].prepare(inputs, chosen)()[0]
    assert torch.equal(step, attended)


def test_a_wrong_kernel_is_not_timed() -> None:
    inputs = make_inputs(CASE)
    chosen = choose(inputs)
    assert check(inputs, chosen)["attend_error"] > 0
    with mock.patch.object(ops, "attend", lambda q, *a, **k: (q * 0, None)), pytest.raises(BackendError, match="errs"):
        check(inputs, chosen)
    chosen.indices[0, 0, 40] += 1
    with pytest.raises(BackendError, match="score_select differs"):
        check(inputs, chosen)


def test_a_wrong_remainder_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(CASE)
    chosen = choose(inputs)
    assert check(inputs, chosen)["remainder_error"] < 1e-2
    real = ops.decode

    def without(*given: object, remainder: object = None, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
        return real(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "decode", without)
    with pytest.raises(BackendError, match="the step with a remainder errs"):
        check(inputs, chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mixture_is_drawn_and_passes_the_gate(dtype: torch.dtype) -> None:
    inputs = make_inputs(dataclasses.replace(CASE, mixture=2, dtype=dtype))
    assert inputs.weights[-1].shape[-1] == 2 * inputs.key_weights[-1].shape[-1] == 128
    chosen = choose(inputs)
    assert chosen.code.shape == (2, 2, 1, 128)
    gate = check(inputs, chosen)
    assert gate["step_heads_off"] == 0
    step, filled = (OURS[name].prepare(inputs, chosen)() for name in ("step", "step+remainder"))
    assert torch.equal(step[0], OURS["attend"].prepare(inputs, chosen)()[0])
    assert not torch.equal(step[0], filled[0])


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(CASE)
    chosen = choose(inputs)
    assert check(inputs, chosen)["step_heads_off"] == 0
    real = ops.decode

    def off(q: torch.Tensor, *rest: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = real(q, *rest, **named)  # type: ignore[arg-type]
        return out * 1.5, lse

    monkeypatch.setattr(ops, "decode", off)
    with pytest.raises(BackendError, match="the step differs from its parts in 100% of the heads"):
        check(inputs, chosen)


def test_the_newest_key_is_signed_in_the_inputs() -> None:
    inputs = make_inputs(CASE)
    before = inputs.signatures.clone()
    OURS["step"].prepare(inputs, choose(inputs))()
    assert torch.equal(inputs.signatures, before)
    inputs.signatures[:, :, -1] = 5
    OURS["encode"].prepare(inputs, choose(inputs))()
    assert torch.equal(inputs.signatures, before)


def test_the_papers_way_takes_the_nearest_signatures_of_each_query_head() -> None:
    inputs = make_inputs(CASE)
    seen: list[torch.Tensor] = []
    real = paper.popcount

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(real(x))
        assert seen[-1][0, 0, :50].tolist() == [int(word).bit_count() for word in x[0, 0, :50].tolist()]
        return seen[-1]

    with mock.patch.object(paper, "popcount", spy):
        out = paper.prepare(inputs, None)()
    sink, local, heavy = CASE.budget.counts(CASE.context)
    distance = seen[0]
    assert distance.shape == (2, 12, CASE.context - sink - local)
    order = distance.sort(-1).values
    strict = distance < order[..., heavy : heavy + 1]
    assert strict.sum(-1).le(heavy).all()
    for head in (0, 7):
        row, kv = distance[1, head], head // 6
        best = row.topk(heavy, largest=False, sorted=False).indices + sink
        index = torch.cat([torch.arange(sink), torch.arange(CASE.context - local, CASE.context), best])
        k, v, q = inputs.k[1, kv, index].float(), inputs.v[1, kv, index].float(), inputs.q[1, head].float()
        exact = (q @ k.T * inputs.scale).softmax(-1) @ v
        torch.testing.assert_close(out[1, head].float(), exact, rtol=3e-2, atol=3e-2)
    assert paper.bytes_moved(inputs) > 2 * 12 * (600 * 8 + 150 * 512)


def test_pages_hold_the_cache_in_order() -> None:
    cache = torch.randn(3, 2, 5 * paged.PAGE, 4)
    pages = paged.pages_of(cache)
    assert pages.shape == (15, 2, paged.PAGE, 4)
    assert torch.equal(pages.unflatten(0, (3, 5)).transpose(1, 2).flatten(2, 3), cache)


@pytest.mark.skipif(paged.version() is not None, reason="flashinfer is installed")
def test_a_baseline_that_is_not_there_says_so_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: object, chosen: object) -> object:
        raise RuntimeError("No available kernel.\nAborting.")

    def other(inputs: object, chosen: object) -> object:
        return lambda: torch.zeros(2, 12, 1, 128)

    extra = {
        "dense FlashInfer, paged": BASELINES["cuda"]["dense FlashInfer, paged"],
        "dense failing": Method("dense", fail),
        "dense wrong": Method("dense", other),
    }
    monkeypatch.setitem(running.BASELINES, "cpu", running.BASELINES["cpu"] | extra)
    rows = {row["method"]: row for row in run("attention", [CASE], "cpu", rounds=1, seconds=0.0)}
    assert rows["dense FlashInfer, paged"]["refusal"] == "flashinfer: not installed"
    assert rows["dense failing"]["refusal"] == "RuntimeError: No available kernel."
    assert rows["dense wrong"]["refusal"] == "differs from the first dense method"
    assert rows["dense failing"]["context"] == 600
    assert rows["step"]["speedup"] > 0
    assert "refusal" not in rows["paper, torch"]


def test_suites_hold_what_the_design_names() -> None:
    points = {(case.batch, case.context, case.bits, case.density) for case in SUITES["targets"]}
    wanted = {(1, 131072, 64), (32, 131072, 64), (32, 131072, 32), (1, 32768, 64), (8, 32768, 64), (1, 4096, 64)}
    assert points >= {(*point, 1 / 32) for point in wanted}
    assert max(case.context for case in SUITES["contexts"]) == 2**20
    assert {case.density for case in SUITES["densities"]} == {1 / 8, 1 / 16, 1 / 32, 1 / 64}
    assert {case.shape for case in SUITES["shapes"]} == set(SHAPES)
    assert {case.bits for case in SUITES["bits"]} == {32, 64, 128}
    assert {case.batch for case in SUITES["batches"]} == {1, 2, 4, 8, 16, 32, 64}
    shipped = {(case.shape, case.batch, case.context) for case in SUITES["shipped"]}
    assert shipped >= {("llama-3.1-8b", 32, 131072), ("qwen2.5-1.5b", 1, 4096), ("qwen2.5-1.5b", 8, 32768)}
    assert {(case.mixture, case.bits) for case in SUITES["shipped"]} == {(2, 64)}
    assert all(case.mixture == 1 for name, suite in SUITES.items() if name != "shipped" for case in suite)
    every = [case for suite in SUITES.values() for case in suite]
    assert all(case.budget.capacity(case.context) < case.context for case in every)


def test_bytes() -> None:
    inputs = make_inputs(CASE)
    row = 2 * 2 * 128 * 2 * 2
    assert bytes_of("dense", "dense", inputs) == row * 600
    assert bytes_of("attend, reference", "slow", inputs) == row * 150
    assert bytes_of("score+select", "part", inputs) == 2 * 2 * 600 * 8
    parts = sum(bytes_of(name, "part", inputs) for name in ("encode", "score+select", "attend"))
    assert bytes_of("step", "ours", inputs) == parts


def test_percentiles_are_samples() -> None:
    timing = Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert timing == Timing(2.0, 3.0, 5.0, 6)


def test_rounds_are_interleaved_and_end() -> None:
    order: list[str] = []
    timings = time_on_cpu({name: lambda name=name: order.append(name) for name in "ab"}, 7, 10.0)
    assert order == ["a", "b"] * 8
    assert timings["a"].samples == 7
    assert time_on_cpu({"a": lambda: None}, 1000, 0.0)["a"].samples == LEAST
    with pytest.raises(ConfigError, match="no timer for device 'meta'"):
        time_functions("meta", {}, 1, 1.0)


@pytest.mark.parametrize("bench", ["attention", "ops"])
def test_rows(bench: str) -> None:
    rows = {row["method"]: row for row in run(bench, [CASE], "cpu", rounds=1, seconds=0.0)}
    assert rows["step"]["heavy"] == 70
    assert rows["step"]["hidden"] == [256]
    assert rows["step"]["mixture"] == 1
    assert rows["step+remainder"]["backend"] == rows["step"]["backend"]
    assert rows["step"]["origin"]["version"]
    assert rows["step"]["bytes"] / rows["step"]["p50_ms"] * 1e3 == rows["step"]["bytes_per_second"]
    if bench == "attention":
        assert rows[rows["step"]["baseline"]]["speedup"] == 1
    else:
        assert rows["step"]["speedup"] is None
        assert "attend, reference" in rows


def test_the_verb(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    given = ["bench", "attention", "--context", "600", "--rounds", "1", "--seconds", "0", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == rows
    assert {(row["context"], row["mixture"]) for row in rows} == {(600, 1)}
    several = CliRunner().invoke(app, [*given, "--mixture", "1", "--mixture", "2"])
    assert several.exit_code == 0, several.output
    assert {row["mixture"] for row in json.loads(several.stdout.splitlines()[-1])["rows"]} == {1, 2}
    assert CliRunner().invoke(app, ["bench", "attention", "--shape", "gpt-2"]).exit_code == 2


def test_the_verb_runs_a_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SUITES, "targets", [CASE, Case("qwen2.5-1.5b", 500)])
    given = ["bench", "ops", "--suite", "targets", "--rounds", "1", "--seconds", "0", "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {(row["batch"], row["context"]) for row in rows} == {(2, 600), (1, 500)}
    unknown = CliRunner().invoke(app, ["bench", "ops", "--suite", "all"])
    assert unknown.exit_code == 2
    assert "known: targets, contexts" in " ".join(unknown.stderr.split())
    both = CliRunner().invoke(app, ["bench", "ops", "--suite", "bits", "--context", "5"])
    assert both.exit_code == 2
    assert "leave out --context" in " ".join(both.stderr.split())
