"""`python -m benchmarks`: prints every measurement, both sides taken in this run."""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.downloading import measure_downloading
from benchmarks.listing import measure_listing
from benchmarks.loading import measure_loading
from benchmarks.responsiveness import measure_responsiveness
from tests.daemon import SpawnedDaemon

MODEL = Path(".cache/models/SmolLM2-135M-Instruct").absolute()


def main() -> None:
    """Runs all benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"model folder ({MODEL.name})")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of loads, downloads (5)")
    options = parser.parse_args()
    model = options.model.absolute()
    console = Console()
    console.print(
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, "
        f"Python {platform.python_version()}, model {model.name}"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--allow-local", str(model.parent)]
        with SpawnedDaemon(Path(folder), arguments, {"LOADERD_LOG_LEVEL": "warning"}) as daemon:
            console.print(measure_loading(daemon, model, options.rounds))
            console.print(measure_responsiveness(daemon, model))
    console.print(measure_listing())
    console.print(measure_downloading(options.rounds))


if __name__ == "__main__":
    main()
