"""Cutting, pasting and batching of patches: no pixel lost, moved or clipped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from denoise_core.patches import Cut, batch_size, batches, core_of, cut, is_wide, stack
from denoise_core.tiling import Patch, Tile, regions, split

SIDES = st.integers(1, 200)
GEOMETRY = {"core": 32, "halo": 16, "stride": 8}


def ramp(height: int, width: int, channels: int = 1) -> np.ndarray:
    """An image whose every value is another."""
    count = height * width * channels
    return np.arange(count, dtype=np.float32).reshape(height, width, channels)


def patches_of(height: int, width: int, **more) -> list[Patch]:
    return [p for region in regions(height, width, **GEOMETRY, **more) for p in region.patches]


@given(height=SIDES, width=SIDES)
def test_pasted_cores_give_the_image_back(height, width):
    image = ramp(height, width)
    result = np.full_like(image, -1.0)
    for patch in patches_of(height, width):
        window = cut(image, patch, origin=(0, 0), low=0.0, high=1.0)
        assert window.shape == (*patch.shape, 1)
        y, x = patch.y, patch.x
        result[y.start : y.stop, x.start : x.stop] = core_of(window, patch)
    np.testing.assert_array_equal(result, image)


@given(height=SIDES, width=SIDES, region=st.sampled_from([32, 64]))
def test_a_window_is_the_same_from_its_region_as_from_the_whole_image(height, width, region):
    image = ramp(height, width)
    for part in regions(height, width, **GEOMETRY, region=region):
        y0, y1, x0, x1 = part.window(height, width)
        pixels = image[y0:y1, x0:x1]
        for patch in part.patches:
            np.testing.assert_array_equal(
                cut(pixels, patch, origin=(y0, x0), low=0.0, high=1.0),
                cut(image, patch, origin=(0, 0), low=0.0, high=1.0),
            )


@given(height=SIDES, width=SIDES)
def test_beyond_its_end_the_image_is_mirrored(height, width):
    image = ramp(height, width)
    (rows,), (columns,) = (split(side, core=256, halo=16, stride=8) for side in (height, width))
    window = cut(image, Patch(rows, columns), origin=(0, 0), low=0.0, high=1.0)
    missing = rows.length - height, columns.length - width
    assert all(0 <= count < 8 for count in missing)
    expected = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(window, expected)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 0, 255), ("uint16", 0, 65535), ("int16", -100, 300), ("float32", -2.0, 2.0)],
)
def test_the_data_range_is_mapped_to_0_to_1_and_not_clipped(dtype, low, high):
    values = np.array([low, high, (low + high) // 2, low + 2 * (high - low)], np.float64)
    info = np.iinfo(dtype) if dtype[0] in "ui" else np.finfo(dtype)
    values = np.clip(values, info.min, info.max)
    window = cut(
        values.astype(dtype)[None, :, None],
        Patch(Tile(0, 1, 0, 1), Tile(0, 4, 0, 4)),
        origin=(0, 0),
        low=float(low),
        high=float(high),
    )
    assert window.dtype == np.float32
    np.testing.assert_allclose(window.ravel(), (values - low) / (high - low), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["uint32", "int64", "float64"])
def test_a_small_range_on_a_large_offset_keeps_its_digits(dtype):
    values = (np.arange(101) + 3_000_000_000).astype(dtype)
    window = cut(
        values[None, :, None],
        Patch(Tile(0, 1, 0, 1), Tile(0, 101, 0, 101)),
        origin=(0, 0),
        low=float(values[0]),
        high=float(values[-1]),
    )
    np.testing.assert_allclose(window.ravel(), np.arange(101) / 100, atol=1e-6)


def test_cutting_leaves_the_image_alone():
    image = ramp(16, 16)
    before = image.copy()
    window = cut(image, patches_of(16, 16)[0], origin=(0, 0), low=0.0, high=1.0)
    window += 1.0
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("uint8", False), ("uint16", False), ("uint32", True), ("float32", False), ("float64", True)],
)
def test_wide_types(dtype, wide):
    assert is_wide(np.dtype(dtype)) is wide


@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), max_size=6),
    pixels=st.sampled_from([1, 5_000, 100_000]),
    most=st.sampled_from([1, 5, 64]),
)
def test_batches_hold_every_patch_once_and_one_shape_each(sizes, pixels, most):
    cuts = [
        Cut(source, patch, None) for source, size in enumerate(sizes) for patch in patches_of(*size)
    ]
    grouped = list(batches(cuts, batch_pixels=pixels, most=most))
    seen = [item for batch in grouped for item in batch]
    assert len(seen) == len(cuts)
    assert set(seen) == set(cuts)
    for batch in grouped:
        (shape,) = {item.patch.shape for item in batch}
        assert 1 <= len(batch) <= batch_size(shape, batch_pixels=pixels, most=most) <= most


@given(side=st.integers(1, 500), pixels=st.integers(1, 10**6), most=st.integers(1, 100))
def test_a_full_batch_is_a_power_of_two_that_fits_or_one(side, pixels, most):
    size = batch_size((side, side), batch_pixels=pixels, most=most)
    assert size & (size - 1) == 0
    assert size == 1 or size * side * side <= pixels
    assert 2 * size > min(most, pixels // side**2)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_stacks_are_filled_up_to_powers_of_two_with_zeros(count, size):
    windows = [np.full((2, 3, 1), place + 1.0, np.float32) for place in range(count)]
    batch = stack(windows)
    assert batch.shape == (size, 2, 3, 1)
    np.testing.assert_array_equal(batch[:count], np.stack(windows))
    assert not batch[count:].any()
