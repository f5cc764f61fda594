"""Times the paper's init: one SVD per block, as here, against one SVD per head.

    python experiments/speed_init.py
    python experiments/speed_init.py --models base --repeats 9

One block is timed and multiplied by the depth. It depends on threads and on what else runs: on a
busy machine OMP_NUM_THREADS=1 is many times faster.
"""

import math
from functools import partial

import torch
from turns import REPEATS, in_turns, medians, ratio

from minskip import PRESETS, ViT, conditioned_init_, orthogonal_mlp_weight, value_output_projections
from support.errors import errors_in_one_line
from support.flags import Parser


def one_svd_per_head(dim: int, num_heads: int, alpha: float = 2.0, beta: float = 0.6) -> list:
    """The weights of one block, by the paper's formula as it stands."""
    d_h, weights = dim // num_heads, []
    for _ in range(num_heads):
        Z = torch.randn(dim, dim) / math.sqrt(dim)
        U, S, V_T = torch.linalg.svd(alpha * Z + beta * torch.eye(dim))
        weights += [U[:, :d_h] * S[:d_h].sqrt(), V_T.T[:, :d_h] * S[:d_h].sqrt()]
    weights += value_output_projections(dim)
    return [*weights, orthogonal_mlp_weight(dim, 4 * dim), orthogonal_mlp_weight(4 * dim, dim)]


def main() -> None:
    p = Parser(__doc__)
    sizes = ["small", "base", "large"]
    help = "sizes of the ViT [small base large]"
    p.add_argument("--models", nargs="+", choices=[*PRESETS], default=sizes, help=help)
    p.add_argument("--repeats", type=REPEATS, default=5, help="inits to time each way [5]")
    args = p.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in args.models:
        dim, depth, heads = PRESETS[name].values()
        block = ViT(dim=dim, depth=1, num_heads=heads, residual=False)
        ways = {
            "per block": partial(conditioned_init_, block),
            "per head": partial(one_svd_per_head, dim, heads),
        }
        times = in_turns(ways, args.repeats)
        whole = {way: [depth * x for x in seconds] for way, seconds in times.items()}
        print(f"{name:6s} {medians(whole)}; {ratio(times, 'per head', 'per block')}")


if __name__ == "__main__":
    with errors_in_one_line("take a smaller model"):
        main()
