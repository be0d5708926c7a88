"""What every stage of one run needs to know. Imports no Ray, so that planning starts fast."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.storage import StorageOptions, join

Facts = dict[str, Any]
"""What is known of a work item so far, as plain JSON types."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run's settings, resolved. Picklable; holds no credential."""

    config: DenoiseConfig
    run_id: str
    options: StorageOptions
    geometry: Geometry
    model_id: str
    model_hash: str
    config_hash: str
    copy_below: float

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
