"""Ray Train's trainer comes without TensorFlow; who uses more of Ray's module has it."""

from __future__ import annotations

import subprocess
import sys

from ray import cloudpickle

from denoise_core.pipelines.tensorflow_trainer import Config

# What Ray Train's controller does first; then a user's own code in a driver.
SCRIPT = """
import sys
from ray import cloudpickle
config = cloudpickle.loads(bytes.fromhex(sys.argv[1]))
print(type(config).__name__, config.framework.name, "tensorflow" in sys.modules)
from ray.train.tensorflow import TensorflowTrainer, tensorflow_checkpoint, train_loop_utils
print(TensorflowTrainer.__module__, "tensorflow" in sys.modules)
print(train_loop_utils.tf.data.AUTOTUNE, "tensorflow" in sys.modules)
import keras
print(tensorflow_checkpoint.keras.Model is keras.Model)
"""


def test_tensorflow_is_there_when_it_is_asked_for_and_not_before():
    pickled = cloudpickle.dumps(Config()).hex()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, pickled], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "Config TENSORFLOW False",
        "ray.train.v2.tensorflow.tensorflow_trainer False",
        "-1 True",
        "True",
    ]
