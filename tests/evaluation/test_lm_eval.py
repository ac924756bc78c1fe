from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hashattention.errors import MissingDependencyError
from hashattention.evaluation import lm_eval as ours


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .lm_eval\[hf\]"):
        ours.register()


@pytest.fixture
def make(small_model, byte_tokenizer):
    pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.registry import get_model

    ours.register()
    ours.register()
    made = []

    def make(**keywords: object):
        model = get_model("hashattention")(
            pretrained=small_model, tokenizer=byte_tokenizer, min_context=0, batch_size=2, **keywords
        )
        made.append(model)
        return model

    yield make
    for model in made:
        model.attachment.detach()


def request(kind: str, *arguments: object):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, " * 8


def test_everything_attended_is_dense(make, small_model, byte_tokenizer) -> None:
    from lm_eval.models.huggingface import HFLM

    asked = [request("loglikelihood", TEXT, " having little"), request("loglikelihood", TEXT[:300], " or no money")]
    texts = [request("generate_until", TEXT[:end], {"until": ["\n\n\n"], "max_gen_toks": 4}) for end in (300, 200)]
    sparse = make(method="oracle", density="1")
    found = sparse.loglikelihood(asked), sparse.generate_until(texts)
    sparse.attachment.detach()
    plain = HFLM(pretrained=small_model, tokenizer=byte_tokenizer, batch_size=2)
    expected = plain.loglikelihood(asked), plain.generate_until(texts)
    assert found[1] == expected[1]
    for (one, greedy), (other, dense_greedy) in zip(found[0], expected[0], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert greedy == dense_greedy


def test_few_tokens_change_the_answer_alike_in_any_batch(make, tiny_maps_folder: Path) -> None:
    asked = [request("loglikelihood", TEXT, " having little"), request("loglikelihood", TEXT[:300], " or no money")]
    sparse = make(method="quest:page=8;bits=4", density="1/8", sink=4, local=8)
    together = sparse.loglikelihood(asked)
    assert [sparse.loglikelihood([one])[0] for one in asked] == together
    sparse.attachment.detach()
    dense = make(method="oracle", density=1.0).loglikelihood(asked)
    assert all(one[0] != pytest.approx(other[0], rel=1e-3) for one, other in zip(together, dense, strict=True))


def test_bad_arguments_are_ours(make) -> None:
    from hashattention.errors import ConfigError

    with pytest.raises(ConfigError, match="density must be a number or a fraction"):
        make(density="x")
    with pytest.raises(ConfigError, match="needs maps"):
        make()
