from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from hashattention import ops
from hashattention.bench.cases import Case, make_inputs
from hashattention.bench.methods import BASELINES, OURS, choose
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
    assert {row["context"] for row in rows} == {600}
    assert CliRunner().invoke(app, ["bench", "attention", "--shape", "gpt-2"]).exit_code == 2
