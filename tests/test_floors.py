"""A file imports only from floors below it: the layering of the package, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hashattention

#: Low to high. Names on one floor may import each other; `<name>.py` and the folder `<name>/` are one name.
FLOORS = [
    ("errors",),
    ("provenance",),
    ("config",),
    ("rotation",),
    ("ops",),
    ("rows",),
    ("artifact",),
    ("maps",),
    ("official",),
    ("cache",),
    ("selectors",),
    ("attention",),
    ("models",),
    ("train",),
    ("integrations",),
    ("evaluation",),
    ("bench",),
    ("report",),
    ("cli", "__main__"),
]
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
ROOT = Path(hashattention.__file__).parent
PACKAGE = "hashattention"
#: What a kernel may import of the ops around it.
KERNEL_MAY = {"reference", "shapes"}
KERNELS = {"triton", "cpu"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node at any depth, but for the bodies of ``if TYPE_CHECKING``."""
    children = [child for child in ast.iter_child_nodes(node) if not is_type_checking(child)]
    children += [other for child in ast.iter_child_nodes(node) if is_type_checking(child) for other in child.orelse]
    for child in children:
        yield child
        yield from statements(child)


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every module or name that `file` imports, relative imports resolved."""
    package = [root.name, *file.relative_to(root).parent.parts]
    for node in statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def home(dotted: str) -> list[str]:
    """Parts below the package of an imported name: a lazy name of `hashattention` counts as the module it lives in."""
    parts = dotted.split(".")[1:]
    lazy = hashattention._HOMES.get(parts[0]) if parts else None
    return lazy.split(".")[1:] if lazy else parts


def broken_ops_rule(here: list[str], dotted: str) -> str | None:
    """Why a file of `ops` may not import `dotted`: the rules inside that floor."""
    parts = home(dotted) if dotted.split(".")[0] == PACKAGE else []
    inside = parts[1] if len(parts) > 1 and parts[0] == "ops" else ""
    if here == ["ops", "reference"] and dotted.split(".")[0] not in ("torch", "__future__"):
        return "the reference imports only torch"
    if here[1] in KERNELS:
        wrong = parts[:1] == ["ops"] and inside not in KERNEL_MAY | {here[1]}
        return f"a kernel imports of the ops only {', '.join(sorted(KERNEL_MAY))}" if wrong else None
    return "only dispatch reaches a kernel, by name" if inside in KERNELS else None


def violations(root: Path) -> list[str]:
    """Everything under the package folder `root` that breaks the layering, one line each."""
    found = []
    for file in sorted(root.rglob("*.py")):
        here = [*file.relative_to(root).with_suffix("").parts]
        if here == ["__init__"]:
            here, height = [""], -1
        elif here[0] not in HEIGHT:
            found.append(f"{here[0]}: not on a floor; add it to FLOORS in tests/test_floors.py")
            continue
        else:
            height = HEIGHT[here[0]]
        for line, dotted in imports(file, root):
            place = f"{file.relative_to(root)}:{line} imports {dotted}"
            if here[0] == "ops" and len(here) > 1 and (reason := broken_ops_rule(here, dotted)):
                found.append(f"{place}: {reason}")
            target = home(dotted)[0] if dotted.split(".")[0] == PACKAGE and home(dotted) else here[0]
            if target not in HEIGHT and target != here[0] and not target.startswith("__"):
                found.append(f"{place}: {target} is not on a floor; add it to FLOORS in tests/test_floors.py")
            elif HEIGHT.get(target, -1) > height:
                found.append(f"{place}: {target} lies above {here[0] or PACKAGE}")
    return sorted(set(found))


def test_every_file_imports_only_from_floors_below() -> None:
    assert violations(ROOT) == []


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / PACKAGE


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("maps.py", "import hashattention.cache", "maps.py:1 imports hashattention.cache: cache lies above maps"),
        ("maps.py", "def f():\n    from hashattention.cli import main", "maps.py:2 .*cli lies above maps"),
        ("maps.py", "from hashattention import attention", "attention lies above maps"),
        ("maps.py", "from hashattention import attach", "integrations lies above maps"),
        ("maps.py", "from . import selectors", "selectors lies above maps"),
        ("maps.py", "import importlib\nimportlib.import_module('hashattention.train')", "train lies above maps"),
        ("selectors/hash.py", "from ..attention import x", "attention lies above selectors"),
        ("maps.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import hashattention.cli", "cli lies above maps"),
        ("__init__.py", "from hashattention.config import Budget", "config lies above hashattention"),
        ("helpers.py", "", "helpers: not on a floor; add it to FLOORS"),
        ("maps.py", "import hashattention.helpers", "helpers is not on a floor; add it to FLOORS"),
        ("ops/reference.py", "import numpy", "the reference imports only torch"),
        ("ops/reference.py", "from hashattention.errors import InputError", "the reference imports only torch"),
        ("ops/reference.py", "from .triton import score", "the reference imports only torch"),
        ("ops/triton/score.py", "from hashattention.ops import dispatch", "a kernel imports of the ops only"),
        ("ops/cpu/__init__.py", "from hashattention.ops.triton import score", "a kernel imports of the ops only"),
        ("ops/attend.py", "from hashattention.ops.triton import attend", "only dispatch reaches a kernel"),
    ],
)
def test_a_violation_is_found(file: str, text: str, message: str, tmp_path: Path) -> None:
    assert re.search(message, "\n".join(violations(write(tmp_path, {file: text}))))


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    files = {
        "__init__.py": "import typing\nif typing.TYPE_CHECKING:\n    from hashattention.maps import HashMaps",
        "config.py": "from hashattention import __version__\nfrom hashattention.errors import ConfigError",
        "ops/reference.py": "from __future__ import annotations\nimport torch\nfrom torch.nn import functional",
        "ops/triton/score.py": "import triton\nfrom hashattention.ops import reference\nfrom . import select",
        "ops/score.py": "from hashattention.ops import dispatch, shapes",
        "selectors/hash.py": "from hashattention.selectors.base import Selector\nfrom hashattention import Budget",
        "maps.py": "from hashattention.artifact import read",
        "cli/train.py": "def train():\n    import hashattention.train.fit",
    }
    assert violations(write(tmp_path, files)) == []
