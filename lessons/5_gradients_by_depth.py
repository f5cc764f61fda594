"""How fast do gradients grow with depth behind a LayerNorm, and behind what replaces it?

    python lessons/5_gradients_by_depth.py    # half a minute; its picture goes to runs/lessons

We measure J, the averaged partial Jacobian norm (APJN): the mean square of the output's change
over that of a small random change of the input. The networks are residual and at initialisation,
with 1 to 64 blocks, width 256, 16 tokens, ReLU and uniform attention (W_Q = 0). Their norm is a
LayerNorm, or one of two functions that replace it: DyT, tanh(a x), and Derf, erf(a x).

Source: "Subcritical Signal Propagation at Initialization in Normalization-Free Transformers"
(arXiv 2604.11890). The recursion is that of beyond/theory.py.

What to see: a LayerNorm divides by the size of the stream, which grows from block to block. So late
blocks change little, and J grows only as a power of the depth L, a straight line on the left. DyT
and Derf only cut off what is large: J grows like exp(c sqrt(L)), a straight line on the right.

Change and try: a = 0.25 for DyT in KINDS, in both places. As tanh(a x) has the derivative a at 0,
the slope is smaller, and 64 blocks amplify 17 times, less than the 45 with a LayerNorm.
"""

import math
import sys
from statistics import linear_regression, mean

import torch
from torch import Tensor, nn

sys.path.insert(1, f"{sys.path[0]}/..")  # the project's root
from beyond.theory import apjn_theory, derf, dyt, layer_norm, relu
from beyond.variants import vary_
from minskip import ViT
from support.errors import errors_in_one_line
from support.flags import lesson_flags
from support.pictures import OTHER_COLOURS, plt, save_figure, tidy

TOKENS, DIM, IMAGES = 16, 256, 4
DEPTHS = [1, 2, 4, 8, 16, 32, 64]
GAINS = (1.0, 2.0, 1.0)  # of W_V W_O, fc1, fc2: the factor by which each multiplies a variance
KINDS = {  # name -> (the norm in beyond/variants.py, a, that in theory.py)
    "LayerNorm": ("layernorm", None, layer_norm),
    "DyT, a = 0.5": ("dyt", 0.5, lambda q, p: dyt(q, p, a=0.5)),
    "DyT, a = 1": ("dyt", 1.0, dyt),
    "Derf, a = 1": ("derf", 1.0, derf),
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
    """J = E ||dy/dx||_F^2 / (n d), the mean of ||v^T dy/dx||^2 / (n d) over random signs v."""
    signs = [torch.randint_like(y, 2) * 2 - 1 for _ in range(probes)]
    gradients = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in signs]
    return mean(gradient.square().mean().item() for gradient in gradients)


def measured(norm: str, a: float | None, seed: int) -> list[float]:
    """J after each of DEPTHS, for independent input tokens of variance 1."""
    torch.manual_seed(seed)
    model = network(DEPTHS[-1], norm, a)
    x = [torch.randn(IMAGES, TOKENS, DIM, requires_grad=True)]
    for block in model.blocks:
        x.append(block(x[-1]))
    return [apjn(x[0], x[L]) for L in DEPTHS]


def expected(normaliser) -> list[float]:
    return [apjn_theory(L, TOKENS, 1, 0, GAINS, True, normaliser, relu)[0][0] for L in DEPTHS]


def slope(J: list[float], of_depth) -> float:
    """Of ln J against of_depth(L), by least squares over L >= 8."""
    points = [(of_depth(L), math.log(j)) for L, j in zip(DEPTHS, J) if L >= 8]
    return linear_regression(*zip(*points)).slope


def main() -> None:
    args = lesson_flags(__doc__, seeds=3)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    print(f"{'slope of ln J':<26}{f'measured, {args.seeds} seeds':>24}{'recursion':>11}")
    for (name, (norm, a, normaliser)), colour in zip(KINDS.items(), OTHER_COLOURS):
        runs = [measured(norm, a, seed) for seed in range(args.seeds)]
        of_depth, words = (math.log, "ln L") if a is None else (math.sqrt, "sqrt(L)")
        slopes, line = [slope(run, of_depth) for run in runs], expected(normaliser)
        spread = f"{mean(slopes):.3f} ({min(slopes):.3f} .. {max(slopes):.3f})"
        print(f"{name:<12} over {words:<8}{spread:>24}{slope(line, of_depth):11.3f}")
        for ax, x in ((left, DEPTHS), (right, [math.sqrt(L) for L in DEPTHS])):
            ax.semilogy(x, line, color=colour, label=name)
            ax.semilogy(x, torch.tensor(runs).T, ".", color=colour)
    left.set_xscale("log", base=2)
    left.legend(frameon=False, fontsize=8)
    tidy(left, "J, against depth L; dots: measured, lines: the recursion")
    tidy(right, "J, against sqrt(L)")
    save_figure(figure, args.out / "5_gradients_by_depth.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller DIM"):
        main()
