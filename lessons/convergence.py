"""How fast gradient descent is with a skip around attention, around attention and MLP, and without.

    python demos/convergence.py                    some minutes; writes convergence.png

One to three layers, each of one head of attention and a ReLU MLP, fit random targets by full-batch
gradient descent. Where tokens are alike and attention is nearly uniform, the attention's output Z
is nearly of rank one: there the skip helps. Where they are not it may even cost.

Source: "Convergence of Gradient Descent on Transformers with Residual Connections" (arXiv
2506.05249), abstract: the condition number kappa of Z sets the linear rate, in one layer and in
several.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import engine
import files
import pictures
from jacobians import condition_number

TOKENS, DIM, HIDDEN = 32, 64, 256
ALIKE, INDEPENDENT = dict(correlation=0.5, factor=0.2), dict(correlation=0.0, factor=1.0)
SETTINGS = {  # correlation of two tokens, factor on W_Q and W_K, ...; see `draw_problem`
    "tokens alike": ALIKE,
    "tokens independent": INDEPENDENT,
    "tokens independent, only the MLP trained": INDEPENDENT | dict(trained=("W_1", "W_2")),
    "tokens alike, four targets": ALIKE | dict(targets=4),
    "tokens alike, two layers": ALIKE | dict(layers=2),
    "tokens alike, three layers": ALIKE | dict(layers=3),
}
SKIPS = {  # name -> (around attention, around the MLP too, the colour of)
    "no skip": (False, False, "skipless-default"),
    "around attention": (True, False, "skipless-identity"),
    "around both": (True, True, "residual"),
}


def attention(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, skip: bool) -> Tensor:
    """Z = softmax(X W_Q W_K^T X^T / sqrt(d)) X W_V, plus X with the skip. (token, dim)"""
    P = (X @ W_Q @ W_K.T @ X.T / math.sqrt(X.shape[1])).softmax(-1)
    return P @ X @ W_V + (X if skip else 0)


def linear_head_losses(Z: Tensor, Y: Tensor, eta: float, steps: int) -> Tensor:
    """||Z W_t - Y||^2, t = 0 .. steps, of gradient descent on ||Z W - Y||^2 / 2 from W_0 = 0.

    With Z = U S V^T:  sum_i (1 - eta s_i^2)^(2 t) (u_i^T Y)^2 + ||(I - U U^T) Y||^2
    """
    U, S, _ = torch.linalg.svd(Z, full_matrices=False)
    energy, rest = (U.T @ Y).square().sum(-1), (Y - U @ (U.T @ Y)).square().sum()
    t = torch.arange(steps + 1, dtype=Z.dtype)[:, None]
    return ((1 - eta * S**2) ** (2 * t) * energy).sum(-1) + rest


def network(X: Tensor, layers: list[dict], skip: bool, mlp_skip: bool) -> tuple[Tensor, Tensor]:
    """(Z of the last layer, (token, dim); the output, (token, target)).

    Each layer: Z = attention(X), with the skip + X;  relu(Z W_1) W_2, with the skip + Z. The last
    one's MLP has another width than Z: there the skip is a projection, Z R.
    """
    for number, W in enumerate(layers, start=1):
        Z = attention(X, W["W_Q"], W["W_K"], W["W_V"], skip)
        X = torch.relu(Z @ W["W_1"]) @ W["W_2"]
        if mlp_skip:
            X = X + (Z @ W["R"] if number == len(layers) else Z)
    return Z, X


def descend(X: Tensor, Y: Tensor, layers: list[dict], skips: tuple, trained, limit: int) -> list:
    """Losses ||network(X) - Y||^2 / 2 of gradient descent, down to 1e-3 of the first.

    trained: names of the weights that move. The step is 1 / (largest eigenvalue of the tangent
    kernel at the start).
    """
    moving = [{k: w.clone().requires_grad_() for k, w in W.items() if k in trained} for W in layers]

    def error(moving: list[dict]) -> Tensor:
        return network(X, [W | own for W, own in zip(layers, moving)], *skips)[1] - Y

    J = torch.func.jacrev(error)(moving)
    J = [j.detach().reshape(Y.numel(), -1) for of_layer in J for j in of_layer.values()]
    eta = 1 / torch.linalg.eigvalsh(sum(j @ j.T for j in J))[-1].item()
    weights = [w for of_layer in moving for w in of_layer.values()]
    losses = []
    while not losses or (losses[-1] > 1e-3 * losses[0] and len(losses) <= limit):
        loss = error(moving).square().sum() / 2
        losses.append(loss.item())
        with torch.no_grad():
            for w, g in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True)):
                if g is not None:  # R counts only where there is a skip
                    w -= eta * g
    return losses


def draw_problem(
    seed: int, correlation: float, factor: float, targets: int = 1, layers: int = 1
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """(X, (token, dim); Y, (token, target); each layer's weights by name), in float64."""
    g = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(rows, columns, generator=g, dtype=torch.float64)

    X = gaussian(1, DIM, math.sqrt(correlation)) + gaussian(TOKENS, DIM, math.sqrt(1 - correlation))
    Y, weights = gaussian(TOKENS, targets), []
    for number in range(1, layers + 1):
        out = targets if number == layers else DIM
        weights.append(
            dict(
                W_Q=gaussian(DIM, DIM, factor * DIM**-0.5),
                W_K=gaussian(DIM, DIM, factor * DIM**-0.5),
                W_V=gaussian(DIM, DIM, DIM**-0.5),
                W_1=gaussian(DIM, HIDDEN, DIM**-0.5),
                W_2=gaussian(HIDDEN, out, HIDDEN**-0.5),
                R=gaussian(DIM, out, DIM**-0.5),
            )
        )
    return X, Y, weights


def compare(axes: list[plt.Axes], title: str, setting: dict, seeds: int, limit: int) -> None:
    """A setting told and drawn: the losses on the first of the axes, dotted those of a linear head
    on the first seed's Z alone, exact; on the second steps against kappa(Z)^2."""
    trained = setting.get("trained", ("W_Q", "W_K", "W_V", "W_1", "W_2", "R"))
    shape = {k: v for k, v in setting.items() if k != "trained"}
    steps = {}
    print(title)
    for name, (skip, mlp_skip, arm) in SKIPS.items():
        kappas, counts, colour = [], [], pictures.ARM_COLOURS[arm]
        for seed in engine.progress(range(seeds), name):
            X, Y, layers = draw_problem(seed, **shape)
            losses = torch.tensor(descend(X, Y, layers, (skip, mlp_skip), trained, limit))
            Z, _ = network(X, layers, skip, mlp_skip)
            singular = torch.linalg.svdvals(Z)
            kappas.append(condition_number(singular))
            counts.append(len(losses) - 1)
            axes[0].plot(losses / losses[0], color=colour, lw=0.9)
            if seed == 0 and not mlp_skip:  # dotted
                exact = linear_head_losses(Z, Y, singular[0].item() ** -2, len(losses) - 1)
                axes[0].plot(exact / exact[0], ":", color=colour, lw=1.4)
        axes[1].scatter([k * k for k in kappas], counts, color=colour, s=14, label=name)
        steps[name] = counts
        reached = f"{min(counts)} .. {max(counts)}"
        reached += f" (limit {limit})" * (max(counts) == limit)
        print(f"    {name:<17} kappa of Z {min(kappas):.2g} .. {max(kappas):.2g}, steps {reached}")
    for name in list(SKIPS)[1:]:
        ratio = [a / b for a, b in zip(steps["no skip"], steps[name])]
        more = "more than " * (max(steps["no skip"]) == limit)
        print(f"    {name}: {more}{min(ratio):.2f} .. {max(ratio):.2f} times as fast as without")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demos"), help="the picture's folder")
    parser.add_argument("--seeds", type=cli.count, default=5, help="problems of each setting")
    parser.add_argument("--limit", type=cli.count, default=8000, help="steps at most")
    args = parser.parse_args()
    files.make_folder(args.out)
    print(f"steps to 1e-3 of the first loss, {args.seeds} seeds")
    size = dict(figsize=(17, 5.6), layout="constrained", sharey="row")
    figure, axes = plt.subplots(2, len(SETTINGS), **size)
    for column, (title, setting) in zip(axes.T, SETTINGS.items()):
        compare(column, title, setting, args.seeds, args.limit)
        column[0].set(xscale="log", yscale="log", ylim=(5e-4, 1.5), xlabel="step")
        column[1].set(xscale="log", yscale="log", xlabel="kappa(Z)^2")
        pictures.tidy(column[0], title.replace(", ", ",\n"))
        pictures.tidy(column[1], "")
    axes[0, 0].set_ylabel("loss / first loss")
    axes[1, 0].set_ylabel("steps to 1e-3 of the first loss")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    pictures.save_figure(figure, args.out / "convergence.png")
    print(f"{args.out}/convergence.png")


if __name__ == "__main__":
    main()
