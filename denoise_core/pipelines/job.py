"""What every stage of one run needs to know. Imports no Ray, so that planning starts fast."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import reduce
from operator import add
from typing import Any

from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.metrics import ErrorSums
from denoise_core.storage import StorageOptions, join

Facts = dict[str, Any]
"""What is known of a work item so far, as plain JSON types."""

# Pixels that the actor holds as floats at a time, beyond those of one region.
GROUP_PIXELS = 8_000_000
# The end of what is told of a run that stopped.
SAFE = "Finished images are safe, the same command goes on with the rest."


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a run may use: `name` as `load_checkpoint` takes it; `id`, `hash` for the row.

    An image is copied where its noise is under `copy_below`, in levels, and, if it is no coarse
    JPEG, where what the model would take away has a root mean square under `copy_residual`.
    `working_bytes` is what the network takes on a CPU for a batch, and an actor for a region.
    """

    name: str
    id: str
    hash: str
    copy_below: float
    copy_residual: float = 0.0
    working_bytes: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Job:
    """One run's settings, resolved. Picklable; holds no credential.

    Of several `models`, each image's facts name by place the one that was chosen for it.
    """

    config: DenoiseConfig
    run_id: str
    options: StorageOptions
    geometry: Geometry
    models: tuple[Model, ...]
    config_hash: str

    def model(self, facts: Facts) -> Model:
        """Return the model of an image. Raises KeyError where one is yet to be chosen."""
        return self.models[facts["model"] if len(self.models) > 1 else 0]

    def staging(self, facts: Facts, name: str) -> str:
        """URI of one region's file between its writer and the assembly of its image.

        The regions of another size, other settings or another version of the input lie elsewhere.
        """
        work = (
            f"{facts['image_id']}-{self.config_hash}-{facts['source_fingerprint']}"
            f"-{self.config.region}"
        )
        return join(self.config.output, ".denoise", "regions", work, name)


def now() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat()


def reference_figures(after: ErrorSums, before: ErrorSums) -> Facts:
    """Return the row's figures against a reference, of the denoised and of the noisy image."""
    if not after.count:
        problem = "no pixel is data both in the image and in its reference"
        return {"reference_uri": None, "reference_problem": problem}
    return {
        "psnr": after.psnr,
        "ssim": after.ssim,
        "mse": after.mse,
        "psnr_noisy": before.psnr,
        "ssim_noisy": before.ssim,
        "mse_noisy": before.mse,
    }


def _sums(marked: Facts) -> ErrorSums:
    """Read what a region's marker holds; older ones, of a run that goes on, hold more."""
    return ErrorSums(**{each.name: marked[each.name] for each in fields(ErrorSums)})


def merge_reference(regions: list[Facts]) -> Facts:
    """Return an image's figures against its reference; every region has to have its sums."""
    for facts in regions:
        if "reference_problem" in facts:
            return {"reference_uri": None, "reference_problem": facts["reference_problem"]}
    after, before = (
        reduce(add, (_sums(facts[name]) for facts in regions)) for name in ("after", "before")
    )
    return reference_figures(after, before)
