"""Two ranks that train together without Ray, each a process; what each saw, as JSON.

`python two_ranks.py RANK FOLDER` is one of them: FOLDER has the images, TF_CONFIG names both ranks.
Each validates on images of its own, so that their losses differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__)
STEPS, VALIDATE, CHECKPOINT = 6, 4, 3
# Below any gradient's norm here, so that all are cut to it.
CLIP_NORM = 1e-4


def train_together(folder: Path) -> list[dict[str, Any]]:
    """Return what each of two ranks saw: reports, the loss of its own, statistics, progress."""
    from conftest import free_port

    hosts = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    ranks = []
    for rank in range(2):
        task = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": rank}}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(rank), str(folder)],
                env={**os.environ, "TF_CONFIG": json.dumps(task), "TF_CPP_MIN_LOG_LEVEL": "3"},
                stdout=subprocess.PIPE,
                text=True,
                cwd=SCRIPT.parents[1],
            )
        )
    try:
        printed = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads(text.splitlines()[-1]) for text in printed]


def main(rank: int, folder: Path) -> None:
    from denoise_core import training
    from denoise_core.config import TrainConfig
    from denoise_core.devices import configure_tensorflow
    from denoise_core.presets import classic
    from denoise_core.training_data import TrainingData

    configure_tensorflow(threads=1, use_gpu=False)
    training.CHECKPOINT_STEPS = CHECKPOINT
    arguments = {"widths": (4, 6), "channels": 3, "norm": True}
    preset = classic("autoencoder", "", crop=16, batch=4, arguments=arguments, default_halo=4)
    preset = replace(preset, clip_norm=CLIP_NORM)
    config = TrainConfig(
        data=(str(folder / "train"),),
        validation_data=(str(folder / f"held{rank}"),),
        output="none",
        steps=STEPS,
        validate_steps=VALIDATE,
        workers=2,
    )
    trainer = training.Trainer(config, preset, TrainingData.index(config, preset), rank=rank)
    reports: list[dict[str, float]] = []
    trainer.run(lambda metrics, save: reports.append({**metrics, "step": trainer.progress.step}))
    seen = {
        "steps": [report["step"] for report in reports],
        "losses": [report["val_loss"] for report in reports if "val_loss" in report],
        "own": trainer.measure()[0],
        "best": trainer.progress.best_loss,
        "weights": [weight.tolist() for weight in trainer.model.get_weights()],
        # Adam's mean of squares: of all weights together, that of the gradients' norm.
        "squares": sum(
            float(v.numpy().sum()) for v in trainer.optimizer.variables if "velocity" in v.path
        ),
        "moved": [float(abs(w.numpy()).max()) for w in trainer.model.non_trainable_weights],
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
