"""What the benchmarks share: ways to do one thing are timed in turns, in one process."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli


def two_or_more(text: str) -> int:
    """A flag's number of repeats."""
    return cli.checked(text, int, lambda x: x > 1, "be at least 2: quartiles are made of them")


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Name -> seconds of each of its calls, after one that is not counted."""
    times = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, call in ways.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(times: dict[str, list[float]], peer: str, ours: str) -> str:
    """The peer's time as a multiple of ours: median and quartiles of the turns."""
    low, middle, high = quantiles([p / o for p, o in zip(times[peer], times[ours])], n=4)
    return f"{peer} / {ours} {middle:.2f} ({low:.2f} .. {high:.2f})"


def medians(times: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {1000 * median(x):.0f} ms" for name, x in times.items())
