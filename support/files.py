"""The files a run writes and reads: its folder, its log, its checkpoints."""

import json
import os
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from support.errors import UserError

FORMAT = "minskip-8"


def write_atomically(path: Path, write: Callable[[Path], None], needed: bool = True) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it.

    write: puts the content into the path it is given. needed: False notes a failure and goes on.
    Raises UserError where the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        problem = f"cannot write {path} ({error.strerror}); what it held before is kept"
        if needed:
            raise UserError(problem) from error
        print(f"note    {problem}", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(out: Path) -> None:
    """Make a folder. Raises UserError where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"{out}: cannot write into this folder ({error.strerror})") from error


def lock(folder: Path) -> None:
    """Keep this folder to this process until it ends. Raises UserError if another has it."""
    if fcntl is None:
        raise UserError("minskip runs on Linux and macOS; on Windows use WSL")
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        other = os.read(descriptor, 200).decode()
        raise UserError(
            f"{folder} is in use by process {other}; wait for it, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
    for leftover in folder.glob("last.pt.*.tmp"):  # of a process that was killed while writing
        leftover.unlink()


def run_folder(out: str | None, stem: str, seed: int, resume: str | None = None) -> Path:
    """The folder of a run: --out, the resumed run's own, or a free name under runs/.

    Raises UserError where it would overwrite another run.
    """
    here = Path(resume).resolve().parent if resume else None
    if here and (out is None or Path(out).resolve() == here):
        if (here / "last.pt").exists() and not os.path.samefile(resume, here / "last.pt"):
            raise UserError(
                f"--resume {resume} would overwrite the last.pt beside it; add --out NEW"
            )
        return here
    if out is not None:
        if (Path(out) / "last.pt").exists():
            raise UserError(f"--out {out} holds a run already; --resume it or name another folder")
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
    """One JSON object per line, one line per epoch. Rewritten whole, so it always fits its run."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_log(path: Path) -> list[dict]:
    """The rows that `write_log` wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save_checkpoint(path: Path, content: dict) -> None:
    """content: tensors, numbers, strings, lists and dicts, which weights_only=True can load."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a path, torch hides a full disk's OSError
            torch.save({"format": FORMAT, **content}, file)

    write_atomically(path, write)


def load_checkpoint(path: str, script: str | None = None) -> dict:
    """What `save_checkpoint` wrote, on the CPU, and "path".

    The tensors are views of the file, read where they are used: so the processes of a run do not
    each hold all of SOAP's state. What is written into them stays in this process, and
    `save_checkpoint` gives its new file the old one's name, which leaves the old one as it is.

    script: the script that must have written it; None accepts any. Raises UserError for a file
    that is missing, damaged, of another program or version, or of another script.
    """
    if not Path(path).is_file():
        hint = f"; {path}/last.pt?" if Path(path).is_dir() else ""
        raise UserError(f"checkpoint {path}: no such file{hint}")
    problem = f"checkpoint {path} is damaged or of another program; use a file saved here"
    try:
        # torch.load does not test the checksums that torch.save writes; zipfile does (2 s a GB)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        how = dict(map_location="cpu", weights_only=True, mmap=True)
        content = None if damaged else torch.load(path, **how)
    except MemoryError:
        raise
    except Exception as error:  # a file of another kind may raise anything
        raise UserError(problem) from error
    if damaged:
        raise UserError(f"checkpoint {path} is damaged (at {damaged}); use another copy of it")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} was not written by this version of minskip; use one of its own"
        )
    if script is not None and content["script"] != script:
        raise UserError(f"checkpoint {path} was written by {content['script']}, not by {script}")
    return content | dict(path=path)
