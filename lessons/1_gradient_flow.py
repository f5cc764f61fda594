"""Does a gradient reach the first of fifty layers?

    python lessons/1_gradient_flow.py    # some seconds; its picture goes to runs/lessons

Backpropagation multiplies the derivatives of all layers. Here a layer is F(x) = tanh(W x + b), of
width 64 and with PyTorch's own init, alone or with a skip connection, x + 0.1 F(x). The loss is the
sum of the last layer's outputs. The table sets what we measure beside what a tutorial quotes.

What to see: without skips each layer keeps 0.57 of the gradient, and 0.57^50 leaves nothing to
learn from. With skips the derivative of a layer is 1 + 0.1 F', so the gradient arrives at its full
size. Two sentences found in many tutorials are wrong, though. "With a skip the gradient is at least
1": it is 0 where F(x) = -x. "The chain becomes 1 plus a sum": it stays a product, of factors
1 + F', and 1.1^100 = 13,781 is no better than 0.9^100 = 1 / 37,649.

Change and try: BRANCH = 1, the plain skip x + F(x). The gradient at the first layer is then about
ten times as large: skips can explode as well, which is why transformers have norms.
"""

import sys

import torch
from torch import nn

sys.path.insert(1, f"{sys.path[0]}/..")  # the project's root
from support.errors import errors_in_one_line
from support.flags import lesson_flags
from support.pictures import ARM_COLOURS, plt, save_figure, tidy

LAYERS, WIDTH, BRANCH = 50, 64, 0.1  # the skip is x + BRANCH F(x)


def gradients_by_layer(skip: bool, seed: int) -> list[float]:
    """Norm of the loss's gradient with respect to each layer's input, then to the output."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    h = [torch.randn(1, WIDTH, requires_grad=True)]  # (1, WIDTH) each
    for layer in layers:
        F = torch.tanh(layer(h[-1]))
        h.append(h[-1] + BRANCH * F if skip else F)
    return [g.norm().item() for g in torch.autograd.grad(h[-1].sum(), h)]


def main() -> None:
    args = lesson_flags(__doc__, seeds=100)
    torch.manual_seed(0)
    size = torch.randn(200, 10 * 512).norm(dim=1).mean().item()
    rows = [
        ("", "measured", "quoted", ""),
        ("norm of randn(1, 10, 512)", f"{size:.2f}", "226.4", "sqrt(5120) = 71.55"),
        ("... after 100 times 0.9 x", f"{size * 0.9**100:.1e}", "5.96e-08", ""),
        ("... after 100 times x + 0.01 x", f"{size * 1.01**100:.1f}", "preserved", "times 2.70"),
    ]
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for skip, name, quoted in ((True, "with skips", 8.92), (False, "without skips", 3e-8)):
        colour = ARM_COLOURS["residual" if skip else "skipless-default"]
        runs = torch.tensor([gradients_by_layer(skip, seed) for seed in range(args.seeds)])
        middle, low, high = runs.median(0).values, runs.amin(0), runs.amax(0)  # (LAYERS + 1,) each
        spread = f"{low[0]:.2g} .. {high[0]:.2g} over {args.seeds} seeds"
        rows.append((f"gradient at layer 1, {name}", f"{middle[0]:.3g}", f"{quoted:.3g}", spread))
        ax.plot(middle, color=colour, lw=2, label=f"{name}, median and range")
        ax.fill_between(range(LAYERS + 1), low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(0, quoted, "x", color=colour, label=f"{name}, quoted in the tutorial")
    for row in rows:
        print("{:<37}{:>10}{:>11}   {}".format(*row))
    ax.set(yscale="log", xlabel="layers passed on the way from the input")
    tidy(ax, "size of the gradient of the loss with respect to a layer's input")
    ax.legend(frameon=False, fontsize=8)
    save_figure(figure, args.out / "1_gradient_flow.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller LAYERS or WIDTH"):
        main()
