"""What the speed_*.py scripts share: several ways to do one thing, timed in turns in one process.

Importing it also puts the project's root on sys.path.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.flags import checked

REPEATS = checked(int, lambda x: x >= 2, "be at least 2, because ratios have quartiles")


def finish(device: torch.device) -> None:
    """Wait until the device has done its work: a GPU's calls return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(
    ways: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Name -> seconds that each of its calls took; those of the warm-up are left out."""
    times = {name: [] for name in ways}
    for _ in range(warmup + repeats):
        for name, call in ways.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: seconds[warmup:] for name, seconds in times.items()}


def ratio(times: dict[str, list[float]], one: str, other: str) -> str:
    """The time of one way over that of another in the same turn: median and quartiles."""
    ratios = [a / b for a, b in zip(times[one], times[other])]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{one} / {other} {middle:.3f} ({low:.3f} .. {high:.3f})"


def medians(times: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {1000 * median(x):.0f} ms" for name, x in times.items())
