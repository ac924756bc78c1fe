from __future__ import annotations

import pytest

from hashattention.errors import MissingDependencyError
from hashattention.report import lab


def entry(error, **more):
    return {"error": error, "ratio": error / 0.1, **more}


def rows():
    shares = (1 / 8, 1 / 32)
    references = [
        {"heavy": s, "exact_shared": entry(0.1), "exact_per_head": entry(0.08), "quest": entry(0.2),
         "hyperplanes_128": entry(0.3)}
        for s in shares
    ]  # fmt: skip
    found = [{"variant": "references", "layers": [0, 1], "budgets": references, "model": "m<n", "origin": {}}]
    for name, bits, error in (("a", 32, 0.15), ("b", 64, 0.12), ("c", 64, 0.13)):
        budgets = [{"heavy": share, "hash": entry(error)} for share in shares]
        found.append(
            {"variant": name, "layers": [0, 1], "budgets": budgets, "score": error, "bits_per_kv_head": bits,
             "recipe": {"steps": 7}, "model": "m<n", "origin": {"device": "a gpu", "version": "1", "commit": "c"}}
        )  # fmt: skip
    return found


def test_cells_hold_errors_and_ratios():
    assert lab.columns(rows()) == ["selection", "layers", "steps", "bits", "1/8", "1/32"]
    found = lab.cells(rows())
    assert found[0] == ["exact, shared", "2", "", "", "0.100 (1.00)", "0.100 (1.00)"]
    assert found[-2] == ["b", "2", "7", "64", "0.120 (1.20)", "0.120 (1.20)"]


def test_the_page_draws_the_best_beside_the_references(tmp_path):
    page = lab.write(rows(), tmp_path / "lab.html").read_text()
    assert "m&lt;n" in page and "a gpu" in page and page.count("<svg") == 2
    assert all(name in lab.by_density(rows()) for name in ("exact, shared", "Quest", "hyperplanes", ">b<"))
    assert [path.name for path in tmp_path.iterdir()] == ["lab.html"]


def test_one_size_has_no_chart_of_sizes():
    assert lab.by_bits([row for row in rows() if row.get("bits_per_kv_head") != 32]) == ""


def test_what_draws_it_is_asked_for_before_a_study_begins(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"altair and vl_convert.*hashattention\[report\]"):
        lab.check_dependencies()
