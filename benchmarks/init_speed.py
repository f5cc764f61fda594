"""Seconds that conditioned_init_ takes, against the plain reading of its formula.

    python benchmarks/init_speed.py

The plain reading draws a Z and takes a dense SVD for every head; it is timed on one block and
multiplied by the depth. Both in one process, so the ratio holds whatever the machine does.
"""

import math
import time

import torch

from minskip import PRESETS, ViT, conditioned_init_, orthogonal_mlp_weight, value_output_projections


def plain_block(width: int, heads: int, alpha: float = 2.0, beta: float = 0.6) -> None:
    """The weights of one block, head by head."""
    d_h = width // heads
    for _ in range(heads):
        Z = torch.randn(width, width) / math.sqrt(width)
        U, S, Vh = torch.linalg.svd(alpha * Z + beta * torch.eye(width))
        U[:, :d_h] * S[:d_h].sqrt(), Vh[:d_h].T * S[:d_h].sqrt()
    value_output_projections(width)
    orthogonal_mlp_weight(width, 4 * width)
    orthogonal_mlp_weight(4 * width, width)


def seconds(function, *args) -> float:
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in ("small", "base", "large"):
        shape = PRESETS[name]
        ours = seconds(conditioned_init_, ViT(**shape, residual=False))
        plain = seconds(plain_block, shape["width"], shape["heads"]) * shape["depth"]
        print(f"{name:6s} {ours:6.2f} s, head by head {plain:6.2f} s, ratio {plain / ours:.1f}")


if __name__ == "__main__":
    main()
