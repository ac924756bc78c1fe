from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tests.train.bytes_model import tiny_model, tiny_recipe, write_texts

from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.train import lab as module
from hashattention.train.lab import REFERENCES, Lab
from hashattention.train.sweep import Sweep, Variant

BUDGETS = (1 / 8, 1 / 32)


def sweep(*variants, **changes):
    return Sweep(tiny_recipe(budgets=BUDGETS), variants, judge=1 / 32, **changes)


def study(tmp_path, plan, told=None):
    lab = Lab(
        tiny_model(), plan, tmp_path / "out", texts=write_texts(tmp_path / "texts"), command="lab",
        tell=None if told is None else lambda row: told.append(row["variant"]),
    )  # fmt: skip
    return lab, lab.run()


def test_rows_hold_quality_by_layer_and_head(tmp_path):
    plan = sweep(Variant("a", {"steps": 20, "learning_rate": 1e-2}, save=True), Variant("b", {"maps": {"bits": 64}}))
    _, rows = study(tmp_path, plan)
    assert [row["variant"] for row in rows] == [REFERENCES, "a", "b"]
    assert [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()] == rows
    reference, first, second = rows
    assert {"exact_shared", "quest", "hyperplanes_64", "exact_shared_output"} <= set(reference["budgets"][1])
    assert reference["budgets"][1]["exact_shared"]["ratio"] == 1
    found = first["budgets"][1]["hash"]
    by_head = torch.tensor(found["error_by_head"])
    assert by_head.shape == (3, 2) and by_head.mean().item() == pytest.approx(found["error"], abs=2e-4)
    exact = reference["budgets"][1]["exact_shared"]["error"]
    assert found["ratio"] == pytest.approx(found["error"] / exact, rel=1e-3) and first["score"] == found["ratio"]
    assert (first["bits_per_kv_head"], second["bits_per_kv_head"]) == (32, 64)
    saved = HashMaps.from_pretrained(tmp_path / "out" / "a")
    assert saved.training_info["recipe"] == first["recipe"] and saved.model.layers == (0, 1, 2)


def test_variants_before_and_after_rope_share_a_capture(tmp_path):
    before = {"steps": 2, "maps": {"rope": "before"}}
    plan = sweep(Variant("after", {"steps": 2}, save=True), Variant("before", before, save=True))
    _, rows = study(tmp_path, plan)
    assert [row["recipe"]["maps"]["rope"] for row in rows] == ["after", "after", "before"]
    assert rows[1]["score"] != rows[2]["score"]
    saved = [json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in ("after", "before")]
    assert ["frequencies" in each["base_model"] for each in saved] == [False, True]
    assert ["rope" in each["maps"] for each in saved] == [False, True]


def test_what_is_done_is_not_done_again(tmp_path):
    told = []
    one = Variant("a", {"steps": 2})
    study(tmp_path, sweep(one), told)
    path = tmp_path / "out" / "rows.jsonl"
    path.write_text(path.read_text() + '{"variant": "b", "layers": [0')
    study(tmp_path, sweep(one, Variant("b", {"steps": 3})), told)
    study(tmp_path, sweep(Variant("a", {"steps": 4})), told)
    assert told == [REFERENCES, "a", "b", "a"]


def test_what_is_done_stays_when_a_study_ends_early(tmp_path, monkeypatch):
    fit, begun = module.fit, []

    def ending(samples, base, recipe, *rest, **options):
        begun.append(recipe.steps)
        if recipe.steps == 3:
            raise KeyboardInterrupt
        return fit(samples, base, recipe, *rest, **options)

    monkeypatch.setattr(module, "fit", ending)
    plan = sweep(Variant("a", {"steps": 2}, save=True), Variant("b", {"steps": 3}, save=True))
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, plan)
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["variant"] for line in lines] == [REFERENCES, "a"]
    saved = HashMaps.from_pretrained(tmp_path / "out" / "a")
    assert saved.training_info["recipe"]["steps"] == 2 and saved.temperatures is not None
    row = json.loads(lines[1])["budgets"][0]["hash"]
    stored = saved.training_info["metrics"]["budgets"][0]
    assert saved.remainder is not None and stored["hash_remainder"]["error"] < stored["hash"]["error"]
    assert stored["hash"]["error"] == row["error"] and stored["exact_shared"]["ratio"] == 1
    assert stored["hash"]["error_by_layer"] == [pytest.approx(sum(h) / len(h), abs=1e-4) for h in row["error_by_head"]]
    monkeypatch.setattr(module, "fit", fit)
    _, rows = study(tmp_path, plan)
    assert [row["variant"] for row in rows] == [REFERENCES, "a", "b"] and begun == [2, 3]


def test_variants_share_targets_where_they_fit(tmp_path, monkeypatch):
    made, stored = [], module.StoredTargets
    monkeypatch.setattr(module, "StoredTargets", lambda *given: made.append(given[1].pool) or stored(*given))
    plan = sweep(
        Variant("one", {"steps": 2}),
        Variant("two codes", {"steps": 2, "maps": {"mixture": 2}}),
        Variant("other targets", {"steps": 2, "pool": "peak_max"}),
    )
    _, rows = study(tmp_path, plan)
    assert made == [rows[1]["recipe"]["pool"], "peak_max"]
    assert rows[1]["budgets"] != rows[2]["budgets"]
    monkeypatch.setattr(module, "CPU_BYTES", 0)
    made.clear()
    study(tmp_path / "none", plan)
    assert not made


def test_kept_tokens_hold_the_targets_they_were_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "StoredTargets", None)
    plan = sweep(Variant("kept", {"steps": 2}), Variant("two codes", {"steps": 2, "maps": {"mixture": 2}}))
    kept = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, keep_tokens=64))
    _, rows = study(tmp_path, kept)
    assert len(rows) == 3 and rows[1]["recipe"]["keep_tokens"] == 64
    for change in ({"pool": "peak_max"}, {"keep_tokens": 0}):
        other = dataclasses.replace(kept, variants=[Variant("other", {"steps": 2, **change})])
        with pytest.raises(ConfigError, match=f"variant 'other': {next(iter(change))} is"):
            study(tmp_path / "other", other)


def test_a_seed_of_its_own_draws_other_weights_for_the_same_text(tmp_path):
    plan = sweep(
        Variant("first", {"steps": 2}), Variant("again", {"steps": 2}), Variant("other", {"steps": 2, "seed": 1})
    )
    _, (reference, *rows) = study(tmp_path, plan)
    assert {row["text"] for row in rows} == {reference["text"]} and rows[2]["recipe"]["seed"] == 1
    assert rows[0]["budgets"] == rows[1]["budgets"] != rows[2]["budgets"]


def test_rows_from_before_a_field_was_there_still_count(tmp_path):
    told, one = [], sweep(Variant("a", {"steps": 2}))
    study(tmp_path, one, told)
    path = tmp_path / "out" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["recipe"]["fit_budgets"], row["recipe"]["maps"]["query_widths"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study(tmp_path, one, told)
    assert told == [REFERENCES, "a"]


def test_best_is_the_best_before(tmp_path, monkeypatch):
    scores = iter([1.4, 1.1, 1.3, 1.2])
    monkeypatch.setattr(module, "fit", lambda samples, base, recipe, *_, **__: HashMaps(recipe.maps, base))

    class Scored(Lab):
        def _summary(self, measured, reference=None):
            rows = super()._summary(measured, reference)
            for row in rows:
                if "hash" in row:
                    row["hash"]["ratio"] = self.score
            return rows

        def _train(self, *what):
            self.score = next(scores)
            super()._train(*what)

    plan = sweep(
        Variant("a", {"top": 5}), Variant("b", {"top": 6}), Variant("c", {"top": 7}),
        Variant("d", {"steps": 99}, base="best"),
    )  # fmt: skip
    lab = Scored(tiny_model(), plan, tmp_path / "out", texts=write_texts(tmp_path / "texts"))
    assert (lab.run()[-1]["recipe"]["top"], lab.rows[-1]["recipe"]["steps"]) == (6, 99)


def test_layers_fewer_sequences_and_test_texts(tmp_path):
    other = write_texts(tmp_path / "other", 2)
    plan = sweep(
        Variant("some", {"sequences": 2, "steps": 2, "weigh": "output"}, layers=(0, 2), tests=True),
        tests={"other": str(other)},
    )
    lab, rows = study(tmp_path, plan)
    assert rows[0]["layers"] == [0, 2] and len(rows[0]["budgets"][0]["quest"]["error_by_head"]) == 2
    assert lab.captured.train.samples[0].value is not None
    assert rows[1]["tests"]["other"][0]["hash"]["ratio"] > 0
    assert rows[0]["tests"]["other"][0]["exact_shared"]["ratio"] == 1


def test_a_subset_of_layers_is_trained_as_among_all(tmp_path):
    plan = sweep(Variant("all", {"steps": 3}, save=True), Variant("some", {"steps": 3}, layers=(0, 2), save=True))
    study(tmp_path, plan)
    all_, some = (HashMaps.from_pretrained(tmp_path / "out" / name) for name in ("all", "some"))
    for name, tensor in some.state_dict().items():
        torch.testing.assert_close(tensor, all_.state_dict()[name][[0, 2]])


@pytest.mark.parametrize(
    ("changes", "message"), [({"queries": 16}, "queries is 16"), ({"sequences": 9}, "sequences is 9")]
)
def test_what_was_not_captured_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, sweep(Variant("a", changes)))


def test_layers_without_full_attention_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"layers \[7\]"):
        study(tmp_path, dataclasses.replace(sweep(Variant("a")), layers=(0, 7)))


def test_budgets_are_fitted_in_a_study_too(tmp_path):
    plan = sweep(Variant("a", {"steps": 4}), Variant("b", {"steps": 4, "fit_budgets": 1 / 16}, save=True))
    _, rows = study(tmp_path, plan)
    assert "shares" not in rows[1] and len(rows[2]["shares"]) == 3
    assert rows[1]["budgets"] != rows[2]["budgets"]
    assert HashMaps.from_pretrained(tmp_path / "out" / "b").shares == rows[2]["shares"]


@pytest.mark.gpu
def test_a_gpu_saves_maps_with_all_that_is_fitted(tmp_path):
    loaded = tiny_model()
    loaded = dataclasses.replace(loaded, model=loaded.model.cuda())
    plan = sweep(Variant("kept", {"steps": 2}, save=True))
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, keep_tokens=64))
    rows = Lab(loaded, plan, tmp_path / "out", texts=write_texts(tmp_path / "texts")).run()
    maps = HashMaps.from_pretrained(tmp_path / "out" / "kept")
    assert maps.remainder is not None and maps.temperatures is not None
    assert all(0 < row["hash_remainder"]["error"] < 1 for row in rows[1]["budgets"])
