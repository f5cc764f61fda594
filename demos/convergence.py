"""How fast gradient descent is with a skip around attention and without it.

    python demos/convergence.py                    about half a minute; writes convergence.png

One attention layer and a ReLU MLP fit random targets by full-batch gradient descent, all weights
trained. In the first setting tokens are alike and attention nearly uniform, which makes the
attention's output Z nearly rank one: there the skip helps. In the second it does not.

Source: "Convergence of Gradient Descent on Transformers with Residual Connections" (arXiv
2506.05249), where the condition number kappa of Z sets the linear rate.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import files
import pictures

TOKENS, DIM, HIDDEN = 32, 64, 256
SETTINGS = {  # title -> (correlation of two tokens, factor on W_Q and W_K)
    "tokens alike (correlation 0.5), W_Q and W_K x 0.2": (0.5, 0.2),
    "tokens independent, W_Q and W_K x 1": (0.0, 1.0),
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


def descend(X: Tensor, Y: Tensor, weights: list[Tensor], skip: bool, limit: int) -> list[float]:
    """Losses ||relu(Z W_1) W_2 - Y||^2 / 2 of gradient descent, down to 1e-3 of the first.

    The step is 1 / (largest eigenvalue of the tangent kernel at the start).
    """
    weights = [w.clone().requires_grad_() for w in weights]

    def error(W_Q, W_K, W_V, W_1, W_2):
        return torch.relu(attention(X, W_Q, W_K, W_V, skip) @ W_1) @ W_2 - Y

    J = torch.func.jacrev(error, argnums=tuple(range(5)))(*weights)
    J = torch.cat([j.detach().reshape(Y.numel(), -1) for j in J], dim=1)
    eta = 1 / torch.linalg.eigvalsh(J @ J.T)[-1].item()
    losses = []
    while not losses or (losses[-1] > 1e-3 * losses[0] and len(losses) <= limit):
        loss = error(*weights).square().sum() / 2
        losses.append(loss.item())
        with torch.no_grad():
            for w, g in zip(weights, torch.autograd.grad(loss, weights)):
                w -= eta * g
    return losses


def draw_problem(seed: int, correlation: float, factor: float) -> tuple[Tensor, Tensor, list]:
    """(X, Y, [W_Q, W_K, W_V, W_1, W_2]) in float64; one scalar target a token."""
    g = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(rows, columns, generator=g, dtype=torch.float64)

    X = gaussian(1, DIM, math.sqrt(correlation)) + gaussian(TOKENS, DIM, math.sqrt(1 - correlation))
    W_Q, W_K = (gaussian(DIM, DIM, factor * DIM**-0.5) for _ in range(2))
    W_V, W_1 = gaussian(DIM, DIM, DIM**-0.5), gaussian(DIM, HIDDEN, DIM**-0.5)
    return X, gaussian(TOKENS, 1), [W_Q, W_K, W_V, W_1, gaussian(HIDDEN, 1, HIDDEN**-0.5)]


def compare(ax: plt.Axes, correlation: float, factor: float, seeds: int, limit: int) -> None:
    """A setting's losses with the skip and without, drawn and told."""
    steps = {False: [], True: []}
    for skip, name, arm in ((False, "without skip", "skipless-default"),
                            (True, "with skip", "residual")):  # fmt: skip
        kappas, colour = [], pictures.ARM_COLOURS[arm]
        for seed in range(seeds):
            X, Y, weights = draw_problem(seed, correlation, factor)
            losses = torch.tensor(descend(X, Y, weights, skip, limit))
            steps[skip].append(len(losses) - 1)
            ax.plot(losses / losses[0], color=colour, lw=0.9, label=None if seed else name)
            Z = attention(X, *weights[:3], skip)
            singular = torch.linalg.svdvals(Z)
            kappas.append((singular[0] / singular[-1]).item())
            if seed == 0:
                exact = linear_head_losses(Z, Y, singular[0].item() ** -2, len(losses) - 1)
                label = f"{name}: a linear head on Z alone, exact"
                ax.plot(exact / exact[0], ":", color=colour, lw=1.4, label=label)
        reached = f"{min(steps[skip])} .. {max(steps[skip])}"
        reached += f" (limit {limit})" * (max(steps[skip]) == limit)
        print(f"    {name:<12}  kappa of Z {min(kappas):.2g} .. {max(kappas):.2g}, steps {reached}")
    ratio = [a / b for a, b in zip(steps[False], steps[True])]
    print(f"    the skip makes it {min(ratio):.2f} .. {max(ratio):.2f} times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/demos"), help="the picture's folder")
    parser.add_argument("--seeds", type=cli.count, default=5, help="problems of each setting")
    parser.add_argument("--limit", type=cli.count, default=8000, help="steps at most")
    parser.error = cli.fail
    args = parser.parse_args()
    files.make_folder(args.out)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for ax, (title, (correlation, factor)) in zip(axes, SETTINGS.items()):
        print(f"{title}; steps to 1e-3 of the first loss, {args.seeds} seeds")
        compare(ax, correlation, factor, args.seeds, args.limit)
        ax.set(xscale="log", yscale="log", ylim=(5e-4, 1.5), xlabel="step of gradient descent")
        pictures.tidy(ax, title)
    axes[0].set_ylabel("loss / first loss")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    pictures.save_figure(figure, args.out / "convergence.png")
    print(f"{args.out}/convergence.png")


if __name__ == "__main__":
    main()
