"""Does a gradient reach the first of fifty layers?

    python lessons/1_gradient_flow.py              some seconds; writes 1_gradient_flow.png

Backpropagation multiplies the derivatives of all layers. Here a layer is F(x) = tanh(W x + b), of
width 64 and with PyTorch's own init: once alone, x -> F(x), and once with a skip connection,
x -> x + 0.1 F(x). The loss is the sum of the last layer's outputs. A tutorial on residual
connections makes this experiment, and the table sets what we measure beside what it quotes.

What to see: without skips each layer keeps 0.57 of the gradient, and 0.57^50 leaves nothing to
learn from. With skips the derivative of a layer is 1 + 0.1 F', so the gradient
arrives at its full size. Two sentences found in many tutorials are wrong, though. "With a skip the
gradient is at least 1": it is 0 where F(x) = -x. "The chain becomes 1 plus a sum": it stays a
product, of factors 1 + F', and 1.1^100 is as far from 1 as 0.9^100 is.

Change and try: BRANCH = 1, the plain skip x + F(x). The gradient at the first layer is then about
ten times as large: skips can explode as well, which is why transformers have norms.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.errors import errors_in_one_line
from support.files import make_folder
from support.flags import COUNT, PATH, Parser
from support.pictures import ARM_COLOURS, save_figure, tidy

LAYERS, WIDTH = 50, 64
BRANCH = 0.1  # x + BRANCH F(x)


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
    parser = Parser(__doc__)
    parser.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    parser.add_argument("--seeds", type=COUNT, default=100, help="draws of the weights [100]")
    args = parser.parse_args()
    make_folder(args.out)

    torch.manual_seed(0)
    size = torch.randn(200, 10 * 512).norm(dim=1).mean().item()
    rows = [
        ("", "measured", "quoted", ""),
        ("0.9^100", f"{0.9**100:.3e}", "2.656e-05", ""),
        ("1.1^100", f"{1.1**100:.1f}", "13780.6", ""),
        ("norm of randn(1, 10, 512)", f"{size:.2f}", "226.4", "sqrt(5120) = 71.55"),
        ("... after 100 times x = 0.9 x", f"{size * 0.9**100:.1e}", "5.96e-08", ""),
        ("... after 100 times x = x + 0.01 x", f"{size * 1.01**100:.1f}", "preserved",
         f"1.01^100 = {1.01**100:.2f}"),
    ]  # fmt: skip
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for skip, name, quoted, arm in (
        (True, "with skips", 8.92, "residual"),
        (False, "without skips", 3e-8, "skipless-default"),
    ):
        runs = torch.tensor([gradients_by_layer(skip, seed) for seed in range(args.seeds)])
        middle, low, high = runs.median(0).values, runs.amin(0), runs.amax(0)  # (LAYERS + 1,) each
        spread = f"{low[0]:.2g} .. {high[0]:.2g} over {args.seeds} seeds"
        rows.append((f"gradient at layer 1, {name}", f"{middle[0]:.3g}", f"{quoted:.3g}", spread))
        colour = ARM_COLOURS[arm]
        ax.plot(middle, color=colour, lw=2)
        ax.fill_between(range(LAYERS + 1), low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(0, quoted, "x", color=colour, ms=8, clip_on=False)
        ax.text(LAYERS / 2, middle[LAYERS // 2] * 8, name, color=colour, ha="right")
    for words in rows:
        print("{:<37}{:>10}{:>11}   {}".format(*words).rstrip())

    ax.text(1, 3e-8, "quoted in the tutorial", fontsize=8, va="center")
    ax.set(yscale="log", xlabel="layers passed on the way from the input", ylim=(None, 1e3))
    tidy(ax, f"size of the gradient of the loss with respect to a layer's input\n"
         f"(median and range of {args.seeds} seeds)")  # fmt: skip
    save_figure(figure, args.out / "1_gradient_flow.png")
    print(f"{args.out}/1_gradient_flow.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller LAYERS or WIDTH"):
        main()
