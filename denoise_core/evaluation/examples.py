"""The few crops that pictures are made of: what a worker keeps of an image, and where.

A worker cannot know which images will be the best and the worst of all, so each keeps the files of
the ten best and the ten worst that it has met; those of the whole set are among them.
"""

from __future__ import annotations

import bisect
import hashlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core.evaluation.protocol import Scale, to_bytes
from denoise_core.storage import Storage, join

Array = npt.NDArray[Any]

CROP = 256
"""Pixels a side that an example shows at most."""

ENDS = 10
"""Best and worst images that are kept of each model and noise."""

MASK_SIDE = 32  # pixels: errors are summed over blocks of it to find the worst place


@dataclass(frozen=True, slots=True)
class Example:
    """One crop: uint8 (h, w, 1 or 3) noisy, denoised and clean, and `error`, int16 levels (h, w).

    `at` is the crop's (y, x) in an image of `size` (height, width); PSNR in dB of whole images.
    """

    noisy: Array
    denoised: Array
    clean: Array
    error: Array
    at: tuple[int, int]
    size: tuple[int, int]
    psnr: float
    psnr_noisy: float
    ssim: float | None

    def to_bytes(self) -> bytes:
        """Return an .npz."""
        buffer = io.BytesIO()
        figures = [self.psnr, self.psnr_noisy, np.nan if self.ssim is None else self.ssim]
        np.savez(  # noise does not compress
            buffer,
            noisy=self.noisy,
            denoised=self.denoised,
            clean=self.clean,
            error=self.error,
            place=np.array([*self.at, *self.size]),
            figures=np.array(figures),
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Example:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            y, x, height, width = (int(value) for value in file["place"])
            psnr, psnr_noisy, ssim = (float(value) for value in file["figures"])
            return Example(
                noisy=file["noisy"],
                denoised=file["denoised"],
                clean=file["clean"],
                error=file["error"],
                at=(y, x),
                size=(height, width),
                psnr=psnr,
                psnr_noisy=psnr_noisy,
                ssim=None if np.isnan(ssim) else ssim,
            )


def cut_example(
    noisy: Array,
    output: Array,
    clean: Array,
    scale: Scale,
    *,
    at_worst: bool,
    psnr: float,
    psnr_noisy: float,
    ssim: float | None,
) -> Example:
    """Cut a crop of at most CROP pixels a side: where the error is largest, or the centre.

    `noisy` is float32 in [0, 1], `output` and `clean` are in the image's own units; all (H, W, C).
    """
    error = (output.astype(np.float64) - clean.astype(np.float64)) * (255 / scale.span)
    magnitude = np.abs(error).max(axis=2)
    y, x = _worst_place(magnitude) if at_worst else _centre(magnitude.shape)
    window = np.s_[y : y + CROP, x : x + CROP]
    return Example(
        noisy=_shown(noisy[window]),
        denoised=_shown(scale.unit(output[window])),
        clean=_shown(scale.unit(clean[window])),
        error=np.rint(magnitude[window]).astype(np.int16),
        at=(y, x),
        size=(clean.shape[0], clean.shape[1]),
        psnr=psnr,
        psnr_noisy=psnr_noisy,
        ssim=ssim,
    )


def _shown(unit: Array) -> Array:
    """Values in [0, 1] as uint8 (h, w, 1 or 3); of other numbers of channels the first."""
    return to_bytes(unit if unit.shape[2] in (1, 3) else unit[..., :1])


def _centre(shape: tuple[int, ...]) -> tuple[int, int]:
    return max(0, (shape[0] - CROP) // 2), max(0, (shape[1] - CROP) // 2)


def _worst_place(error: Array) -> tuple[int, int]:
    """Return (y, x) of the crop of (H, W) with the largest squared error, on a grid of blocks."""
    height, width = error.shape
    squares = error**2
    rows = np.add.reduceat(squares, np.arange(0, height, MASK_SIDE), axis=0)
    blocks = np.add.reduceat(rows, np.arange(0, width, MASK_SIDE), axis=1)
    side = CROP // MASK_SIDE
    down = np.lib.stride_tricks.sliding_window_view(blocks, min(side, blocks.shape[0]), axis=0)
    sums = np.lib.stride_tricks.sliding_window_view(
        down.sum(axis=-1), min(side, blocks.shape[1]), axis=1
    ).sum(axis=-1)
    y, x = np.unravel_index(int(sums.argmax()), sums.shape)
    return (
        min(int(y) * MASK_SIDE, max(0, height - CROP)),
        min(int(x) * MASK_SIDE, max(0, width - CROP)),
    )


def example_uri(out: str, run_id: str, *, kind: str, method: str, noise: str, image: str) -> str:
    """URI of an example's file while a run lasts; `kind` is 'shown' or 'ends'."""
    text = "\n".join((run_id, method, noise, image)).encode("utf-8", "surrogateescape")
    name = hashlib.blake2b(text, digest_size=16).hexdigest()
    return join(out, ".evaluate", kind, f"{name}.npz")


@dataclass(slots=True)
class Ends:
    """Which images of each (model, noise) are among the best and the worst so far."""

    count: int = ENDS
    kept: dict[tuple[str, str], list[tuple[float, str]]] = field(default_factory=dict)

    def offer(self, group: tuple[str, str], value: float, image: str) -> tuple[bool, str | None]:
        """Take an image's value; return whether to keep its file, and whose file to delete."""
        kept = self.kept.setdefault(group, [])
        bisect.insort(kept, (value, image))
        if len(kept) <= 2 * self.count:
            return True, None
        _, dropped = kept.pop(self.count)
        return dropped != image, None if dropped == image else dropped


def read_example(storage: Storage, uri: str) -> Example:
    """Read what a worker kept. Raises ObjectNotFound."""
    return Example.from_bytes(storage.read(uri))
