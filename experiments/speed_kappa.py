"""Time of the probe's condition numbers of a block.

    python benchmarks/kappa_speed.py

Where K is formed whole, 17 tokens of width 64: an LU and Krylov steps, against an SVD, in turns,
with the ratio's quartiles. Where it is not, 197 tokens of width 384 (K would have 75,648 rows): the
time of the lower bounds.
"""

import sys
from pathlib import Path

import torch
from turns import in_turns, medians, ratio, two_or_more

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from jacobians import attention_jacobian, condition_number, conditioning, square_condition_number
from minskip import PRESETS, ViT, conditioned_init_


def block_of(name: str):
    size = PRESETS[name] | dict(depth=1)
    return conditioned_init_(ViT(**size, residual=False)).double().blocks[0]


def main() -> None:
    p = cli.Parser(__doc__)
    p.add_argument("--repeats", type=two_or_more, default=6, help="of each [6]")
    p.add_argument("--tokens", type=cli.count, default=197, help="of the larger K [197]")
    args = p.parse_args()
    block = block_of("nano")
    K = attention_jacobian(block.attention, torch.randn(17, 64, dtype=torch.float64))
    ways = {
        "LU": lambda: square_condition_number(K),
        "SVD": lambda: condition_number(torch.linalg.svdvals(K)),
    }
    times = in_turns(ways, args.repeats)
    print(f"{torch.get_num_threads()} threads; K of {len(K)} rows: {medians(times)}")
    print(ratio(times, "SVD", "LU"))
    block, x = block_of("small"), torch.randn(args.tokens, 384, dtype=torch.float64)
    name = f"{args.tokens} tokens of width 384"
    print(medians(in_turns({name: lambda: conditioning(block, x)}, args.repeats)))


if __name__ == "__main__":
    with cli.one_line_errors("ask for less"):
        main()
