"""DATA to the images of a test set: files, IDX files, pairs. Lists names, reads images one by one.

    shots = find_shots(config, options)              # on the driver: names only
    picture = read_shot(shots[0], options)           # in a worker: pixels

A `Shot` is one image to evaluate. Images of an IDX file are named `t10k-images-idx3-ubyte.gz#17`.
"""

from __future__ import annotations

import gzip
import posixpath
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from denoise_core.config import EvaluateConfig
from denoise_core.errors import (
    ObjectNotFound,
    UnsupportedImage,
    UsageError,
)
from denoise_core.evaluation.protocol import Scale
from denoise_core.idx import is_idx, labels_name, read_idx
from denoise_core.images import MAX_PIXELS, data_range, decode, picture_of
from denoise_core.images.codecs import SUFFIXES
from denoise_core.images.types import check_finite
from denoise_core.pairs import find_pairs, no_images, refuse_unpaired, spread
from denoise_core.storage import Entry, StorageOptions, expand, is_bundle, storage_for

Array = npt.NDArray[Any]

IMAGE_SUFFIXES = tuple(suffix for group in SUFFIXES.values() for suffix in group)


@dataclass(frozen=True, slots=True)
class Shot:
    """One image of a test set; plain values, so that it travels as JSON.

    `uri` holds the clean image, `noisy_uri` its noisy partner where pairs are given. `index` is
    the place in an IDX file, `labels_uri` that file's labels. `slow`: also for the slow filters;
    `shown`: kept as an example; `coded`: its latent code is wanted.
    """

    name: str
    uri: str
    noisy_uri: str | None = None
    index: int | None = None
    labels_uri: str | None = None
    slow: bool = False
    shown: bool = False
    coded: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(slots=True)
class Picture:
    """A shot's pixels: `clean` (H, W, C) in the file's dtype, `noisy` float32 in [0, 1] or None."""

    clean: Array
    scale: Scale
    noisy: Array | None = None
    label: int | None = None

    @property
    def unit(self) -> Array:
        """The clean image as float64 in [0, 1]."""
        return self.scale.unit(self.clean)


def find_shots(
    config: EvaluateConfig,
    options: StorageOptions,
    *,
    shown: int = 4,
    coded: int = 1000,
) -> list[Shot]:
    """List the images of `config.data` by name, each once. Raises UsageError for none to use.

    `shown` and `coded` say how many, evenly spread, are marked as such.
    """
    listed: dict[str, Entry] = {}
    for entry in _listed(config, options):
        listed.setdefault(entry.uri, entry)
    entries = sorted(listed.values(), key=lambda entry: (entry.path, entry.uri))
    if config.paired and entries:
        shots = list(_paired(entries, config, options))
    else:
        shots = [shot for entry in entries for shot in _clean_shots(entry, options)]
    if not shots:
        raise no_images(config.data, options, suffixes=IMAGE_SUFFIXES)
    shots = spread(_with_own_names(shots), config.limit)
    slow = spread(range(len(shots)), config.limit_slow)
    # Examples are of those that every filter sees, so that all can stand side by side.
    chosen = (set(slow), set(spread(slow, shown)), set(spread(range(len(shots)), coded)))
    return [
        replace(shot, slow=i in chosen[0], shown=i in chosen[1], coded=i in chosen[2])
        for i, shot in enumerate(shots)
    ]


def _with_own_names(shots: list[Shot]) -> list[Shot]:
    """Call images of one relative path below several DATA by their URIs."""
    counts = Counter(shot.name for shot in shots)
    return [
        shot
        if counts[shot.name] == 1
        else replace(shot, name=shot.uri if shot.index is None else f"{shot.uri}#{shot.index}")
        for shot in shots
    ]


def _listed(config: EvaluateConfig, options: StorageOptions) -> Iterator[Entry]:
    try:
        for found in expand(config.data, options):
            if not isinstance(found, Entry):
                raise found[1]
            if found.uri in config.data and is_bundle(found.uri):
                raise no_images([found.uri], options, suffixes=IMAGE_SUFFIXES)
            own = found.uri.startswith(f"{config.output.rstrip('/')}/")
            if not own and _is_wanted(found, config):
                yield found
    except ObjectNotFound as error:
        raise UsageError(f"DATA {error}") from error


def _is_wanted(entry: Entry, config: EvaluateConfig) -> bool:
    """Whether it may be an image: by its name, or because DATA names it itself."""
    if is_idx(entry.path):
        return "labels" not in posixpath.basename(entry.path)
    return entry.path.lower().endswith(IMAGE_SUFFIXES) or entry.uri in config.data


def _clean_shots(entry: Entry, options: StorageOptions) -> Iterator[Shot]:
    if not is_idx(entry.path):
        yield Shot(entry.path, entry.uri)
        return
    labels = labels_name(entry.uri)
    if labels is not None and storage_for(labels, options).stat(labels) is None:
        labels = None
    for index in range(_idx_count(entry.uri, options)):
        yield Shot(f"{entry.path}#{index}", entry.uri, index=index, labels_uri=labels)


def _idx_count(uri: str, options: StorageOptions) -> int:
    """Return the number of images of an IDX file from its first eight bytes."""
    try:
        with storage_for(uri, options).open(uri) as file:
            head = _unzipped(file).read(8)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{uri}: cannot be read as an IDX file ({error}).") from error
    if len(head) < 8 or head[:2] != b"\0\0" or head[3] not in (3, 4):
        raise UsageError(
            f"{uri}: not an IDX file of images (it begins with {head[:4].hex(' ') or 'nothing'}); "
            "expected three or four dimensions."
        )
    return int(struct.unpack(">I", head[4:8])[0])


def _unzipped(file: BinaryIO) -> BinaryIO:
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file


# --- Pairs ------------------------------------------------------------------------------------


def _paired(
    entries: Iterable[Entry], config: EvaluateConfig, options: StorageOptions
) -> Iterator[Shot]:
    entries = list(entries)
    if config.reference is not None:
        noisy = _by_path(entries)
        try:
            found = storage_for(config.reference, options).list(config.reference)
            # A reference folder may hold more than is asked for.
            clean = {entry.path: entry for entry in found if entry.path in noisy}
        except ObjectNotFound as error:
            raise UsageError(f"--reference {error}") from error
        refuse_unpaired(noisy, clean)
    else:
        noisy, clean = find_pairs(entries, noisy=config.noisy or "", clean=config.clean or "")
    for key in sorted(noisy):
        yield Shot(noisy[key].path, clean[key].uri, noisy_uri=noisy[key].uri)


def _by_path(entries: list[Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in found:
            raise UsageError(
                f"--reference: {found[entry.path].uri} and {entry.uri} both belong to "
                f"{entry.path!r}; give the folders one by one."
            )
        found[entry.path] = entry
    return found


# --- Pixels -----------------------------------------------------------------------------------


def read_shot(shot: Shot, options: StorageOptions, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a shot. Raises ImageError or StorageError where it cannot be used."""
    if shot.index is not None:
        return _read_idx_shot(shot, shot.index, options)
    clean, scale = _decoded(shot.uri, options, max_pixels=max_pixels)
    picture = Picture(clean, scale)
    if shot.noisy_uri is not None:
        noisy, other = _decoded(shot.noisy_uri, options, max_pixels=max_pixels)
        if noisy.shape != clean.shape:
            raise UnsupportedImage(
                f"{shot.name}: the noisy image is {_size(noisy)}, the clean one {_size(clean)}; "
                "expected equal sizes and channels"
            )
        # In the same units, noise must not widen the range that floats are measured by.
        same = noisy.dtype == clean.dtype
        picture.noisy = (scale if same else other).unit(noisy).astype(np.float32)
    return picture


def _decoded(uri: str, options: StorageOptions, *, max_pixels: int) -> tuple[Array, Scale]:
    data = storage_for(uri, options).read(uri)
    name = posixpath.basename(uri)
    image = decode(data, name=name, max_pixels=max_pixels, keep_nodata=True)
    pixels, (low, high) = picture_of(image)
    return pixels, Scale(low, high, pixels.dtype.name)


def _size(pixels: Array) -> str:
    height, width, channels = pixels.shape
    return f"{width}x{height} with {channels} channel(s)"


def _read_idx_shot(shot: Shot, index: int, options: StorageOptions) -> Picture:
    images = _idx_array(shot.uri, options)
    pixels = np.ascontiguousarray(images[index])
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    check_finite(pixels, name=shot.name)
    low, high = data_range(pixels)
    picture = Picture(pixels, Scale(low, high, pixels.dtype.name))
    if shot.labels_uri is not None:
        labels = _idx_array(shot.labels_uri, options)
        # They only colour a plot: those that are not one for each image are left out.
        if labels.shape == images.shape[:1] and labels.dtype.kind in "iu":
            picture.label = int(labels[index])
    return picture


@lru_cache(maxsize=2)
def _idx_array(uri: str, options: StorageOptions) -> Array:
    """The whole file, read once in each worker: MNIST's largest takes 47 MB."""
    array: Array = read_idx(storage_for(uri, options).read(uri), name=uri)
    return array
