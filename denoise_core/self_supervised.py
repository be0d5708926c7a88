"""Learning from noisy images alone, where the noise is independent between pixels.

Neighbor2Neighbor: Huang et al., "Neighbor2Neighbor: Self-Supervised Denoising from Single Noisy
Images", CVPR 2021, https://arxiv.org/abs/2101.02824. Of every 2x2 cell two pixels with an edge in
common go to two images of half the size, one the input, the other its target. They show the scene a
pixel apart; a regularizer takes out what the network itself sees of that difference.

Noise2Void: Krull et al., "Noise2Void - Learning Denoising from Single Noisy Images", CVPR 2019,
https://arxiv.org/abs/1811.10980. Some pixels are hidden behind a neighbour's value and predicted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray

# The regularizer's weight at the end of the schedule; it rises from 0, as in the authors' code.
REGULARIZER = 2.0
# Pixels (row, column) of a 2x2 cell, clockwise: those beside each other in this list share an edge.
RING = ((0, 0), (0, 1), (1, 1), (1, 0))


def draw_neighbours(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return (height, width, 2) float32: of each 2x2 cell two places in RING, side by side."""
    first = rng.integers(4, size=(height, width))
    second = (first + rng.choice([1, 3], size=first.shape)) % 4
    return np.stack([first, second], axis=2).astype(np.float32)


def pick(image: Any, places: Any) -> Any:
    """Return (..., H/2, W/2, C): of each cell of `image` (..., H, W, C) the pixel at its place.

    `places` is (..., H/2, W/2), numbers in RING. Takes arrays and tensors.
    """
    parts = [
        image[..., y::2, x::2, :] * _as_values(places == number)[..., None]
        for number, (y, x) in enumerate(RING)
    ]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _as_values(chosen: Any) -> Any:
    if isinstance(chosen, np.ndarray):
        return chosen.astype(np.float32)
    import tensorflow as tf

    return tf.cast(chosen, tf.float32)


def neighbours_loss(predict: Any, noisy: Any, places: Any, *, loss: Any, weight: Any) -> Any:
    """Return Neighbor2Neighbor's loss, a tensor of no dimensions, of one batch.

    `noisy` is (B, 2h, 2w, C), `places` (B, h, w, 2) by `draw_neighbours`; `predict` is the network,
    `loss(predicted, target)` that of every value. With g1, g2 the two images of a cell's pixels:
    loss(f(g1(y)), g2(y)) + weight * loss(f(g1(y)) - g1(f(y)) + g2(f(y)), g2(y)), where no gradient
    flows through f(y) (equations 8 and 9 of the paper, there with the squared error).
    """
    import tensorflow as tf

    whole = tf.stop_gradient(predict(noisy))
    first, second = places[..., 0], places[..., 1]
    denoised, target = predict(pick(noisy, first)), pick(noisy, second)
    shift = pick(whole, first) - pick(whole, second)
    rebuilt = tf.reduce_mean(loss(denoised, target))
    return rebuilt + weight * tf.reduce_mean(loss(denoised - shift, target))


def blind_spots(
    noisy: Array, rng: np.random.Generator, *, share: float = 0.02, reach: int = 2
) -> tuple[Array, Array]:
    """Return Noise2Void's (input, target), (H, W, C) both: a `share` of the pixels is hidden.

    They are replaced by a neighbour within `reach`. The target has the true values there and NaN
    elsewhere, where there is nothing to learn.
    """
    height, width = noisy.shape[:2]
    count = max(1, round(share * height * width))
    # No pixel twice: all crops hide as many, so that a mean over some of them counts all alike.
    y, x = np.divmod(rng.choice(height * width, size=count, replace=False), width)
    steps = rng.integers(-reach, reach + 1, (2, count))
    # A pixel may not stand in for itself.
    steps[0] += np.where((steps == 0).all(axis=0), 1, 0)
    from_y = np.abs(y + steps[0])
    from_y = np.where(from_y >= height, 2 * height - 2 - from_y, from_y)
    from_x = np.abs(x + steps[1])
    from_x = np.where(from_x >= width, 2 * width - 2 - from_x, from_x)
    # Mirrored, a step of 2 from the second row or column leads back to where it began.
    same = (from_y == y) & (from_x == x)
    from_y += np.where(same, np.where(y < height - 1, 1, -1), 0)
    values, target = noisy.copy(), np.full_like(noisy, np.nan)
    values[y, x] = noisy[from_y, from_x]
    target[y, x] = noisy[y, x]
    return values, target


def blind_spots_loss(denoised: Any, target: Any, *, loss: Any) -> Any:
    """Return the mean loss over the hidden pixels, a tensor of no dimensions."""
    import tensorflow as tf

    known = tf.math.is_finite(target)
    values = loss(denoised, tf.where(known, target, denoised))
    return tf.reduce_mean(values) / tf.reduce_mean(tf.cast(known, tf.float32))
