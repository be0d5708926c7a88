"""Rows to figures: means with confidence intervals, gains over the noisy input, warnings, PCA.

All comparisons are paired: a gain is the mean over images of (PSNR of the method - PSNR of the
noisy input of the same image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from denoise_core.evaluation.methods import IDENTITY
from denoise_core.evaluation.protocol import sigma_of

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `count` values and its 95 % confidence interval; None where there is none."""

    mean: float | None
    low: float | None
    high: float | None
    count: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


def interval(values: Floats) -> Interval:
    """Return mean ± t(n-1) s/√n of the finite values (Student's t, two-sided 95 %).

    Infinite values (the PSNR of equal images) have no part in it; one value alone has no interval.
    """
    from scipy.special import stdtrit

    # Sorted, so that the last digits do not tell in which order the images came.
    known = np.sort(values[np.isfinite(values)])
    if not known.size:
        return Interval(None, None, None, 0)
    mean = float(known.mean())
    if known.size == 1:
        return Interval(mean, None, None, 1)
    deviation = float(known.std(ddof=1)) / math.sqrt(known.size)
    half = float(stdtrit(known.size - 1, 0.5 + CONFIDENCE / 2)) * deviation
    return Interval(mean, mean - half, mean + half, int(known.size))


@dataclass(slots=True)
class Figures:
    """The measures of all images: arrays (methods, noises, images), NaN where there is none.

    PSNR in dB, MSE in squared data ranges, times in milliseconds for one image.
    """

    methods: list[str]
    noises: list[str]
    images: list[str]
    psnr: Floats
    ssim: Floats
    mse: Floats
    milliseconds: Floats

    def at(self, method: str, noise: str) -> tuple[int, int]:
        """The place of a method and a noise in the first two axes."""
        return self.methods.index(method), self.noises.index(noise)

    def gain(self, method: str, noise: str) -> Floats:
        """PSNR of a method minus that of the noisy input, for each image; NaN where unknown."""
        with np.errstate(invalid="ignore"):  # two infinite ones: unknown
            return self.psnr[self.at(method, noise)] - self.psnr[self.at(IDENTITY, noise)]


def figures(table: pa.Table, *, methods: list[str], noises: list[str]) -> Figures:
    """Arrange the rows of a table that went well; images are sorted by name."""
    ok = table.filter(pa.compute.equal(table["status"], "ok"))
    images = sorted(set(ok["image"].to_pylist()))
    places = [
        np.array([order[value] for value in ok[name].to_pylist()], np.int64)
        for name, order in (
            ("method", {name: place for place, name in enumerate(methods)}),
            ("noise", {name: place for place, name in enumerate(noises)}),
            ("image", {name: place for place, name in enumerate(images)}),
        )
    ]
    arrays = {}
    for name in ("psnr", "ssim", "mse", "milliseconds"):
        arrays[name] = np.full((len(methods), len(noises), len(images)), np.nan)
        arrays[name][tuple(places)] = ok[name].to_numpy(zero_copy_only=False)
    return Figures(methods, noises, images, **arrays)


def summarise(data: Figures, *, models: list[str]) -> list[dict[str, Any]]:
    """Return one entry for each noise and method, in that order, as plain JSON values.

    `gain` is the paired gain in PSNR over the noisy input, `loses` the images where it is negative,
    `identical` those with an infinite PSNR, which have no part in the mean, `spoiled` those without
    noise that the method changed. `first_model_psnr` is the mean PSNR of the first model over the
    images that this method saw.
    """
    entries = []
    for noise in data.noises:
        first = data.psnr[data.at(models[0], noise)] if models else None
        for method in data.methods:
            place = data.at(method, noise)
            seen = ~np.isnan(data.psnr[place])
            gain = data.gain(method, noise)
            entries.append(
                {
                    "noise": noise,
                    "method": method,
                    "kind": "model" if method in models else "filter",
                    "images": int(seen.sum()),
                    "psnr": interval(data.psnr[place]).to_json(),
                    "ssim": interval(data.ssim[place]).to_json(),
                    "mse": interval(data.mse[place]).to_json(),
                    "gain": interval(gain).to_json(),
                    "loses": int((gain < 0).sum()),
                    "identical": int(np.isinf(data.psnr[place]).sum()),
                    "spoiled": int(np.isneginf(gain).sum()),
                    "first_model_psnr": None if first is None else interval(first[seen]).mean,
                    "milliseconds": interval(data.milliseconds[place]).mean,
                }
            )
    return entries


def find_losses(entries: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each model and noise where the noisy input itself is better."""
    models = [e for e in entries if e["kind"] == "model"]
    return [
        f"{e['method']} loses to the noisy input itself at {e['noise']}: {e['gain']['mean']:+.2f} "
        f"dB PSNR on average, worse on {e['loses']} of {e['images']} images. Do not use it for "
        "such noise."
        for e in models
        if e["gain"]["mean"] is not None and e["gain"]["mean"] < 0
    ] + [
        f"{e['method']} changes images that have no noise, {e['spoiled']} of {e['images']} at "
        f"{e['noise']}: it can only do them harm. Do not use it for such images."
        for e in models
        if e["spoiled"]
    ]


def two_ends(values: Floats, count: int) -> tuple[list[int], list[int]]:
    """Return the places of the lowest values (lowest first) and of the highest (highest first).

    At most `count` each, and none in both; NaN is left out.
    """
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")].tolist()
    low = order[: min(count, (len(order) + 1) // 2)]
    high = order[::-1][: min(count, len(order) - len(low))]
    return low, high


def gaussian_levels(noises: list[str]) -> list[tuple[float, str]]:
    """Return (sigma, noise) of those that state one, by sigma."""
    known = [(sigma_of(noise), noise) for noise in noises]
    return sorted((sigma, noise) for sigma, noise in known if sigma is not None)


def principal_components(codes: Floats) -> tuple[Floats, Floats]:
    """Return points (N, 2) and the shares (2,) of the variance that the two axes explain.

    PCA of codes (N, D), N > 2, by scikit-learn. Codes of one value have a second axis of zeros.
    """
    from sklearn.decomposition import PCA  # a second to import

    points, shares = np.zeros((len(codes), 2)), np.zeros(2)
    axes = min(2, codes.shape[1])
    if np.ptp(codes, axis=0).any():
        pca = PCA(n_components=axes, svd_solver="full")
        points[:, :axes] = pca.fit_transform(codes)
        shares[:axes] = pca.explained_variance_ratio_
    return points, shares
