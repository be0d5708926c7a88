"""Denoiser(checkpoint).denoise([arrays]) -> [arrays]. Knows neither files nor Ray.

    denoiser = Denoiser(load_checkpoint("unet-s"))
    clean, = denoiser.denoise([noisy])

Images of 1 and 3 channels go through the model whole; of any other number, channel by channel.
A grey plane is repeated to the model's three channels, and their mean is taken.

What the model's card says is kept to: `input_size` [h, w], where every window has just that size
and what leaves the image is mirrored; `data_range` [lo, hi], the values that the model was trained
on, to and from which pixels are scaled; `float32_only`, where other precisions are not taken.

On a CPU in float32 the bytes of a result depend on the image, the model and the geometry alone:
there every patch goes through the model by itself, in kernels of one thread, and the threads share
the patches. In a batch oneDNN's sums differ in the last bit by the batch's size, by the place in it
and by the number of threads (seen at every layer of the U-Net); 32 px patches pay up to a fifth
more CPU time for going alone, those of 64 px and more nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from denoise_core.checkpoints import Checkpoint
from denoise_core.devices import bound_kernels, choose_precision, import_tensorflow
from denoise_core.errors import ImageError, UsageError
from denoise_core.images import data_range, to_dtype
from denoise_core.patches import (
    NO_CONTEXT,
    Context,
    Cut,
    batches,
    core_of,
    cut,
    is_wide,
    stack,
)
from denoise_core.tiling import Patch, Region, fixed_regions, regions, round_up

Array = np.ndarray

# On a CPU the fastest batches stay in its caches; a GPU wants many more pixels at once.
CPU_BATCH_PIXELS = 110_000
GPU_BATCH_PIXELS = 4_000_000
# Bytes that TensorFlow holds at the peak for each pixel of a batch and unit of model width.
BYTES_PER_PIXEL_AND_WIDTH = 40
AUTO_PATCHES = (1024, 512, 256)
# A region as it came and denoised, and both again as they leave; up to four samples of four bytes.
BYTES_PER_REGION_PIXEL = 4 * 4 * 4
# `--patch` where the user has not said any; a network of one size has its own.
DEFAULT_PATCH = "256"


@dataclass(frozen=True, slots=True)
class Part:
    """A region of one image with the pixels of its window.

    `pixels` is (h, w, C) of any real dtype; its first pixel is (0, 0) of `region`'s window. `low`
    and `high` are the image's data range. The result has `dtype`: integers are rounded and clipped
    as they are pasted, which spares a float copy of the whole region.
    """

    pixels: Array
    region: Region
    origin: tuple[int, int]
    low: float
    high: float
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Patch core, halo and stride in pixels, resolved for one model.

    `input_size` (h, w) is the window of a network that takes no other; then `patch` is what the
    halo leaves of its shorter side. No window has a side under `least`, a multiple of `stride`.
    """

    patch: int
    halo: int
    stride: int
    input_size: tuple[int, int] | None = None
    least: int = 0

    def regions(self, height: int, width: int, *, region: int | None = None) -> list[Region]:
        """Cut an image of that size; see `tiling.regions`."""
        if self.input_size is not None:
            return fixed_regions(
                height,
                width,
                size=self.input_size,
                halo=self.halo,
                stride=self.stride,
                region=region,
            )
        return regions(
            height,
            width,
            core=self.patch,
            halo=self.halo,
            stride=self.stride,
            least=self.least,
            region=region,
        )


def resolve_geometry(
    card: dict[str, Any], *, patch: str, halo: str, memory_bytes: int | None = None
) -> Geometry:
    """Turn the words 'auto' and 'exact' into pixels by the model's card.

    A patch of 'auto' is the largest of AUTO_PATCHES whose batch of one fits into half of
    `memory_bytes`; it and the default are rounded up to a multiple of the model's total stride. A
    network of one size has one patch: its size less two halos. Raises UsageError for another patch
    that is no multiple of the stride, or not that of the model's size.
    """
    stride = int(card["total_stride"])
    names = {"auto": card["default_halo"], "exact": card["exact_halo"]}
    pixels = int(names[halo]) if halo in names else int(halo)
    if card.get("input_size"):
        height, width = card["input_size"]
        return _fixed_geometry((height, width), patch=patch, halo=pixels, stride=stride)
    if patch == "auto":
        fits = [
            size
            for size in AUTO_PATCHES
            if _network_bytes(card, size + 2 * pixels) <= (memory_bytes or 4 << 30) / 2
        ]
        core = fits[0] if fits else AUTO_PATCHES[-1]
    else:
        core = int(patch)
    if patch in ("auto", DEFAULT_PATCH):
        core = round_up(core, stride)
    if core % stride:
        raise UsageError(f"--patch {core}: the model needs a multiple of {stride}.")
    least = round_up(card.get("least_side", 0), stride)
    return Geometry(core, round_up(pixels, stride), stride, least=least)


def _network_bytes(card: dict[str, Any], side: int) -> int:
    width = max(card["arguments"].get("widths", (64,)))
    return int(side * side * width * BYTES_PER_PIXEL_AND_WIDTH)


def working_bytes(
    card: dict[str, Any], geometry: Geometry, *, region: int, batch: int = 1
) -> tuple[int, int]:
    """Return the bytes that the network takes for a batch, and one actor for one region.

    Both come on top of what TensorFlow and the weights take; a region has `region` pixels a side.
    """
    side = geometry.patch + 2 * geometry.halo
    window = (region + 2 * geometry.halo) ** 2
    return batch * _network_bytes(card, side), window * BYTES_PER_REGION_PIXEL


def _fixed_geometry(size: tuple[int, int], *, patch: str, halo: int, stride: int) -> Geometry:
    halo, text = round_up(halo, stride), f"{size[0]}x{size[1]} pixels"
    core = min(size) - 2 * halo
    if core < stride:
        most = (min(size) - stride) // 2 // stride * stride
        raise UsageError(
            f"--halo {halo}: the model takes {text}, of which {2 * halo} of context would leave "
            f"no core; expected at most {most}."
        )
    if patch not in ("auto", DEFAULT_PATCH, str(core)):
        raise UsageError(
            f"--patch {patch}: the model takes {text} and no other size, which with a halo of "
            f"{halo} is a patch of {core}; leave --patch out."
        )
    return Geometry(core, halo, stride, size)


class Denoiser:
    """A model ready to denoise arrays, on whatever device TensorFlow shows.

    `batch_size` bounds the patches of one step where patches are batched at all; `strength` blends
    from 0, the noisy image, to 1, the model's output. `threads` is how many patches run at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        geometry: Geometry | None = None,
        batch_size: int | None = None,
        strength: float = 1.0,
        precision: str = "auto",
    ) -> None:
        tf = import_tensorflow()
        self.card = checkpoint.card
        self.geometry = geometry or resolve_geometry(
            checkpoint.card, patch=DEFAULT_PATCH, halo="auto"
        )
        self.strength = strength
        only = checkpoint.card.get("float32_only", False)
        self.precision = choose_precision("float32" if only else precision, tf)
        gpus = tf.config.get_visible_devices("GPU")
        self.device = "gpu" if gpus else "cpu"
        self._batch_pixels = GPU_BATCH_PIXELS if gpus else CPU_BATCH_PIXELS
        self._most = batch_size or 64
        if batch_size is not None:
            self._batch_pixels = batch_size * (self.geometry.patch + 2 * self.geometry.halo) ** 2
        self._alone = self.device == "cpu" and self.precision == "float32"
        self.threads = bound_kernels(tf) if self._alone else 1
        if self._alone:
            self._most = 1
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._channels = int(checkpoint.card["arguments"].get("channels", 3))
        self._trims = checkpoint.can_trim
        network = checkpoint.build(precision=self.precision, trimmed=self._trims)

        def model(windows: Any, context: Any) -> Any:
            def on(x: Any, *, training: bool) -> Any:
                return network([x, context] if self._trims else x, training=training)

            return in_unit_range(on, checkpoint.card)(windows)

        sides = self.geometry.input_size or (None, None)
        shape = tf.TensorSpec((None, *sides, self._channels), tf.float32)
        self._model = tf.function(model, input_signature=[shape, tf.TensorSpec((4,), tf.int32)])
        self._constant = tf.constant
        # Our own models take every window that they are given.
        foreign = checkpoint.card.get("architecture") == "keras-file"
        # Aborted is what oneDNN says of an empty picture.
        refusals = (tf.errors.InvalidArgumentError, tf.errors.AbortedError)
        self._refusals = refusals if foreign else ()
        self._exhausted = tf.errors.ResourceExhaustedError

    def warm_up(self) -> None:
        """Trace and run the model once, so that the first image does not wait for it."""
        side = max(4 * self.geometry.stride, self.geometry.least)
        sides = self.geometry.input_size or (side, side)
        self.predict(np.zeros((1, *sides, self._channels), np.float32))

    def context(self, patch: Patch) -> Context:
        """Return what the model takes off the patch's window; nothing where it cannot do so."""
        return patch.context(self.geometry.stride) if self._trims else NO_CONTEXT

    def predict(self, batch: Array, context: Context = NO_CONTEXT) -> Array:
        """Run the bare model on (N, h, w, C) float32, [0, 1] as black and white.

        h and w are multiples of the model's stride or, where it has one, its input size. The result
        has the pixels of `context` less on each side. Raises ImageError for windows that a user's
        model does not take, or does not give back in their own size.
        """
        if not self._alone or len(batch) == 1:
            return self._run(batch, context)
        singles = [batch[place : place + 1] for place in range(len(batch))]
        return np.concatenate(list(self._map(lambda one: self.predict(one, context), singles)))

    def _run(self, batch: Array, context: Context) -> Array:
        _, height, width, _ = batch.shape
        top, bottom, left, right = context
        try:
            result: Array = self._model(self._constant(batch), self._constant(context)).numpy()
        except self._refusals as error:
            text = " ".join(str(error).split())[:200]
            raise ImageError(_too_small(height, width, f"fails on it ({text})")) from error
        if result.shape[1:3] != (height - top - bottom, width - left - right):
            made = f"makes {result.shape[1]}x{result.shape[2]} of it"
            raise ImageError(_too_small(height, width, made))
        return result

    def _map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        return map(function, items) if self._pool is None else self._pool.map(function, items)

    def denoise(
        self, images: Sequence[Array], *, ranges: Sequence[tuple[float, float]] | None = None
    ) -> list[Array]:
        """Denoise whole images (H, W, C); results are float32 in the image's own units.

        `ranges` holds each image's data range (low, high); default: its dtype's for integers,
        [0, 1] for floats that lie in it, else their own minimum and maximum. Results are neither
        clipped nor rounded. Raises ValueError for arrays of another rank or without pixels.
        """
        parts = []
        for index, pixels in enumerate(images):
            if pixels.ndim != 3 or pixels.size == 0:
                raise ValueError(f"image {index} has shape {pixels.shape}: expected (H, W, C)")
            low, high = ranges[index] if ranges is not None else data_range(pixels)
            (region,) = self.geometry.regions(*pixels.shape[:2])
            parts.append(Part(pixels, region, (0, 0), low, high))
        return self.denoise_parts(parts)

    def denoise_parts(self, parts: Sequence[Part]) -> list[Array]:
        """Denoise regions; each result is its region's core in the image's units and `part.dtype`.

        Patches of all parts share batches; a result does not depend on its batch neighbours. With
        a strength of 0 the model does not run, and the pixels are the image's own.
        """
        if self.strength == 0.0:
            return [_untouched(part) for part in parts]
        results = []
        for part in parts:
            y0, y1, x0, x1 = part.region.core
            results.append(np.empty((y1 - y0, x1 - x0, part.pixels.shape[2]), part.dtype))
        todo = [
            Cut(source, patch, plane, self.context(patch))
            for source, part in enumerate(parts)
            for patch in part.region.patches
            for plane in self._planes(part.pixels.shape[2])
        ]

        def run(batch: list[Cut]) -> None:
            windows = [self._window(parts[item.source], item) for item in batch]
            outputs = self._fitting(windows, batch[0].context)
            for item, noisy, output in zip(batch, windows, outputs, strict=True):
                self._paste(parts[item.source], item, (noisy, output), into=results[item.source])

        # Cores are disjoint, so threads never paste to the same pixels.
        for _ in self._map(run, batches(todo, batch_pixels=self._batch_pixels, most=self._most)):
            pass
        return results

    def _fitting(self, windows: Sequence[Array], context: Context) -> Iterator[Array]:
        """Yield the model's output for each window, in batches that the device has memory for.

        One that it has none for is halved, and so are those of later calls. Raises ImageError where
        one window is too much.
        """
        try:
            yield from self.predict(stack(windows), context)[: len(windows)]
            return
        except self._exhausted as error:
            if len(windows) == 1:
                text = "the device has no memory for one patch; use a smaller --patch."
                raise ImageError(text) from error
        half = 1 << (len(windows) - 1).bit_length() - 1
        height, width, _ = windows[0].shape
        self._batch_pixels = min(self._batch_pixels, half * height * width)
        for part in (windows[:half], windows[half:]):
            yield from self._fitting(part, context)

    def _planes(self, channels: int) -> list[int | None]:
        whole = channels in (1, self._channels)
        return [None] if whole else list(range(channels))

    def _window(self, part: Part, item: Cut) -> Array:
        pixels = part.pixels if item.plane is None else part.pixels[..., item.plane, None]
        window = cut(pixels, item.patch, origin=part.origin, low=part.low, high=part.high)
        if window.shape[2] == self._channels:
            return window
        return np.repeat(window, self._channels, axis=2)

    def _paste(self, part: Part, item: Cut, pair: tuple[Array, Array], *, into: Array) -> None:
        noisy = core_of(pair[0], item.patch)
        values = core_of(pair[1], item.patch, item.context)
        if self.strength != 1.0:
            values = noisy + np.float32(self.strength) * (values - noisy)
        if into.shape[2] != self._channels:
            values = values.mean(axis=2, keepdims=True)
        if (part.low, part.high) != (0.0, 1.0):
            wide = np.float64 if is_wide(np.dtype(part.dtype)) else np.float32
            values = values * wide(part.high - part.low) + wide(part.low)
        values = to_dtype(values, part.dtype, part.low, part.high)
        y0, _, x0, _ = part.region.core
        y, x = item.patch.y, item.patch.x
        target = into[y.start - y0 : y.stop - y0, x.start - x0 : x.stop - x0]
        if item.plane is None:
            target[...] = values
        else:
            target[..., item.plane] = values[..., 0]


def _untouched(part: Part) -> Array:
    """Return the core's own pixels in `part.dtype`."""
    y0, y1, x0, x1 = part.region.core
    y, x = part.origin
    core = part.pixels[y0 - y : y1 - y, x0 - x : x1 - x]
    return to_dtype(core, part.dtype, part.low, part.high).copy()


def _too_small(height: int, width: int, what: str) -> str:
    return (
        f"a window of {height}x{width} pixels: the model {what}; expected its own size back. The "
        "image, or its last patch, is smaller than the model can take: use convolutions with "
        "padding='same', or larger images."
    )


def in_unit_range(model: Any, card: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the model as a function of values in [0, 1], whatever range it was trained on."""
    low, high = card.get("data_range") or (0.0, 1.0)
    if (low, high) == (0.0, 1.0):
        return lambda x: model(x, training=False)
    span = high - low
    return lambda x: (model(x * span + low, training=False) - low) / span
