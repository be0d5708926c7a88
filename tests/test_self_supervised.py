"""Neighbor2Neighbor and Noise2Void: what is shown, what is asked for, and the losses."""

from __future__ import annotations

import numpy as np
import pytest

from denoise_core.self_supervised import (
    blind_spots,
    blind_spots_loss,
    draw_neighbours,
    neighbours_loss,
    pick,
)


def test_neighbours_share_an_edge_of_one_cell():
    places = draw_neighbours(np.random.default_rng(0), 8, 10)
    where = np.stack(np.indices((16, 20)), axis=2).astype(np.float32)
    first, second = pick(where, places[..., 0]), pick(where, places[..., 1])
    assert first.shape == second.shape == (8, 10, 2)
    np.testing.assert_array_equal(np.abs(first - second).sum(axis=2), 1)
    cells = np.stack(np.indices((8, 10)), axis=2)
    np.testing.assert_array_equal(first // 2, cells)
    np.testing.assert_array_equal(second // 2, cells)
    # Every pixel of a cell has its turn on both sides.
    assert {tuple(yx) for yx in (first % 2).reshape(-1, 2)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def squared(predicted, target):
    return (predicted - target) ** 2


def test_neighbours_loss_against_its_formula():
    rng = np.random.default_rng(0)
    noisy = rng.random((3, 12, 16, 2)).astype(np.float32)
    places = np.stack([draw_neighbours(rng, 6, 8) for _ in noisy])
    first, second = pick(noisy, places[..., 0]), pick(noisy, places[..., 1])

    def value(predict, weight):
        return float(neighbours_loss(predict, noisy, places, loss=squared, weight=weight))

    # The identity differs from its target just as the two pixels differ: nothing to regularize.
    plain = np.mean((first - second) ** 2)
    assert value(lambda x: x, 0.0) == pytest.approx(plain, rel=1e-5)
    assert value(lambda x: x, 5.0) == pytest.approx(plain, rel=1e-5)
    # Half the value: f(g1) - g1(f) + g2(f) - g2 = -second / 2.
    halved = np.mean((first / 2 - second) ** 2)
    expected = halved + 3.0 * np.mean((second / 2) ** 2)
    assert value(lambda x: x / 2, 3.0) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_through_the_whole_image():
    import tensorflow as tf

    rng = np.random.default_rng(1)
    noisy = rng.random((1, 8, 8, 1)).astype(np.float32)
    places = draw_neighbours(rng, 4, 4)[None]
    first, second = pick(noisy, places[..., 0]), pick(noisy, places[..., 1])
    gain = tf.Variable(0.5)
    with tf.GradientTape() as tape:
        loss = neighbours_loss(lambda x: gain * x, noisy, places, loss=squared, weight=2.0)
    rebuilt = np.mean(2 * (0.5 * first - second) * first)
    # The shift 0.5 (first - second) counts as a constant.
    bound = np.mean(2 * 2.0 * (0.5 * first - 0.5 * (first - second) - second) * first)
    assert float(tape.gradient(loss, gain)) == pytest.approx(rebuilt + bound, rel=1e-4)


# With one seed in four some pixel at a border would stand in for itself but for its second move.
@pytest.mark.parametrize("seed", range(50))
def test_blind_spots_show_a_neighbour_and_ask_for_the_pixel(seed):
    rng = np.random.default_rng(seed)
    noisy = np.stack(np.indices((32, 40)), axis=2).astype(np.float32)
    values, target = blind_spots(noisy, rng, share=0.05, reach=2)
    spots = np.isfinite(target).all(axis=2)
    assert 30 <= spots.sum() <= 64
    np.testing.assert_array_equal(values[~spots], noisy[~spots])
    np.testing.assert_array_equal(target[spots], noisy[spots])
    steps = np.abs(values - noisy)[spots]
    assert steps.max() <= 2
    assert (steps.max(axis=1) > 0).all()


def test_blind_spots_loss_counts_hidden_pixels_alone():
    target = np.full((1, 4, 4, 1), np.nan, np.float32)
    target[0, 1, 2], target[0, 3, 3] = 0.5, 1.0
    denoised = np.zeros((1, 4, 4, 1), np.float32)
    value = float(blind_spots_loss(denoised, target, loss=squared))
    assert value == pytest.approx((0.25 + 1.0) / 2)
