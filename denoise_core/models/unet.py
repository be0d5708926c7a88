"""Residual U-Net without biases or normalisation.

Blocks of conv-ReLU-conv with an additive skip, 2x2 strided convolutions down, 2x2 transposed
convolutions up, additive skips across, and a global residual: the network predicts what to add to
the noisy image. The layout is DRUNet's (Zhang et al., TPAMI 2022) at a fraction of its width and
without its noise map. Without biases the network scales with its input, f(a x) = a f(x) for a > 0,
which carries a blind model to noise levels it was not trained on (Mohan et al., ICLR 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def build(*, widths: Sequence[int], blocks: Sequence[int], channels: int = 3) -> Any:
    """Return a Keras model (N, H, W, channels) -> the same; H, W multiples of the total stride."""
    return _build(widths, blocks, channels, trimmed=False)


def build_trimmed(*, widths: Sequence[int], blocks: Sequence[int], channels: int = 3) -> Any:
    """Return a Keras model of [windows (N, H, W, channels), context] -> their cores.

    `context` is int32 (4,), pixels at the top, bottom, left and right that are there for the core's
    sake only, multiples of the total stride. The values and the weights are those of `build`; what
    the core does not need is not computed on the way up: a tenth of all for 256 px with 32 px
    around them.
    """
    return _build(widths, blocks, channels, trimmed=True)


def _build(widths: Sequence[int], blocks: Sequence[int], channels: int, *, trimmed: bool) -> Any:
    import keras
    from keras import layers

    context = keras.Input(batch_shape=(4,), dtype="int32", name="context") if trimmed else None

    def trim(x: Any, level: int, *, had: int | None = None, kept: int) -> Any:
        if context is None:
            return x
        cut = functools.partial(_trim, cell=2**level, had=had, kept=kept)
        shape = (None, None, x.shape[3])
        return layers.Lambda(cut, output_shape=shape, autocast=False)([x, context])

    def conv(width: int, **more: Any) -> Any:
        return layers.Conv2D(width, 3, padding="same", use_bias=False, **more)

    def stage(x: Any, width: int, count: int) -> Any:
        for _ in range(count):
            y = conv(width, activation="relu", kernel_initializer="he_normal")(x)
            # Small second convolutions start every block near the identity.
            small = keras.initializers.VarianceScaling(0.1, distribution="truncated_normal")
            x = layers.Add()([x, conv(width, kernel_initializer=small)(y)])
        return x

    noisy = keras.Input((None, None, channels), name="noisy")
    x = conv(widths[0])(noisy)
    skips = []
    for width, deeper, count in zip(widths[:-1], widths[1:], blocks[:-1], strict=True):
        x = stage(x, width, count)
        skips.append(x)
        x = layers.Conv2D(deeper, 2, strides=2, use_bias=False)(x)
    x = stage(x, widths[-1], blocks[-1])
    x = layers.Identity(name="latent")(x)
    had = None
    for level, reach in reversed(list(enumerate(_reaches(blocks)))):
        x = trim(x, level + 1, had=had, kept=reach // 2)
        x = layers.Conv2DTranspose(widths[level], 2, strides=2, use_bias=False)(x)
        skip = trim(skips.pop(), level, kept=reach)
        x = stage(layers.Add()([x, skip]), widths[level], blocks[level])
        had = reach
    residual = trim(conv(channels, kernel_initializer="zeros")(x), 0, had=had, kept=0)
    added = layers.Add(dtype="float32", name="denoised")([trim(noisy, 0, kept=0), residual])
    return keras.Model(noisy if context is None else [noisy, context], added, name="unet")


def _trim(pair: tuple[Any, Any], *, cell: int, had: int | None, kept: int) -> Any:
    """Take cells of context off the sides of x (N, h, w, C), where only earlier layers needed them.

    `cell` is the pixels of one of them. On each side x has at most `had` of the context yet, None
    for all, and keeps at most `kept`.
    """
    from keras import ops

    x, context = pair
    cells = context // cell
    if had is not None:
        cells = ops.minimum(cells, had)
    off = cells - ops.minimum(cells, kept)
    _, height, width, _ = ops.shape(x)
    return x[:, off[0] : height - off[1], off[2] : width - off[3]]


def _reaches(blocks: Sequence[int]) -> list[int]:
    """Return the cells around a core that each level of the way up needs, the finest level first.

    Walks backwards from an output pixel: each 3x3 convolution adds one cell of its level, and a
    level is made of whole cells of the next coarser one.
    """
    radius, reaches = 1, []
    for count in blocks[:-1]:
        radius = -(-(radius + 2 * count) // 2)
        reaches.append(2 * radius)
    return reaches


def total_stride(*, widths: Sequence[int], **_: Any) -> int:
    """Return the pixels of one cell of the deepest level; patch origins are multiples of it."""
    return int(2 ** (len(widths) - 1))


def exact_halo(*, widths: Sequence[int], blocks: Sequence[int], **_: Any) -> int:
    """Return the context that a core needs, in pixels: a multiple of the total stride.

    It is the receptive radius of a core whose edges lie on multiples of the total stride, as
    `tiling` cuts them; a pixel in the middle of a cell can reach a few pixels further. Walks the
    deepest path backwards, up (`_reaches`) and down.
    """
    reaches = _reaches(blocks)
    radius = (reaches[-1] // 2 if reaches else 1) + 2 * blocks[-1]
    for count in reversed(blocks[:-1]):
        radius = radius * 2 + 2 * count
    radius += 1
    stride = total_stride(widths=widths)
    return -(-radius // stride) * stride


def mflop_per_pixel(
    *, widths: Sequence[int], blocks: Sequence[int], channels: int = 3, **_: Any
) -> float:
    """Return the forward cost in 10^6 multiplications and additions for each pixel."""
    total = 2.0 * 9 * 2 * channels * widths[0]
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        passes = 1 if level == len(widths) - 1 else 2
        total += passes * count * 2 * 2.0 * 9 * width * width / 4**level
    for level, (width, deeper) in enumerate(pairwise(widths)):
        total += 2 * 2.0 * 4 * width * deeper / 4 ** (level + 1)
    return total / 1e6
