"""The command line: ``hashattention VERB``, one short file a verb."""

from __future__ import annotations

import importlib.util
import os
import sys


def main() -> None:
    """Run the command line; its exit code is 0, 1 (it failed) or 2 (what was asked for cannot be done)."""
    missing = [package for package in ("typer", "rich") if importlib.util.find_spec(package) is None]
    if missing:
        needs = f"the command line needs {' and '.join(missing)}"
        sys.stderr.write(f'hashattention: {needs}: pip install "hashattention[cli]"\n')
        raise SystemExit(1)
    # Idle threads that spin slow a busy machine several times over; OpenMP reads this when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hashattention.cli.app import app

    app()
