"""Seeded noise models: clean pixels in, noisy pixels out.

A model is written as text, `gaussian:25` or `gaussian:0-55`; levels are in 1/255 of the data range
and a range is drawn from uniformly, once for each image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from denoise_core.config import nearest
from denoise_core.errors import UsageError

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Additive white Gaussian noise, y = x + N(0, sigma / 255), neither clipped nor quantised."""

    low: float
    high: float

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`, which is float32 in [0, 1]."""
        sigma = np.float32(rng.uniform(self.low, self.high) / 255.0)
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        noise *= sigma
        noise += clean
        return noise


NOISE_MODELS = {"gaussian": Gaussian}


def parse_noise(spec: str) -> Gaussian:
    """Read `NAME:LEVEL` or `NAME:LOW-HIGH`. Raises UsageError."""
    name, _, levels = spec.partition(":")
    if name not in NOISE_MODELS:
        raise UsageError(f"--noise {spec!r}: unknown noise {name!r}.{nearest(name, NOISE_MODELS)}")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?", levels)
    if match is None or float(match[2] or match[1]) < float(match[1]):
        raise UsageError(f"--noise {spec!r}: expected {name}:LEVEL or {name}:LOW-HIGH.")
    return NOISE_MODELS[name](float(match[1]), float(match[2] or match[1]))
