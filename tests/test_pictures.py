"""What pictures show, read off their figures: the right numbers, under the right title, apart."""

import os
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, SMALL, run_main

import train_cls
import train_ssl
from support import files, pictures

ROWS = [  # epoch 1 is missing, as in the log of a run that was cut
    dict(epoch=2, loss=2.5, val_loss=2.0, top1=11.0, knn=None),
    dict(epoch=3, loss=1.5, val_loss=None, top1=23.0, knn=40.0),
    dict(epoch=4, loss=0.5, val_loss=1.0, top1=35.0),
]
PANELS = dict(loss="training loss", val_loss="validation loss", top1="val top-1, %", knn="k-NN, %")


@pytest.fixture
def caught(monkeypatch) -> list:
    """The figures that would have been saved."""
    figures = []

    def catch(figure, path, needed=True):
        figures.append(figure)
        plt.close(figure)

    monkeypatch.setattr(pictures, "save_figure", catch)
    return figures


def points(line) -> list[tuple[float, float]]:
    return [tuple(xy) for xy in line.get_xydata().tolist()]


def test_a_log_is_drawn_against_its_epochs_each_key_under_its_title(caught):
    pictures.draw_curves("path", "cls-nano-residual-soap-seed0", ROWS, PANELS)
    [figure] = caught
    loss, top1, knn = figure.axes
    titles = [(ax.get_title(), ax.get_xlabel()) for ax in figure.axes]
    assert titles == [("loss", "epoch"), ("val top-1, %", "epoch"), ("k-NN, %", "epoch")]
    training, validation = loss.get_lines()
    assert points(training) == [(2, 2.5), (3, 1.5), (4, 0.5)]
    assert points(validation) == [(2, 2.0), (4, 1.0)]  # null in epoch 3
    legend = loss.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["training loss", "validation loss"]
    for lines in (loss.get_lines(), legend.get_lines()):
        assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert points(top1.get_lines()[0]) == [(2, 11), (3, 23), (4, 35)]
    assert points(knn.get_lines()[0]) == [(3, 40)]  # null in epoch 2, missing in epoch 4
    assert knn.get_lines()[0].get_marker() == "."  # or a single point would not be seen
    assert {line.get_color() for ax in figure.axes for line in ax.get_lines()} == {"#0072b2"}
    assert figure.get_suptitle() == "cls-nano-residual-soap-seed0"


TRAINERS = {  # title of a panel -> the keys of the log that it shows
    train_cls: {"loss": ["loss", "val_loss"], "val top-1, %": ["top1"]},
    train_ssl: {"training loss": ["loss"], "k-NN top-1, %": ["knn"]},
}


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda module: module.__name__)
def test_a_trainers_panels_show_what_their_titles_say(
    trainer, caught, image_root, tmp_path, monkeypatch
):
    words = [*SMALL, "--data", image_root, "--out", "run"]
    words += ["--prototypes", 32, "--knn-every", 1] if trainer is train_ssl else []
    run_main(trainer.main, words, tmp_path, monkeypatch)
    log = files.read_log(tmp_path / "run/log.jsonl")
    panels = {ax.get_title(): ax.get_lines() for ax in caught[-1].axes}
    assert list(panels) == list(TRAINERS[trainer])
    for title, keys in TRAINERS[trainer].items():
        for line, key in zip(panels[title], keys, strict=True):
            shown = [(row["epoch"], row[key]) for row in log if row.get(key) is not None]
            assert points(line) == shown and len(shown) > 1


def test_one_loss_keeps_its_title_and_a_log_without_numbers_is_drawn_too(caught):
    pictures.draw_curves("path", "r", ROWS[:1], dict(loss="training loss", knn="k-NN, %"))
    assert [ax.get_title() for ax in caught[0].axes] == ["training loss", "k-NN, %"]
    assert points(caught[0].axes[1].get_lines()[0]) == []


def test_any_name_of_a_folder_can_be_written(tmp_path, recwarn):
    pictures.draw_curves(tmp_path / "a.png", "ü$x^{$ 训练", ROWS, PANELS)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and not recwarn.list


def test_colours_do_not_coincide():
    """Runs of one arm have shades of its colour; names without an arm take the other colours."""
    names = ["mine", "cls-residual-soap-seed0", "cls-residual-soap-seed1", "residual+dyt", "yours"]
    names += ["skipless-paper", "ssl-skipless-paper-adamw", "skipless-identity", "skipless-default"]
    colours = {name: pictures.colour_of(name, names) for name in names}
    assert len(set(colours.values())) == len(names)
    assert colours["cls-residual-soap-seed0"] == pictures.ARM_COLOURS["residual"]
    assert colours["skipless-paper"] == pictures.ARM_COLOURS["skipless-paper"]
    assert [colours[x] for x in ("mine", "yours")] == pictures.OTHER_COLOURS[:2]
    red, green, blue = (int(colours["residual+dyt"][i : i + 2], 16) for i in (1, 3, 5))
    assert red < green < blue < 255 and red > 0  # between residual's blue, #0072b2, and white


def test_labels_are_what_tells_names_apart():
    long = ["cls-nano-residual-soap-seed0", "cls-nano-skipless-paper-soap-seed0"]
    assert list(pictures.shortened(long).values()) == ["residual", "skipless-paper"]
    assert pictures.shortened(["cls-a-seed3"]) == {"cls-a-seed3": "cls-a"}
    assert list(pictures.shortened(["a-b-seed0", "a-b-seed1"]).values()) == ["seed0", "seed1"]
    assert list(pictures.shortened(["a", "a-b"]).values()) == ["a", "b"]  # never without a label


def test_labels_stand_at_the_ends_of_lines_and_do_not_overlap():
    figure, ax = plt.subplots()
    ends = dict(low=(1, 2, 0.0), middle=(1, 2, 1.0), close=(1, 2, 1.01), short=(0, 1, 5.0))
    lines = {name: ax.plot([x, end], [0, y])[0] for name, (x, end, y) in ends.items()}
    ax.set_ylim(-1, 9)
    labels = pictures.label_ends(ax, lines, apart=0.1)
    assert labels == ["low", "middle", "close"]  # short ends at 1
    heights = {text.get_text(): text.xy for text in ax.texts}
    assert heights == dict(low=(2, 0.1), middle=(2, 0.2), close=(2, pytest.approx(0.3)))
    plt.close(figure)


def test_a_notebooks_backend_stops_no_script():
    """Importing matplotlib fails where MPLBACKEND names a backend that is not installed, so only
    support/pictures.py, which sets it first, imports matplotlib."""
    notebook = os.environ | dict(MPLBACKEND="module://not_installed.backend_inline")
    command = [sys.executable, "-c", "import support.pictures as p; p.plt.subplots()"]
    subprocess.run(command, cwd=ROOT, env=notebook, check=True)
    scripts = [
        x
        for part in (".", "beyond", "support", "lessons", "experiments")
        for x in (ROOT / part).glob("*.py")
        if x.name != "pictures.py"
    ]
    for script in scripts:
        assert not re.search(r"^\s*(import|from) matplotlib", script.read_text(), re.M), script
