"""One way to tell a user what is wrong: raise `UserError` anywhere, catch it once in the script."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch


class UserError(Exception):
    """Something that the user can put right. The message is the one line that they see.

    code: the program's exit code; 2 for bad input, 1 for a run that went wrong.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def stop_printing() -> None:
    """Send what is still printed nowhere, because its reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def errors_in_one_line(memory_advice: str) -> Iterator[None]:
    """End the program with one line for each error that a user can put right.

    Every other error is a bug of ours and keeps its traceback.
    """
    # A file's name may hold what the terminal's encoding does not.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()  # here, or Python would report a closed pipe as it exits
    except UserError as error:
        # From a loader's process the message arrives behind that process's traceback.
        end(str(error).split("UserError: ")[-1].strip(), error.code)
    except (torch.OutOfMemoryError, MemoryError) as error:
        end(f"out of memory ({str(error).split('.')[0]}); {memory_advice}", 2)
    except RuntimeError as error:  # torch has no class of its own for the CPU's memory
        if "can't allocate memory" in str(error):
            end(f"out of memory; {memory_advice}", 2)
        if not isinstance(error, torch.linalg.LinAlgError):
            raise
        end(f"{error}; usually a gradient is not finite: use a smaller --lr", 1)
    except OSError as error:  # no permission, a disk that is full or gone, a closed pipe
        if error.errno is None:
            raise
        if error.filename is None:
            stop_printing()  # it may be standard output that cannot be written
        end(f"{error.filename or 'output'}: {error.strerror}", 2 if error.filename else 1)
    except KeyboardInterrupt as stop:
        # A training run raises it with the signal's number once it has saved, and has said so.
        if stop.args:
            raise SystemExit(128 + stop.args[0]) from None
        end("interrupted", 130)
