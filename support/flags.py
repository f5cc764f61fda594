"""Command lines: types of flags, a parser whose errors are one line, the trainers' table."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from support.errors import UserError
from support.files import make_folder


def checked(kind: type, fits: Callable[..., bool], rule: str) -> Callable:
    """The type of a flag: `kind`, and a message for values that do not fit."""

    def parse(text: str):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must {rule}; it is {text}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where `kind` itself raises
    return parse


COUNT = checked(int, lambda x: x >= 1, "be at least 1")
COUNT_OR_0 = checked(int, lambda x: x >= 0, "not be negative")
SEED = checked(int, lambda x: 0 <= x < 2**32, "lie in 0 .. 2^32 - 1")
WORKERS = checked(int, lambda x: 0 <= x <= 256, "lie in 0 .. 256")
POSITIVE = checked(float, lambda x: 0 < x < math.inf, "be positive")
NOT_NEGATIVE = checked(float, lambda x: 0 <= x < math.inf, "not be negative")
FRACTION = checked(float, lambda x: 0 <= x < 1, "lie in [0, 1)")
NAME = checked(str, bool, "name a file or folder")  # "" is what an unset variable gives


def PATH(text: str) -> Path:
    return Path(NAME(text))


class Parser(argparse.ArgumentParser):
    """Shows its description as written, takes no abbreviated flags, and raises UserError."""

    def __init__(self, description: str | None = None, **kind):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **kind)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


# --------------------------------------------------------------------------------------------------
# The trainers' table of settings: name -> (value in the demo, value with --data, type, help)
# --------------------------------------------------------------------------------------------------

# The rows that both trainers have. A type is a function of the text, a list of choices, or bool.
COMMON = dict(
    data=(None, None, NAME,
        "folder with train/<class>/* and val/<class>/*; without labels images alone will do "
        "[synthetic images]"),
    out=(None, None, NAME, "folder for this run's files [under runs/, named after the settings]"),
    grad_accum=(1, 1, COUNT, "parts in which a batch is computed; raise it if memory runs out"),
    checkpoint_activations=(False, False, bool,
        "compute activations twice instead of keeping them: much less memory, a third more time"),
    refresh_every=(10, 10, COUNT,
        "of SOAP: steps between two refreshes of an eigenbasis; 20 halves what they cost, and some "
        "accuracy of short runs goes with it"),
    amp=("auto", "auto", ["auto", "bf16", "off"], "bf16 autocast; auto: on GPUs that support it"),
    compile=(False, False, bool, "torch.compile: faster, after some minutes of compiling"),
    device=("auto", "auto", str, "auto, cpu, cuda, cuda:N, or mps (untried)"),
    seed=(0, 0, SEED, "of weights, order of the images, augmentation and drop-path"),
    init_from=(None, None, NAME,
        "start from the network and weights of this checkpoint, of either trainer, with a fresh "
        "head where the classes are others; how to train is not taken from it"),
    save_every=(10, 10, NOT_NEGATIVE,
        "minutes between two checkpoints, which are written at the end of an epoch; 0: each epoch; "
        "those of the run's first and last epoch, and of one that is interrupted, always are"),
    resume=(None, None, NAME,
        "continue the run of this checkpoint with its settings, on the CPU exactly to the bit; a "
        "larger --epochs prolongs it"),
)  # fmt: skip

# Flags that may differ between a run and its continuation without changing the result; of the
# last, up to rounding.
FREE_TO_CHANGE = {
    "data", "out", "device", "workers", "compile", "checkpoint_activations", "resume", "eval",
    "grad_accum", "save_every",
}  # fmt: skip


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def given_flags(description: str, table: dict[str, tuple]) -> dict:
    """The flags on the command line, by name; those not given are absent."""
    p = Parser(description, argument_default=argparse.SUPPRESS)
    for name, (demo, folder, kind, help) in table.items():
        if demo not in (None, False):
            help += f" [{demo}]" if demo == folder else f" [{demo}; with --data {folder}]"
        if kind is bool:
            p.add_argument(flag_of(name), help=help, action="store_true")
        elif isinstance(kind, list):
            p.add_argument(flag_of(name), help=help, choices=kind)
        else:
            p.add_argument(flag_of(name), help=help, type=kind)
    return vars(p.parse_args())


def settings_of(table: dict[str, tuple], given: dict) -> argparse.Namespace:
    """The table's column for this kind of run, under the flags that were given."""
    column = 1 if "data" in given else 0
    return argparse.Namespace(**{name: row[column] for name, row in table.items()} | given)


def check_no_other(stored: dict, given: dict, free: set[str]) -> None:
    """Raises UserError where a flag outside `free` contradicts a checkpoint's settings."""
    for name, value in given.items():
        if name not in free and value != stored.get(name):
            flag = flag_of(name)
            raise UserError(
                f"{flag} {value} contradicts the checkpoint, trained with {stored.get(name)}; "
                f"leave {flag} out"
            )


def stored_settings(stored: dict, given: dict, free: set[str]) -> argparse.Namespace:
    """A checkpoint's settings under the flags that were given.

    Raises UserError where a flag outside `free` contradicts the checkpoint, but for a larger
    --epochs, which prolongs the run.
    """
    if "resume" in given and given.get("epochs", 0) > stored["epochs"]:
        free = free | {"epochs"}
    check_no_other(stored, given, free)
    forget = dict(out=None, resume=None, eval=None)  # the folder may have moved
    return argparse.Namespace(**stored | forget | given)


def lesson_flags(description: str, seeds: int) -> argparse.Namespace:
    """A lesson's flags: --out, a folder which is made here, and --seeds."""
    p = Parser(description)
    p.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    p.add_argument("--seeds", type=COUNT, default=seeds, help=f"random repetitions [{seeds}]")
    args = p.parse_args()
    make_folder(args.out)
    return args
