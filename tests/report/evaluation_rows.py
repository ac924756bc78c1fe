"""Made-up results of every kind, for the tests of the leaderboard."""

from __future__ import annotations

import math
import random
from pathlib import Path

from hashattention.evaluation.result import Marked, Reading, Results, Row

MODEL = "owner/Model-1.5B"
ORIGIN = {
    "version": "0.1.0",
    "commit": "abc",
    "command": "hashattention eval owner/Model-1.5B --tasks needle,ruler:vt --out results",
    "python": "3.11.0",
    "libraries": {"torch": "2.11.0"},
    "device": "cpu (2 threads)",
    "time": "2026-01-01T00:00:00+00:00",
}
LAYERS = 28
#: Method, name, bits, what it loses at 1/32, rows it reads for each attended token.
METHODS = (
    ("oracle", "oracle", 0.0, 0.01, 1.0),
    ("oracle:share=query_head", "oracle per head", 0.0, 0.005, 3.4),
    ("hash", "hash", 64.0, 0.03, 1.0),
    ("quest:page=16", "Quest", 256.0, 0.12, 1.0),
    ("double_sparsity", "Double Sparsity", 64.0, 0.09, 1.0),
    ("streaming", "StreamingLLM", 0.0, 0.6, 1.0),
    ("h2o", "H2O", 16.0, 0.4, 1.0),
    ("infllm", "InfLLM", 256.0, 0.3, 1.0),
    ("lsh", "LSH", 128.0, 0.2, 2.6),
    ("hata", "HATA", 128.0, 0.07, 1.0),
    ("hash+sampled:fraction=0.5", "hash + sample", 64.0, 0.05, 1.0),
)
DENSITIES = (1 / 8, 1 / 16, 1 / 32)
WORDS = ("The ", "sea ", "was ", "grey ", "and ", "nobody ", "on ", "the ", "quay ", "spoke", ". ", "<b>", "\n\n")


def make_rows(methods: int = len(METHODS), samples: int = 3, seed: int = 0) -> list[Row]:
    """Dense, then every method at every density, on the same samples."""
    draw = random.Random(seed)
    cases: list[tuple[str, int, str, float | None]] = [
        ("needle", length, f"{length}-{depth}", depth)
        for length in (4096, 8192, 16384)
        for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    cases += [
        (task, length, str(sample), None)
        for task in ("ruler:vt", "ruler:cwe", "longbench:qasper", "perplexity", "agreement")
        for length in (4096, 8192)
        for sample in range(samples)
    ]
    hard = {case: draw.random() for case in cases}
    settings = [("dense", "dense", 0.0, 0.0, 1.0, 1.0)]
    settings += [(*method, density) for density in DENSITIES for method in METHODS[:methods]]
    return [make_row(case, hard[case], setting, draw) for case in cases for setting in settings]


def make_row(
    case: tuple[str, int, str, float | None],
    hard: float,
    setting: tuple[str, str, float, float, float, float],
    draw: random.Random,
) -> Row:
    task, length, sample, depth = case
    method, name, bits, loss, spread, density = setting
    dense = method == "dense"
    lost = loss * (1 / density / 32) ** 0.7
    nll = 2.1 + hard / 4 + lost / 2 + (0 if dense else draw.gauss(0, 0.01))
    score = {"perplexity": math.exp(-nll), "agreement": 1 - lost / 2}.get(task, float(hard * 0.9 + lost < 0.9))
    return Row(
        task=task,
        length=length,
        sample=sample,
        method=method,
        name=name,
        density=density,
        budget=(0, 0, 0) if dense else (16, 64, int(length * density) - 80),
        score=score,
        answer="7412",
        expected=("7412",),
        logprob=-0.02 - lost,
        attended=None if dense else length * density,
        rows=None if dense else min(length, length * density * spread),
        tokens=length,
        auxiliary_bits=bits,
        head_dim=128,
        error=() if dense else tuple(lost / 2 + 0.04 + 0.1 * abs(draw.gauss(0, 0.2)) for _ in range(LAYERS)),
        depth=depth,
        nll=nll if task == "perplexity" else None,
        kl=lost / 3 if task == "agreement" else None,
        model=MODEL,
        maps="model-1.5b" if method.startswith("hash") else "",
        dtype="bfloat16",
        origin=ORIGIN,
    )


def make_marked(tokens: int = 2000, sample: str = "0", seed: int = 0) -> Marked:
    """A document with a fact at two thirds of it, which every method but StreamingLLM attends to."""
    draw = random.Random(seed)
    pieces = [draw.choice(WORDS) for _ in range(tokens)]
    fact = 2 * tokens // 3
    pieces[fact : fact + 4] = ["The ", "code ", "is ", "7412"]
    readings = []
    for density in DENSITIES:
        for method, name, _, loss, _ in METHODS:
            weights = [0.0 if draw.random() > density else draw.random() ** 6 / 4 for _ in pieces]
            weights[:4] = [0.8, 0.3, 0.2, 0.1]
            weights[fact : fact + 4] = [max(0.0, 0.9 - 2 * loss)] * 4
            right = loss < 0.4
            readings.append(
                Reading(method, name, density, "7412" if right else "<i>no</i>", float(right), tuple(weights))
            )
    return Marked(MODEL, "needle", 2048, sample, tuple(pieces), "What is the code?", ("7412",), tuple(readings))


def write_results(folder: Path, rows: list[Row], documents: int = 2) -> Path:
    """A result folder as `hashattention eval` leaves it."""
    results = Results(folder)
    for row in rows:
        results.append(row)
    for number in range(documents):
        results.mark(make_marked(sample=str(number), seed=number))
    return folder
