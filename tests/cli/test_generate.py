from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hashattention.cli.generate import traffic
from hashattention.config import BaseModel, Budget, MapsConfig
from hashattention.maps import HashMaps

BASE = BaseModel("LlamaForCausalLM", 4, 8, 2, 64, (0, 1, 3), "{}")
FEW = ("--max-new-tokens", 4, "--min-context", 0)


def test_text_goes_to_stdout_and_cost_to_stderr(invoke, tiny_model_folder, tiny_maps_folder, prompt_file) -> None:
    done = invoke("generate", tiny_model_folder, "--maps", tiny_maps_folder, "--prompt-file", prompt_file, *FEW)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()
    assert "tokens/s" in done.stderr
    assert "hash attention: 17 of 284 tokens" in done.stderr


def test_json_holds_the_same_text(invoke, last_json, tiny_model_folder, tiny_maps_folder, prompt_file) -> None:
    words = "generate", tiny_model_folder, "--maps", tiny_maps_folder, "--prompt-file", prompt_file, *FEW
    plain, done = invoke(*words), invoke(*words, "--json")
    assert len(done.stdout.splitlines()) == 1
    found = last_json(done)
    assert found["text"] == plain.stdout[:-1]
    assert (found["prompt_tokens"], found["new_tokens"], found["attention"]) == (280, 4, "hash")
    assert found["density"] <= 1 / 16
    assert found["origin"]["version"]


def test_density_1_says_what_dense_says(invoke, last_json, tiny_model_folder, tiny_maps_folder, prompt_file) -> None:
    words = "generate", tiny_model_folder, "--prompt-file", prompt_file, *FEW, "--json"
    dense = last_json(invoke(*words, "--dense"))
    whole = last_json(invoke(*words, "--maps", tiny_maps_folder, "--density", 1))
    assert dense["text"] == whole["text"]
    assert dense["attention"] == "dense"
    assert dense["kv_bytes_per_token"] == whole["kv_bytes_per_token"]


@pytest.mark.parametrize("count", [1, 11])
def test_both_ways_from_one_prefill(
    invoke, last_json, tiny_model_folder, tiny_maps_folder, prompt_file, count: int
) -> None:
    words = "generate", tiny_model_folder, "--prompt-file", prompt_file, "--min-context", 0, "--max-new-tokens", count
    alone = last_json(invoke(*words, "--dense", "--json"))
    few = last_json(invoke(*words, "--maps", tiny_maps_folder, "--json"))
    done = invoke(*words, "--maps", tiny_maps_folder, "--compare", "--json")
    assert done.exit_code == 0, done.stderr
    found = last_json(done)
    assert found["dense"]["text"] == alone["text"]
    assert found["hash"]["text"] == few["text"]
    assert found["hash"]["attended"] < found["dense"]["attended"] == 280 + count
    rates = [found[name]["tokens_per_second"] for name in ("dense", "hash")]
    assert found["speedup"] == (rates[1] / rates[0] if count > 2 else None)
    assert (count > 2) == ("dense: " in done.stderr and "tokens/s" in done.stderr)


def test_comparing_needs_maps_and_both_ways(refused, tiny_model_folder, tiny_maps_folder, prompt_file) -> None:
    words = "generate", tiny_model_folder, "--prompt-file", prompt_file, "--compare"
    assert "--compare decodes both ways" in refused(*words, "--maps", tiny_maps_folder, "--dense")
    assert "give --maps DIR" in refused(*words)


def test_stdin_and_a_short_context(invoke, tiny_model_folder, tiny_maps_folder) -> None:
    done = invoke("generate", tiny_model_folder, "--maps", tiny_maps_folder, "--max-new-tokens", 3, stdin="Hello")
    assert done.exit_code == 0, done.stderr
    assert "under --min-context 1024, so attention was dense" in done.stderr


@pytest.mark.parametrize("density", ["0", "-0.5", "1.01"])
def test_bad_densities(refused, tiny_model_folder, tiny_maps_folder, prompt_file, density: str) -> None:
    words = "generate", tiny_model_folder, "--maps", tiny_maps_folder, "--prompt-file", prompt_file
    assert "density must be in (0, 1]" in refused(*words, f"--density={density}")


def test_maps_are_asked_for(refused, tiny_model_folder, prompt_file) -> None:
    said = refused("generate", tiny_model_folder, "--prompt-file", prompt_file)
    assert "give --maps DIR, or --dense" in said


def test_maps_of_another_model(refused, tiny_model_folder, tiny_maps_folder, prompt_file, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_maps_folder, tmp_path / "maps")
    config = json.loads((folder / "config.json").read_text())
    config["base_model"]["num_hidden_layers"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    said = refused("generate", tiny_model_folder, "--maps", folder, "--prompt-file", prompt_file)
    assert "num_hidden_layers is 9, but the model has 2" in said


def test_missing_things(refused, tiny_model_folder, tiny_maps_folder, prompt_file, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert "no maps folder" in refused("generate", tiny_model_folder, "--maps", gone, "--prompt-file", prompt_file)
    assert "cannot read the prompt" in refused("generate", tiny_model_folder, "--dense", "--prompt-file", gone)
    assert "no folder or file" in refused("generate", gone, "--dense", "--prompt-file", prompt_file)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_prompt(refused, tiny_model_folder, text: str) -> None:
    assert "the prompt is empty" in refused("generate", tiny_model_folder, "--dense", stdin=text)


def test_a_prompt_that_is_no_text(refused, tiny_model_folder, tmp_path: Path) -> None:
    path = tmp_path / "prompt.bin"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("generate", tiny_model_folder, "--dense", "--prompt-file", path)


def test_a_prompt_longer_than_the_context(refused, tiny_model_folder) -> None:
    said = refused("generate", tiny_model_folder, "--dense", "--max-new-tokens", 8, stdin="x" * 2041)
    assert "the prompt has 2041 tokens" in said
    assert "context is 2048" in said


def test_chat_without_a_chat_format(refused, tiny_model_folder) -> None:
    assert "no chat format" in refused("generate", tiny_model_folder, "--dense", "--chat", stdin="Hello")


def test_an_encoder(refused, tiny_model_folder, tmp_path: Path) -> None:
    import transformers

    folder = shutil.copytree(tiny_model_folder, tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=259, **sizes)).save_pretrained(folder)
    assert "not a decoder-only language model" in refused("generate", folder, "--dense", stdin="Hello")


@pytest.mark.parametrize("option", [("--dtype", "int3"), ("--device", "toaster")])
def test_bad_dtype_and_device(refused, tiny_model_folder, option: tuple[str, str]) -> None:
    assert option[1] in refused("generate", tiny_model_folder, "--dense", *option, stdin="Hello")


def test_traffic_counts_dense_layers_densely() -> None:
    row = 2 * 64 * 2
    dense = traffic(BASE, None, Budget(density=0.25), 1000, 2)
    assert dense["kv_bytes_per_token"] == 4 * 2 * 1000 * row
    assert dense["signature_bytes_per_token"] == 0
    group = traffic(BASE, MapsConfig(), Budget(density=0.25), 1000, 2)
    assert group["attended"] == 250
    assert group["kv_bytes_per_token"] == 2 * (3 * 250 + 1000) * row
    assert group["signature_bytes_per_token"] == 3 * 1000 * 2 * 8
    paper = traffic(BASE, MapsConfig.paper(), Budget(density=0.25), 1000, 2)
    assert paper["kv_bytes_per_token"] == dense["kv_bytes_per_token"]
    assert paper["signature_bytes_per_token"] == 3 * 1000 * 8 * 4


def warm(folder, out):
    """The same maps, with temperatures that make few tokens hold most of the estimated attention."""
    maps = HashMaps.from_pretrained(folder)
    heads = maps.config.selection_heads(maps.model)
    maps.temperatures = ((30.0,) * heads,) * len(maps.model.layers)
    maps.save_pretrained(out)
    return out


@pytest.mark.parametrize("both", [False, True])
def test_top_p_shows_what_was_attended(
    invoke, last_json, tmp_path, tiny_model_folder, tiny_maps_folder, prompt_file, both: bool
) -> None:
    words = "generate", tiny_model_folder, "--maps", warm(tiny_maps_folder, tmp_path / "maps"), *FEW, "--json"
    words = *words, "--prompt-file", prompt_file, "--density", 0.6, *(["--compare"] if both else [])
    found = [last_json(invoke(*words, *more)) for more in ([], ["--top-p", 0.9])]
    capped, fewer = [row["hash"] if both else row for row in found]
    assert capped["attended"] == int(0.6 * 284) > fewer["attended"] > 80
    assert capped["density"] == capped["attended"] / 284
    assert fewer["density"] == pytest.approx(fewer["attended"] / 282, abs=0.005)
    assert fewer["kv_bytes_per_token"] < capped["kv_bytes_per_token"]


def test_top_p_without_temperatures_is_refused(refused, tiny_model_folder, tiny_maps_folder, prompt_file) -> None:
    words = "generate", tiny_model_folder, "--maps", tiny_maps_folder, "--prompt-file", prompt_file, "--top-p", 0.9
    assert "these maps have none" in refused(*words)


@pytest.mark.parametrize("both", [False, True])
def test_without_the_remainder_maps_are_served_as_if_they_had_none(
    invoke, last_json, tmp_path, tiny_model_folder, tiny_maps_folder, prompt_file, both: bool
) -> None:
    maps = HashMaps.from_pretrained(tiny_maps_folder)
    # What was left out weighs as much a token as what was taken: other words follow.
    maps.remainder = tuple(((9.0, 0.0, 0.0),) * maps.model.num_attention_heads for _ in maps.model.layers)
    maps.save_pretrained(tmp_path / "maps")
    rest = *FEW, "--prompt-file", prompt_file, "--density", 0.1, "--json", *(["--compare"] if both else [])
    ways = [(tiny_maps_folder,), (tmp_path / "maps", "--no-remainder"), (tmp_path / "maps",)]
    found = [last_json(invoke("generate", tiny_model_folder, "--maps", *way, *rest)) for way in ways]
    plain, without, filled = [(row["hash"] if both else row)["text"] for row in found]
    assert plain == without != filled
