"""The files a run writes and reads: its folder, its log, its checkpoints."""

import fcntl
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from cli import fail

FORMAT = "minskip-4"
PARTS = dict(  # of a checkpoint, beside the optimizer's state and the like
    args=dict, model_config=dict, model=dict, classes=list, listing=str, images=int, processes=int,
    epoch=int, step=int, seconds=float, history=list, sums=dict,
)  # fmt: skip


def write_atomically(path: Path, write: Callable[[Path], None], needed: bool = True) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it.

    needed: False says that it could not be written, and goes on.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        words = ("inline_container", "cannot be opened", "Parent directory")  # torch.save's
        if isinstance(error, RuntimeError) and not any(x in str(error) for x in words):
            raise
        why = getattr(error, "strerror", None) or "usually a full disk"
        problem = f"cannot write {path} ({why}); what it held before is kept"
        if needed:
            fail(problem)
        print(f"note    {problem}", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(out: Path) -> None:
    """Make a folder, or end the program where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        fail(f"{out}: cannot write into this folder ({error.strerror})")


def lock(folder: Path) -> None:
    """Keep this folder to this process until it ends; end the program if another has it."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        other = os.read(descriptor, 200).decode()
        fail(f"{folder} is in use by process {other}; wait for it, or name another folder")
    except OSError:  # a file system without locks
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
    for left in folder.glob("last.pt.*.tmp"):  # by a process that was killed as it wrote
        left.unlink()


def run_folder(out: str | None, stem: str, seed: int, resume: str | None = None) -> Path:
    """--out, which must not hold another run; the resumed run's; or a free name under runs/."""
    here = Path(resume).resolve().parent if resume else None
    if here and (out is None or Path(out).resolve() == here):
        if (here / "last.pt").exists() and not os.path.samefile(resume, here / "last.pt"):
            fail(f"--resume {resume} would overwrite the last.pt beside it; add --out NEW")
        return here
    if out is not None:
        if (Path(out) / "last.pt").exists():
            fail(f"--out {out} holds a run already; --resume it or name another folder")
        return Path(out)
    folder, number = Path("runs") / f"{stem}-seed{seed}", 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-run{number}-seed{seed}"
    chosen = [folder]
    if dist.is_initialized():  # one process may have made it before another looked
        dist.broadcast_object_list(chosen)
    return chosen[0]


def write_log(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, one line an epoch. Rewritten whole: it always matches its run."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_log(path: Path) -> list[dict]:
    """The rows that `write_log` wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save_checkpoint(path: Path, content: dict) -> None:
    """Tensors, numbers, strings, lists and dicts only, so that it loads with weights_only=True."""
    content = {"format": FORMAT, **content}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: str, script: str | None = None) -> dict:
    """A checkpoint of ours, on the CPU; anything else ends the program with one line.

    script: the name of the script that must have written it; None takes any.
    """
    if not Path(path).is_file():
        hint = f"; {path}/last.pt?" if Path(path).is_dir() else ""
        fail(f"checkpoint {path}: no such file{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of any other kind makes the reader stumble over
        kind = type(error).__name__
        fail(f"checkpoint {path} is damaged or of another program ({kind}); use a file saved here")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        fail(f"checkpoint {path} was not written by this version of minskip; use one of its own")
    if script is not None and content.get("script") != script:
        fail(f"checkpoint {path} was written by {content.get('script')}, not by {script}")
    parts = PARTS if content.get("ema") is None else PARTS | dict(ema=dict)
    for name, kind in parts.items():
        value = content.get(name)
        if not isinstance(value, kind) or (kind is int and value < 0):
            fail(f"checkpoint {path} is damaged: it has no {name}; use another")
    return content | dict(path=path)
