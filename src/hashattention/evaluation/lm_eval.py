"""Any task of lm-evaluation-harness, served by selected tokens: ``python -m hashattention.evaluation.lm_eval``.

lm-eval finds models in its own registry and scans no entry points, so that ``--model hashattention`` has to be
registered first: this module's `main` does that and then is ``lm_eval``, with all of its options::

    python -m hashattention.evaluation.lm_eval run --model hashattention \
        --model_args pretrained=MODEL,maps=MAPS,density=0.0625 --tasks hellaswag
"""

from __future__ import annotations

from hashattention.errors import MissingDependencyError

NAME = "hashattention"
TARGET = "hashattention.evaluation.lm_eval_model:HashAttentionLM"


def register() -> None:
    """Make ``"hashattention"`` a model of lm-eval's registry, for ``lm_eval.simple_evaluate(model="hashattention")``.

    Raises
    ------
    MissingDependencyError
        If lm-eval is not installed.
    """
    try:
        # Importing the models fills the registry.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise MissingDependencyError(
            'lm-eval is not installed: pip install "lm_eval[hf]", or "hashattention[lm_eval]".'
        ) from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def main() -> None:
    """``lm_eval`` with hash attention among its models."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
