"""Convolutional autoencoders of the classic kind: no skips, the image is painted anew.

Each level of the encoder is a 3x3 convolution and a 2x2 maximum; the decoder mirrors it with
convolution and repetition ("upsample") or with transposed convolutions ("transposed"). Four of the
classic presets are this network; see `presets.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Of the running statistics: Keras' 0.99 is far behind the weights in a run of a few hundred steps.
BN_MOMENTUM = 0.9

UPS = ("upsample", "transposed")


def build(
    *,
    widths: Sequence[int],
    channels: int,
    up: str = "transposed",
    norm: bool = False,
    output: str = "sigmoid",
) -> Any:
    """Return a Keras model (N, H, W, channels) -> the same; H, W multiples of the total stride.

    `norm` puts a batch normalisation between every convolution and its ReLU. `output` is the last
    activation, 'sigmoid' or 'linear'. The layer `latent` holds the code.
    """
    import keras
    import tensorflow as tf
    from keras import layers

    if up not in UPS:
        raise ValueError(f"up is {up!r}: expected one of {', '.join(UPS)}")

    # Several replicas normalise by the statistics of all their images, as one would.
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1

    def activate(x: Any) -> Any:
        if norm:
            x = layers.BatchNormalization(momentum=BN_MOMENTUM, synchronized=several)(x)
        return layers.ReLU()(x)

    noisy = x = keras.Input((None, None, channels), name="noisy")
    for width in widths:
        x = activate(layers.Conv2D(width, 3, padding="same")(x))
        x = layers.MaxPooling2D(2)(x)
    x = layers.Identity(name="latent")(x)
    for width in reversed(widths):
        if up == "upsample":
            x = activate(layers.Conv2D(width, 3, padding="same")(x))
            x = layers.UpSampling2D(2)(x)
        else:
            x = activate(layers.Conv2DTranspose(width, 3, strides=2, padding="same")(x))
    x = layers.Conv2D(channels, 3, padding="same")(x)
    denoised = layers.Activation(output, dtype="float32", name="denoised")(x)
    return keras.Model(noisy, denoised, name="autoencoder")


def total_stride(*, widths: Sequence[int], **_: Any) -> int:
    """Return the pixels of one cell of the code; patch origins are multiples of it."""
    return int(2 ** len(widths))


def exact_halo(*, widths: Sequence[int], up: str = "transposed", **_: Any) -> int:
    """Return the context that a core on multiples of the stride needs, in pixels.

    Walks back from the output: a convolution adds one cell of its level, a step to a coarser level
    rounds up to whole cells. An even pixel of a transposed convolution sees the coarse cell before.
    """
    radius = 1
    for _level in widths:
        radius = radius // 2 + 1 if up == "transposed" else -(-radius // 2) + 1
    for _level in widths:
        radius = 2 * radius + 1
    stride = total_stride(widths=widths)
    return -(-radius // stride) * stride


def mflop_per_pixel(
    *, widths: Sequence[int], channels: int, up: str = "transposed", **_: Any
) -> float:
    """Return the forward cost in 10^6 multiplications and additions for each pixel."""
    total, before = 0.0, channels
    for level, width in enumerate(widths):
        total += 18.0 * before * width / 4**level
        before = width
    for level, width in reversed(list(enumerate(widths))):
        # Both kinds multiply once for each coarse cell, tap and pair of channels.
        total += 18.0 * before * width / 4 ** (level + 1)
        before = width
    return (total + 18.0 * before * channels) / 1e6
