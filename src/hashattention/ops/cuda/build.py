"""Compile a CUDA C++ source of this folder for given constants with nvcc, once a machine, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hashattention.errors import BackendError

SOURCES = Path(__file__).parent


def find_compiler() -> str | None:
    """Path of nvcc: from CUDA_HOME, the PATH, or the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    places += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/hashattention/cuda``, else under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hashattention" / "cuda"


@functools.cache
def load(name: str, **constants: int) -> ctypes.CDLL:
    """The library made of ``name.cu`` with each constant defined.

    Raises
    ------
    BackendError
        If nvcc is missing or refuses the source.
    """
    source = SOURCES / f"{name}.cu"
    # Without -fno-gnu-unique the statics of one library would serve every other one in the process.
    flags = ["-O3", "-std=c++17", "-gencode=arch=compute_90,code=sm_90", "--shared"]
    flags += ["-Xcompiler", "-fPIC,-fno-gnu-unique"]
    flags += [f"-D{key}={value}" for key, value in sorted(constants.items())]
    text = b"".join(part.read_bytes() for part in (source, *sorted(SOURCES.glob("*.cuh"))))
    digest = hashlib.sha256(text + " ".join(flags).encode()).hexdigest()[:16]
    library = cache_folder() / f"{name}-{digest}.so"
    if not library.exists():
        compiler = find_compiler()
        if compiler is None:
            raise BackendError("needs nvcc: set CUDA_HOME or put nvcc on the PATH, or use backend='triton'.")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *flags, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BackendError(f"nvcc could not compile {source.name}: {done.stderr[-2000:]}")
            os.replace(made, library)
    return ctypes.CDLL(str(library))
