"""What the scripts' command lines share: errors in one line, flags, where a setting comes from.

A setting is, in rising order of precedence: the script's DEMO; with --data its FOLDER; with
--skipless its SKIPLESS; what --init counts on; a checkpoint's settings; the flag as given.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import DistBackendError

import identity_init
from minskip import PRESETS
from variants import CHOICES, GRID_ATTENTIONS, STARTS, differing

CORES = min(8, os.cpu_count() or 1)

# Flags that may differ between a run and its continuation without changing its result.
FREE_TO_CHANGE = {
    "data", "out", "device", "workers", "compile", "checkpoint_activations", "resume", "eval",
}  # fmt: skip


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr: what is wrong, where, and what to do about it."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


def mute() -> None:
    """From now on print into nothing: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Its help is as written, its flags are not abbreviated, and a mistake ends in one line."""

    def __init__(self, description: str | None = None, **kind):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **kind)

    def error(self, message: str) -> NoReturn:
        fail(message)


class BadInput(Exception):
    """What the user gave cannot be used; the message is the one line to show."""


@contextmanager
def one_line_errors(memory_advice: str) -> Iterator[None]:
    """Turns what can still go wrong in mid-run, and is the user's to mend, into one line."""
    try:
        yield
        sys.stdout.flush()  # or Python would, as it ends, and tell of a reader that has left
    except (torch.OutOfMemoryError, MemoryError) as error:
        said = str(error).split(".")[0] or "of the CPU"
        fail(f"out of memory ({said}); {memory_advice}")
    except torch.linalg.LinAlgError as error:
        fail(f"{error}; usually a gradient is not finite: use a smaller --lr", code=1)
    except RuntimeError as error:
        text = str(error)
        lines = text.strip().splitlines() or [""]
        if any(x in text for x in ("DataLoader worker (pid", "DataLoader timed out", "(shm)")):
            said = lines[-1 if text.startswith("Caught") else 0].split("RuntimeError: ")[-1].strip()
            fail(
                f"loading images: {said}; usually memory, or a small /dev/shm: use fewer "
                "--workers, or 0",
                code=1,
            )
        if isinstance(error, DistBackendError) or "gloo/transport" in text:
            said = " ".join(text.split())[-300:]
            fail(f"the processes lost touch, usually since one has ended: {said}", code=1)
        if "can't allocate memory" not in text:  # the CPU's way to be out of memory
            raise
        fail(f"out of memory; {memory_advice}")
    except BadInput as error:  # a loader's process puts its traceback before the message
        fail(str(error).strip().splitlines()[-1].split("BadInput: ")[-1])
    except BrokenPipeError:  # into head, say
        mute()  # what is left to write
        fail("the reader of the output has left, or a process has ended", code=1)
    except OSError as error:  # no permission, a name too long, a disk that is full or gone
        if error.errno is None:
            raise
        if error.filename is None:
            mute()  # it may be what is printed to
        fail(f"{error.filename or 'a file'}: {error.strerror}; mend it or name another")
    except KeyboardInterrupt:  # outside the training loop, which sees to it itself
        fail("interrupted", code=130)


# --------------------------------------------------------------------------------------------------
# Numbers as flags: argparse calls these with the text and shows their message
# --------------------------------------------------------------------------------------------------


def checked(text: str, kind: type, fits: Callable, rule: str):
    value = kind(text)
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must {rule}; it is {text}")
    return value


def positive(text: str) -> float:
    return checked(text, float, lambda x: 0 < x < math.inf, "be positive")


def not_negative(text: str) -> float:
    return checked(text, float, lambda x: 0 <= x < math.inf, "not be negative")


def share(text: str) -> float:
    return checked(text, float, lambda x: 0 <= x < 1, "lie in [0, 1)")


def path(text: str) -> str:
    return checked(text, str, bool, "name a file or folder")


def place(text: str) -> Path:
    return Path(path(text))


def count(text: str) -> int:
    return checked(text, int, lambda x: x > 0, "be at least 1")


def count_or_0(text: str) -> int:
    return checked(text, int, lambda x: 0 <= x < 2**32, "lie in 0 .. 2^32 - 1")


# --------------------------------------------------------------------------------------------------
# The trainers' flags
# --------------------------------------------------------------------------------------------------

COMMON = dict(  # defaults of both trainers
    depth=None,  # the model's
    init="default",
    norm="layernorm",
    attention="softmax",
    activation="gelu",
    skipless=False,
    grad_accum=1,
    checkpoint_activations=False,
    seed=0,
    data=None,
    out=None,
    amp="auto",
    compile=False,
    device="auto",
    resume=None,
)


def shown(value) -> str:
    """A default in a help text; one that depends on another setting with that setting's values."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {shown(x)}" for key, x in value.items())
    return str(value)


def trainer_flags(description: str, demo: dict, folder: dict, skipless: dict):
    """(parser, add): a parser with the flags that both trainers have, and `add(flag, help, type)`
    for a script's own. Help texts end with the effective defaults. A flag not given is absent."""
    p = Parser(description, argument_default=argparse.SUPPRESS)

    def add(flag: str, help: str, type: Callable | None = None, **kind) -> None:
        name = flag[2:].replace("-", "_")
        layers = (("", demo), ("--data ", folder), ("--skipless ", skipless))
        defaults = [f"{when}{shown(layer[name])}" for when, layer in layers if name in layer]
        if defaults and demo[name] is not None and demo[name] is not False:
            help += f" [{', '.join(defaults)}]"
        p.add_argument(flag, help=help, **(dict(type=type) if type else {}), **kind)

    data = "folder with train/<class>/* and val/<class>/*, which DINO can do without"
    add("--data", f"{data} [synthetic images]", path)
    add("--out", "folder of this run's files [under runs/, named after the settings]", path)
    add("--model", "width and depth; nano is for CPUs", choices=list(PRESETS))
    add("--skipless", "train without skip connections", action="store_true")
    add(
        "--init",
        "weights the blocks start from; identity: ours, nearest to skips at small size; paper: "
        "Cutting the Skip's; default: the usual std 0.02, from which a skipless network learns "
        "little",
        choices=["identity", "paper", "default"],
    )
    add(
        "--alpha",
        "of --init paper: weight of the random part of W_Q W_K^T, 0.5 .. 2; too large: attention "
        "starts as one-hot at random places",
        not_negative,
    )
    add(
        "--beta",
        "of --init paper: weight of the identity in W_Q W_K^T, 0.5 .. 2; too small: tokens blur "
        "into one another with depth",
        not_negative,
    )
    add(
        "--c",
        "of --init paper: scale of W_V and W_O, 1 .. 3; smaller makes every step relatively larger",
        positive,
    )
    add(
        "--pool",
        "what is read off the last block: the class token, or the mean over patch tokens "
        "[--init identity mean]",
        choices=["cls", "mean"],
    )
    add(
        "--pos-embed-std",
        "standard deviation of the position embedding at the start, 0.02 .. 1 "
        "[--init identity 0.5]",
        not_negative,
    )
    add(
        "--norm",
        "what stands in the LayerNorms' place; none: only two are left",
        choices=CHOICES["norm"],
    )
    add(
        "--attention",
        "how tokens mix; the others start near the identity, or keep tokens apart (variants.py)",
        choices=CHOICES["attention"],
    )
    add(
        "--activation",
        "of the MLPs; tat: a leaky ReLU tailored to the depth",
        choices=CHOICES["activation"],
    )
    add("--opt", "optimizer; soap is the paper's, matters without skips", choices=["soap", "adamw"])
    add(
        "--lr",
        "peak learning rate; without skips --init paper wants a third to a tenth of a residual "
        "network's, --init identity the same; too large and the loss stays flat at its first value",
        positive,
    )
    add("--batch-size", "images a step, over all processes", count)
    add("--grad-accum", "parts a batch is computed in; raise it if memory runs out", count)
    add(
        "--checkpoint-activations",
        "compute activations twice rather than keep them: much less memory, a third more time",
        action="store_true",
    )
    add("--epochs", "passes over the training images", count)
    add(
        "--warmup-epochs",
        "epochs over which the learning rate rises; fractions are fine; too short: the loss jumps "
        "in the first steps",
        not_negative,
    )
    add("--image-size", "side of the images, pixels", count)
    add("--patch-size", "side of a patch, pixels; halving it makes four times the tokens", count)
    add("--depth", "number of blocks [the model's]", count)
    add("--drop-path", "stochastic depth of the last block; only with skips", share)
    add("--workers", "processes that load images, up to 256", count_or_0)
    add("--compile", "torch.compile: faster after minutes of compiling", action="store_true")
    add("--amp", "bf16 autocast; auto: on GPUs that support it", choices=["auto", "bf16", "off"])
    add("--device", "auto, cpu, cuda or cuda:N")
    add("--seed", "of weights, order, augmentation and drop-path", count_or_0)
    add(
        "--resume",
        "continue the run of this checkpoint, on the CPU to the last bit; its settings are kept",
        path,
        metavar="CKPT",
    )
    return p, add


def stored_settings(p: argparse.ArgumentParser, demo: dict, checkpoint: dict) -> dict:
    """All settings of a checkpoint; the end of the program where the flags would not take them."""
    words, stored = [], checkpoint["args"]
    p.error = lambda message: fail(f"checkpoint {checkpoint['path']} is damaged: {message}")
    for name, value in stored.items():
        if name not in demo.keys() - {"resume", "eval"}:
            p.error(f"unknown setting {name}")
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            if demo[name] is not None and demo[name] is not False:
                p.error(f"{flag} is {value}")
        else:
            words.append(flag if value is True else f"{flag}={value}")
    if lacking := demo.keys() - stored.keys() - {"resume", "eval"}:
        p.error(f"no setting {min(lacking)}")
    return demo | stored | vars(p.parse_args(words))


def layered(*layers: dict) -> dict:
    """Settings laid over one another; of one that is a dict in both, its entries."""
    settings = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(value, dict) and isinstance(settings.get(name), dict)
            settings[name] = settings[name] | value if both else value
    return settings


def picked(value, *by: str):
    """A setting that depends on others is a dict by their values; the first that it has counts."""
    while isinstance(value, dict):
        value = next(value[x] for x in by if x in value)
    return value


def settle(
    explicit: dict, demo: dict, folder: dict, skipless: dict, stored: dict | None, free: set[str]
) -> argparse.Namespace:
    """Every setting of a run, as the head of this file says; contradictions end the program.

    explicit: the flags given. stored: a checkpoint's settings, which only the flags in `free` may
    change.
    """
    if explicit.get("workers", 0) > 256:
        fail(f"--workers {explicit['workers']} would fill the machine; give at most 256")
    if stored is not None:
        for name, value in explicit.items():
            if name not in free and value != stored.get(name):
                flag = "--" + name.replace("_", "-")
                fail(
                    f"{flag} {value} contradicts the checkpoint, trained with {stored.get(name)}; "
                    f"leave {flag} out"
                )
        return argparse.Namespace(**stored | dict(out=None) | explicit)  # it may have moved
    folder, skipless = (
        layer if flag in explicit else {}
        for flag, layer in (("data", folder), ("skipless", skipless))
    )
    settings = layered(demo, folder, skipless, explicit)
    if differing(settings) and settings["skipless"]:  # what --init identity is not made for
        settings |= dict(init="paper") | explicit
    settings["init"] = picked(settings["init"], settings["model"])
    W_Q, _, W_V, _ = STARTS[settings["attention"]]
    if settings["norm"] == "none" or W_V == "orthogonal":
        settings |= dict(c=1.0) | explicit  # no norm cancels it: c = 3 makes tokens of 1e9
    for name, start in (("alpha", W_Q), ("beta", W_Q), ("c", W_V)):
        if name in explicit and start != "as --init":
            fail(f"--{name} is not part of --attention {settings['attention']}; leave it out")
    if settings["attention"] in GRID_ATTENTIONS:
        settings |= dict(pool="mean") | explicit
    if settings["init"] == "identity":
        settings |= identity_init.COUNTS_ON | explicit
    settings["lr"] = picked(settings["lr"], settings["init"], settings["opt"])
    settings["depth"] = settings["depth"] or PRESETS[settings["model"]]["depth"]
    for name in ("alpha", "beta", "c"):
        if name in explicit and settings["init"] != "paper":
            fail(f"--{name} is not part of --init {settings['init']}; leave it out")
    if settings["drop_path"] and settings["skipless"]:
        fail("--drop-path needs skip connections: leave it out with --skipless")
    if settings["warmup_epochs"] >= settings["epochs"]:
        fail(
            f"--warmup-epochs {settings['warmup_epochs']} must be less than --epochs "
            f"{settings['epochs']}"
        )
    return argparse.Namespace(**settings)
