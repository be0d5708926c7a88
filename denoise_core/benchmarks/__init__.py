"""What the project costs and gives here: speed, quality, precision, memory, listing, scale.

    config = ThroughputConfig(output="bench", megapixels=5)
    write_result(throughput.run(config), config)             # bench/throughput.md and .json

One file for each benchmark, each with its settings and a `run(settings) -> Result`. `processes.py`
starts `python -m jobs.denoise` as a user would and watches its processes, `child.py` runs a
function in a process of its own, `simulation.py` is a run without pixels, `pictures.py` makes the
images, `tables.py` writes what was measured. Nothing here imports Ray; every figure is measured
when it is written.
"""

from denoise_core.benchmarks.harm import HarmConfig
from denoise_core.benchmarks.input import InputConfig
from denoise_core.benchmarks.listing import ListingConfig
from denoise_core.benchmarks.memory import MemoryConfig
from denoise_core.benchmarks.precision import PrecisionConfig
from denoise_core.benchmarks.quality import QualityConfig
from denoise_core.benchmarks.scale import ScaleConfig
from denoise_core.benchmarks.simulation import SimulationConfig
from denoise_core.benchmarks.tables import Result, join_results, write_result
from denoise_core.benchmarks.throughput import ThroughputConfig

__all__ = [
    "HarmConfig",
    "InputConfig",
    "ListingConfig",
    "MemoryConfig",
    "PrecisionConfig",
    "QualityConfig",
    "Result",
    "ScaleConfig",
    "SimulationConfig",
    "ThroughputConfig",
    "join_results",
    "write_result",
]
