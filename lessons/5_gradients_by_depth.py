"""How fast do gradients grow with depth behind a LayerNorm, and behind what replaces it?

    python lessons/5_gradients_by_depth.py         under a minute; writes 5_gradients_by_depth.png

We measure J, the averaged partial Jacobian norm (APJN): the mean square of the output's change
over that of a small random change of the input. The networks are residual and at initialisation,
with 1 to 64 blocks, width 256, 16 tokens, ReLU and uniform attention (W_Q = 0). Their norm is a
LayerNorm, or one of two functions that replace it: DyT, tanh(a x), and Derf, erf(a x).

Source: "Subcritical Signal Propagation at Initialization in Normalization-Free Transformers"
(arXiv 2604.11890). The lines in the picture are the recursion of beyond/theory.py.

What to see: a LayerNorm divides by the size of the stream, which grows from block to block. So late
blocks change little, and J grows only as a power of the depth L, a straight line on the left. DyT
and Derf only cut off what is large: J grows like exp(c sqrt(L)), a straight line on the right.

Change and try: another a in KINDS. A smaller a gives a smaller slope, because tanh(a x) has the
derivative a at 0; with DyT and a = 0.25 even 64 blocks amplify less than with a LayerNorm, 17
times against 45, though the law stays the same.
"""

import functools
import math
import sys
from pathlib import Path
from statistics import linear_regression, mean

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from beyond import theory
from beyond.variants import vary_
from minskip import ViT
from support.errors import errors_in_one_line
from support.files import make_folder
from support.flags import COUNT, PATH, Parser
from support.pictures import ARM_COLOURS, OTHER_COLOURS, save_figure, tidy

TOKENS, DIM, IMAGES = 16, 256, 4
DEPTHS = [1, 2, 4, 8, 16, 32, 64]
FIRST = 8  # slopes are fitted from this depth on
GAINS = (1.0, 2.0, 1.0)  # of W_V W_O, fc1, fc2: the factor by which each multiplies a variance
KINDS = {  # name -> (the norm in variants.py, a, the norm in theory.py)
    "LayerNorm": ("layernorm", None, theory.layer_norm),
    "DyT, a = 0.5": ("dyt", 0.5, functools.partial(theory.dyt, a=0.5)),
    "DyT, a = 1": ("dyt", 1.0, theory.dyt),
    "Derf, a = 1": ("derf", 1.0, theory.derf),
}


@torch.no_grad()
def network(depth: int, norm: str, a: float | None) -> ViT:
    model = vary_(ViT(16, 4, 0, dim=DIM, depth=depth, num_heads=4, pool="mean"), norm=norm)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        mlp.activation = nn.ReLU()
        nn.init.zeros_(attention.W_Q.weight)
        # Variance 1 / fan_in, twice that in front of the ReLU, which halves it.
        for layer, gain in ((attention.W_V, 1), (attention.W_O, 1), (mlp.fc1, 2), (mlp.fc2, 1)):
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
        if a is not None:
            block.norm1.a.fill_(a)
            block.norm2.a.fill_(a)
    return model


def apjn(x: Tensor, y: Tensor, probes: int = 2) -> float:
    """J = E ||dy/dx||_F^2 / (n d), for x and y of (image, token, dim).

    With v of random signs E ||v^T dy/dx||^2 is ||dy/dx||_F^2: a backward pass per probe.
    """
    total = 0.0
    for _ in range(probes):
        v = torch.randint_like(y, 2) * 2 - 1
        [gradient] = torch.autograd.grad(y, x, v, retain_graph=True)
        total += gradient.square().mean().item()
    return total / probes


def measured(model: ViT) -> list[float]:
    """J after each of DEPTHS, for independent input tokens of variance 1."""
    first = torch.randn(IMAGES, TOKENS, DIM, requires_grad=True)
    x, found = first, []
    for number, block in enumerate(model.blocks, start=1):
        x = block(x)
        if number in DEPTHS:
            found.append(apjn(first, x))
    return found


def expected(normaliser, activation=theory.relu) -> list[float]:
    how = dict(normaliser=normaliser, activation=activation)
    return [theory.apjn_theory(L, TOKENS, 1.0, 0.0, GAINS, **how)[0][0] for L in DEPTHS]


def slope(J: list[float], of_depth) -> float:
    """Of ln J against of_depth(L), by least squares over L >= FIRST."""
    points = [(of_depth(L), math.log(j)) for L, j in zip(DEPTHS, J) if L >= FIRST]
    return linear_regression(*zip(*points)).slope


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    parser.add_argument("--seeds", type=COUNT, default=3, help="draws of the weights [3]")
    args = parser.parse_args()
    make_folder(args.out)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    print(f"{'slope of ln J':<26}{f'measured, {args.seeds} seeds':>24}{'recursion':>11}")
    for (name, (norm, a, normaliser)), colour in zip(
        KINDS.items(), [ARM_COLOURS["residual"], *OTHER_COLOURS]
    ):
        runs = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            runs.append(measured(network(DEPTHS[-1], norm, a)))
        of_depth, words = (math.log, "ln L") if a is None else (math.sqrt, "sqrt(L)")
        slopes, line = [slope(run, of_depth) for run in runs], expected(normaliser)
        spread = f"{mean(slopes):.3f} ({min(slopes):.3f} .. {max(slopes):.3f})"
        print(f"{name:<12} over {words:<8}{spread:>24}{slope(line, of_depth):11.3f}")
        for ax, x in zip(axes, (DEPTHS, [math.sqrt(L) for L in DEPTHS])):
            ax.plot(x, line, color=colour, lw=1.2)
            ax.plot(x, torch.tensor(runs).T, "o", ms=4, color=colour, alpha=0.6)
            ax.text(x[-1] * 1.02, line[-1], f"  {name}", color=colour, fontsize=9, va="center")
    axes[0].set(xscale="log", yscale="log", xlabel="blocks L", xlim=(0.9, 200))
    axes[0].set_xticks(DEPTHS, DEPTHS)
    axes[0].minorticks_off()
    axes[1].set(yscale="log", xlabel="sqrt(L)", xlim=(0.8, 10))
    tidy(axes[0], "J, against depth: a straight line for LayerNorm")
    tidy(axes[1], "J, against sqrt(depth): straight lines for DyT and Derf")
    figure.supxlabel("dots: measured, one per seed; lines: the recursion", fontsize=9)
    save_figure(figure, args.out / "5_gradients_by_depth.png")
    print(f"{args.out}/5_gradients_by_depth.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller DIM"):
        main()
