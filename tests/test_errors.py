from __future__ import annotations

import inspect

import pytest

from hashattention import errors

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_one_root_catches_every_error(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.HashAttentionError)
    assert kind.__doc__
    with pytest.raises(errors.HashAttentionError, match=r"^given 1$"):
        raise kind("given 1")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.InputError, ValueError),
        (errors.BackendError, RuntimeError),
        (errors.ModelNotFoundError, LookupError),
        (errors.UnsupportedModelError, TypeError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_errors_are_also_the_builtin_a_caller_expects(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)
