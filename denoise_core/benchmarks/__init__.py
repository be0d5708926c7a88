"""What the project costs and gives on this machine: speed, quality, precision, memory, listing.

    config = ThroughputConfig(output="bench", megapixels=5)
    write_result(throughput.run(config), config)             # bench/throughput.md and .json

One file for each benchmark, each with its settings and a `run(settings) -> Result`. `processes.py`
starts `python -m jobs.denoise` as a user would and watches its processes, `child.py` runs a
function in a process of its own, `pictures.py` makes the images, `tables.py` writes what was
measured. Nothing here imports Ray; every figure is measured when it is written.
"""

from denoise_core.benchmarks.input import InputConfig
from denoise_core.benchmarks.listing import ListingConfig
from denoise_core.benchmarks.memory import MemoryConfig
from denoise_core.benchmarks.precision import PrecisionConfig
from denoise_core.benchmarks.quality import QualityConfig
from denoise_core.benchmarks.tables import Result, join_results, write_result
from denoise_core.benchmarks.throughput import ThroughputConfig

__all__ = [
    "InputConfig",
    "ListingConfig",
    "MemoryConfig",
    "PrecisionConfig",
    "QualityConfig",
    "Result",
    "ThroughputConfig",
    "join_results",
    "write_result",
]
