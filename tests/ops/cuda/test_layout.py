"""How rows are laid over a GPU: what needs no GPU to be worked out."""

from __future__ import annotations

import pytest

from hashattention.errors import BackendError
from hashattention.ops.cuda import layout, step


@pytest.mark.parametrize(
    ("shared", "resident", "percent"),
    [(1 << 10, 1, 4), (153584, 1, 72), (77296, 2, 72), (60 << 10, 3, 86), (227 << 10, 1, 100)],
)
def test_a_multiprocessor_is_divided_as_the_blocks_need_it(shared, resident, percent):
    """Of 228 KiB the least of the possible parts that holds them, each with the KiB that every block takes besides."""
    assert layout.carveout_of(layout.Shape(256, 2, resident, 4, shared)) == percent


@pytest.mark.parametrize(
    ("heads", "batch", "tokens", "hidden", "few"),
    [
        (2, 6, 1 << 20, (512, 512), True),
        (8, 2, 1 << 12, (256, 0), True),
        (8, 2, 1 << 15, (256, 256), True),
        (8, 2, (1 << 15) + 64, (256, 0), False),
        (8, 2, 1 << 12, (512, 0), False),
        (2, 8, 1 << 12, (256, 0), False),
    ],
)
def test_few_rows_are_one_launch_and_more_where_they_are_short_and_find_room(heads, batch, tokens, hidden, few):
    assert layout.are_few(heads, batch, tokens, hidden) is few


@pytest.mark.parametrize(
    ("heads", "batch", "tokens", "blocks"),
    [
        (2, 1, 1 << 14, 8),
        (2, 1, 1 << 15, 16),
        (2, 2, 1 << 17, 16),
        (2, 3, 1 << 17, 8),
        (4, 1, 1 << 17, 16),
        (2, 1, 1 << 18, 16),
        (8, 1, 1 << 17, 8),
    ],
)
def test_few_long_rows_are_spread_over_sixteen_blocks(heads, batch, tokens, blocks):
    shape = layout.choose_fused(heads, batch, tokens, tokens // 32, 768, (256, 0), 64, 128)
    assert shape is not None
    assert (shape.threads, shape.blocks, shape.wide) == (256, blocks, False)


@pytest.mark.parametrize(
    ("tokens", "hidden", "threads", "wide"),
    [
        (1 << 12, (256, 0), 256, False),
        (1 << 15, (256, 256), 256, False),
        (1 << 16, (256, 0), 256, False),
        (1 << 17, (256, 0), 256, False),
        (1 << 17, (512, 0), 512, False),
        (1 << 19, (256, 256), 256, False),
        (1 << 19, (256, 0), 384, True),
        (1 << 20, (128, 0), 384, True),
    ],
)
def test_a_step_of_few_rows_has_the_shape_of_its_length(tokens, hidden, threads, wide):
    shape = layout.choose_fused(8, 1, tokens, tokens // 32, 512, hidden, 64, 128)
    assert shape is not None
    assert (shape.threads, shape.wide) == (threads, wide)


@pytest.mark.parametrize(
    ("tokens", "bits", "paged", "held"),
    [
        (1 << 12, 64, False, 1 << 12),
        (1 << 17, 64, False, 1 << 17),
        (1 << 17, 128, False, 0),
        (1 << 15, 64, True, 1 << 15),
        (1 << 17, 64, True, 0),
        (1 << 18, 64, False, 0),
    ],
)
def test_signatures_wait_in_shared_memory_where_a_block_is_alone_and_they_fit(tokens, bits, paged, held):
    shape = layout.choose_fused(8, 1, tokens, tokens // 32, 512, (256, 0), bits, 128, paged=paged)
    assert shape is not None
    assert shape.held == held
    assert shape.shared + layout.BLOCK_BYTES <= layout.SHARED_BYTES


@pytest.mark.parametrize(
    ("rows", "tokens", "blocks", "resident"),
    [(2, 1 << 17, 16, 1), (8, 1 << 17, 8, 1), (64, 1 << 15, 2, 1), (64, 1 << 17, 4, 3), (256, 1 << 17, 4, 3)],
)
def test_selection_alone_has_short_segments_or_a_multiprocessor_a_block(rows, tokens, blocks, resident):
    shape = layout.choose(1, rows, tokens, 4, 64, signature=8)
    assert shape is not None
    assert (shape.blocks, shape.resident) == (blocks, resident)


@pytest.mark.parametrize(
    ("threads", "signature", "spare"), [(256, 4, 56 * 128), (256, 8, 56 * 64), (256, 16, 24 * 64), (512, 8, 48 * 64)]
)
def test_scores_have_room_for_a_whole_turn_of_the_warps_where_signatures_are_held(threads, signature, spare):
    """`TOGETHER` chunks of score.cuh a warp, of which only the first need be one of the block's."""
    assert layout.spare_scores(threads, signature) == spare
    for tokens in (1 << 14, 5 << 14):
        held, plain = (layout.fit(1, threads, 8, 1, tokens, 4, 64, signature=bits) for bits in (signature, 0))
        assert held is not None
        assert plain is not None
        assert held.held == tokens // 8 * signature
        assert held.shared == plain.shared + held.held + spare


def test_blocks_that_share_a_multiprocessor_hold_no_signatures():
    shapes = [layout.choose(0, 8 * batch, 1 << 15, 1 << 10, 512, signature=8) for batch in (8, 32)]
    assert [(s.resident, s.held) for s in shapes if s] == [(1, 1 << 17), (2, 0)]


def test_blocks_that_wait_for_each_other_need_a_multiprocessor_each():
    def is_wide(batch, processors):
        shape = layout.choose_fused(8, batch, 1 << 19, 1 << 14, 512, (256, 0), 64, 128, processors)
        return shape is not None and shape.wide

    assert is_wide(1, 128)
    assert not is_wide(1, 127)
    assert not is_wide(2, 132)


def test_a_remainder_takes_shared_memory_of_its_own():
    sizes = 8, 1, 4096, 180, 512, (256, 0), 64, 128
    plain, filled = (layout.choose_fused(*sizes, known=known) for known in (0, layout.remainder_bytes(4, 128)))
    assert plain is not None
    assert filled == plain._replace(shared=plain.shared + 2176)
    one, other = (layout.choose(0, 256, 4096, 180, 512, known=known) for known in (0, 2176))
    assert one is not None
    assert other == one._replace(shared=one.shared + 2176)


def test_a_forced_shape_is_taken_where_it_fits():
    shape = layout.choose(0, 64, 1 << 15, 1 << 10, 512, forced=(256, 8))
    assert shape is not None
    assert (shape.threads, shape.blocks) == (256, 8)
    assert layout.choose(0, 64, 1 << 17, 1 << 12, 512, forced=(256, 1)) is None


def test_rows_that_have_no_shape_are_one_clear_error():
    assert layout.choose(0, 1, 1 << 21, 1 << 16, 512) is None
    with pytest.raises(BackendError, match=r"2097152 tokens a row do not fit .* Use backend='triton'\."):
        layout.require(None, 1 << 21)


@pytest.mark.parametrize(
    ("levels", "bits", "slots"),
    [(0, 64, 1), (1, 64, 1), (3, 64, 2), (4, 64, 4), (7, 64, 4), (7, 128, 4), (7, 32, 3), (15, 64, 4)],
)
def test_magnitudes_take_as_many_slots_as_the_kernels_give_them(levels, bits, slots):
    """A bit each, but two of weight 1 and two of weight 3 for magnitudes up to 7 in longer signatures (common.cuh)."""
    assert step.slots_of(levels, bits) == slots
