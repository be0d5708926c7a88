"""Regions of a large image become one tiled BigTIFF, within bounded memory."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile

from denoise_core.assemble import Region, assemble_tiff
from denoise_core.errors import ImageError
from denoise_core.images import decode, read_header, read_metadata, read_window

HEIGHT, WIDTH = 83, 101


def source_of(shape: tuple[int, ...], **options: object) -> bytes:
    out = io.BytesIO()
    array = np.random.default_rng(1).integers(0, 60000, shape).astype("uint16")
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def regions_of(samples: np.ndarray, *, size: tuple[int, int]) -> list[Region]:
    regions = []
    for y in range(0, samples.shape[0], size[0]):
        for x in range(0, samples.shape[1], size[1]):
            part = samples[y : y + size[0], x : x + size[1]]
            regions.append(Region(y, x, *part.shape[:2], partial(np.asarray, part)))
    return regions


def assemble(data: bytes, folder: Path, *, size: tuple[int, int], **options: object) -> Path:
    image = decode(data, name="x")
    samples = image.pixels
    if image.alpha is not None:
        samples = np.concatenate((samples, image.alpha[..., None]), -1)
    file = io.BytesIO(data)
    assemble_tiff(
        reversed(regions_of(samples, size=size)),
        path=folder / "out.tiff",
        header=read_header(file, name="x"),
        metadata=read_metadata(file, name="x"),
        **options,
    )
    return folder / "out.tiff"


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (16, 200), (83, 101), (29, 31)])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((HEIGHT, WIDTH), {"photometric": "minisblack"}),
        ((HEIGHT, WIDTH, 3), {"photometric": "rgb", "byteorder": ">"}),
        ((HEIGHT, WIDTH, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        ((3, HEIGHT, WIDTH), {"photometric": "rgb", "planarconfig": "separate"}),
        ((2, 3, HEIGHT, WIDTH), {"photometric": "minisblack", "metadata": {"axes": "ZCYX"}}),
    ],
)
def test_pixels_and_axes(
    tmp_path: Path, shape: tuple[int, ...], options: dict[str, object], size: tuple[int, int]
) -> None:
    data = source_of(shape, tile=(32, 48), compression="zlib", **options)
    out = assemble(data, tmp_path, size=size)
    with tifffile.TiffFile(io.BytesIO(data)) as one, tifffile.TiffFile(out) as two:
        assert two.is_bigtiff
        assert two.byteorder == one.byteorder
        assert two.pages[0].tile == (32, 48)
        assert two.series[0].axes == one.series[0].axes
        np.testing.assert_array_equal(two.asarray(), one.asarray())
    with out.open("rb") as file:
        whole = decode(data, name="x")
        pixels, alpha = read_window(file, y=slice(20, 70), x=slice(30, 90))
        np.testing.assert_array_equal(pixels, whole.pixels[20:70, 30:90])
        if alpha is not None:
            np.testing.assert_array_equal(alpha, whole.alpha[20:70, 30:90])


def test_tags_are_the_sources(tmp_path: Path) -> None:
    data = source_of(
        (HEIGHT, WIDTH, 3),
        photometric="rgb",
        tile=(32, 32),
        compression="zstd",
        predictor=True,
        resolution=(300, 150),
        resolutionunit="INCH",
        iccprofile=b"profile",
        software="camera",
        extratags=[(274, 3, 1, 6, True), (33550, 12, 3, (1.0, 2.0, 0.0), True)],
        metadata=None,
    )
    out = assemble(data, tmp_path, size=(48, 48))
    moving = {324, 325}
    with tifffile.TiffFile(io.BytesIO(data)) as one, tifffile.TiffFile(out) as two:
        tags = [
            {tag.code: tag.value for tag in tif.pages[0].tags if tag.code not in moving}
            for tif in (one, two)
        ]
    assert tags[0] == tags[1]


def test_damaged_exif_is_left_out_and_named(tmp_path: Path) -> None:
    data = source_of((HEIGHT, WIDTH), tile=(32, 32))
    file = io.BytesIO(data)
    lost = assemble_tiff(
        regions_of(decode(data, name="x").pixels, size=(48, 48)),
        path=tmp_path / "out.tiff",
        header=read_header(file, name="x"),
        metadata=replace(read_metadata(file, name="x"), exif=b"no directory"),
    )
    assert lost == ("EXIF (damaged)",)


def test_strips_become_tiles_and_options_win(tmp_path: Path) -> None:
    data = source_of((HEIGHT, WIDTH), rowsperstrip=8)
    out = assemble(data, tmp_path, size=(48, 48), compression="lzw", tile=(64, 16))
    with tifffile.TiffFile(out) as tif:
        assert tif.pages[0].tile == (64, 16)
        assert tif.pages[0].compression == tifffile.COMPRESSION.LZW
        np.testing.assert_array_equal(tif.asarray(), tifffile.imread(io.BytesIO(data)))


def test_zarr_reads_a_window(tmp_path: Path) -> None:
    import zarr

    data = source_of((HEIGHT, WIDTH, 3), photometric="rgb", tile=(16, 16), compression="zlib")
    out = assemble(data, tmp_path, size=(48, 48))
    with tifffile.TiffFile(out) as tif:
        array = zarr.open(tif.aszarr(), mode="r")
        expected = tifffile.imread(io.BytesIO(data))[10:50, 20:60]
        np.testing.assert_array_equal(array[10:50, 20:60], expected)


@pytest.mark.parametrize("missing", [0, 1, 3, 5])
def test_a_missing_region_is_an_error(tmp_path: Path, missing: int) -> None:
    data = source_of((HEIGHT, WIDTH))
    image = decode(data, name="x")
    regions = regions_of(image.pixels, size=(42, 40))
    del regions[missing]
    with pytest.raises(ImageError, match="missing or overlap"):
        assemble_tiff(regions, path=tmp_path / "out", header=image.header, metadata=image.metadata)
    assert not (tmp_path / "out").exists()


def test_a_region_of_another_shape_leaves_no_file(tmp_path: Path) -> None:
    image = decode(source_of((HEIGHT, WIDTH)), name="x")
    wrong = Region(0, 0, HEIGHT, WIDTH, lambda: np.zeros((HEIGHT, WIDTH, 1), "uint8"))
    with pytest.raises(ImageError, match="expected uint16"):
        assemble_tiff([wrong], path=tmp_path / "o", header=image.header, metadata=image.metadata)
    assert not (tmp_path / "o").exists()


MEMORY_PROBE = """
    import sys, numpy as np
    from denoise_core.assemble import Region, assemble_tiff
    from denoise_core.benchmarks.child import peak_rss
    from denoise_core.images import ImageHeader, ImageMetadata, read_header, read_window
    side, region, path = 6144, 1024, sys.argv[1]
    def peak():
        return peak_rss() / 2**20
    header = ImageHeader("tiff", side, side, 3, "uint8")
    metadata = ImageMetadata("npy", "uint8", 3)
    load = lambda: np.zeros((region, region, 3), "uint8")
    regions = [Region(y, x, region, region, load)
               for y in range(0, side, region) for x in range(0, side, region)]
    import tifffile, imagecodecs
    before = peak()
    assemble_tiff(regions, path=path, header=header, metadata=metadata)
    after = peak()
    with open(path, "rb") as file:
        assert read_header(file, name="x").windowed
        read_window(file, y=slice(500, 1500), x=slice(500, 1500))
    print(after - before, peak() - before)
"""


def test_memory_is_a_row_of_regions(tmp_path: Path) -> None:
    """113 MB of pixels pass through; one row of regions is 19 MB."""
    script = textwrap.dedent(MEMORY_PROBE)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big.tiff")],
        capture_output=True,
        text=True,
        check=True,
    )
    writing, reading = map(float, done.stdout.split())
    assert writing < 60
    assert reading < 80
