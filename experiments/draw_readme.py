"""Draws the pictures of the README, in seconds, from fresh networks and from logs.

    python experiments/draw_readme.py

In results/readme/, schematic.png shows where a block without skips carries its input, skips.png
what skips and inits do to tokens, gradients and accuracy, and lengths.png how far networks are
ahead of residual ones by length of training.
"""

import sys
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from beyond.arms import ARMS, fresh_arm
from minskip import PRESETS
from support.data import normalise
from support.files import read_log
from support.pictures import ARM_COLOURS, MaxNLocator, label_ends, plt, save_figure, tidy
from support.shapes import draw_shapes

RESULTS = Path(__file__).resolve().parent.parent / "results"
# epochs -> folder of the runs; label -> arm, its runs, the residual ones beside them, and its look
NANO = {5: "tiny-imagenet", 20: "tiny-imagenet-long", 40: "tiny-imagenet-40"}
WIDER = {5: "width-192"}
HALVES = {5: "halves", 20: "halves-20", 40: "halves-40"}
LENGTHS = {
    "skips around attention only, pairs in the MLP": (
        "attention-skip-identity", HALVES, NANO, dict(color="#5e3c99", fmt="s-")
    ),
    "without skips, identity init": (
        "skipless-identity", NANO, NANO, dict(color=ARM_COLOURS["skipless-identity"], fmt="o-")
    ),
    "the same, width 192 instead of 64": (
        "skipless-identity", WIDER, WIDER, dict(color="#7a2e58", fmt="D")
    ),
}  # fmt: skip
CARRIES, MIXES, INK = ARM_COLOURS["skipless-identity"], "#e3e3e3", "#333333"


def correlation(tokens: Tensor) -> float:
    """The mean cosine of two different tokens of an image; tokens: (image, token, dim)."""
    n, unit = tokens.shape[1], F.normalize(tokens, dim=-1)
    return ((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).mean().item()


def at_initialisation(arm: str) -> tuple[Tensor, Tensor]:
    """Of fresh networks, in float64: the correlation of tokens after each block, (seed, block), and
    the norm of the gradient of the loss with respect to each W_Q, (seed, block)."""
    images, labels, _ = draw_shapes(list(range(16)), 32, "val")
    size = PRESETS["nano"] | dict(image_size=32, patch_size=8, num_classes=10, pool="mean")
    correlations, gradients = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = fresh_arm(arm, **size).double()
        W_Qs = [block.attention.W_Q.weight for block in model.blocks]
        tokens = model.forward_features(normalise(images).double(), list(range(len(W_Qs) + 1)))
        loss = F.cross_entropy(model.classify(tokens[-1]), labels)
        correlations.append([correlation(x) for x in tokens])
        gradients.append([g.norm().item() for g in torch.autograd.grad(loss, W_Qs)])
    return torch.tensor(correlations), torch.tensor(gradients)


def accuracies(arm: str, folder: str = "tiny-imagenet") -> Tensor:
    """Top-1 on val after each epoch, (seed, epoch), of the runs with 12 blocks and SOAP."""
    logs = sorted(RESULTS.glob(f"{folder}/full/{arm}-12-soap-*/log.jsonl"))
    return torch.tensor([[row["top1"] for row in read_log(log)] for log in logs])


def draw_skips(path: Path) -> None:
    """Medians, and for the accuracy means, over the seeds, with their range."""
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.2), layout="constrained")
    lines = {}
    for arm in ARMS:
        for panel, y in enumerate([*at_initialisation(arm), accuracies(arm)]):
            middle, ax = y.mean(0) if panel == 2 else y.median(0).values, axes[panel]
            x = range(min(panel, 1), min(panel, 1) + y.shape[1])  # the embedding is block 0
            [lines[arm]] = ax.plot(x, middle, "o-", color=ARM_COLOURS[arm], lw=2, markersize=3.5)
            ax.fill_between(x, *y.aminmax(dim=0), color=ARM_COLOURS[arm], alpha=0.2, lw=0)
    axes[0].set_ylim(0, 1.03)
    axes[1].set(yscale="log", ylim=(1e-12, 10))  # further down it is rounding
    titles = ["correlation of two tokens", "gradient with respect to $W_Q$", "validation top-1, %"]
    for ax, title in zip(axes, titles):
        tidy(ax, title)
        ax.title.set_fontsize(11)
        ax.set_xlabel("epoch" if ax is axes[2] else "block, before training")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 3, 10]))
    label_ends(ax, lines, apart=0.07)
    save_figure(figure, path)


def ahead(arm: str, folders: dict[int, str], residuals: dict[int, str]) -> Tensor:
    """Epochs, mean top-1 minus residual's and the standard error of this difference, (length, 3);
    folders, residuals: epochs -> folder of the arm's and of residual's runs."""
    points = []
    for epochs, folder in folders.items():
        own = accuracies(arm, folder)[:, -1]
        other = accuracies("residual", residuals[epochs])[:, -1]
        error = (own.var() / len(own) + other.var() / len(other)).sqrt()
        points.append([epochs, own.mean() - other.mean(), error])
    return torch.tensor(points)


def draw_lengths(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    lines = {}
    for label, (arm, folders, residuals, look) in LENGTHS.items():
        x, gap, error = ahead(arm, folders, residuals).T
        lines[label], *_ = ax.errorbar(x, gap, error, **look, capsize=3, lw=2, markersize=5)
    ax.axhline(0, color=ARM_COLOURS["residual"], lw=2)
    ax.set(xscale="log", xticks=list(NANO), xticklabels=list(NANO), xlabel="epochs")
    ax.minorticks_off()
    tidy(ax, "points of top-1 ahead of the residual network (0)")
    ax.legend(lines.values(), lines, fontsize=8, frameon=False)
    save_figure(figure, path)


def write(ax: plt.Axes, x: float, y: float, text: str, size: float = 12, **look) -> None:
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, **look)


def box(ax: plt.Axes, x: float, y: float, width: float, height: float, colour: str, lw=1.0) -> None:
    """x, y: of the lower left corner."""
    ax.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, lw=lw))


def arrow(ax: plt.Axes, *points: tuple[float, float], carries: bool = False) -> None:
    """A line through the points, with a head at the last one."""
    look = dict(color=CARRIES if carries else INK, lw=4 if carries else 1.4)
    ax.plot(*zip(*points[:-1]), **look, solid_joinstyle="miter")
    look |= dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, mutation_scale=15, capstyle="butt")
    ax.annotate("", points[-1], points[-2], arrowprops=look)


def draw_plain_block(ax: plt.Axes, x: float, residual: bool) -> None:
    """Two sub-blocks from bottom to top, x in the middle, with skips or without."""
    for y, name in ((1.4, "attention"), (4.2, "MLP")):
        box(ax, x - 1, y, 2, 1.2, MIXES)
        write(ax, x, y + 0.6, name)
        if residual:
            branch, join = (x, y - 0.5), (x - 0.2, y + 1.8)
            arrow(ax, branch, (x - 1.5, branch[1]), (x - 1.5, join[1]), join, carries=True)
            arrow(ax, (x, y + 1.2), (x, y + 1.6))
            write(ax, x, y + 1.8, "+", 16)
        arrow(ax, (x, y + (2.0 if residual else 1.2)), (x, y + 2.8 if y < 2 else 6.8))
    arrow(ax, (x, 0.6), (x, 1.4))


def draw_identity_block(ax: plt.Axes, x: float) -> None:
    """The two sub-blocks from x on, with what is inside them."""
    left, right = x + 1.8, x + 5.4
    for y, name in ((1.1, "attention"), (3.9, "MLP")):
        box(ax, x - 0.2, y, 7.6, 2.1, "none")
        write(ax, x - 0.55, y + 1.05, name, rotation=90)
    for y in (0.5, 3.25, 6.0):
        arrow(ax, (left, y), (left, y + 0.6), carries=True)
        arrow(ax, (right, y), (right, y + 0.6))
    for middle in (left - 1.2, left, left + 1.2, right):
        for row, column in product(range(5), repeat=2):  # the head's attention matrix
            keeps = CARRIES if row + column == 4 else "white"
            where = middle - 0.5 + 0.2 * column, 2.0 + 0.2 * row
            box(ax, *where, 0.2, 0.2, keeps if middle < right else MIXES, 0.4)
    write(ax, left, 1.55, "keepers, 3/4 of the heads,\npass each token on", 11)
    write(ax, right, 1.55, "fetchers, 1/4 of the heads,\nbring context", 11)
    box(ax, left - 1.7, 4.95, 3.4, 0.85, CARRIES)
    write(ax, left, 5.37, "GELU($z$) $-$ GELU($-z$) = $z$")
    box(ax, right - 1.7, 4.95, 3.4, 0.85, MIXES)
    write(ax, right, 5.37, "GELU($z$)")
    write(ax, left, 4.4, "mirrored pairs, half of the\nhidden units, pass it on", 11)
    write(ax, right, 4.4, "the other half is free\nto learn", 11)


def draw_schematic(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(11, 5.9), layout="constrained")
    ax.set(xlim=(0, 15), ylim=(0, 8.1), aspect="equal")
    ax.set_axis_off()
    draw_plain_block(ax, 1.7, residual=True)
    draw_plain_block(ax, 4.9, residual=False)
    draw_identity_block(ax, 7.4)
    titles = {1.7: "residual", 4.9: "skipless", 11.0: "skipless, identity init"}
    subtitles = ["a skip carries $x$", "nothing carries $x$", "part of the weights carries $x$"]
    for (x, title), subtitle in zip(titles.items(), subtitles):
        write(ax, x, 7.8, title, 14, weight="bold")
        write(ax, x, 7.3, subtitle)
    for x in (1.7, 4.9, 9.2, 12.8):
        write(ax, x, 0.3, "$x$", 14)
    save_figure(figure, path)


if __name__ == "__main__":
    draw_schematic(RESULTS / "readme/schematic.png")
    draw_skips(RESULTS / "readme/skips.png")
    draw_lengths(RESULTS / "readme/lengths.png")
