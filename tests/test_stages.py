"""Which images go through in regions, and how large those are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from denoise_core.images import ImageHeader
from denoise_core.pipelines.stages import Expand


@pytest.mark.parametrize(
    ("kind", "side", "channels", "windowed", "expected"),
    [
        ("tiff", 5_000, 3, True, None),
        ("tiff", 6_000, 3, True, 2048),
        ("tiff", 6_000, 3, False, None),
        # A stack counts as many pixels as it has groups of four samples, and its regions are
        # smaller by as much.
        ("tiff", 2_000, 36, True, 512),
        ("tiff", 2_000, 32, True, None),
        ("zarr", 100, 1, True, 2048),
        ("zarr", 100, 5, True, 1024),
        ("zarr", 100, 10_000, True, 256),
    ],
)
def test_regions_hold_so_many_samples(kind, side, channels, windowed, expected) -> None:
    header = ImageHeader(kind, side, side, channels, "uint8", windowed=windowed)
    expand = Expand(SimpleNamespace(config=SimpleNamespace(region=2048)), None)
    assert expand._region_size(header) == expected
