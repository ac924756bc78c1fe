from __future__ import annotations

import datetime
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hashattention
from hashattention import provenance


def test_an_origin_says_what_is_needed_and_no_more(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [str(Path.home() / "bin" / "hashattention"), "train", f"--out={Path.home() / 'maps'}"]
    )
    origin = provenance.origin("cpu")
    assert json.loads(json.dumps(origin)) == origin
    assert origin["version"] == hashattention.__version__
    assert origin["libraries"]["torch"] == torch.__version__
    assert origin["command"] == "hashattention train --out=maps"
    assert origin["device"].startswith("cpu (")
    assert datetime.datetime.fromisoformat(origin["time"]).utcoffset() == datetime.timedelta(0)
    told = json.dumps(origin)
    assert str(Path.home()) not in told and socket.gethostname() not in told


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["/usr/bin/python", "-m", "x", "a b"], "python -m x 'a b'"),
        (["run", "--out", "/home/me/maps", "texts/train"], "run --out maps texts/train"),
        (["run", "--rate=5e-3", "--out=/tmp/x"], "run --rate=5e-3 --out=x"),
        (["/opt/lib/hashattention/__main__.py", "lab", "study.toml"], "hashattention lab study.toml"),
    ],
)
def test_a_command_line_tells_no_home(words, line):
    assert provenance.command_line(words) == line


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_of_a_checkout(tmp_path):
    assert provenance.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    package = tmp_path / "package"
    package.mkdir()
    (tmp_path / "other").write_text("1")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "one")
    (package / "file").write_text("1")
    assert provenance.commit(package) is None, "installed inside a checkout that does not track it"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "two")
    assert provenance.commit(package) == git(tmp_path, "rev-parse", "--short=12", "HEAD")
    (package / "file").write_text("2")
    assert provenance.commit(package).endswith("+")


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


def test_outside_a_checkout_the_environment_may_name_it(monkeypatch, tmp_path):
    monkeypatch.setenv(provenance.COMMIT, "0123456789ab")
    assert provenance.commit(tmp_path) == "0123456789ab"
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    assert provenance.commit(tmp_path) == git(tmp_path, "rev-parse", "--short=12", "HEAD")
