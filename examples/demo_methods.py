"""The demo's questions, asked with other ways of choosing tokens at the same density: whose is an error?

python examples/demo_methods.py
"""

from __future__ import annotations

import torch

import hashattention
from hashattention import Budget
from hashattention.evaluation import demo
from hashattention.evaluation.needle import FACTS, grade
from hashattention.selectors.registry import create

METHODS = ("hash", "oracle:share=group", "oracle:share=query_head", "quest:page=16")
DENSITIES = (1 / 8, 1 / 16)


def main() -> None:
    loaded = hashattention.load_model("smollm2-135m-instruct", dtype=torch.float32)
    maps = hashattention.HashMaps.from_pretrained("smollm2-135m-instruct")
    reader = demo.read(loaded, demo.DemoConfig())
    for density in DENSITIES:
        for method in METHODS:
            selector = create(method, maps=maps)
            right = []
            for fact in FACTS:
                question = reader.question(fact.question)
                options = {"min_context": 0, "sparse_tail": len(question)}
                with hashattention.attach(loaded.model, selector, Budget(density=density), **options):
                    right.append(grade(reader.answer(question, 24), fact))
            print(f"{method:24} density {density:<7g} right: {sum(right)} of {len(right)}")


if __name__ == "__main__":
    main()
