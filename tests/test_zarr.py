"""Zarr and OME-Zarr folders: listed as one image, read in windows, written like their source."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import worker_hook
import zarr
from conftest import S3Server
from helpers import as_dtype, by_name, denoise, files_below, picture
from zarr.codecs import BloscCodec, GzipCodec

from denoise_core.assemble import Region, zarr_files
from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.errors import (
    CorruptImage,
    ImageError,
    ImageTooLarge,
    NonFiniteValues,
    NotAnImage,
    ObjectNotFound,
    StorageError,
    UnsupportedImage,
    UsageError,
)
from denoise_core.images import (
    ImageHeader,
    ImageMetadata,
    decode,
    encode,
    fetch,
    open_image,
    read_header,
    read_metadata,
    read_window,
)
from denoise_core.images.zarr import METADATA_FILES
from denoise_core.pipelines.job import Job
from denoise_core.pipelines.stages import Expand, drop_regions, publish_image, regions_of
from denoise_core.report.examples import read_example
from denoise_core.storage import (
    Entry,
    LocalStorage,
    StorageOptions,
    expand,
    join,
    storage_for,
)
from denoise_core.worklist import outputs_present

LOCAL = LocalStorage()
SHAPE = (2, 3, 70, 90)
VALUES = np.random.default_rng(0).integers(0, 60_000, SHAPE).astype("uint16")


def write_array(path: Path, values: np.ndarray, *, zarr_format: int = 2, **more: Any) -> Path:
    """A bare array; chunks of 32x32 unless told."""
    more.setdefault("chunks", (*(1,) * (values.ndim - 2), 32, 32))
    array = zarr.create_array(
        path, shape=values.shape, dtype=values.dtype, zarr_format=zarr_format, **more
    )
    array[...] = values
    return path


def write_ome(
    path: Path,
    values: np.ndarray = VALUES,
    *,
    axes: str = "czyx",
    zarr_format: int = 2,
    **more: Any,
) -> Path:
    """A pyramid of two levels, as NGFF 0.4 (format 2) or 0.5 (format 3) has it."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    scales = [[*(1.0,) * (len(axes) - 2), s, s] for s in (0.5, 1.0)]
    image = {
        "axes": [{"name": name, "type": "space"} for name in axes],
        "datasets": [
            {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            for i, scale in enumerate(scales)
        ],
        "name": "cells",
    }
    omero = {"channels": [{"label": "DAPI", "window": {"start": 0, "end": 9000}}]}
    if zarr_format == 2:
        group.attrs.update({"multiscales": [{**image, "version": "0.4"}], "omero": omero, "own": 7})
    else:
        ome = {"version": "0.5", "multiscales": [image], "omero": omero}
        group.attrs.update({"ome": ome, "own": 7})
    write_array(path / "0", values, zarr_format=zarr_format, **more)
    write_array(path / "1", values[..., ::2, ::2], zarr_format=zarr_format)
    return path


def flat(values: np.ndarray) -> np.ndarray:
    """(..., H, W) -> (H, W, S)."""
    return np.moveaxis(values, (-2, -1), (0, 1)).reshape(*values.shape[-2:], -1)


def window_of(path: Path, rows: slice, columns: slice) -> np.ndarray:
    with open_image(LOCAL, str(path)) as source:
        return read_window(source, y=rows, x=columns, name="x")[0]


def rewrite(path: Path, target: Path, *, size: tuple[int, int]) -> tuple[str, ...]:
    """Decode, cut to regions, assemble again; return what was lost."""
    with open_image(LOCAL, str(path)) as source:
        header, metadata = read_header(source, name="x"), read_metadata(source, name="x")
    metadata = ImageMetadata.from_bytes(metadata.to_bytes())
    pixels = decode(fetch(LOCAL, str(path)), name="x").pixels
    height, width = size
    regions = []
    for y in range(0, header.height, height):
        for x in range(0, header.width, width):
            piece = pixels[y : y + height, x : x + width]
            regions.append(Region(y, x, *piece.shape[:2], lambda piece=piece: piece))
    files = zarr_files(regions, header=header, metadata=metadata)
    LOCAL.publish(str(target), files, last=METADATA_FILES)
    return metadata.lost


def tree(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in files_below(root)}


# --- listing ------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], str]:
    """Copies a local folder to where the storage under test has it; returns that URI."""

    def copy(folder: Path) -> str:
        if request.param == "local":
            return str(folder)
        root = join(request.getfixturevalue("s3_server").make_bucket(), "top")
        for entry in LOCAL.tree(str(folder)):
            storage_for(root).write(join(root, entry.path), LOCAL.read(entry.uri))
        return root

    return copy


def found(*inputs: str, **selection: Any) -> dict[str, Entry]:
    entries = list(expand(inputs, **selection))
    assert all(isinstance(each, Entry) for each in entries), entries
    names = [each.path for each in entries]
    assert len(set(names)) == len(names)
    return {each.path: each for each in entries}


def test_a_zarr_is_one_entry(place: Callable[[Path], str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_ome(folder / "sub/a.ome.zarr")
    write_array(folder / "B.ZARR", VALUES[0, 0])
    write_array(folder / ".hidden.zarr", VALUES[0, 0])
    for name in ("a.png", "sub/b.png", "sub/a.ome.zarr.txt", "zarr/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    root = place(folder)
    everything = {"B.ZARR", "a.png", "sub/b.png", "sub/a.ome.zarr", "sub/a.ome.zarr.txt"}
    entries = found(root)
    assert set(entries) == everything | {"zarr/c.png"}
    entry = entries["sub/a.ome.zarr"]
    assert entry.uri == join(root, "sub/a.ome.zarr")
    inside = folder / "sub/a.ome.zarr"
    assert entry.size == sum((inside / name).stat().st_size for name in files_below(inside))
    assert set(found(root, recursive=False)) == {"B.ZARR", "a.png"}
    assert set(found(root, include=["*.zarr"])) == {"B.ZARR", "sub/a.ome.zarr"}
    assert set(found(root, exclude=["*.zarr", "*.png"])) == {"sub/a.ome.zarr.txt"}
    for text in (join(root, "sub/a.ome.zarr"), join(root, "sub/a.ome.zarr") + "/"):
        alone = found(text)
        assert set(alone) == {"a.ome.zarr"}
        assert alone["a.ome.zarr"].fingerprint == entry.fingerprint
    assert set(found(join(root, "s*/*.zarr"))) == {"sub/a.ome.zarr"}
    assert set(found(join(root, "*.ZARR"))) == {"B.ZARR"}
    assert set(found(join(root, "s*"), recursive=False)) == {
        "sub/b.png", "sub/a.ome.zarr", "sub/a.ome.zarr.txt",
    }  # fmt: skip
    for inner in ("sub/a.ome.zarr/0", "sub/a.ome.zarr/*", "**/*.zarr/0"):
        with pytest.raises(UsageError, match="is one image"):
            found(join(root, inner))


def test_the_fingerprint_knows_every_file(place: Callable[[Path], str], tmp_path: Path) -> None:
    path = write_ome(tmp_path / "in/a.zarr")
    root = place(tmp_path / "in")
    storage = storage_for(root)
    seen = {found(root)["a.zarr"].fingerprint}
    for name in (".zattrs", "0/.zarray", "0/1.2.0.0", "0/.zattrs"):
        uri = join(root, "a.zarr", name)
        old = storage.read(uri)
        storage.write(uri, old + b" ")
        seen.add(found(root)["a.zarr"].fingerprint)
    storage.delete(join(root, "a.zarr/0/0.0.0.0"))
    seen.add(found(root)["a.zarr"].fingerprint)
    storage.write(join(root, "a.zarr/new"), b"")
    seen.add(found(root)["a.zarr"].fingerprint)
    assert len(seen) == 7, path


def test_publish_replaces_a_folder_whole(
    place: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/other.png").write_bytes(b"x")
    root = place(tmp_path / "in")
    storage, uri = storage_for(root), join(root, "images/a.zarr")
    old = {".zgroup": b"{}", ".zattrs": b"old", "0/.zarray": b"{}", "0/0.0": b"old", "0/9.9": b"o"}
    new = {"0/0.0": b"new", "0/0.1": b"new", "0/.zarray": b"{1}", ".zattrs": b"n", ".zgroup": b"{}"}

    def content() -> dict[str, bytes]:
        return {entry.path: storage.read(entry.uri) for entry in storage.tree(uri)}

    def failing() -> Any:
        yield "0/0.0", b"new"
        raise ImageError("broken off")

    for files in (old, new, new):
        storage.publish(uri, iter(files.items()), last=METADATA_FILES)
        assert content() == files
    with monkeypatch.context() as patch:
        # What the listing says is enough: no request for each Zarr.
        patch.setattr(type(storage), "stat", None)
        assert len(outputs_present(storage, root)) == 1
    with pytest.raises(ImageError, match="broken off"):
        storage.publish(uri, failing(), last=METADATA_FILES)
    if isinstance(storage, LocalStorage):
        assert content() == new
        assert [each.name for each in (tmp_path / "in/images").iterdir()] == ["a.zarr"]
    else:
        with pytest.raises(ObjectNotFound):
            content()
        # One that was killed: no reader takes it for whole, and a rerun does it again.
        storage.write(join(uri, "0/0.0"), b"new")
        assert len(outputs_present(storage, root)) == 0
    with pytest.raises(UsageError, match="relative path"):
        storage.publish(uri, iter([("../x", b"")]), last=METADATA_FILES)


def test_a_killed_publish_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    uri, images = str(tmp_path / "images/a.zarr"), tmp_path / "images"

    def killed() -> Any:
        yield "0/0.0", b"new"
        shutil.copytree(images, tmp_path / "seen")  # as a kill would leave it
        yield ".zgroup", b"{}"

    LOCAL.publish(uri, killed(), last=METADATA_FILES)
    assert list(LOCAL.list(str(tmp_path / "seen"))) == []
    (leftover,) = (tmp_path / "seen").iterdir()
    assert leftover.name.startswith(".tmp-")
    leftover.rename(images / leftover.name)
    LOCAL.publish(uri, iter([(".zgroup", b"{}")]), last=METADATA_FILES)
    assert [each.name for each in images.iterdir()] == ["a.zarr"]


def test_one_whose_folder_was_taken_away_does_not_publish(tmp_path: Path) -> None:
    """A host that is cut off, and its successor, at one Zarr: what is there at the end is whole."""
    uri = str(tmp_path / "images/a.zarr")
    whole = {**{f"0/c/{index}": b"x" for index in range(6)}, "zarr.json": b"{}"}

    def cut_off() -> Any:
        for index, file in enumerate(whole.items()):
            if index == 4:
                LOCAL.publish(uri, iter(whole.items()), last=METADATA_FILES)
            yield file

    with pytest.raises(StorageError):
        LOCAL.publish(uri, cut_off(), last=METADATA_FILES)
    assert {entry.path: LOCAL.read(entry.uri) for entry in LOCAL.tree(uri)} == whole
    assert [each.name for each in (tmp_path / "images").iterdir()] == ["a.zarr"]


def test_one_that_fails_late_leaves_what_its_successor_published(
    place: Callable[[Path], str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/other.png").write_bytes(b"x")
    root = place(tmp_path / "in")
    storage, uri = storage_for(root), join(root, "images/a.zarr")
    whole = {"0/0.0": b"x", "0/.zarray": b"{}", ".zgroup": b"{}"}

    def late() -> Any:
        yield "0/0.0", b"x"
        storage.publish(uri, iter(whole.items()), last=METADATA_FILES)
        raise ImageError("the regions are gone")

    with pytest.raises(ImageError, match="are gone"):
        storage.publish(uri, late(), last=METADATA_FILES)
    assert {entry.path: storage.read(entry.uri) for entry in storage.tree(uri)} == whole


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_ome_header_windows_and_metadata(tmp_path: Path, zarr_format: int) -> None:
    path = write_ome(tmp_path / "a.zarr", zarr_format=zarr_format)
    with open_image(LOCAL, str(path)) as source:
        header = read_header(source, name="x", max_pixels=10)
        metadata = read_metadata(source, name="x")
    assert (header.format, header.height, header.width, header.channels) == ("zarr", 70, 90, 6)
    assert (header.dtype, header.axes, header.windowed) == ("uint16", "CZYX", True)
    assert (header.bits, header.tile, header.has_alpha) == (16, (32, 32), False)
    assert metadata.lost == ("zarr:levels",)
    np.testing.assert_array_equal(
        window_of(path, slice(20, 69), slice(31, 70)), flat(VALUES)[20:69, 31:70]
    )
    np.testing.assert_array_equal(decode(fetch(LOCAL, str(path)), name="x").pixels, flat(VALUES))
    with pytest.raises(ImageTooLarge, match="90x70"):
        decode(fetch(LOCAL, str(path)), name="x", max_pixels=10)


@pytest.mark.parametrize(
    ("axes", "shape", "options"),
    [
        ("yx", (70, 90), {"zarr_format": 2, "order": "F"}),
        ("tczyx", (2, 2, 3, 70, 90), {"zarr_format": 2, "dtype": ">u2"}),
        ("xy", (90, 70), {"zarr_format": 3, "compressors": BloscCodec(cname="zstd")}),
        ("yxc", (70, 90, 3), {"zarr_format": 3, "chunks": (32, 16, 3)}),
        ("zyx", (3, 70, 90), {"zarr_format": 3, "shards": (3, 64, 32), "compressors": GzipCodec()}),
        ("zyx", (3, 70, 90), {"zarr_format": 2, "filters": "delta"}),
        ("zyx", (3, 70, 90), {"zarr_format": 2, "compressors": None, "chunks": (3, 70, 7)}),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (30, 41), (70, 90)])
def test_round_trip(
    tmp_path: Path, axes: str, shape: tuple[int, ...], options: dict[str, Any], size: Any
) -> None:
    """Pixels, and every byte of the metadata files of the array, with any regions."""
    import numcodecs

    values = np.random.default_rng(3).integers(0, 999, shape).astype(options.pop("dtype", "u2"))
    if options.get("filters") == "delta":
        options = {**options, "filters": [numcodecs.Delta("<u2")]}
    path = write_ome(tmp_path / "a.zarr", values, axes=axes, **options)
    zarr.open_array(path / "0").attrs["unit"] = {"base64": "µm"}
    lost = rewrite(path, tmp_path / "out/a.zarr", size=size)
    rewrite(path, tmp_path / "again/a.zarr", size=(35, 90))
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    assert lost == ("zarr:levels",)
    before, after = tree(path), tree(tmp_path / "out/a.zarr")
    assert after.keys() == {n for n in before if not n.startswith("1/")}
    same = {n for n in after if n.startswith("0/") and n.rpartition("/")[2] in METADATA_FILES}
    assert same
    assert {n: after[n] for n in same} == {n: before[n] for n in same}
    one, two = (zarr.open_group(each, mode="r") for each in (path, tmp_path / "out/a.zarr"))
    np.testing.assert_array_equal(two["0"][...], values)
    assert two["0"].metadata == one["0"].metadata
    expected = dict(one.attrs)
    image = expected.get("ome", expected)["multiscales"][0]
    image["datasets"] = image["datasets"][:1]
    assert dict(two.attrs) == expected


def test_bare_arrays_and_their_axes(tmp_path: Path) -> None:
    grey, colour = VALUES[0, 0], np.moveaxis(VALUES[0], 0, -1)
    more = {"chunks": (32, 32, 3)}
    cases = [
        (grey, {"zarr_format": 2}, "YX", grey[..., None]),
        (colour, {"zarr_format": 2, **more}, "YXS", colour),
        (VALUES[0], {"zarr_format": 3, "dimension_names": ["z", "y", "x"]}, "ZYX", flat(VALUES[0])),
        (VALUES[0], {"zarr_format": 2, "attributes": {"_ARRAY_DIMENSIONS": ["band", "y", "x"]}},
         "QYX", flat(VALUES[0])),
        (grey, {"zarr_format": 3, "dimension_names": ["dim_0", None]}, "YX", grey[..., None]),
    ]  # fmt: skip
    for index, (values, options, axes, expected) in enumerate(cases):
        path = write_array(tmp_path / f"{index}.zarr", values, **options)
        with open_image(LOCAL, str(path)) as source:
            assert read_header(source, name="x").axes == axes
        np.testing.assert_array_equal(window_of(path, slice(5, 40), slice(0, 90)), expected[5:40])
        assert rewrite(path, tmp_path / f"out/{index}.zarr", size=(64, 64)) == ()
        assert tree(path) == tree(tmp_path / f"out/{index}.zarr")


def test_consolidated_metadata_labels_and_old_versions(tmp_path: Path) -> None:
    for zarr_format in (2, 3):
        path = write_ome(tmp_path / f"{zarr_format}.zarr", zarr_format=zarr_format)
        zarr.open_group(path, mode="r+").create_group("labels")
        zarr.consolidate_metadata(path)
        out = tmp_path / f"out/{zarr_format}.zarr"
        assert rewrite(path, out, size=(64, 64)) == ("zarr:levels", "zarr:labels")
        group = zarr.open_consolidated(out)
        assert set(group.keys()) == {"0"}
        np.testing.assert_array_equal(group["0"][...], VALUES)
    path = write_ome(tmp_path / "old.zarr", VALUES[None], axes="tczyx")
    attributes = json.loads((path / ".zattrs").read_text())
    del attributes["multiscales"][0]["axes"]
    (path / ".zattrs").write_text(json.dumps(attributes))
    np.testing.assert_array_equal(window_of(path, slice(0, 9), slice(0, 90)), flat(VALUES)[:9])


def test_without_a_fill_value_no_chunk_is_missing(tmp_path: Path) -> None:
    values = np.ones((64, 64), "uint16")
    path = write_array(tmp_path / "a.zarr", values)
    document = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps(document | {"fill_value": None}))
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(path, mode="r+")[...] = 0
    chunks = {"0.0", "0.1", "1.0", "1.1"}
    assert chunks < set(tree(path))
    rewrite(path, tmp_path / "out.zarr", size=(64, 64))
    assert chunks < set(tree(tmp_path / "out.zarr"))


def test_a_missing_chunk_is_its_fill_value(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.zarr", VALUES[0, 0], fill_value=77)
    (path / "1.1").unlink()
    pixels = window_of(path, slice(0, 70), slice(0, 90))
    assert (pixels[32:64, 32:64] == 77).all()
    np.testing.assert_array_equal(pixels[:32, :, 0], VALUES[0, 0, :32])
    rewrite(path, tmp_path / "out.zarr", size=(64, 64))
    assert tree(tmp_path / "out.zarr") == tree(path)


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2},
        {"zarr_format": 2, "compressors": None},
        {"zarr_format": 3},
        {"zarr_format": 3, "compressors": None},
        {"zarr_format": 3, "compressors": BloscCodec()},
        {"zarr_format": 3, "compressors": GzipCodec()},
        {"zarr_format": 3, "shards": (64, 64)},
        {"zarr_format": 2, "compressors": "blosc"},
    ],
)
@pytest.mark.parametrize("left", [0, 1, 7, 20, -1])
def test_a_truncated_chunk_is_corrupt(tmp_path: Path, options: dict[str, Any], left: int) -> None:
    import numcodecs

    if options.get("compressors") == "blosc":
        options = {**options, "compressors": numcodecs.Blosc()}
    path = write_array(tmp_path / "a.zarr", VALUES[0, 0], **options)
    chunk = path / ("0.0" if options["zarr_format"] == 2 else "c/0/0")
    data = chunk.read_bytes()
    chunk.write_bytes(data[:left])
    with pytest.raises(CorruptImage, match="chunk is damaged or cut short"):
        window_of(path, slice(0, 40), slice(0, 40))
    if "shards" not in options:
        window_of(path, slice(40, 60), slice(40, 60))


def damaged(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    document = json.loads((path / name).read_text())
    document = change(document) or document
    (path / name).write_text(json.dumps(document))


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Path], Any]]] = {
    "empty folder": (NotAnImage, "holds none of", lambda p: (shutil.rmtree(p), p.mkdir())),
    "no json": (CorruptImage, "no JSON object", lambda p: (p / ".zattrs").write_bytes(b"{{")),
    "no array": (CorruptImage, "'0', which is not there", lambda p: (p / "0/.zarray").unlink()),
    "array no json": (CorruptImage, "no JSON", lambda p: (p / "0/.zarray").write_text("[1]")),
    "no shape": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, "0/.zarray", lambda d: d.pop("shape") and None)),
    "infinite shape": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(shape=[1, 1, float("inf"), 32]))),
    "open dtype": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(dtype="(1,2"))),
    "negative dtype": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(dtype="(-1,)u1"))),
    "surrogate dtype": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(dtype="\ud800"))),
    "surrogate path": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, ".zattrs", lambda d: d["multiscales"][0]["datasets"][0].update(path="\ud800"))),
    "number of filters": (CorruptImage, "metadata are damaged", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(filters=5))),
    "list beside the array": (CorruptImage, "no JSON object", lambda p: (
        p / "0/.zattrs").write_text("[1]")),
    "outside": (CorruptImage, "cannot be put below", lambda p: damaged(
        p, ".zattrs", lambda d: d["multiscales"][0]["datasets"][0].update(path="../b"))),
    "no datasets": (CorruptImage, "damaged", lambda p: damaged(
        p, ".zattrs", lambda d: d["multiscales"][0].update(datasets=[]))),
    "other axes": (CorruptImage, "do not go together", lambda p: damaged(
        p, ".zattrs", lambda d: d["multiscales"][0].update(axes=["y", "x"]))),
    "no y": (UnsupportedImage, "expected y and x", lambda p: damaged(
        p, ".zattrs", lambda d: d["multiscales"][0].update(axes=["c", "z", "lat", "x"]))),
    "zero chunk": (CorruptImage, "do not go together", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(chunks=[1, 1, 0, 32]))),
    "no pixels": (UnsupportedImage, "some pixels", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(shape=[1, 0, 70, 90]))),
    "bomb": (ImageTooLarge, "the header tells", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(shape=[1, 1, 10**8, 10**8]))),
    "large chunks": (ImageTooLarge, "MiB each", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(chunks=[1, 1, 10**5, 10**5]))),
    "objects": (UnsupportedImage, "not denoised", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(dtype="|O", filters=[{"id": "pickle"}]))),
    "pickles": (UnsupportedImage, "pickle is for objects", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(filters=[{"id": "pickle"}]))),
    "structured": (UnsupportedImage, "not denoised", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(dtype=[["a", "<u2"]]))),
    "bool": (UnsupportedImage, "1-bit", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(dtype="|b1"))),
    "codec": (UnsupportedImage, "does not open", lambda p: damaged(
        p, "0/.zarray", lambda d: d.update(compressor={"id": "unheard"}))),
    "plate": (UnsupportedImage, "plate, which holds several", lambda p: damaged(
        p, ".zattrs", lambda d: {"plate": {}})),
    "well": (UnsupportedImage, "well", lambda p: damaged(p, ".zattrs", lambda d: {"well": {}})),
    "bioformats2raw": (UnsupportedImage, "bioformats2raw", lambda p: damaged(
        p, ".zattrs", lambda d: {"bioformats2raw.layout": 3})),
    "label": (UnsupportedImage, "label image", lambda p: damaged(
        p, ".zattrs", lambda d: d.update({"image-label": {}}))),
    "two images": (UnsupportedImage, "2 multiscale images", lambda p: damaged(
        p, ".zattrs", lambda d: d["multiscales"].append({}))),
    "plain group": (UnsupportedImage, "no OME-Zarr image", lambda p: (p / ".zattrs").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence(tmp_path: Path, case: str) -> None:
    kind, words, spoil = REFUSED[case]
    path = write_ome(tmp_path / "a.zarr")
    spoil(path)
    with pytest.raises(kind, match=words) as caught:
        decode(fetch(LOCAL, str(path)), name="a.zarr")
    text = str(caught.value)
    assert text.startswith("a.zarr: ")
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("key", ["attributes", "consolidated_metadata"])
@pytest.mark.parametrize("file", ["zarr.json", "0/zarr.json"])
def test_lists_for_objects_are_refused(tmp_path: Path, file: str, key: str) -> None:
    path = write_ome(tmp_path / "a.zarr", zarr_format=3)
    damaged(path, file, lambda d: d.update({key: [1]}))
    with pytest.raises(CorruptImage, match="metadata are damaged"):
        decode(fetch(LOCAL, str(path)), name="a.zarr")


def test_codec_that_reads_but_does_not_write(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "a.zarr")
    damaged(path, "0/.zarray", lambda d: d["compressor"].update(level=None))
    with pytest.raises(UnsupportedImage, match="cannot write it"):
        rewrite(path, tmp_path / "b.zarr", size=(64, 64))


def test_other_refusals(tmp_path: Path) -> None:
    file = tmp_path / "file.zarr"
    file.write_bytes(b"x")
    with pytest.raises(NotAnImage, match="holds none of"):
        decode(fetch(LOCAL, str(file)), name="x")
    four = write_array(tmp_path / "four.zarr", VALUES)
    with pytest.raises(UnsupportedImage, match="axes have no names"):
        decode(fetch(LOCAL, str(four)), name="x")
    values = picture(70, 90, 1)[..., 0]
    values[3, 4] = np.nan
    path = write_array(tmp_path / "nan.zarr", values)
    with pytest.raises(NonFiniteValues, match="1 of 6300"):
        window_of(path, slice(0, 70), slice(0, 90))
    for name in ("int64", "complex64", "string"):
        path = write_array(tmp_path / f"{name}.zarr", VALUES[0, 0], zarr_format=3)
        damaged(path, "zarr.json", lambda d, name=name: d.update(data_type=name))
        with pytest.raises(UnsupportedImage, match="not denoised"):
            decode(fetch(LOCAL, str(path)), name="x")


def test_a_small_one_becomes_another_format(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "a.zarr", VALUES[:1, 0], axes="cyx")
    image = decode(fetch(LOCAL, str(path)), name="x")
    for target in ("png", "npy", "tiff"):
        data, lost = encode(image.pixels, None, image.metadata, format=target)
        np.testing.assert_array_equal(decode(data, name="x").pixels, flat(VALUES[:1, 0]))
        assert lost == ("zarr:levels", "zarr:axes CYX", "zarr:attributes")


# --- the job ------------------------------------------------------------------------------------


def stack(height: int = 1100, width: int = 900, *, sigma: float = 20.0) -> np.ndarray:
    """Three planes of noise over a picture, uint16 (3, H, W)."""
    return np.moveaxis(as_dtype(picture(height, width, 3, seed=2, sigma=sigma), "uint16"), -1, 0)


def write_folder(root: Path) -> Path:
    """A PNG, an OME-Zarr that takes six regions, a TIFF of its pixels, a small array, a quiet one
    and a broken one."""
    (root / "sub").mkdir(parents=True)
    write_ome(root / "sub/big.ome.zarr", stack(), axes="cyx", chunks=(1, 200, 256))
    planes = np.moveaxis(stack(), 0, -1)
    tifffile.imwrite(root / "big.tif", planes, tile=(256, 256), photometric="rgb")
    small = as_dtype(picture(61, 83, 3, seed=9), "uint8")
    write_array(root / "small.zarr", small, zarr_format=3, chunks=(32, 32, 3), shards=(64, 64, 3))
    write_ome(root / "quiet.zarr", stack(61, 83, sigma=0.0), axes="cyx", zarr_format=3)
    (root / "small.png").write_bytes(bytes(imagecodecs.png_encode(small)))
    (write_array(root / "bad.zarr", small, chunks=(32, 32, 3)) / "1.1.0").write_bytes(b"")
    return root


SETTINGS: dict[str, Any] = {"region": 512, "copy_below": "1.5", "max_error_rate": 0.5}


@pytest.fixture(scope="module")
def job(ray_session: None, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with one actor; the folder with `in`, `clean` and `out`."""
    root = tmp_path_factory.mktemp("zarr-job")
    write_folder(root / "in")
    clean = stack(sigma=0.0)
    write_ome(root / "clean/sub/big.ome.zarr", clean, axes="cyx", zarr_format=3)
    more = {"reference": str(root / "clean")}
    outcome = denoise(root / "in", root / "out", checkpoint, **SETTINGS, **more)
    assert (outcome.totals.ok, outcome.totals.copied, outcome.totals.failed) == (4, 1, 1)
    return root


@pytest.mark.ray
def test_the_job_writes_zarrs_like_their_sources(job: Path) -> None:
    rows, images = by_name(job / "out"), job / "out/images"
    assert rows["bad.zarr"]["error_type"] == "CorruptImage"
    assert "chunk is damaged" in rows["bad.zarr"]["error_message"]
    row = rows["big.ome.zarr"]
    assert (row["status"], row["regions"], row["channels"]) == ("ok", 6, 3)
    assert (row["height"], row["width"], row["metadata_lost"]) == (1100, 900, ["zarr:levels"])
    assert row["output_uri"] == str(images / "sub/big.ome.zarr")
    assert row["psnr_noisy"] == pytest.approx(22.1, abs=0.5)
    assert row["psnr"] != row["psnr_noisy"]
    assert rows["small.zarr"]["regions"] == 1
    names = {name.partition(".zarr/")[0] for name in files_below(images)}
    assert names == {"sub/big.ome", "big.tif", "small", "quiet", "small.png"}
    assert files_below(job / "out/.denoise/regions") == []
    assert tree(images / "quiet.zarr") == tree(job / "in/quiet.zarr")
    # Other formats of the same pixels come out the same.
    group = zarr.open_group(images / "sub/big.ome.zarr", mode="r")
    made = np.moveaxis(group["0"][...], 0, -1)
    np.testing.assert_array_equal(made, tifffile.imread(images / "big.tif"))
    assert not np.array_equal(made, np.moveaxis(stack(), 0, -1))
    png = decode((images / "small.png").read_bytes(), name="x").pixels
    np.testing.assert_array_equal(zarr.open_array(images / "small.zarr", mode="r")[...], png)
    before = zarr.open_group(job / "in/sub/big.ome.zarr", mode="r")
    assert group["0"].metadata == before["0"].metadata
    assert group.attrs["omero"] == before.attrs["omero"]
    assert len(group.attrs["multiscales"][0]["datasets"]) == 1


@pytest.mark.ray
def test_the_report_shows_a_crop(job: Path) -> None:
    example = read_example(by_name(job / "out")["big.ome.zarr"], None, out=str(job / "out"))
    assert example.before.startswith("data:image/"), example.note
    assert example.crop.startswith("384 × 384")
    assert "big.ome.zarr" in (job / "out/report.html").read_text()


@pytest.mark.ray
def test_bucket_to_bucket_with_two_actors_makes_the_same_bytes(
    job: Path, s3_server: S3Server, checkpoint: str
) -> None:
    bucket = s3_server.make_bucket()
    storage = storage_for(bucket)
    for entry in LOCAL.tree(str(job / "in/sub/big.ome.zarr")):
        for name in ("a.zarr", "b/B.Zarr"):
            storage.write(join(bucket, "in", name, entry.path), LOCAL.read(entry.uri))
    source, out = join(bucket, "in"), join(bucket, "out")
    outcome = denoise(source, out, checkpoint, **SETTINGS, actors="2")
    assert outcome.totals.ok == 2
    local = s3_server.root / bucket.removeprefix("s3://") / "out"
    for name in ("a.zarr", "b/B.Zarr"):
        assert tree(local / "images" / name) == tree(job / "out/images/sub/big.ome.zarr")
    again = denoise(source, out, checkpoint, **SETTINGS)
    assert (again.totals.to_do, again.totals.skipped) == (0, 2)


@pytest.mark.ray
def test_sigkill_of_everything_and_resume(job: Path, stand_in: str, tmp_path: Path) -> None:
    """What is staged is used and not made again: one region is marked to find it in the result."""
    from test_denoise_faults import kill_everything, start_hooked, wait_until

    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(job / "in/sub/big.ome.zarr", source / "slow-big.ome.zarr")
    flags = ["--model", stand_in, "--precision", "float32", "--actors", "1", "--region", "512"]
    process = start_hooked(source, "--output", out, *flags)
    wait_until(lambda: any(out.glob(".denoise/regions/*/*.json")), process)
    kill_everything(process)
    assert not (out / "images").exists()
    staged = sorted(out.glob(".denoise/regions/*/*.json"))
    assert staged
    index = int(staged[0].stem)
    marked = np.load(staged[0].with_suffix(".npy"))
    np.save(staged[0].with_suffix(".npy"), 65535 - marked)
    with worker_hook.hurry():
        outcome = denoise(source, out, stand_in, region=512)
    assert outcome.totals.ok == 1
    assert by_name(out)["slow-big.ome.zarr"]["regions"] == 6
    assert files_below(out / ".denoise/regions") == []
    made = flat(zarr.open_array(out / "images/slow-big.ome.zarr/0", mode="r")[...])
    big = zarr.open_array(source / "slow-big.ome.zarr/0", mode="r")
    expected = worker_hook.stand_in(flat(big[...]))
    y, x = divmod(index, 2)
    here = np.s_[y * 512 : y * 512 + marked.shape[0], x * 512 : x * 512 + marked.shape[1]]
    expected[here] = 65535 - expected[here]
    np.testing.assert_array_equal(made, expected)


@pytest.mark.ray
def test_an_unchanged_rerun_does_nothing_and_a_change_one_image(job: Path, checkpoint: str) -> None:
    again = denoise(job / "in", job / "out", checkpoint, **SETTINGS, dry_run=True)
    assert (again.totals.to_do, again.totals.skipped) == (0, 6)
    for path in (job / "in/small.zarr/zarr.json", job / "in/sub/big.ome.zarr/0/0.0.0"):
        path.touch()
    shutil.rmtree(job / "out/images/quiet.zarr")
    listed = denoise(job / "in", job / "out", checkpoint, **SETTINGS, dry_run=True).listed
    assert {Path(uri).name for uri in listed} == {"small.zarr", "big.ome.zarr", "quiet.zarr"}


def job_of(out: Path, **settings: Any) -> Job:
    config = DenoiseConfig(inputs=("x",), output=str(out), region=256, **settings)
    geometry = Geometry(patch=64, halo=16, stride=2)
    return Job(config, "run", StorageOptions(), geometry, (), "hash")


def test_regions_become_a_tiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--format tiff --bit-depth 8`, from what the workers have staged."""
    path = write_ome(tmp_path / "a.zarr", stack(700, 300), axes="cyx")
    job = job_of(tmp_path / "out", format="tiff", bit_depth="8")
    facts = {
        "image_id": "id", "source_fingerprint": "print", "source_uri": str(path), "path": "a.zarr",
        "output_uri": str(tmp_path / "out/images/a.zarr.tiff"), "size": [700, 300],
        "region_size": 256, "regions": 6,
    }  # fmt: skip
    expected = (flat(stack(700, 300)) >> 8).astype("uint8")
    for index, region in enumerate(regions_of(job, {**facts, "in_regions": True})):
        y0, y1, x0, x1 = region.core
        data = io.BytesIO()
        np.save(data, expected[y0:y1, x0:x1])
        LOCAL.write(job.staging(facts, f"{index:06d}.npy"), data.getvalue())
        LOCAL.write(job.staging(facts, f"{index:06d}.json"), b"{}")
    assert index == 5
    for _ in range(2):  # a task that is done again finds the regions
        lost = publish_image(job, facts)
        assert lost == ("zarr:levels", "zarr:axes CYX", "zarr:attributes")
    with tifffile.TiffFile(tmp_path / "out/images/a.zarr.tiff") as file:
        assert file.is_bigtiff
        assert file.pages[0].is_tiled
        np.testing.assert_array_equal(file.asarray(), expected)

    def delete(storage: LocalStorage, uri: str) -> None:
        # A run may be killed before any of these: no marker may be there without its pixels.
        staged = [Path(name) for name in files_below(tmp_path / "out/.denoise")]
        pixels, markers = (
            {path.stem for path in staged if path.suffix == end} for end in (".npy", ".json")
        )
        assert markers <= pixels
        really(storage, uri)

    really = LocalStorage.delete
    monkeypatch.setattr(LocalStorage, "delete", delete)
    drop_regions(job, facts)
    assert files_below(tmp_path / "out") == ["images/a.zarr.tiff"]


def test_a_zarr_keeps_its_depth(tmp_path: Path) -> None:
    header = ImageHeader("zarr", 90, 90, 1, "uint16", windowed=True)
    for settings in ({}, {"bit_depth": "16"}, {"bit_depth": "8", "format": "tiff"}):
        Expand(job_of(tmp_path, **settings), None)._refuse_depth(header, name="x")
    with pytest.raises(UnsupportedImage, match="--bit-depth 8 does not change a Zarr of uint16"):
        Expand(job_of(tmp_path, bit_depth="8"), None)._refuse_depth(header, name="x")


def test_deep_stacks_have_smaller_regions(tmp_path: Path) -> None:
    config = DenoiseConfig(inputs=("x",), output="y", region=2048)
    stage = Expand(replace(job_of(tmp_path), config=config), None)
    sizes = [
        stage._region_size(ImageHeader("zarr", 9000, 9000, samples, "uint16", windowed=True))
        for samples in (1, 4, 5, 16, 64, 5000)
    ]
    assert sizes == [2048, 2048, 1024, 1024, 512, 256]


MEMORY_PROBE = """
    import io, sys, numpy as np
    from denoise_core.assemble import Region, zarr_files
    from denoise_core.benchmarks.child import peak_rss
    from denoise_core.images import open_image, read_header, read_metadata, read_window
    from denoise_core.images.zarr import METADATA_FILES
    from denoise_core.storage import LocalStorage
    side, region, source, target = 6144, 1024, *sys.argv[1:]
    def peak():
        return peak_rss() / 2**20
    storage = LocalStorage()
    with open_image(storage, source) as file:
        read_window(file, y=slice(0, 9), x=slice(0, 9), name="x")
        header, metadata = read_header(file, name="x"), read_metadata(file, name="x")
    load = lambda: np.full((region, region, 3), 9, "uint8")
    regions = [Region(y, x, region, region, load)
               for y in range(0, side, region) for x in range(0, side, region)]
    before = peak()
    storage.publish(target, zarr_files(regions, header=header, metadata=metadata),
                    last=METADATA_FILES)
    after = peak()
    with open_image(storage, target) as file:
        assert read_window(file, y=slice(500, 1500), x=slice(500, 1500), name="x")[0].min() == 9
    print(after - before, peak() - before)
"""


def test_memory_is_some_regions(tmp_path: Path) -> None:
    """113 MB of pixels pass through; one region is 3 MB."""
    source = tmp_path / "a.zarr"
    zarr.create_array(source, shape=(3, 6144, 6144), chunks=(1, 256, 256), dtype="uint8",
                      dimension_names=["c", "y", "x"])  # fmt: skip
    script = textwrap.dedent(MEMORY_PROBE)
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out/a.zarr")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    writing, reading = map(float, done.stdout.split())
    assert writing < 40
    assert reading < 60
