from __future__ import annotations

import pytest

from hashattention.evaluation.demo import Answer, DemoResult, Setting
from hashattention.evaluation.needle import Prompt

PIECES = ("<chat>", "A ", "fact", ".", "\n\n", "</script>\n", "More", " text", "<q>")
ORIGIN = {
    "version": "0.1.0",
    "commit": "abc",
    "command": "hashattention demo",
    "python": "3.11.0",
    "libraries": {"torch": "2.11.0"},
    "device": "cpu (2 threads)",
    "time": "2026-01-01T00:00:00+00:00",
}


def a_setting(density: float | None) -> Setting:
    right = Answer("The code is 7412.", True, tuple(place / 16 for place in range(len(PIECES))))
    wrong = Answer("<b>I</b> | do not know the answer to that, and it is far too long to show", False, right.attention)
    silent = Answer("", False, right.attention)
    layers = {} if density is None else {0: 0.5, 1: 0.25}
    name = "dense" if density is None else "hash"
    return Setting(name, density, (right, wrong, silent), 1234.5, 47.3e6, 3e6, layers, layers, 25.04)


@pytest.fixture
def result() -> DemoResult:
    return DemoResult(
        model="owner/model<1>",
        dtype="float32",
        backends={"attend": "cpu"},
        prompt=Prompt(tuple(range(9)), PIECES, (1, 8), ((2, 4), (5, 6), (6, 7)), ""),
        settings=(a_setting(None), a_setting(0.25), a_setting(0.0625)),
        prefill_seconds=1.5,
        weight_bytes=538_000_000,
        maps_origin=ORIGIN,
        origin=ORIGIN,
    )
