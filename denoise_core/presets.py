"""Presets of `jobs.train`: an architecture with its arguments and the recipe it is trained by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoise_core.config import nearest
from denoise_core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Stage:
    """From the share `start` of the schedule on: crops of `crop` pixels in batches of `batch`."""

    start: float
    crop: int
    batch: int


@dataclass(frozen=True, slots=True)
class Preset:
    """An architecture and its recipe. `default_halo` is in pixels."""

    architecture: str
    arguments: dict[str, Any]
    default_halo: int
    learning_rate: float
    stages: tuple[Stage, ...]
    warmup_steps: int = 200
    mse_from: float = 0.9
    # The median norm of unet-s's gradients is 0.1; without a bound a run at 1.5e-3 in batches of
    # four 64 px crops diverged within 1,100 steps.
    clip_norm: float = 0.1
    ema: float = 0.999


# Small crops first: as many optimizer steps for each pixel of a CPU's budget as the gradient's
# noise allows. Large crops last: the network meets the context it will see in use.
STAGES = (Stage(0.0, 64, 8), Stage(0.6, 96, 8), Stage(0.85, 128, 8))


def unet(widths: tuple[int, ...], blocks: tuple[int, ...], rate: float) -> Preset:
    """Return the preset of one size of the residual U-Net."""
    return Preset("unet", {"widths": widths, "blocks": blocks, "channels": 3}, 32, rate, STAGES)


PRESETS = {
    "unet-xs": unet((16, 32, 64, 128), (1, 1, 1, 2), 2e-3),
    "unet-s": unet((24, 48, 96, 192), (1, 1, 1, 2), 1e-3),
    "unet-m": unet((40, 80, 160, 320), (1, 1, 1, 2), 6e-4),
    "unet-l": unet((56, 112, 224, 448), (1, 1, 2, 4), 4e-4),
}


def preset(name: str) -> Preset:
    """Return a preset by name. Raises UsageError for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}.{nearest(name, PRESETS)}")
    return PRESETS[name]
