"""How the gradient grows with depth behind a LayerNorm, and behind what replaces it.

    python demos/apjn.py                           about a minute; writes apjn.png

J^{L,0}, the averaged partial Jacobian norm (see theory.py), of residual networks of up to 64 blocks
at initialisation: width 256, 16 tokens, ReLU, uniform attention (W_Q = 0), weights of variance
1 / fan_in, those of fc1 2 / fan_in. Points are measured, lines the recursion of theory.py.

With a LayerNorm J is a power of L, a straight line on two log axes; with DyT or Derf it grows like
exp(c sqrt(L)): a straight line of ln J against sqrt(L). Source: "Subcritical Signal Propagation at
Initialization in Normalization-Free Transformers" (arXiv 2604.11890), abstract.
"""

import functools
import math
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import engine
import files
import pictures
import theory
from jacobians import apjn
from minskip import ViT
from variants import vary_

TOKENS, DIM, IMAGES, SIGNS = 16, 256, 4, 2
GAINS = (1.0, 2.0, 1.0)  # of W_V W_O, fc1, fc2: what they multiply a variance by
FIRST = 8  # slopes are fitted from this depth on
KINDS = {  # name -> (--norm, a of DyT and Derf, the recursion's normaliser)
    "LayerNorm": ("layernorm", None, theory.layer_norm),
    "DyT, a = 0.5": ("dyt", 0.5, functools.partial(theory.dyt, a=0.5)),
    "DyT, a = 1": ("dyt", 1.0, theory.dyt),
    "Derf, a = 0.5": ("derf", 0.5, functools.partial(theory.derf, a=0.5)),
    "Derf, a = 1": ("derf", 1.0, theory.derf),
}


@torch.no_grad()
def network(depth: int, norm: str, a: float | None) -> ViT:
    model = vary_(ViT(16, 4, 0, dim=DIM, depth=depth, num_heads=4, pool="mean"), norm=norm)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        mlp.activation = nn.ReLU()
        layers = (attention.W_V, attention.W_O, mlp.fc1, mlp.fc2)
        for layer, gain in zip(layers, (1, 1, 2, 1)):
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
        nn.init.zeros_(attention.W_Q.weight)
        if a is not None:
            block.norm1.a.fill_(a)
            block.norm2.a.fill_(a)
    return model


def measured(model: ViT, depths: list[int]) -> list[float]:
    """J^{L,0} for each L in `depths`, of independent tokens of variance 1."""
    first = torch.randn(IMAGES, TOKENS, DIM, requires_grad=True)
    x, found = first, []
    for number, block in enumerate(model.blocks, start=1):
        x = block(x)
        if number in depths:
            found.append(apjn([first, x], SIGNS)[0])
    return found


def expected(normaliser, depths: list[int]) -> list[float]:
    four = dict(normaliser=normaliser, activation=theory.relu)
    return [theory.apjn_theory(L, TOKENS, 1.0, 0.0, GAINS, **four)[0][0] for L in depths]


def slope(J: list[float], depths: list[int], log: bool) -> float:
    """Of ln J against ln L, or against sqrt(L), by least squares over L >= FIRST."""
    points = [(L, j) for L, j in zip(depths, J) if L >= FIRST]
    x = Tensor([math.log(L) if log else math.sqrt(L) for L, _ in points])
    y = Tensor([math.log(j) for _, j in points])
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demos"), help="the picture's folder")
    parser.add_argument("--seeds", type=cli.count, default=5, help="draws of the weights")
    parser.add_argument("--depth", type=cli.count, default=64, help="blocks at most; 16 or more")
    args = parser.parse_args()
    if args.depth < 2 * FIRST:
        cli.fail(f"--depth {args.depth}: a slope needs {2 * FIRST} blocks or more")
    files.make_folder(args.out)
    depths = [2**i for i in range(int(math.log2(args.depth)) + 1)]
    colours = [pictures.ARM_COLOURS["residual"], *pictures.OTHER_COLOURS]

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    head = f"slope of ln J, {FIRST} blocks on"
    print(f"{head:<31}{f'measured, {args.seeds} seeds':>24}{'recursion':>11}")
    for (name, (norm, a, normaliser)), colour in zip(KINDS.items(), colours):
        runs = []
        for seed in engine.progress(range(args.seeds), name):
            torch.manual_seed(seed)
            runs.append(measured(network(depths[-1], norm, a), depths))
        J, theirs = torch.tensor(runs), expected(normaliser, depths)
        log = norm == "layernorm"
        slopes = [slope(run, depths, log) for run in runs]
        spread = f"{statistics.mean(slopes):.3f} ({min(slopes):.3f} .. {max(slopes):.3f})"
        theory_s = slope(theirs, depths, log)
        print(f"{name:<14} against {'ln L' if log else 'sqrt(L)':<9}{spread:>24}{theory_s:11.3f}")
        for ax, x in zip(axes, (depths, [math.sqrt(L) for L in depths])):
            ax.plot(x, theirs, color=colour, lw=1.2, label=name)
            middles, low, high = J.median(0).values, J.amin(0), J.amax(0)
            ax.errorbar(x, middles, [middles - low, high - middles], fmt="o", ms=4, color=colour)
    for ax, xlabel in zip(axes, ("blocks L", "sqrt(L)")):
        ax.set(yscale="log", xlabel=xlabel)
    axes[0].set_xscale("log")
    pictures.tidy(axes[0], "J: LayerNorm is straight here")
    pictures.tidy(axes[1], "J: DyT and Derf are straight here")
    axes[0].legend(frameon=False, fontsize=8)
    pictures.save_figure(figure, args.out / "apjn.png")
    print(f"{args.out}/apjn.png")


if __name__ == "__main__":
    main()
