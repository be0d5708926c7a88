"""Training data: images, IDX files and pairs -> noisy and clean crops.

    data = TrainingData.index(config, recipe)            # names and sizes, split; no pixels yet
    sampler = Sampler.make(data.training, config, recipe)
    noisy, clean = sampler.batch(step=0, crop=64, places=range(8))

A batch is a function of (seed, step, place in the batch) alone. So a resumed run continues where it
was, and the global batch is the same however many workers share it. Images are read when they are
first drawn and kept while memory lasts; a collection that is too large for that is drawn from a
window that moves through its shuffled list and fits into that memory, so that every image is read
about once in a pass.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from denoise_core.config import TrainConfig, nearest
from denoise_core.errors import DenoiseError, ObjectNotFound, UsageError
from denoise_core.idx import is_idx, read_idx
from denoise_core.images import data_range, decode, picture_of, read_header
from denoise_core.images.codecs import SUFFIXES
from denoise_core.noise import Noise, parse_noise
from denoise_core.pairs import find_pairs, no_images, spread
from denoise_core.presets import Preset
from denoise_core.self_supervised import blind_spots, draw_neighbours, pick
from denoise_core.storage import Entry, StorageOptions, expand, is_bundle, storage_for

Array = np.ndarray
# (low, high) of a noisy image (True) and of a partner in other units (False).
Ranges = dict[bool, tuple[float, float]]

IMAGE_SUFFIXES = tuple(suffix for group in SUFFIXES.values() for suffix in group)
# Sharp small photographs matter most off-domain: large images also enter at these scales.
SCALES = (1.0, 0.5)
LARGE_SIDE = 1000
# Up to so many files are opened before the start, for their sizes; of more, so many are looked at.
MOST_HEADERS, SOME_HEADERS = 20_000, 200
CACHE_BYTES = 2 << 30
# Of a collection larger than the cache: most images in the moving window, and crops of each.
WINDOW_IMAGES = 256
CROPS_OF_EACH = 64
# The window's share of the cache, which also holds what has just left it, and windows of larger
# images than most. Simulated: 1.02 reads of each photograph for 64 crops where a cache holds 28 of
# them at two scales; 4.6 for a window as large as the cache.
WINDOW_SHARE = 2 / 3
# Held-out crops stay in memory: 300 MB of colour at the most, noisy and clean.
VALIDATION_IMAGES, VALIDATION_PIXELS = 1000, 13_000_000
HEADERS_AT_ONCE = 16
AUGMENTATIONS = ("none", "flip", "rotate90", "scale", "affine")
# ITU-R BT.601 luma, as in the grey version of BSD68.
LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)


@dataclass(frozen=True, slots=True)
class Picture:
    """One image to draw from, not yet read. `clean_uri` is a noisy image's partner.

    `member` is the place in an IDX file; `scale` reduces the image. Sides are those of the file in
    pixels, 0 where it was not opened. `path` is the one below DATA. `plane_bytes` is what one
    channel takes decoded, at scale 1 and with that of a partner; of a file that was not opened
    about so much, 0 where nothing is known.
    """

    uri: str
    height: int = 0
    width: int = 0
    channels: int = 0
    member: int | None = None
    scale: float = 1.0
    clean_uri: str | None = None
    path: str = ""
    plane_bytes: int = 0

    @property
    def name(self) -> str:
        """The URI, with the place in an IDX file."""
        return self.uri if self.member is None else f"{self.uri}#{self.member}"

    @property
    def names(self) -> set[str]:
        """What must not be both trained on and held out: the name, and that of a partner."""
        return {self.name, self.clean_uri or self.name}

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) as they are drawn from."""
        return round(self.height * self.scale), round(self.width * self.scale)


# --- the index ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Pictures to train on and pictures held out; `files` counts the images behind the first."""

    training: list[Picture]
    validation: list[Picture]

    @staticmethod
    def index(config: TrainConfig, preset: Preset) -> TrainingData:
        """List, open headers, check against the preset, hold out a seeded share of the files.

        Images of --validation-data are not trained on, wherever they lie. Raises UsageError for no
        images, pairs without partner, unreadable files, and images that do not fit the preset.
        """
        pictures = find_pictures(config.data, config)
        if config.validation_data:
            held = find_pictures(config.validation_data, config)
            pictures = _without(pictures, held)
        else:
            pictures, held = _split(pictures, config.validation, seed=config.seed)
        wanted = Wanted.by(config, preset)
        data = TrainingData(_scaled(pictures, wanted.side), held)
        every = [*data.training, *data.validation]
        closed = [picture for picture in every if not picture.height]
        some = closed[:: len(closed) // SOME_HEADERS + 1]
        opened = _opened(some, StorageOptions(s3_endpoint=config.s3_endpoint))
        for picture in (*every, *opened):
            if picture.height:
                wanted.check(picture.name, *picture.sides, picture.channels)
        return replace(data, training=_with_mean_bytes(data.training, opened))

    @property
    def files(self) -> int:
        """Images to train on, not counting those that enter at several scales twice."""
        return sum(picture.scale == 1.0 for picture in self.training)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an image must be: of 1 or 3 channels and no side below `side` px, or just `sample`."""

    preset: str
    channels: int
    sample: tuple[int, int] | None
    side: int

    @classmethod
    def by(cls, config: TrainConfig, preset: Preset) -> Wanted:
        """Return what a training wants; the side is that of the largest window it cuts."""
        crop = max(stage.crop for stage in stages_of(config, preset))
        side = 2 * crop if config.mode == "neighbor2neighbor" else crop
        return cls(config.preset, preset.channels, preset.sample, side)

    def check(self, name: str, height: int, width: int, channels: int) -> None:
        """Raise UsageError for an image that does not fit."""
        _check_channels(channels, name)
        if self.sample is not None and (height, width) != self.sample:
            want = "x".join(map(str, reversed(self.sample)))
            raise UsageError(
                f"{name}: --preset {self.preset} is for images of {want} px with "
                f"{self.channels} channel(s), such as MNIST; got {width}x{height} px with "
                f"{channels}. For photographs choose unet-s or photo-conv."
            )
        if min(height, width) < self.side:
            raise UsageError(
                f"{name}: crops of {self.side} px do not fit into {width}x{height} px. "
                "Leave the image out, give a smaller --crop, or choose a preset with smaller crops."
            )


def find_pictures(data: Sequence[str], config: TrainConfig) -> list[Picture]:
    """Return the pictures of folders, files, globs and prefixes, sorted by path and opened.

    Each comes once, and none of those below the output, unless DATA lies there itself. Raises
    UsageError where there are none, or one cannot be trained on.
    """
    options = StorageOptions(s3_endpoint=config.s3_endpoint)
    listed: dict[str, Entry] = {}
    for entry in _listed(data, config, options):
        listed.setdefault(entry.uri, entry)
    entries = sorted(listed.values(), key=lambda entry: (entry.path, entry.uri))
    if config.noisy is not None and entries:
        noisy, clean = find_pairs(entries, noisy=config.noisy, clean=config.clean or "")
        pictures = [
            Picture(noisy[key].uri, clean_uri=clean[key].uri, path=noisy[key].path)
            for key in sorted(noisy)
        ]
    else:
        pictures = [p for entry in entries for p in _pictures(entry, options)]
    if not pictures:
        raise no_images(data, options, suffixes=IMAGE_SUFFIXES)
    # Those of IDX files are known already.
    closed = [picture for picture in pictures if not picture.height]
    if len(closed) > MOST_HEADERS:
        return pictures
    opened = iter(_opened(closed, options))
    return [picture if picture.height else next(opened) for picture in pictures]


def _listed(data: Sequence[str], config: TrainConfig, options: StorageOptions) -> Iterator[Entry]:
    output = f"{config.output.rstrip('/')}/"
    try:
        for text in data:
            if f"{text.rstrip('/')}/" == output:
                raise UsageError(
                    f"--output {config.output} is where images are taken from, and the run's own "
                    "pictures would be among them: name another folder."
                )
            # What a run leaves, its samples and curves, is no photograph.
            own = "" if text.startswith(output) else output
            for found in expand([text], options):
                if not isinstance(found, Entry):
                    raise found[1]
                if own and found.uri.startswith(own):
                    continue
                if found.uri in data and is_bundle(found.uri):
                    raise no_images([found.uri], options, suffixes=IMAGE_SUFFIXES)
                if found.uri in data or _is_wanted(found.path.rpartition("/")[2].lower()):
                    yield found
    except ObjectNotFound as error:
        raise UsageError(f"No images found in {', '.join(data)}: {error}") from error


def _is_wanted(name: str) -> bool:
    """Whether a file of a folder is to train on: MNIST's labels and its test set are not."""
    if is_idx(name):
        return "labels" not in name and not name.startswith("t10k")
    return name.endswith(IMAGE_SUFFIXES)


def _pictures(entry: Entry, options: StorageOptions) -> list[Picture]:
    if not is_idx(entry.path):
        return [Picture(entry.uri, path=entry.path)]
    array = _idx_array(entry.uri, options)
    count, height, width = array.shape[:3]
    channels = array.shape[3] if array.ndim == 4 else 1
    known = Picture(
        entry.uri,
        height,
        width,
        channels,
        path=entry.path,
        plane_bytes=height * width * array.dtype.itemsize,
    )
    return [replace(known, member=i) for i in range(count)]


def _opened(pictures: Sequence[Picture], options: StorageOptions) -> list[Picture]:
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        return list(pool.map(lambda picture: _with_sides(picture, options), pictures))


def _with_sides(picture: Picture, options: StorageOptions) -> Picture:
    try:
        with storage_for(picture.uri, options).open(picture.uri) as file:
            header = read_header(file, name=picture.uri)
    except DenoiseError as error:
        raise UsageError(str(error)) from error
    # A partner's header is not opened for this: its depth is taken to be that of the noisy image.
    each = np.dtype(header.dtype).itemsize * (1 if picture.clean_uri is None else 2)
    return replace(
        picture,
        height=header.height,
        width=header.width,
        channels=header.channels,
        plane_bytes=header.height * header.width * each,
    )


def _with_mean_bytes(pictures: list[Picture], opened: Sequence[Picture]) -> list[Picture]:
    """Give the pictures that were not opened the mean size of those that were."""
    if not opened:
        return pictures
    mean = round(np.mean([picture.plane_bytes for picture in opened]))
    return [p if p.height else replace(p, plane_bytes=mean) for p in pictures]


def _split(
    pictures: list[Picture], share: float, *, seed: int
) -> tuple[list[Picture], list[Picture]]:
    # By hashes, not by places: where a file came or went, a resumed run holds out the same others.
    order = sorted(range(len(pictures)), key=lambda index: _draw(pictures[index], seed))
    held = set(order[: max(1, round(len(pictures) * share))])
    if len(held) == len(pictures):
        raise UsageError(
            f"{len(pictures)} image(s) cannot be split into training and validation: give more, or "
            "--validation-data."
        )
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    for index, picture in enumerate(pictures):
        parts[index in held].append(picture)
    return parts


def _draw(picture: Picture, seed: int) -> bytes:
    """Return a random value of a picture's own: of its path, so that DATA may be moved."""
    text = f"{seed}\0{picture.path}\0{picture.member}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _without(pictures: list[Picture], held: list[Picture]) -> list[Picture]:
    names = {name for picture in held for name in picture.names}
    left = [picture for picture in pictures if names.isdisjoint(picture.names)]
    if not left:
        raise UsageError("--validation-data holds all images of DATA: none is left to train on.")
    return left


def _check_channels(channels: int, name: str) -> None:
    if channels not in (1, 3):
        raise UsageError(
            f"{name}: training takes images of 1 or 3 channels, got {channels}. Leave it out."
        )


def _scaled(pictures: list[Picture], side: int) -> list[Picture]:
    """Let large images enter at the scales that hold crops of `side` px; pairs stay as they are."""
    found = []
    for picture in pictures:
        scaled = [replace(picture, scale=s) for s in (SCALES if _is_large(picture) else (1.0,))]
        found += [each for each in scaled if each.scale == 1.0 or min(each.sides) >= side]
    return found


def _is_large(picture: Picture) -> bool:
    return min(picture.height, picture.width) >= LARGE_SIDE and picture.clean_uri is None


def stages_of(config: TrainConfig, preset: Preset) -> tuple[Any, ...]:
    """Return the preset's stages with --crop, --batch and --batch-scale applied."""
    return tuple(
        replace(
            stage,
            crop=config.crop or stage.crop,
            batch=(config.batch or stage.batch) * config.batch_scale,
        )
        for stage in preset.stages
    )


# --- pixels -------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _idx_array(uri: str, options: StorageOptions) -> Array:
    try:
        array: Array = read_idx(storage_for(uri, options).read(uri), name=uri)
    except DenoiseError as error:
        raise UsageError(str(error)) from error
    if array.ndim not in (3, 4):
        raise UsageError(f"{uri}: holds {array.ndim} dimension(s); expected images, three or four.")
    return array


class Library:
    """Reads pictures and keeps those last used, up to CACHE_BYTES; refuses what is not `wanted`."""

    def __init__(
        self,
        options: StorageOptions,
        *,
        channels: int,
        capacity: int = CACHE_BYTES,
        wanted: Wanted | None = None,
    ) -> None:
        self.options, self.channels, self.capacity = options, channels, capacity
        self.wanted = wanted or Wanted("", channels, None, 1)
        self.kept: OrderedDict[Picture, tuple[Array, Array | None]] = OrderedDict()
        # What `to_unit` knows of those that are kept.
        self.ranges: dict[Picture, Ranges] = {}
        self.bytes = 0

    def get(self, picture: Picture) -> tuple[Array, Array | None]:
        """Return the picture and its clean partner, both (H, W, channels) in their file's dtype.

        Raises UsageError for what cannot be trained on.
        """
        if picture in self.kept:
            self.kept.move_to_end(picture)
            return self.kept[picture]
        arrays = self.read(picture)
        self.kept[picture], self.ranges[picture] = arrays, {}
        self.bytes += _size(arrays)
        while self.bytes > self.capacity and len(self.kept) > 1:
            oldest, gone = self.kept.popitem(last=False)
            del self.ranges[oldest]
            self.bytes -= _size(gone)
        return arrays

    def read(self, picture: Picture) -> tuple[Array, Array | None]:
        """Return what `get` does, and keep nothing."""
        image = self._load(picture.uri, picture.member)
        if picture.scale != 1.0:
            image = _reduce(image, picture.scale)
        if picture.clean_uri is None:
            return image, None
        clean = self._load(picture.clean_uri, None)
        if clean.shape != image.shape:
            raise UsageError(
                f"{picture.uri} is {image.shape[1]}x{image.shape[0]} px and its clean partner "
                f"{picture.clean_uri} {clean.shape[1]}x{clean.shape[0]} px: expected equal sizes."
            )
        return image, clean

    def _load(self, uri: str, member: int | None) -> Array:
        if member is not None:
            array = _idx_array(uri, self.options)[member]
            return self._fit(array[..., None] if array.ndim == 2 else array, uri)
        try:
            data = storage_for(uri, self.options).read(uri)
            image = decode(data, name=uri, keep_nodata=True)
        except DenoiseError as error:
            raise UsageError(str(error)) from error
        return self._fit(_filling(picture_of(image)[0], image.header.bits), uri)

    def _fit(self, image: Array, uri: str) -> Array:
        """Return the image with the network's channels: grey repeated, colour turned to luma."""
        self.wanted.check(uri, *image.shape)
        if image.shape[2] == self.channels:
            return image
        if image.shape[2] == 1:
            return _spread(image, self.channels)
        luma: Array = image.astype(np.float32) @ LUMA
        return luma if image.dtype.kind == "f" else np.rint(luma).astype(image.dtype)


def _spread(image: Array, channels: int) -> Array:
    """Return a grey image (H, W, 1) with that many channels, a view, which `is_grey` can tell."""
    return np.broadcast_to(image, (*image.shape[:2], channels))


def is_grey(image: Array) -> bool:
    """Whether a `Library` made this image's channels of one."""
    return image.shape[2] > 1 and image.strides[2] == 0


def _filling(pixels: Array, bits: int) -> Array:
    """Move integers of fewer bits, such as 12 in 16, up to where their dtype's range is theirs."""
    unused = pixels.dtype.itemsize * 8 - bits
    return pixels << unused if pixels.dtype.kind == "u" and bits and unused else pixels


def _size(arrays: tuple[Array, Array | None]) -> int:
    return sum(array.nbytes for array in arrays if array is not None)


def _reduce(image: Array, scale: float) -> Array:
    """Reduce (H, W, C) by averaging over pixels, in the image's dtype."""
    from PIL import Image

    if is_grey(image):
        return _spread(_reduce(image[..., :1], scale), image.shape[2])
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    if image.dtype == np.uint8:
        flat = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
        return np.asarray(flat.resize((width, height), Image.Resampling.BOX)).reshape(
            height, width, -1
        )
    planes = [
        np.asarray(
            Image.fromarray(image[..., c].astype(np.float32)).resize(
                (width, height), Image.Resampling.BOX
            )
        )
        for c in range(image.shape[2])
    ]
    stacked = np.stack(planes, axis=2)
    return stacked if image.dtype.kind == "f" else np.rint(stacked).astype(image.dtype)


def to_unit(
    crop: Array, image: Array, partner: Array | None = None, *, known: Ranges | None = None
) -> Array:
    """Return a crop of `image` as float32, its data range scaled to [0, 1].

    A crop of its clean `partner` goes by the noisy image's range, as the model's output will;
    where their dtypes differ, so do their units, and each goes by its own. `known` keeps the ranges
    for the next crop: that of a float image takes a look at all of its pixels.
    """
    if crop.dtype == np.uint8:
        return crop.astype(np.float32) / np.float32(255.0)
    whole = image if partner is None or partner.dtype == image.dtype else partner
    known, own = {} if known is None else known, whole is image
    if own not in known:
        known[own] = data_range(whole)
    low, high = known[own]
    return (crop.astype(np.float32) - np.float32(low)) / np.float32(high - low)


# --- drawing ------------------------------------------------------------------------------------


def parse_augment(text: str) -> tuple[str, ...]:
    """Read words between commas, of AUGMENTATIONS. Raises UsageError."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in words:
        if word not in AUGMENTATIONS:
            raise UsageError(
                f"--augment {word!r}: expected some of {', '.join(AUGMENTATIONS)}."
                f"{nearest(word, AUGMENTATIONS)}"
            )
    return tuple(word for word in words if word != "none")


@dataclass(slots=True)
class Sampler:
    """Draws noisy and clean crops. What it draws for a step and a place never changes.

    `mode` 'clean' adds noise to clean images, 'pairs' cuts both partners alike; 'neighbor2neighbor'
    and 'noise2void' learn from noisy images alone. `order` is the preset's.
    """

    pictures: list[Picture]
    library: Library
    noise: Noise
    seed: int
    mode: str = "clean"
    order: str = "draws"
    grey: float = 0.0
    augment: tuple[str, ...] = ("flip", "rotate90")
    _shares: Array = field(init=False)
    _window: int = field(init=False)
    _order: tuple[int, Array] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Square roots: a 2K photo weighs more than a small one, but not forty times more.
        sides = np.sqrt([max(1, p.sides[0] * p.sides[1]) for p in self.pictures])
        self._shares = np.cumsum(sides[:-1]) / sides.sum()
        self._window = self._images_of_window()

    @property
    def keeps_all(self) -> bool:
        """Whether the library keeps all images; else they come from a moving window."""
        return not self._window

    def _images_of_window(self) -> int:
        """Return the images in the moving window, by the data alone; 0 where all can be kept."""
        planes = [p.plane_bytes * p.scale**2 for p in self.pictures]
        mean = float(np.mean(planes)) * self.library.channels
        if self.pictures[0].height and mean * len(planes) <= self.library.capacity:
            return 0
        most = min(WINDOW_IMAGES, len(self.pictures))
        fits = int(WINDOW_SHARE * self.library.capacity / mean) if mean else most
        return max(1, min(most, fits))

    @classmethod
    def make(cls, pictures: list[Picture], config: TrainConfig, preset: Preset) -> Sampler:
        """Return the sampler of a training."""
        options = StorageOptions(s3_endpoint=config.s3_endpoint)
        return cls(
            pictures,
            Library(options, channels=preset.channels, wanted=Wanted.by(config, preset)),
            parse_noise(config.noise or preset.noise),
            config.seed,
            mode=config.mode,
            order=preset.order,
            grey=(preset.grey if config.grey is None else config.grey)
            if preset.channels == 3
            else 0.0,
            augment=parse_augment(config.augment or preset.augment),
        )

    def batch(
        self, *, step: int, crop: int, places: range, size: int | None = None
    ) -> tuple[Array, Array]:
        """Return (noisy, clean), float32 (len(places), crop, crop, C): these `places` of a step.

        The global batch of `step` has `size` samples, by default just these. What the two hold
        without a clean image, `sample` says.
        """
        size = size or len(places)
        pairs = [self.sample(step=step, place=p, crop=crop, size=size) for p in places]
        noisy, clean = zip(*pairs, strict=True)
        return np.stack(noisy), np.stack(clean)

    def sample(self, *, step: int, place: int, crop: int, size: int = 1) -> tuple[Array, Array]:
        """Return (noisy, clean), float32 (crop, crop, C); clean is in [0, 1].

        In mode 'neighbor2neighbor' noisy has twice the sides, and draw_neighbours' places stand for
        the clean image; in mode 'noise2void' the pair is that of `blind_spots`.
        """
        rng = np.random.default_rng((self.seed, step, place))
        picture = self._picture(rng, number=step * size + place)
        image, partner = self.library.get(picture)
        window = 2 * crop if self.mode == "neighbor2neighbor" else crop
        cut, other = self._cut(rng, picture, (image, partner), side=window)
        if self.mode == "pairs":
            assert other is not None
            return cut, other
        if self.mode == "neighbor2neighbor":
            return cut, draw_neighbours(rng, crop, crop)
        if self.mode == "noise2void":
            return blind_spots(cut, rng)
        return self._with_noise(cut, rng, grey=is_grey(image))

    def _picture(self, rng: np.random.Generator, *, number: int) -> Picture:
        count = len(self.pictures)
        if self._window:
            at = number // CROPS_OF_EACH + int(rng.integers(self._window))
            return self.pictures[int(self._permutation(at // count)[at % count])]
        if self.order == "epochs":
            return self.pictures[int(self._permutation(number // count)[number % count])]
        return self.pictures[int(np.searchsorted(self._shares, rng.random()))]

    def _permutation(self, epoch: int) -> Array:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, 2**31, epoch))
            self._order = epoch, rng.permutation(len(self.pictures))
        return self._order[1]

    def _cut(
        self,
        rng: np.random.Generator,
        picture: Picture,
        images: tuple[Array, Array | None],
        *,
        side: int,
    ) -> tuple[Array, Array | None]:
        """Return one crop of the image and of its partner, augmented alike, in [0, 1]."""
        image = images[0]
        window = side
        if "scale" in self.augment:
            most = min(image.shape[:2])
            window = min(most, round(side / rng.uniform(0.6, 1.0)))
        top = int(rng.integers(image.shape[0] - window + 1))
        left = int(rng.integers(image.shape[1] - window + 1))
        turns = int(rng.integers(4)) if "rotate90" in self.augment else 0
        flip = bool(rng.integers(2)) if "flip" in self.augment else False
        warp = Affine.draw(rng) if "affine" in self.augment else None

        def one(pixels: Array) -> Array:
            cut = pixels[top : top + window, left : left + window]
            if window != side:
                cut = _reduce(np.ascontiguousarray(cut), side / window)
            cut = np.rot90(cut, k=turns)
            cut = cut[:, ::-1] if flip else cut
            known = self.library.ranges[picture]
            values = to_unit(np.ascontiguousarray(cut), image, pixels, known=known)
            return values if warp is None else warp.apply(values)

        return one(image), None if images[1] is None else one(images[1])

    def _with_noise(
        self, clean: Array, rng: np.random.Generator, *, grey: bool
    ) -> tuple[Array, Array]:
        if not grey and clean.shape[2] == 3 and rng.random() < self.grey:
            clean, grey = np.repeat(clean @ LUMA, 3, axis=2), True
        return noisy_of(clean, self.noise, rng, grey=grey), clean


def noisy_of(clean: Array, noise: Noise, rng: np.random.Generator, *, grey: bool) -> Array:
    """Return `clean` with noise; a grey image gets one for all channels, as it comes in use."""
    if not grey:
        return noise.apply(clean, rng)
    return np.repeat(noise.apply(clean[..., :1], rng), clean.shape[2], axis=2)


@dataclass(frozen=True, slots=True)
class Affine:
    """A small turn in degrees, a zoom and a shift in pixels, around the middle of an image."""

    degrees: float
    zoom: float
    shift: tuple[float, float]

    @staticmethod
    def draw(rng: np.random.Generator) -> Affine:
        """Draw a turn up to 10 degrees, a zoom of 0.9-1.1, a shift up to 2 px."""
        y, x = rng.uniform(-2, 2, 2)
        return Affine(float(rng.uniform(-10, 10)), float(rng.uniform(0.9, 1.1)), (y, x))

    def apply(self, image: Array) -> Array:
        """Return (H, W, C) float32 of the same shape; what comes from outside is 0."""
        from scipy.ndimage import affine_transform

        angle = np.deg2rad(self.degrees)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix /= self.zoom
        middle = (np.array(image.shape[:2]) - 1) / 2
        offset = middle - matrix @ (middle + np.array(self.shift))
        planes = [
            affine_transform(image[..., c], matrix, offset, order=1) for c in range(image.shape[2])
        ]
        return np.stack(planes, axis=2).astype(np.float32)


def measured(pictures: Sequence[Picture], *, side: int) -> list[Picture]:
    """Return the held-out images whose crops of at most `side` px are measured.

    All, or of more an even spread: at most VALIDATION_IMAGES with about VALIDATION_PIXELS.
    """
    # Of a file that was not opened: a whole crop.
    crops = [math.prod(min(side, length or side) for length in p.sides) for p in pictures]
    most = int(VALIDATION_PIXELS * len(crops) / sum(crops))
    return spread(pictures, max(1, min(VALIDATION_IMAGES, most)))


def validation_pairs(
    pictures: Sequence[Picture], sampler: Sampler, *, noise: Noise, side: int, stride: int
) -> list[tuple[Array, Array]]:
    """Return (noisy, clean) float32 centre crops (h, w, C) of each, always the same.

    Sides are at most `side` and multiples of `stride`. For the self-supervised modes the pairs are
    what these train on; there is nothing clean to compare with.
    """
    pairs: list[tuple[Array, Array]] = []
    for index, picture in enumerate(pictures):
        rng = np.random.default_rng((0, index))
        # Not kept: only the crop is looked at again.
        image, partner = sampler.library.read(picture)
        unit = 2 * stride if sampler.mode == "neighbor2neighbor" else stride
        height, width = (min(side, length) // unit * unit for length in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        place = slice(top, top + height), slice(left, left + width)
        values = to_unit(image[place], image)
        if sampler.mode == "pairs" and partner is not None:
            pairs.append((values, to_unit(partner[place], image, partner)))
        elif sampler.mode == "neighbor2neighbor":
            places = draw_neighbours(rng, height // 2, width // 2)
            pairs.append((pick(values, places[..., 0]), pick(values, places[..., 1])))
        elif sampler.mode == "noise2void":
            pairs.append(blind_spots(values, rng))
        else:
            pairs.append((noisy_of(values, noise, rng, grey=is_grey(image)), values))
    return pairs


def prefetch(
    batches: Iterator[tuple[Array, Array]], *, depth: int = 4
) -> Generator[tuple[Array, Array]]:
    """Run an iterator in a thread, `depth` items ahead; `close()` waits for the one under way."""
    ready: queue.Queue[tuple[Array, Array] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def fill() -> None:
        try:
            for batch in batches:
                ready.put(batch)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # Room for what it still has to put before it looks at `stop`.
        while not ready.empty():
            ready.get_nowait()
        thread.join()
