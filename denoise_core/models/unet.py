"""Residual U-Net without biases or normalisation.

Blocks of conv-ReLU-conv with an additive skip, 2x2 strided convolutions down, 2x2 transposed
convolutions up, additive skips across, and a global residual: the network predicts what to add to
the noisy image. The layout is DRUNet's (Zhang et al., TPAMI 2022) at a fraction of its width and
without its noise map. Without biases the network scales with its input, f(a x) = a f(x) for a > 0,
which carries a blind model to noise levels it was not trained on (Mohan et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def build(*, widths: Sequence[int], blocks: Sequence[int], channels: int = 3) -> Any:
    """Return a Keras model (N, H, W, channels) -> the same; H, W multiples of the total stride."""
    import keras
    from keras import layers

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
    for width, count in reversed(list(zip(widths[:-1], blocks[:-1], strict=True))):
        x = layers.Conv2DTranspose(width, 2, strides=2, use_bias=False)(x)
        x = stage(layers.Add()([x, skips.pop()]), width, count)
    residual = conv(channels, kernel_initializer="zeros")(x)
    denoised = layers.Add(dtype="float32", name="denoised")([noisy, residual])
    return keras.Model(noisy, denoised, name="unet")


def total_stride(*, widths: Sequence[int], **_: Any) -> int:
    """Return the pixels of one cell of the deepest level; patch origins are multiples of it."""
    return int(2 ** (len(widths) - 1))


def exact_halo(*, widths: Sequence[int], blocks: Sequence[int], **_: Any) -> int:
    """Return the context that a core needs, in pixels: a multiple of the total stride.

    It is the receptive radius of a core whose edges lie on multiples of the total stride, as
    `tiling` cuts them; a pixel in the middle of a cell can reach a few pixels further. Walks the
    deepest path backwards from an output pixel: each 3x3 convolution adds one cell of its level,
    each step to a coarser level rounds up to whole cells.
    """
    radius = 1
    for count in blocks[:-1]:
        radius = -(-(radius + 2 * count) // 2)
    radius += 2 * blocks[-1]
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
