"""Does a skip connection make gradient descent faster?

    python lessons/6_speed_of_descent.py    # half a minute; its picture goes to runs/lessons

One layer, a head of attention with or without a skip and then a ReLU MLP, fits random targets by
full-batch gradient descent on all weights. Two kinds of input: tokens that are alike (correlation
0.5, and small W_Q and W_K, so attention is nearly uniform) and independent tokens.

Source: "Convergence of Gradient Descent on Transformers with Residual Connections" (arXiv
2506.05249): the speed is set by the condition number kappa of Z, the attention's output. For a
linear head trained on a fixed Z this is exact: the error along the i-th singular direction of Z
shrinks by 1 - eta s_i^2 per step, so the smallest s_i takes about kappa^2 steps.

What to see: where tokens are alike, attention without a skip returns nearly one and the same token
(kappa of Z near half a million), and the skip makes descent several times faster. Where they are
independent, the skip lowers kappa as well, and yet descent without it is faster: when all weights
are trained, Z changes, and its kappa at the start does not tell the whole story.

Change and try: TRAINED = ["W_1", "W_2"]. Z then stays as it is, and the skip helps in both cases.
"""

import sys
from functools import partial

import torch
from torch import Tensor

sys.path.insert(1, f"{sys.path[0]}/..")  # the project's root
from support.errors import errors_in_one_line
from support.flags import lesson_flags
from support.pictures import ARM_COLOURS, plt, save_figure, tidy

TOKENS, DIM, HIDDEN = 32, 64, 256
INPUTS = {"tokens alike": (0.5, 0.2), "tokens independent": (0.0, 1.0)}  # correlation, factor
TRAINED = ["W_Q", "W_K", "W_V", "W_1", "W_2"]
GOAL, LIMIT = 1e-3, 6000  # fraction of the first loss; steps


def draw_problem(seed: int, correlation: float, factor: float) -> tuple:
    """Inputs X (token, dim), targets Y (token, 1) and weights; factor: of W_Q and W_K."""
    torch.manual_seed(seed)
    randn = partial(torch.randn, dtype=torch.float64)
    X = correlation**0.5 * randn(1, DIM) + (1 - correlation) ** 0.5 * randn(TOKENS, DIM)
    Y = randn(TOKENS, 1)
    W_Q, W_K = factor * randn(2, DIM, DIM) / DIM**0.5
    W_V, W_1 = randn(DIM, DIM) / DIM**0.5, randn(DIM, HIDDEN) / DIM**0.5
    W_2 = randn(HIDDEN, 1) / HIDDEN**0.5
    return X, Y, dict(W_Q=W_Q, W_K=W_K, W_V=W_V, W_1=W_1, W_2=W_2)


def attention(X: Tensor, W: dict[str, Tensor], skip: bool) -> Tensor:
    """Z = softmax(X W_Q W_K^T X^T / sqrt(d)) X W_V, plus X with the skip; (token, dim)."""
    P = (X @ W["W_Q"] @ W["W_K"].T @ X.T / DIM**0.5).softmax(dim=-1)
    return P @ X @ W["W_V"] + skip * X


def descend(X: Tensor, Y: Tensor, W: dict[str, Tensor], skip: bool, limit: int) -> list[float]:
    """Losses of gradient descent, from the first to the goal or to the limit of steps.

    The step is 1 / (largest eigenvalue of the tangent kernel J J^T at the start), J being the
    derivative of all errors with respect to all trained weights: the largest that is safe there.
    """

    def error(trained: dict[str, Tensor]) -> Tensor:
        V = W | trained
        return torch.relu(attention(X, V, skip) @ V["W_1"]) @ V["W_2"] - Y  # (token, 1)

    trained = {name: W[name] for name in TRAINED}
    J = torch.cat([j.flatten(1) for j in torch.func.jacrev(error)(trained).values()], dim=1)
    eta = 1 / torch.linalg.matrix_norm(J, ord=2) ** 2
    gradient_and_loss = torch.func.grad_and_value(lambda trained: error(trained).square().sum() / 2)
    losses = []
    while not losses or (losses[-1] > GOAL * losses[0] and len(losses) <= limit):
        gradients, loss = gradient_and_loss(trained)
        trained = {name: w - eta * gradients[name] for name, w in trained.items()}
        losses.append(loss.item())
    return losses


def linear_head_losses(Z: Tensor, Y: Tensor, steps: int) -> Tensor:
    """||Z W_t - Y||^2, t = 0 .. steps, of gradient descent on ||Z W - Y||^2 / 2 from W_0 = 0.

    With Z = U S V^T and eta = 1 / s_1^2:
        sum_i (1 - eta s_i^2)^(2 t) (u_i^T Y)^2 + ||(I - U U^T) Y||^2
    """
    U, S, _ = torch.linalg.svd(Z, full_matrices=False)
    c, t = U.T @ Y, torch.arange(steps + 1)[:, None]  # (step, 1)
    shrunk = (1 - (S / S[0]) ** 2) ** (2 * t) * c.square().sum(-1)  # (step, i)
    return shrunk.sum(-1) + (Y - U @ c).square().sum()


def main() -> None:
    args = lesson_flags(__doc__, seeds=3)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    print(f"{args.seeds} seeds{'kappa of Z':>42}    steps to {GOAL} of the first loss")
    for ax, (title, constants) in zip(axes, INPUTS.items()):
        for name, arm in (("without skip", "skipless-default"), ("with skip", "residual")):
            kappas, steps, skip = [], [], arm == "residual"
            for seed in range(args.seeds):
                X, Y, W = draw_problem(seed, *constants)
                Z = attention(X, W, skip)
                losses = torch.tensor(descend(X, Y, W, skip, LIMIT))
                kappas.append(torch.linalg.cond(Z).item())
                steps.append(len(losses) - 1)
                ax.loglog(losses / losses[0], color=ARM_COLOURS[arm], label=None if seed else name)
            exact = linear_head_losses(Z, Y, LIMIT)
            ax.loglog(exact / exact[0], ":", color=ARM_COLOURS[arm])
            ranges = f"{min(kappas):9.2g} .. {max(kappas):<9.2g}{min(steps):9} .. {max(steps)}"
            print(f"{title + ', ' + name:<33}{ranges}")
        ax.set(xlim=(1, 2 * LIMIT), ylim=(GOAL / 2, 3), xlabel="step; dotted: a linear head on Z")
        tidy(ax, f"loss / first loss, {title}")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, args.out / "6_speed_of_descent.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller HIDDEN"):
        main()
