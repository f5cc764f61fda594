"""One look for every picture: a colour an arm, and figures written whole."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no window system is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from support.files import write_atomically

# Okabe and Ito's colours, told apart with every common colour blindness.
ARM_COLOURS = {
    "residual": "#0072B2",
    "skipless-default": "#D55E00",
    "skipless-paper": "#009E73",
    "skipless-identity": "#CC79A7",
}
OTHER_COLOURS = ["#E69F00", "#56B4E9", "#000000", "#999999", "#7A4300", "#5E3C99", "#A6BF00"]


def colour_of(name: str, others: list[str]) -> str:
    """An arm's colour, found in the name of a run or network; the rest take turns, in order.

    others: all names of the picture, so that those of no known arm are told apart.
    """

    def of_arm(name: str) -> str | None:  # behind a + are parts of `variants.py`
        plain = "+" not in name
        return next((c for arm, c in ARM_COLOURS.items() if plain and arm in name), None)

    if colour := of_arm(name):
        return colour
    strangers = [n for n in others if not of_arm(n)]
    return OTHER_COLOURS[strangers.index(name) % len(OTHER_COLOURS)]


def tidy(ax: plt.Axes, title: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def save_figure(figure: plt.Figure, path: Path, needed: bool = True) -> None:
    """Write a figure as PNG, atomically, and let go of it."""
    how = dict(dpi=130, format="png")
    write_atomically(path, lambda temporary: figure.savefig(temporary, **how), needed)
    plt.close(figure)


def draw_curves(path: Path, name: str, rows: list[dict], panels: dict[str, str]) -> None:
    """A run's log: a panel a key against the epoch. Where it cannot be written a run goes on.

    rows: of the log. panels: log key -> title; epochs in which a key is null are left out.
    """
    size = dict(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **size)
    label = name.split("-seed")[0].encode("ascii", "replace").decode().replace("$", r"\$")
    colour = colour_of(name, [name])
    for ax, (key, title) in zip(axes[0], panels.items()):
        points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
        marker = "." if len(points) <= 10 else None
        ax.plot(*zip(*points), color=colour, linewidth=1.4, marker=marker, label=label)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(ax, title)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    save_figure(figure, path, needed=False)
