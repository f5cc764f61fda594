"""What a tutorial on residual connections claims, measured beside what it quotes.

    python demos/gradient_flow.py                  some seconds; writes gradient-flow.png

Its examples: a number multiplied a hundred times, a signal's norm over a hundred layers, and the
gradient at the first of 50 layers nn.Linear(64, 64) with the loss y.sum(), `tanh(layer(x))`
without skips and `x + 0.1 * tanh(layer(x))` with them.
"""

import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import files
import pictures

LAYERS, WIDTH = 50, 64


def gradients_by_layer(skip: bool, seed: int) -> list[float]:
    """Norm of the gradient of y.sum() by the input of each layer, and by y."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    h = [torch.randn(1, WIDTH, requires_grad=True)]
    for layer in layers:
        update = torch.tanh(layer(h[-1]))
        h.append(h[-1] + 0.1 * update if skip else update)
    return [g.norm().item() for g in torch.autograd.grad(h[-1].sum(), h)]


def report(what: str, measured: str, quoted: str, remark: str = "") -> None:
    print(f"{what:<43}{measured:>10}{quoted:>11}   {remark}".rstrip())


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demos"), help="the picture's folder")
    parser.add_argument("--seeds", type=cli.count, default=100, help="draws of the weights")
    args = parser.parse_args()
    files.make_folder(args.out)

    report("", "measured", "quoted")
    report("0.9^100", f"{0.9**100:.3e}", "2.656e-05")
    report("1.1^100", f"{1.1**100:.1f}", "13780.6")
    torch.manual_seed(0)
    norm = statistics.mean(torch.randn(1, 10, 512).norm().item() for _ in range(200))
    report("norm of randn(1, 10, 512)", f"{norm:.2f}", "226.4", "sqrt(5120) = 71.55")
    report("... after x = 0.9 * x, 100 times", f"{norm * 0.9**100:.1e}", "5.96e-08")
    report("... after x = x + 0.01 * x, 100 times", f"{norm * 1.01**100:.1f}", "preserved",
           f"1.01^100 = {1.01**100:.2f}")  # fmt: skip

    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    kinds = ((True, "with skips", "8.92", "residual"),
             (False, "without skips", "3e-8", "skipless-default"))  # fmt: skip
    for skip, name, quoted, arm in kinds:
        runs = torch.tensor([gradients_by_layer(skip, seed) for seed in range(args.seeds)])
        middle, least, most = runs.median(0).values, runs.amin(0), runs.amax(0)
        report(f"gradient at the first of 50, {name}", f"{middle[0]:.3g}", quoted,
               f"{least[0]:.2g} .. {most[0]:.2g} over {args.seeds} seeds")  # fmt: skip
        colour = pictures.ARM_COLOURS[arm]
        ax.plot(middle, color=colour, label=name)
        ax.fill_between(range(LAYERS + 1), least, most, color=colour, alpha=0.2, lw=0)
    ax.set_yscale("log")
    ax.set_xlabel("layers before it")
    ax.legend(frameon=False)
    pictures.tidy(
        ax, f"gradient of y.sum() by a layer's input, median and range of {args.seeds} seeds"
    )
    pictures.save_figure(figure, args.out / "gradient-flow.png")

    print(
        "Not so either: 'with a skip the gradient is at least 1' (with F(x) = -x it is 0), and\n"
        "'the chain is 1 plus a sum' (it is a product of factors 1 + dF_i).\n"
        f"{args.out}/gradient-flow.png"
    )


if __name__ == "__main__":
    main()
