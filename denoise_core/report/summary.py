"""The numbers of a run: measures of every image, and the dictionary of summary.json."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np

from denoise_core import __version__
from denoise_core.report.rows import COPIED, OK, STATUSES, Floats, Survey
from denoise_core.results import SCHEMA_VERSION


def measures(survey: Survey) -> dict[str, Floats]:
    """The finite values of each measure over the images that it speaks of.

    Noise before and after: every image that was written. All else: denoised images only, for a
    copied one would add a zero gain that says nothing of the model.
    """
    ok = survey.status == OK
    written = ok | (survey.status == COPIED)
    all_measures = derived(survey)
    return {
        name: _finite(values[written if name in ("sigma_in", "sigma_out") else ok])
        for name, values in all_measures.items()
    }


def derived(survey: Survey) -> dict[str, Floats]:
    """Measures of all rows, NaN where unknown."""
    n = survey.numbers
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = (n["read_ms"] + n["denoise_ms"] + n["write_ms"]) / 1000
        return {
            "sigma_in": n["sigma_in"],
            "sigma_out": n["sigma_out"],
            "psnr_noisy": n["psnr_noisy"],
            "psnr": n["psnr"],
            "psnr_gain": n["psnr"] - n["psnr_noisy"],
            "ssim_noisy": n["ssim_noisy"],
            "ssim": n["ssim"],
            "ssim_gain": n["ssim"] - n["ssim_noisy"],
            "mpx_per_s": n["width"] * n["height"] / 1e6 / seconds,
            "residual_autocorrelation": n["residual_autocorrelation"],
            "clipped_fraction": n["clipped_fraction"],
            "seam_ratio": n["seam_ratio"],
        }


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def summarise(survey: Survey, out: str, *, finished: bool | None = None) -> dict[str, Any]:
    """The content of summary.json; its keys are listed at `build_report`."""
    n, status = survey.numbers, survey.status
    written = (status == OK) | (status == COPIED)
    megapixels = float(np.nansum((n["width"] * n["height"])[written]) / 1e6)
    wall = sum((last - first).total_seconds() for first, last in survey.spans.values())
    counts = {name: int(np.sum(status == code)) for code, name in enumerate(STATUSES)}
    return {
        "schema_version": SCHEMA_VERSION,
        "program_version": __version__,
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "out": out,
        "finished": finished,
        "images": {"total": int(status.size), **counts},
        "megapixels": round(megapixels, 6),
        "source_bytes": int(np.nansum(n["source_bytes"])),
        "wall_s": round(wall, 3),
        "mpx_per_s": round(megapixels / wall, 4) if wall > 0 else None,
        "runs": len(survey.spans),
        "retried": int(np.sum(n["attempts"] > 1)),
        "started_at": _iso(min((first for first, _ in survey.spans.values()), default=None)),
        "finished_at": _iso(max((last for _, last in survey.spans.values()), default=None)),
        "stage_s": {
            stage: round(float(np.nansum(n[f"{stage}_ms"])) / 1000, 3)
            for stage in ("read", "denoise", "write")
        },
        "models": [
            {"model_id": name, "model_hash": digest, "images": count}
            for (name, digest), count in survey.models.most_common(20)
            if name is not None
        ],
        "quantiles": {name: _quantiles(values) for name, values in measures(survey).items()},
        "failures": _failure_counts(survey),
        "metadata_lost": {
            str(name): count for (name,), count in survey.metadata_lost.most_common(50)
        },
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _quantiles(values: Floats) -> dict[str, Any]:
    levels = {"min": 0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}
    if not values.size:
        return {"count": 0, "mean": None, **dict.fromkeys(levels)}
    cuts = np.quantile(values, list(levels.values()))
    rounded = {name: round(float(cut), 6) for name, cut in zip(levels, cuts, strict=True)}
    return {"count": int(values.size), "mean": round(float(values.mean()), 6), **rounded}


def _failure_counts(survey: Survey) -> dict[str, Any]:
    by_stage: Counter[str] = Counter()
    by_type: Counter[str] = Counter()
    for (stage, kind), count in survey.failures.items():
        by_stage[stage or "unknown"] += count
        by_type[kind or "unknown"] += count
    return {
        "total": survey.failures.total(),
        "by_stage": dict(by_stage.most_common()),
        "by_type": dict(by_type.most_common()),
    }
