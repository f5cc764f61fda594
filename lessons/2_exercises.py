"""Which other ways of combining x and F(x) let a gradient through?

    python lessons/2_exercises.py    # half a minute; its picture goes to runs/lessons

The tutorial of lesson 1 leaves this as an exercise. Again F(x) = tanh(W x + b), of width 64. Three
questions for each combination, the first two in networks of 50 layers at initialisation:

1. How large is the loss's gradient at the first layer? The loss is the sum of the outputs with
   random signs (the plain sum behind a LayerNorm is 0, whatever the weights are).
2. How large are the outputs, as root mean square (rms)? The input has 1.
3. Through how many layers can Adam still halve the loss of 32 examples in 100 steps?

What to see: an untouched x carries the gradient. Where a gate, a matrix P or F itself multiplies x,
its factors multiply over the layers, and the gradient shrinks. The plain skip keeps the gradient
but lets the outputs grow; a small or learned factor on F, or a norm, prevents that.

Change and try: sigmoid(... - 6) as the gate. It starts almost closed, and the gradient comes back.
"""

import sys
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(1, f"{sys.path[0]}/..")  # the project's root
from support.errors import errors_in_one_line
from support.flags import lesson_flags
from support.pictures import ARM_COLOURS, plt, save_figure, tidy

LAYERS, WIDTH = 50, 64
DEPTHS = [2, 4, 8, 16, 32, 64]  # tried in question 3
COMBINATIONS = {  # layer, x and f = F(x) -> the next x
    "F(x)": lambda layer, x, f: f,
    "x + F(x)": lambda layer, x, f: x + f,
    "x + 0.1 F(x)": lambda layer, x, f: x + 0.1 * f,
    "x + g F(x), g learned from 0": lambda layer, x, f: x + layer.g * f,
    "(1 - T) x + T F(x), T a gate": lambda layer, x, f: x + torch.sigmoid(layer.P(x) - 2) * (f - x),
    "x F(x)": lambda layer, x, f: x * f,
    "x + dropout(F(x))": lambda layer, x, f: x + F.dropout(f, 0.5),
    "P x + F(x), P a matrix": lambda layer, x, f: F.linear(x, layer.P.weight) + f,
    "LayerNorm(x + F(x))": lambda layer, x, f: F.layer_norm(x + f, (WIDTH,)),
}


class Layer(nn.Module):
    """One layer, (example, WIDTH) -> (example, WIDTH); g and P serve those that need them."""

    def __init__(self, formula: str):
        super().__init__()
        self.combine = COMBINATIONS[formula]
        self.linear, self.P = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.g = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x, torch.tanh(self.linear(x)))


def gradient_and_size(formula: str, seed: int) -> tuple[float, float]:
    """Norm of the loss's gradient with respect to the input, and rms of the output."""
    torch.manual_seed(seed)
    layers = nn.Sequential(*(Layer(formula) for _ in range(LAYERS)))
    x = torch.randn(1, WIDTH, requires_grad=True)
    y = layers(x)
    signs = torch.randint(0, 2, (WIDTH,)) * 2.0 - 1
    [gradient] = torch.autograd.grad((y * signs).sum(), x)
    return gradient.norm().item(), y.square().mean().sqrt().item()


def learns(formula: str, depth: int, seed: int) -> bool:
    """Whether Adam halves the loss of 32 random inputs with random labels within 100 steps."""
    torch.manual_seed(seed)
    layers = nn.Sequential(*(Layer(formula) for _ in range(depth)), nn.Linear(WIDTH, 10))
    x, label = torch.randn(32, WIDTH), torch.randint(10, (32,))
    optimizer, losses = torch.optim.Adam(layers.parameters(), 1e-3), []
    for _ in range(100):
        losses.append(F.cross_entropy(layers(x), label))
        if losses[-1] < losses[0] / 2:
            return True
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return False


def greatest_depth(formula: str, seed: int) -> int:
    """The last of DEPTHS, each twice the one before, that comes before the first failure."""
    return next((d // 2 for d in DEPTHS if not learns(formula, d, seed)), DEPTHS[-1])


def main() -> None:
    args = lesson_flags(__doc__, seeds=20)
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained", sharey=True)
    print(f"median of {args.seeds} seeds{'gradient':>24}{'rms of output':>15}{'depth':>12}")
    for formula in COMBINATIONS:
        gradients, sizes = zip(*(gradient_and_size(formula, seed) for seed in range(args.seeds)))
        depths = [greatest_depth(formula, seed) for seed in range(min(2, args.seeds))]
        gradient, size, depth = map(median, (gradients, sizes, depths))
        print(f"{formula:<33}{gradient:9.2g}{size:15.2g}{', '.join(map(str, depths)):>12}")
        colour = ARM_COLOURS["residual" if depth == DEPTHS[-1] else "skipless-default"]
        for ax, values in zip(axes, (gradients, sizes, depths)):
            ax.plot(values, [formula] * len(values), color=colour, lw=5, alpha=0.3)
            ax.plot(median(values), formula, "o", color=colour)
    titles = "gradient at layer 1", "rms of the output (no dot: 0)", "depth that learns (blue: all)"
    for ax, title, left in zip(axes, titles, (1e-14, 1e-3, 1)):
        ax.set(xscale="log", xlim=(left, None))
        tidy(ax, title)
    axes[2].set_xscale("log", base=2)
    axes[0].invert_yaxis()
    save_figure(figure, args.out / "2_exercises.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller LAYERS or WIDTH"):
        main()
