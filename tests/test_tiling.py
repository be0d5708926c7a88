"""Properties of the geometry that every pixel's correctness rests on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from denoise_core.tiling import STEP, fixed_regions, regions, round_up, split, split_fixed

LENGTHS = st.integers(1, 5000)
CORES = st.sampled_from([32, 64, 100, 256, 512])
HALOS = st.sampled_from([0, 8, 30, 32, 64, 300])
STRIDES = st.sampled_from([1, 4, 8])


@given(length=LENGTHS, core=CORES, halo=HALOS, stride=STRIDES)
def test_cores_cover_the_axis_once(length, core, halo, stride):
    tiles = split(length, core=core, halo=halo, stride=stride)
    edges = [tile.start for tile in tiles] + [tiles[-1].stop]
    assert edges[0] == 0
    assert edges[-1] == length
    assert all(tile.stop == after for tile, after in zip(tiles, edges[1:], strict=True))
    assert all(tile.start < tile.stop for tile in tiles)


@given(length=LENGTHS, core=CORES, halo=HALOS, stride=STRIDES)
def test_windows_hold_core_and_halo_and_start_on_the_stride(length, core, halo, stride):
    padded = round_up(length, stride)
    for tile in split(length, core=core, halo=halo, stride=stride):
        assert tile.first % stride == 0
        assert tile.last % stride == 0
        assert 0 <= tile.first <= tile.start
        assert tile.stop <= tile.last <= padded
        assert tile.first == 0 or tile.start - tile.first >= halo
        assert tile.last == padded or tile.last - tile.stop >= halo


@given(length=LENGTHS, core=CORES, halo=HALOS, stride=STRIDES, count=st.integers(1, 40))
def test_no_window_is_shorter_than_the_least(length, core, halo, stride, count):
    least = count * stride
    tiles = split(length, core=core, halo=halo, stride=stride, least=least)
    assert [tiles[0].start, tiles[-1].stop] == [0, length]
    assert [tile.stop for tile in tiles[:-1]] == [tile.start for tile in tiles[1:]]
    end = max(round_up(length, stride), least)
    for tile in tiles:
        assert tile.length >= least
        assert tile.length % stride == tile.first % stride == 0
        assert 0 <= tile.first <= tile.start < tile.stop <= tile.last <= end
        assert tile.first == 0 or tile.start - tile.first >= halo
        assert tile.last == end or tile.last - tile.stop >= halo


@given(length=LENGTHS, core=CORES, halo=HALOS, stride=STRIDES)
def test_cut_axes_have_few_window_lengths_and_pay_for_little_more_than_they_need(
    length, core, halo, stride
):
    tiles = split(length, core=core, halo=halo, stride=stride)
    if len(tiles) > 1:
        core, halo, padded = (round_up(value, stride) for value in (core, halo, length))
        for tile in tiles:
            needed = min(padded, tile.stop + halo) - max(0, tile.start - halo)
            assert tile.length in (core + halo, core + 2 * halo) or tile.length % STEP == 0
            assert needed <= tile.length <= core + 2 * halo
            assert tile.length < round_up(needed, stride) + STEP


@given(length=LENGTHS, core=CORES, halo=HALOS, stride=STRIDES)
def test_context_is_what_lies_around_the_core_in_whole_strides(length, core, halo, stride):
    for tile in split(length, core=core, halo=halo, stride=stride):
        before, behind = tile.context(stride)
        assert before % stride == behind % stride == 0
        assert 0 <= tile.start - (tile.first + before) < stride
        assert tile.last - behind >= tile.stop
        assert behind == 0 or tile.last - behind - tile.stop < stride


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), region=st.sampled_from([256, 1024]))
def test_regions_own_every_pixel_once(height, width, region):
    cut = regions(height, width, core=256, halo=32, stride=8, region=region)
    area = 0
    for part in cut:
        y0, y1, x0, x1 = part.core
        top, bottom, left, right = part.window(height, width)
        assert 0 <= top <= y0 < y1 <= bottom <= height
        assert 0 <= left <= x0 < x1 <= right <= width
        area += (y1 - y0) * (x1 - x0)
    assert area == height * width
    assert len({part.core for part in cut}) == len(cut)


def test_small_images_are_not_cut_nor_padded_beyond_the_stride():
    (tile,) = split(481, core=256, halo=32, stride=8)
    assert (tile.start, tile.stop, tile.first, tile.last) == (0, 481, 0, 488)


@pytest.mark.parametrize("bad", [{"length": 0}, {"core": 0}, {"halo": -1}])
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        split(**{"length": 10, "core": 32, "halo": 8, "stride": 8, **bad})


@given(
    length=st.integers(1, 400),
    size=st.sampled_from([16, 28, 64]),
    halo=st.sampled_from([0, 4]),
    stride=st.sampled_from([1, 2, 4]),
)
def test_windows_of_one_size_own_every_pixel_with_its_halo(length, size, halo, stride):
    tiles = split_fixed(length, size=size, halo=halo, stride=stride)
    assert (tiles[0].start, tiles[-1].stop) == (0, length)
    for tile, after in zip(tiles, [*tiles[1:], None], strict=True):
        assert tile.length == size
        assert tile.first % stride == 0
        assert tile.first <= tile.start < tile.stop <= tile.last
        assert tile.start == 0 or tile.start - tile.first >= halo
        assert after is None or (tile.stop == after.start and tile.last - tile.stop >= halo)
    # Beyond the axis there is only what the stride or a short axis make necessary.
    assert tiles[-1].last - length < max(stride, size - length + 1)


def test_regions_of_one_window_size_keep_sides_apart():
    cut = fixed_regions(60, 100, size=(20, 30), halo=2, stride=2, region=64)
    assert {patch.shape for part in cut for patch in part.patches} == {(20, 30)}
    assert sum((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in (part.core for part in cut)) == 6000
    assert len(cut) == 4


def test_a_halo_that_leaves_no_core_is_refused():
    with pytest.raises(ValueError, match="size=28, halo=14"):
        split_fixed(100, size=28, halo=14, stride=1)
