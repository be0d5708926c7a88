"""Ray Train's `TensorflowTrainer` without TensorFlow in the processes that do not train.

`ray.train.tensorflow` imports TensorFlow, of which it needs but annotations until it is called. In
the driver, and once more in Ray Train's controller, that took seconds and 230 MB. Here it is given
stand-ins, which import TensorFlow when they are first used.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """TensorFlow, or something in it, that is imported when it is first asked for something."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions to a module
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        if sys.modules.get("tensorflow") is _TENSORFLOW:
            return _Later(path)
        root, *parts = path.split(".")
        return functools.reduce(getattr, parts, importlib.import_module(root))


_TENSORFLOW = _Later("tensorflow")
_imported = sys.modules.setdefault("tensorflow", _TENSORFLOW)
try:
    from ray.train.tensorflow import TensorflowConfig, TensorflowTrainer
finally:
    if _imported is _TENSORFLOW:
        del sys.modules["tensorflow"]

__all__ = ["TensorflowConfig", "TensorflowTrainer"]


class Config(TensorflowConfig):
    """Ray's own; where it is unpickled, as in the controller, this module is imported first."""
