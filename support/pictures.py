"""What all pictures share: colours, labels, and how a figure is written."""

import os
from pathlib import Path

# Pictures go to files, which needs no window system. This comes before matplotlib's first import: a
# notebook passes its own backend on to the programs that it starts, where that import would fail.
os.environ["MPLBACKEND"] = "Agg"
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import MaxNLocator

from support.files import write_atomically

# Okabe and Ito's colours, which people with the common forms of colour blindness can tell apart.
ARM_COLOURS = {
    "residual": "#0072b2",
    "skipless-default": "#d55e00",
    "skipless-paper": "#009e73",
    "skipless-identity": "#cc79a7",
}
OTHER_COLOURS = ["#e69f00", "#56b4e9", "#000000", "#999999", "#7a4300", "#5e3c99", "#a6bf00"]


def colour_of(name: str, others: list[str]) -> str:
    """The colour of the arm that a run or network is named after.

    others: all names in the picture. Further names of the same arm get lighter shades of its
    colour, and names without an arm take the other colours in order.
    """

    def arm_in(name: str) -> str | None:
        return next((arm for arm in ARM_COLOURS if arm in name), None)

    arm = arm_in(name)
    alike = [other for other in dict.fromkeys(others) if arm_in(other) == arm]
    if arm is None:
        return OTHER_COLOURS[alike.index(name) % len(OTHER_COLOURS)]
    white = 0.75 * alike.index(name) / len(alike)
    return to_hex([white + (1 - white) * channel for channel in to_rgb(ARM_COLOURS[arm])])


def shortened(names: list[str]) -> dict[str, str]:
    """Label each run by what tells its name from the others: cls-nano-residual-soap-seed0 becomes
    residual beside cls-nano-skipless-paper-soap-seed0. A single name loses only its seed."""
    if len(names) == 1:
        return {names[0]: names[0].split("-seed")[0]}
    parts = {name: name.split("-") for name in names}
    common = set.intersection(*map(set, parts.values()))
    return {
        name: "-".join(part for part in parts[name] if part not in common) or name for name in names
    }


def tidy(ax: plt.Axes, title: str) -> None:
    """Give a panel the title and the plain look that all pictures share."""
    ax.set_title(title, fontsize=10)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def label_ends(ax: plt.Axes, lines: dict[str, plt.Line2D], apart: float = 0.05) -> list[str]:
    """Write labels beside the lines that end furthest right; returns the labels written.

    apart: least distance between two labels, as a fraction of the axis; where ends are closer, the
    upper label moves up.
    """
    right = max(line.get_xdata()[-1] for line in lines.values())
    ends = {name: x.get_ydata()[-1] for name, x in lines.items() if x.get_xdata()[-1] == right}
    to_fraction = ax.transScale + ax.transLimits
    height = -apart
    for name in sorted(ends, key=ends.get):
        height = max(height + apart, to_fraction.transform((right, ends[name]))[1])
        dark = [0.7 * channel for channel in to_rgb(lines[name].get_color())]
        look = dict(va="center", fontsize=8, color=dark)
        where = dict(xycoords=ax.get_xaxis_transform(), xytext=(7, 0), textcoords="offset points")
        ax.annotate(name, (right, height), **where, **look)
    return list(ends)


def save_figure(figure: plt.Figure, path: Path, needed: bool = True) -> None:
    """Write a figure as PNG and close it. needed: False only notes where it cannot be written."""
    options = dict(dpi=130, format="png")
    write_atomically(path, lambda temporary: figure.savefig(temporary, **options), needed)
    plt.close(figure)


def draw_curves(path: Path, name: str, rows: list[dict], panels: dict[str, str]) -> None:
    """Draw a run's log against the epoch. A run goes on where its picture cannot be written.

    rows: the log. panels: key in the log -> title; one or two losses share the first panel. A line
    leaves out the epochs in which its key is missing or null.
    """
    losses = [key for key in panels if "loss" in key]
    groups = [losses, *([key] for key in panels if key not in losses)]
    size = dict(figsize=(4.6 * len(groups), 3.6), layout="constrained")
    figure, axes = plt.subplots(1, len(groups), squeeze=False, **size)
    for ax, keys in zip(axes[0], groups):
        for key, style in zip(keys, ("-", "--")):
            measured = [row for row in rows if row.get(key) is not None]
            x, y = [row["epoch"] for row in measured], [row[key] for row in measured]
            look = dict(color=colour_of(name, [name]), marker="." if len(x) <= 10 else None)
            ax.plot(x, y, style, label=panels[key], **look)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(ax, panels[keys[0]] if len(keys) == 1 else "loss")
        if len(keys) > 1:
            ax.legend(fontsize=8, frameon=False)
    printable = name.encode("ascii", "replace").decode()  # the font may lack other letters
    figure.suptitle(printable, fontsize=10, parse_math=False)
    save_figure(figure, path, needed=False)
