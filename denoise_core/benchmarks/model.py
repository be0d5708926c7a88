"""The settings of a benchmark that name its model."""

from __future__ import annotations

from dataclasses import dataclass

from denoise_core.checkpoints import Checkpoint, load_checkpoint
from denoise_core.config import model_range_setting, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a benchmark's settings begin with."""

    model: str = setting("unet-s", "A shipped model's name or a path.", metavar="NAME|PATH")
    model_range: str = model_range_setting()

    def load(self) -> Checkpoint:
        """Load the model. Raises UsageError, CheckpointError."""
        return load_checkpoint(self.model, model_range=self.model_range)

    @property
    def flags(self) -> tuple[str, ...]:
        """The same settings on another job's command line."""
        return ("--model", self.model, "--model-range", self.model_range)

    @property
    def named(self) -> dict[str, str]:
        """The same settings for a function in a process of its own."""
        return {"model": self.model, "model_range": self.model_range}
