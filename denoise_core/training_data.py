"""Training data: images -> noisy and clean crops.

A batch is a function of (seed, step, place in the batch) alone. So a resumed run continues where it
was, and the global batch is the same however many workers share it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from denoise_core.errors import DenoiseError, UsageError
from denoise_core.images import decode, read_header, rescale
from denoise_core.noise import Gaussian

Array = np.ndarray

# Sharp small photographs matter most off-domain: large images also enter at these scales.
SCALES = (1.0, 0.5)
LARGE_SIDE = 1000


def find_images(folders: Sequence[str]) -> list[Path]:
    """Return the image files below `folders`, sorted. Raises UsageError where there are none."""
    suffixes = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"}
    paths = [
        path
        for folder in folders
        for path in ([Path(folder)] if Path(folder).is_file() else sorted(Path(folder).rglob("*")))
        if path.suffix.lower() in suffixes and path.is_file()
    ]
    if not paths:
        raise UsageError(
            f"No images found in {', '.join(folders)}: expected files with one of the endings "
            f"{', '.join(sorted(suffixes))}."
        )
    return paths


def check_images(paths: Sequence[Path], *, crop: int) -> None:
    """Raise UsageError where a crop of `crop` pixels does not fit into an image, by its header."""
    for path in paths:
        try:
            with path.open("rb") as file:
                header = read_header(file, name=path.name)
        except (OSError, DenoiseError) as error:
            raise UsageError(f"{path}: {error}") from error
        if min(header.height, header.width) < crop:
            raise UsageError(
                f"{path}: crops of {crop} px do not fit into {header.width}x{header.height} px. "
                "Leave the image out or choose a preset with smaller crops."
            )


def load_clean(path: Path) -> list[Array]:
    """Read one image as 8-bit RGB arrays (H, W, 3), a large one at several scales.

    Raises UsageError for a file that cannot be trained on.
    """
    try:
        image = decode(path.read_bytes(), name=path.name).pixels
    except (OSError, DenoiseError) as error:
        raise UsageError(f"{path}: {error}") from error
    if image.dtype not in (np.uint8, np.uint16) or image.shape[2] not in (1, 3):
        raise UsageError(
            f"{path}: training takes 8- or 16-bit images of 1 or 3 channels, "
            f"got {image.dtype} with {image.shape[2]}."
        )
    if image.dtype == np.uint16:
        image = rescale(image, np.uint8, source=(0.0, 65535.0))
    image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    if min(image.shape[:2]) < LARGE_SIDE:
        return [image]
    return [_reduce(image, scale) for scale in SCALES]


def _reduce(image: Array, scale: float) -> Array:
    if scale == 1.0:
        return image
    from PIL import Image

    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


@dataclass(frozen=True, slots=True)
class CleanImages:
    """Clean images in memory, split into training and validation parts."""

    training: list[Array]
    validation: list[Array]

    @staticmethod
    def load(paths: Sequence[Path], *, validation: float, seed: int) -> CleanImages:
        """Read images and hold out a seeded share of the files, at least one, for validation.

        Raises UsageError for files that cannot be trained on and where there are too few.
        """
        order = np.random.default_rng(seed).permutation(len(paths))
        held = {int(i) for i in order[: max(1, round(len(paths) * validation))]}
        if len(held) == len(paths):
            raise UsageError(
                f"{len(paths)} image(s) cannot be split into training and validation: give more."
            )
        parts: tuple[list[Array], list[Array]] = ([], [])
        for index, path in enumerate(paths):
            parts[index in held].extend(load_clean(path))
        return CleanImages(*parts)

    def check_crop(self, crop: int) -> None:
        """Raise UsageError where `crop` pixels do not fit into an image, held out or not."""
        smallest = min(min(image.shape[:2]) for image in [*self.training, *self.validation])
        if crop > smallest:
            raise UsageError(
                f"Crops of {crop} px do not fit: the smallest image has a side of {smallest} px. "
                "Leave it out or choose a preset with smaller crops."
            )


@dataclass(frozen=True, slots=True)
class CropSampler:
    """Draws noisy and clean crops from images in memory."""

    images: list[Array]
    noise: Gaussian
    grey: float
    seed: int
    shares: Array = field(init=False)

    def __post_init__(self) -> None:
        # Square roots: a 2K photo weighs more than a small one, but not forty times more.
        sides = np.sqrt([image.shape[0] * image.shape[1] for image in self.images])
        object.__setattr__(self, "shares", np.cumsum(sides[:-1]) / sides.sum())

    def sample(self, *, step: int, place: int, crop: int) -> tuple[Array, Array]:
        """Return (noisy, clean), float32 (crop, crop, 3); clean is in [0, 1].

        Images are drawn in proportion to the square root of their pixels; crops are flipped and
        turned by quarters.
        """
        rng = np.random.default_rng((self.seed, step, place))
        image = self.images[np.searchsorted(self.shares, rng.random())]
        top = rng.integers(image.shape[0] - crop + 1)
        left = rng.integers(image.shape[1] - crop + 1)
        cut = np.rot90(image[top : top + crop, left : left + crop], k=int(rng.integers(4)))
        cut = cut[:, ::-1] if rng.integers(2) else cut
        clean = cut.astype(np.float32) / np.float32(255.0)
        if rng.random() < self.grey:
            # ITU-R BT.601 luma, as in the grey version of BSD68; one noise for all channels.
            luma = clean @ np.array([[0.299], [0.587], [0.114]], np.float32)
            noisy = self.noise.apply(luma, rng)
            return np.repeat(noisy, 3, axis=2), np.repeat(luma, 3, axis=2)
        return self.noise.apply(np.ascontiguousarray(clean), rng), clean

    def batch(self, *, step: int, crop: int, places: range) -> tuple[Array, Array]:
        """Return the samples `places` of the global batch of `step`, stacked."""
        pairs = [self.sample(step=step, place=place, crop=crop) for place in places]
        noisy, clean = zip(*pairs, strict=True)
        return np.stack(noisy), np.stack(clean)


def prefetch(
    batches: Iterator[tuple[Array, Array]], *, depth: int = 4
) -> Generator[tuple[Array, Array]]:
    """Run an iterator in a thread, `depth` items ahead."""
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

    threading.Thread(target=fill, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while not ready.empty():
            ready.get_nowait()
