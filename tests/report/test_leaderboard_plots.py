from __future__ import annotations

import dataclasses
import itertools
import json
import re
import struct

import pytest
from tests.report.evaluation_rows import make_rows

from hashattention.report import leaderboard_plots as plots
from hashattention.report.leaderboard import Board, boards, depths

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

#: What eyes without one kind of cone see, in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
#: Linear RGB to XYZ over the white point D65.
XYZ = [[0.4340, 0.3762, 0.1899], [0.2127, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]
#: CIE 1976 distance at which two colours are plainly two.
APART = 15.0


def linear(colour: str) -> list[float]:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def lab(rgb: list[float]) -> tuple[float, float, float]:
    x, y, z = (
        c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116
        for c in times(XYZ, [min(max(channel, 0.0), 1.0) for channel in rgb])
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def contrast(one: str, other: str) -> float:
    dark, light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (linear(one), linear(other)))
    return (light + 0.05) / (dark + 0.05)


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.fixture(scope="module")
def board() -> Board:
    return boards(make_rows())[0]


@pytest.mark.parametrize("palette", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_every_text_can_be_read(palette: dict[str, str]) -> None:
    assert palette.keys() == plots.LIGHT.keys()
    for name in ("ink", "quiet", "accent", "wrong", *(f"line-{hue}" for hue in range(plots.HUES))):
        for ground in ("ground", "panel"):
            assert contrast(palette[name], palette[ground]) >= 4.5, name


@pytest.mark.parametrize("palette", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_lines_are_told_apart_by_all_eyes(palette: dict[str, str], eye: str) -> None:
    seen = [lab(times(EYES[eye], linear(palette[f"line-{hue}"]))) for hue in range(plots.HUES)]
    for one, other in itertools.combinations(seen, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 >= APART


def test_no_two_methods_look_alike(board: Board) -> None:
    looks = plots.styles(board)
    assert looks.keys() == board.methods.keys()
    assert len({json.dumps(look) for look in looks.values()}) == len(looks)
    assert [method for method, (colour, _) in looks.items() if colour == "var(--line-0)"] == ["hash"]


@pytest.mark.parametrize("kind", ["density", "rows", "bytes", "bits", "layer"])
def test_every_line_has_its_name_and_the_page_its_colours(board: Board, kind: str) -> None:
    chart = {
        "density": lambda: plots.by_density(board, "ruler"),
        "rows": lambda: plots.by_rows(board, "ruler"),
        "bytes": lambda: plots.by_bytes(board, "ruler"),
        "bits": lambda: plots.by_bits(board, "ruler", 1 / 32),
        "layer": lambda: plots.by_layer(board, 1 / 32),
    }[kind]()
    svg = plots.to_svg(chart)
    assert set(board.methods.values()) <= set(texts(svg))
    assert ("dense" in texts(svg)) == (kind != "layer")
    assert not re.findall(r'(?:fill|stroke)="#', svg)
    assert svg.startswith('<svg role="img" aria-label="')
    assert "http" not in svg
    assert svg.count("role=") == svg.count("aria-") == 1
    width = float(re.search(r"max-width:(\d+)px", svg)[1])
    assert width <= 328, "wider than a phone"


def test_densities_are_ticks(board: Board) -> None:
    assert {"1/8", "1/16", "1/32"} <= set(texts(plots.to_svg(plots.by_density(board, "ruler"))))


def test_nothing_to_draw_is_nothing() -> None:
    (dense,) = boards(row for row in make_rows(methods=1) if row.method == "dense")
    assert plots.by_density(dense, "ruler") is None
    assert plots.by_rows(dense, "ruler") is None
    assert plots.by_bytes(dense, "ruler") is None
    assert plots.by_bits(dense, "ruler", 1.0) is None
    assert plots.by_layer(dense, 1.0) is None


def test_one_method_at_one_density_with_one_score() -> None:
    rows = [row for row in make_rows(methods=1, samples=1) if row.task == "ruler:vt" and row.density in (1.0, 1 / 16)]
    (board,) = boards(rows)
    svg = plots.to_svg(plots.by_density(board, "ruler"))
    assert "NaN" not in svg
    assert {"oracle", "1/16", "dense"} <= set(texts(svg))


def test_names_are_escaped_and_long_ones_cut() -> None:
    rows = [
        row if row.method == "dense" else dataclasses.replace(row, name='<b>"&" and so on and on')
        for row in make_rows(methods=1, samples=1)
    ]
    svg = plots.to_svg(plots.by_density(boards(rows)[0], "ruler"))
    assert "<b>" not in svg
    assert 'aria-label="ruler score against attended tokens: &lt;b&gt;&quot;&amp;&quot;' in svg
    assert any(text.endswith("…") for text in texts(svg))


def test_a_needle_map_has_a_square_for_every_place(board: Board) -> None:
    place = "streaming", 1 / 32
    cells = depths(board)[place]
    svg = plots.to_svg(plots.needles(board, place, cells))
    assert svg.count('fill="var(--accent)"') == len(cells) == 15
    assert texts(svg).count("0") == sum(score == 0 for score in cells.values()) > 0
    assert {"4K", "8K", "16K", "0%", "25%", "100%"} <= set(texts(svg))


def test_a_picture_is_a_png_in_light_colours(board: Board) -> None:
    data = plots.to_png([("ruler", plots.by_density(board, "ruler"))])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 500 < width < 1000
    assert 400 < height < 1000


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([3.0, 3.0], [2.0, 4.0]),
        ([0.0, 0.0, 0.0], [0.0, 2.0, 4.0]),
        ([10.0, 10.0, 1.0], [8.0, 10.0, 1.0]),
        ([9.0, 1.0, 5.0], [9.0, 1.0, 5.0]),
    ],
)
def test_labels_are_spread(wanted: list[float], found: list[float]) -> None:
    assert plots.spread(wanted, 2.0, 0.0, 10.0) == pytest.approx(found)


def test_too_many_labels_share_the_room() -> None:
    places = plots.spread([5.0] * 21, 2.0, 0.0, 10.0)
    assert places == pytest.approx([index / 2 for index in range(21)])
