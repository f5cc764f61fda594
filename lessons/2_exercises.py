"""Which other ways of combining x and F(x) let a gradient through?

    python lessons/2_exercises.py                  half a minute; writes 2_exercises.png

The tutorial of lesson 1 leaves this as an exercise. Again F(x) = tanh(W x + b), of width 64. Three
questions for each combination, in networks of 50 layers at initialisation unless said otherwise:

1. How large is the loss's gradient at the first layer? The loss is the sum of the outputs with
   random signs (the plain sum behind a LayerNorm is 0, whatever the weights are).
2. How large are the outputs, as root mean square (rms)? The input has 1.
3. Through how many layers can Adam still halve the loss of 32 examples in 100 steps?

What to see: an untouched x carries the gradient. Where a gate, a matrix P or F itself multiplies x,
its factors multiply over the layers, and the gradient shrinks. The plain skip keeps the gradient
but lets the outputs grow; a small or learned factor on F, or a norm, prevents that.

Change and try: the 2 in the highway's sigmoid(... - 2). With 6 its gates start almost closed, x
passes undisturbed, and the gradient at the first layer comes back.
"""

import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.errors import errors_in_one_line
from support.files import make_folder
from support.flags import COUNT, PATH, Parser
from support.pictures import ARM_COLOURS, save_figure, tidy

LAYERS, WIDTH = 50, 64
DEPTHS = [2, 4, 8, 16, 32, 64]  # tried in question 3
STEPS = 100
COMBINATIONS = {  # layer, x and F(x) -> the next x
    "F(x)": lambda layer, x, f: f,
    "x + F(x)": lambda layer, x, f: x + f,
    "x + 0.1 F(x)": lambda layer, x, f: x + 0.1 * f,
    "x + g F(x), g learned from 0": lambda layer, x, f: x + layer.g * f,
    "(1 - T) x + T F(x), T a gate": lambda layer, x, f: x + layer.gate(x) * (f - x),
    "x F(x)": lambda layer, x, f: x * f,
    "x + dropout(F(x))": lambda layer, x, f: x + F.dropout(f, 0.5),
    "P x + F(x), P a matrix": lambda layer, x, f: F.linear(x, layer.other.weight) + f,
    "LayerNorm(x + F(x))": lambda layer, x, f: F.layer_norm(x + f, (WIDTH,)),
}


class Layer(nn.Module):
    """One layer, (example, WIDTH) -> (example, WIDTH); g and `other` serve those that need them."""

    def __init__(self, formula: str):
        super().__init__()
        self.combine = COMBINATIONS[formula]
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.g = nn.Parameter(torch.zeros(()))

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.other(x) - 2)  # a highway network's T: it closes the skip too

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x, torch.tanh(self.linear(x)))


def network(formula: str, depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(Layer(formula) for _ in range(depth)))


def gradient_and_size(formula: str, seed: int) -> tuple[float, float]:
    """Norm of the loss's gradient with respect to the input, and rms of the output."""
    layers = network(formula, LAYERS, seed)
    x = torch.randn(1, WIDTH, requires_grad=True)
    y = layers(x)
    signs = torch.randint(0, 2, (WIDTH,)) * 2.0 - 1
    [gradient] = torch.autograd.grad((y * signs).sum(), x)
    return gradient.norm().item(), y.square().mean().sqrt().item()


def learns(formula: str, depth: int, seed: int) -> bool:
    """Whether Adam halves the loss of 32 random inputs with random labels within STEPS steps."""
    layers = network(formula, depth, seed).append(nn.Linear(WIDTH, 10))
    x, label = torch.randn(32, WIDTH), torch.randint(10, (32,))
    optimizer, losses = torch.optim.Adam(layers.parameters(), 1e-3), []
    for _ in range(STEPS):
        losses.append(F.cross_entropy(layers(x), label))
        if losses[-1] < losses[0] / 2:
            return True
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return False


def greatest_depth(formula: str, seed: int) -> int:
    """The last of DEPTHS, each twice the one before, that comes before the first failure."""
    failed = next((d for d in DEPTHS if not learns(formula, d, seed)), 2 * DEPTHS[-1])
    return failed // 2


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    parser.add_argument("--seeds", type=COUNT, default=20, help="draws; of depths <= 2 [20]")
    args = parser.parse_args()
    make_folder(args.out)
    print(f"median of {args.seeds} seeds{'gradient':>24}{'rms of output':>15}{'depth':>12}")
    measured = {}
    for formula in COMBINATIONS:
        pairs = [gradient_and_size(formula, seed) for seed in range(args.seeds)]
        gradients, sizes = zip(*pairs)
        depths = [greatest_depth(formula, seed) for seed in range(min(2, args.seeds))]
        measured[formula] = gradients, sizes, depths
        middle, size = statistics.median(gradients), statistics.median(sizes)
        print(f"{formula:<33}{middle:9.2g}{size:15.2g}{', '.join(map(str, depths)):>12}")

    figure, axes = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained", sharey=True)
    panels = (  # title and the smallest value drawn; an arrow to the left stands for less
        (f"gradient at the first of {LAYERS} layers", 1e-14),
        (f"rms of the output of {LAYERS} layers", 1e-3),
        (f"greatest depth that learns, of {DEPTHS[0]} .. {DEPTHS[-1]}", 1),
    )
    for column, (ax, (title, floor)) in enumerate(zip(axes, panels)):
        for row, found in enumerate(measured.values()):
            deepest = statistics.median(found[2]) == DEPTHS[-1]
            colour = ARM_COLOURS["residual" if deepest else "skipless-default"]
            values = [max(value, floor) for value in found[column]]
            middle = statistics.median(values)
            ax.plot(values, [row] * len(values), color=colour, lw=5, alpha=0.3)
            ax.plot(middle, row, "o" if middle > floor else "<", color=colour)
        ax.set_xscale("log")
        tidy(ax, title)
    axes[2].set_xticks(DEPTHS, DEPTHS)
    axes[2].minorticks_off()
    figure.supxlabel(
        f"blue: learns through {DEPTHS[-1]} layers; bars: range over seeds", fontsize=9
    )
    axes[0].set_yticks(range(len(measured)), list(measured))
    axes[0].invert_yaxis()
    save_figure(figure, args.out / "2_exercises.png")
    print(f"{args.out}/2_exercises.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller LAYERS or WIDTH"):
        main()
