"""Scripts in processes of their own, forked from one that has imported the large libraries once.

Importing torch and torchvision takes four seconds of a core, and the suite starts some sixty
scripts. Nothing of this project is imported before the fork.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision.transforms.v2", "matplotlib.pyplot"])


def become(words: list[str], cwd: Path, environment: dict, output: str, errors: str) -> None:
    """What `python words` does, in this process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    ours = ("", str(ROOT), str(ROOT / "tests"))
    added = [x for x in environment.get("PYTHONPATH", "").split(os.pathsep) if x]
    installed = [x for x in sys.path if x not in ours]
    sys.path[:] = [str(Path(words[0]).resolve().parent), *added, *installed]
    sys.argv = words
    multiprocessing.set_start_method("fork", force=True)  # a loader's, as in any other process
    runpy.run_path(words[0], run_name="__main__")


def run(words: list, cwd: Path, environment: dict) -> subprocess.CompletedProcess:
    """`python words` in cwd."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        for path in paths:
            path.touch()
        args = (list(map(str, words)), cwd, environment, *map(str, paths))
        process = FORKS.Process(target=become, args=args)
        process.start()
        process.join(200)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{words}\n{paths[0].read_text()}\n{paths[1].read_text()}")
        return subprocess.CompletedProcess(words, process.exitcode, *(p.read_text() for p in paths))
