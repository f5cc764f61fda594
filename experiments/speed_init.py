"""Seconds that the paper's init takes: ours, one SVD a block, against an SVD a head.

    python benchmarks/init_speed.py
    python benchmarks/init_speed.py --models base --repeats 9

Each is timed on one block, in turns, and multiplied by the depth: medians, and the range of the
ratio. All of it depends on the machine, its threads and what else runs there (on a busy machine
OMP_NUM_THREADS=1 is many times faster).
"""

import math
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from turns import in_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import minskip
from minskip import PRESETS, ViT, conditioned_init_


def an_svd_a_head(dim: int, num_heads: int, alpha: float = 2.0, beta: float = 0.6) -> list:
    """The weights of one block, by the formula as it stands."""
    d_h, weights = dim // num_heads, []
    for _ in range(num_heads):
        Z = torch.randn(dim, dim) / math.sqrt(dim)
        U, S, V_T = torch.linalg.svd(alpha * Z + beta * torch.eye(dim))
        weights += [U[:, :d_h] * S[:d_h].sqrt(), V_T.T[:, :d_h] * S[:d_h].sqrt()]
    weights += minskip.value_output_projections(dim)
    for sizes in ((dim, 4 * dim), (4 * dim, dim)):
        weights.append(minskip.orthogonal_mlp_weight(*sizes))
    return weights


def main() -> None:
    p = cli.Parser(__doc__)
    sizes = ["small", "base", "large"]
    p.add_argument("--models", nargs="+", choices=list(PRESETS), default=sizes, help="[S, B, L]")
    p.add_argument("--repeats", type=cli.count, default=5, help="of each [5]")
    args = p.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.repeats} repeats")
    for name in args.models:
        dim, depth, heads = PRESETS[name].values()
        block = ViT(dim=dim, depth=1, num_heads=heads, residual=False)
        ways = dict(
            ours=partial(conditioned_init_, block), plain=partial(an_svd_a_head, dim, heads)
        )
        ours, plain = in_turns(ways, args.repeats).values()
        ratios = sorted(b / a for a, b in zip(ours, plain))
        print(
            f"{name:6s} ours {depth * median(ours):6.2f} s, an SVD a head "
            f"{depth * median(plain):6.2f} s, "
            f"ratio {median(ratios):.1f} ({ratios[0]:.1f} .. {ratios[-1]:.1f})"
        )


if __name__ == "__main__":
    with cli.one_line_errors("ask for less"):
        main()
