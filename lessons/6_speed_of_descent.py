"""Does a skip connection make gradient descent faster?

    python lessons/6_speed_of_descent.py           under a minute; writes 6_speed_of_descent.png

One layer, a head of attention with or without a skip and then a ReLU MLP, fits random targets by
full-batch gradient descent on all weights. Two kinds of input: tokens that are alike (correlation
0.5, and small W_Q and W_K, so attention is nearly uniform) and independent tokens.

Source: "Convergence of Gradient Descent on Transformers with Residual Connections" (arXiv
2506.05249): the speed is set by the condition number kappa of Z, the attention's output. For a
linear head trained on a fixed Z this is exact: the error along the i-th singular direction of Z
shrinks by 1 - eta s_i^2 per step, so the smallest s_i takes about kappa^2 steps.

What to see: where tokens are alike, attention without a skip returns nearly one and the same token
(kappa of Z near a million), and the skip makes descent several times faster. Where they are
independent, the skip lowers kappa as well, and yet descent without it is faster: when all weights
are trained, Z changes, and its kappa at the start does not tell the whole story.

Change and try: TRAINED = ["W_1", "W_2"], the MLP alone. Then the skip helps for independent tokens
too, as Z no longer changes and its kappa decides.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.errors import errors_in_one_line
from support.files import make_folder
from support.flags import COUNT, PATH, Parser
from support.pictures import ARM_COLOURS, save_figure, tidy

TOKENS, DIM, HIDDEN = 32, 64, 256
# correlation of two tokens, factor on W_Q and W_K
INPUTS = {"tokens alike": (0.5, 0.2), "tokens independent": (0.0, 1.0)}
SKIPS = {"without skip": "skipless-default", "with skip": "residual"}  # -> colour
TRAINED = ["W_Q", "W_K", "W_V", "W_1", "W_2"]
GOAL = 1e-3  # of the first loss


def draw_problem(seed: int, correlation: float, factor: float) -> tuple:
    """Inputs X (token, dim), targets Y (token, 1) and the weights by name, in float64."""
    g = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int, std: float) -> Tensor:
        return std * torch.randn(rows, columns, generator=g, dtype=torch.float64)

    common = gaussian(1, DIM, math.sqrt(correlation))
    X = common + gaussian(TOKENS, DIM, math.sqrt(1 - correlation))
    Y = gaussian(TOKENS, 1, 1.0)
    weights = dict(
        W_Q=gaussian(DIM, DIM, factor * DIM**-0.5),
        W_K=gaussian(DIM, DIM, factor * DIM**-0.5),
        W_V=gaussian(DIM, DIM, DIM**-0.5),
        W_1=gaussian(DIM, HIDDEN, DIM**-0.5),
        W_2=gaussian(HIDDEN, 1, HIDDEN**-0.5),
    )
    return X, Y, weights


def attention(X: Tensor, W: dict[str, Tensor], skip: bool) -> Tensor:
    """Z = softmax(X W_Q W_K^T X^T / sqrt(d)) X W_V, plus X with the skip; (token, dim)."""
    P = (X @ W["W_Q"] @ W["W_K"].T @ X.T / math.sqrt(DIM)).softmax(dim=-1)
    return P @ X @ W["W_V"] + skip * X


def descend(X: Tensor, Y: Tensor, W: dict[str, Tensor], skip: bool, limit: int) -> list[float]:
    """Losses of gradient descent, from the first to the goal or to the limit of steps.

    The step is 1 / (largest eigenvalue of the tangent kernel J J^T at the start), J being the
    derivative of all errors with respect to all trained weights: the largest that is safe there.
    """
    trained = {name: W[name].clone().requires_grad_() for name in TRAINED}

    def error(trained: dict[str, Tensor]) -> Tensor:
        V = W | trained
        return torch.relu(attention(X, V, skip) @ V["W_1"]) @ V["W_2"] - Y  # (token, 1)

    J = torch.cat([j.flatten(2)[:, 0] for j in torch.func.jacrev(error)(trained).values()], dim=1)
    eta = 1 / torch.linalg.matrix_norm(J.detach(), ord=2) ** 2
    losses = []
    while not losses or (losses[-1] > GOAL * losses[0] and len(losses) <= limit):
        loss = error(trained).square().sum() / 2
        losses.append(loss.item())
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(trained.values()))
            for w, gradient in zip(trained.values(), gradients):
                w -= eta * gradient
    return losses


def linear_head_losses(Z: Tensor, Y: Tensor, eta: float, steps: int) -> Tensor:
    """||Z W_t - Y||^2, t = 0 .. steps, of gradient descent on ||Z W - Y||^2 / 2 from W_0 = 0.

    With Z = U S V^T:  sum_i (1 - eta s_i^2)^(2 t) (u_i^T Y)^2 + ||(I - U U^T) Y||^2
    """
    U, S, _ = torch.linalg.svd(Z, full_matrices=False)
    energy, rest = (U.T @ Y).square().sum(-1), (Y - U @ (U.T @ Y)).square().sum()
    t = torch.arange(steps + 1, dtype=Z.dtype)[:, None]  # (step, 1)
    return ((1 - eta * S**2) ** (2 * t) * energy).sum(-1) + rest


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    parser.add_argument("--seeds", type=COUNT, default=3, help="problems of each kind [3]")
    parser.add_argument("--limit", type=COUNT, default=6000, help="steps at most [6000]")
    args = parser.parse_args()
    make_folder(args.out)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    print(f"{args.seeds} seeds{'kappa of Z':>33}{f'steps to {GOAL} of the first loss':>38}")
    for ax, (title, constants) in zip(axes, INPUTS.items()):
        for name, arm in SKIPS.items():
            skip, colour = name == "with skip", ARM_COLOURS[arm]
            kappas, steps = [], []
            for seed in range(args.seeds):
                X, Y, W = draw_problem(seed, *constants)
                Z = attention(X, W, skip)
                losses = torch.tensor(descend(X, Y, W, skip, args.limit))
                kappas.append(torch.linalg.cond(Z).item())
                steps.append(len(losses) - 1)
                ax.plot(losses / losses[0], color=colour, lw=1)
                ax.plot(steps[-1], losses[-1] / losses[0], "o", color=colour)
                if seed == 0:
                    eta = 1 / torch.linalg.matrix_norm(Z, ord=2).item() ** 2
                    exact = linear_head_losses(Z, Y, eta, args.limit)
                    ax.plot(exact / exact[0], ":", color=colour)
            spread = f"{min(kappas):.2g} .. {max(kappas):.2g}"
            print(f"{title + ', ' + name:<33}{spread:>18}{f'{min(steps)} .. {max(steps)}':>24}")
        ax.set(xscale="log", yscale="log", ylim=(GOAL / 2, 3), xlim=(1, 2 * args.limit))
        ax.set_xlabel("step")
        tidy(ax, f"loss / first loss, {title}")
    for height, (name, arm) in zip((0.03, 0.06), SKIPS.items()):
        axes[0].text(1.3, height, name, color=ARM_COLOURS[arm], fontsize=9)
    axes[0].text(1.3, 2e-3, "large dots: goal reached\ndotted lines: a linear head on the\n"
                 "first problem's Z, exact formula", fontsize=8)  # fmt: skip
    save_figure(figure, args.out / "6_speed_of_descent.png")
    print(f"{args.out}/6_speed_of_descent.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller HIDDEN"):
        main()
