"""An autoencoder whose code is a short vector: two convolutions, a dense layer, and back.

It takes images of one size only, since every value of the code sees the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def build(
    *,
    size: Sequence[int] = (28, 28),
    channels: int = 1,
    widths: Sequence[int] = (32, 64),
    latent: int = 16,
    dropout: float = 0.2,
) -> Any:
    """Return a Keras model (N, *size, channels) -> the same, in [0, 1].

    Strided 3x3 convolutions of `widths`, dropout, the dense layer `latent`, and transposed
    convolutions back; the sides of `size` are multiples of two to the number of widths.
    """
    import keras
    from keras import layers

    cells = [side // 2 ** len(widths) for side in size]
    noisy = x = keras.Input((*size, channels), name="noisy")
    for width in widths:
        x = layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(_dropout(dropout)(x))
    x = layers.Dense(latent, name="latent")(x)
    x = layers.Dense(cells[0] * cells[1] * widths[-1], activation="relu")(x)
    x = layers.Reshape((*cells, widths[-1]))(x)
    for width in reversed(widths[:-1]):
        x = layers.Conv2DTranspose(width, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(channels, 3, strides=2, padding="same")(x)
    denoised = layers.Activation("sigmoid", dtype="float32", name="denoised")(x)
    return keras.Model(noisy, denoised, name="dense")


def _dropout(rate: float) -> Any:
    """Return a dropout that drops the same of an image, however many replicas share the batch.

    Each replica draws for the whole batch, all alike, and takes its own part.
    """
    import tensorflow as tf
    from keras import layers

    class Dropout(layers.Dropout):
        def call(self, inputs: Any, training: bool = False) -> Any:
            context = tf.distribute.get_replica_context()
            replicas = context.num_replicas_in_sync if context else 1
            if not training or replicas == 1:
                return super().call(inputs, training=training)
            whole = super().call(tf.concat([inputs] * replicas, axis=0), training=True)
            count = tf.shape(inputs)[0]
            first = context.replica_id_in_sync_group * count
            return whole[first : first + count]

    return Dropout(rate)


def input_size(*, size: Sequence[int] = (28, 28), **_: Any) -> tuple[int, int]:
    """Return the one (height, width) in pixels that the network takes."""
    return int(size[0]), int(size[1])


def total_stride(*, widths: Sequence[int] = (32, 64), **_: Any) -> int:
    """Return the pixels of one cell of the coarsest feature map."""
    return int(2 ** len(widths))


def exact_halo(**_: Any) -> int:
    """Return 0: an output depends on the whole image and on nothing beyond it."""
    return 0


def mflop_per_pixel(
    *,
    size: Sequence[int] = (28, 28),
    channels: int = 1,
    widths: Sequence[int] = (32, 64),
    latent: int = 16,
    **_: Any,
) -> float:
    """Return the forward cost in 10^6 multiplications and additions for each pixel."""
    total, before = 0.0, channels
    for level, width in enumerate(widths):
        # Forth at this level's output, back from it: the same taps, cells and pairs of channels.
        total += 2 * 18.0 * before * width / 4 ** (level + 1)
        before = width
    code = 2.0 * 2 * latent * before / 4 ** len(widths)
    return (total + code) / 1e6
