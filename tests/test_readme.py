"""What README and docstrings print is run: every command, every snippet; what they name exists."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import fresh_process
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TWO_PROCESSES, run_script, script_environment
from PIL import Image

README = (ROOT / "README.md").read_text()
PLACES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page.read_text() for page in PLACES]
FOLDERS = [ROOT, ROOT / "lessons", ROOT / "experiments"]
SCRIPTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]

# ---- commands ------------------------------------------------------------------------------------


def printed_commands() -> list[str]:
    """Lines of README's shell blocks, and the indented command lines of scripts' docstrings."""
    lines = [
        line for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page, re.S)
        for line in block.splitlines()
    ]  # fmt: skip
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
        docstring = re.sub(r" \\\n +", " ", docstring)
        lines += re.findall(r"^ {2,}((?:python|torchrun) .*?)(?:   .*)?$", docstring, re.M)
    lines = [line.split("#")[0].strip() for line in lines]
    return list(dict.fromkeys(line.split("&& ")[-1] for line in lines if line))


# What makes a command short. A flag given twice counts as given last.
SHORT = {
    "train_cls.py": "--model nano --depth 1 --image-size 16 --patch-size 8 --batch-size 20 "
    "--epochs 1 --warmup-epochs 0 --grad-accum 1 --workers 0 --data {images} --out {out}",
    "train_ssl.py": "--model nano --depth 1 --image-size 16 --patch-size 8 --batch-size 20 "
    "--epochs 1 --warmup-epochs 0 --prototypes 16 --workers 0 --data {images} --out {out}",
    "jacobian_probe.py": "--depths 2 --seeds 1 --images 2 --image-size 16 --patch-size 8 --model "
    "nano --out {out}",
    "eval_dense.py": "--image-size 24 --out {out}",
    "1_gradient_flow.py": "--seeds 2 --out {out}",
    "2_exercises.py": "--seeds 1 --out {out}",
    "3_why_attention_needs_a_skip.py": "--seeds 1 --out {out}",
    "4_alpha_beta_c.py": "--seeds 1 --out {out}",
    "5_gradients_by_depth.py": "--seeds 1 --out {out}",
    "6_speed_of_descent.py": "--seeds 1 --out {out}",
    "draw_readme.py": "--out {out}",
    "sweep.py": "--classes 2 --arms residual --depths 1 --opts adamw --rates 1e-3 --seeds 0 "
    "--epochs 1 --tune-epochs 1 --work {out}",
    "first_gpu.py": "--minutes 0.02 --device cpu --out {out}",
    "speed.py step": "--models nano --steps 2 --batch-size 2 --image-size 32 --device cpu",
    "speed.py soap": "--model nano --tens 2 --device cpu",
    "speed.py init": "--models nano --repeats 2",
    "speed.py dino": "--model nano --batch-size 1 --repeats 2 --device cpu",
    "speed.py loading": "--images 8 --repeats 2 --workers 0",
    "speed.py checkpoint": "--model nano --repeats 2",
    "pytest": "--collect-only -q -n 0 tests/test_files.py",
}


PLACEHOLDERS = {  # what stands for what in a printed command
    r"(RUN|runs/a)/last\.pt": "{run}",
    r"(OTHER|runs/b)/last\.pt": "{other}",
    r"(runs/sweep|results/tiny-imagenet|results/neighbours)": "{sweep}",
    "runs/first-gpu-DATE": "{first}",
    r"(/imagenet|DATA|TINY)\b": "{images}",
    r"(CAMVID|ROOT)\b": "{scenes}",
    r"\w+\.(png|jpg)\b": "{street}",
    r"\bS\b": "3",
}


def shortened(command: str) -> list[str]:
    """The words of a printed command, with {names} for things, made short."""
    for placeholder, name in PLACEHOLDERS.items():
        command = re.sub(rf"(?<=[ =]){placeholder}", name, command)
    words = [word for word in shlex.split(command) if word not in ("...", "--compile")]
    if words[0] == "torchrun":
        words = ["python", *TWO_PROCESSES, *[word for word in words[1:] if "--n" not in word]]
    name = next(w for w in words if w.endswith(".py") or w == "pytest")
    script = name.split("/")[-1]  # or, of speed.py, script and command
    short = SHORT[f"speed.py {words[2]}" if script == "speed.py" else script].split()
    if {"--resume", "--eval", "--help", "--table"} & set(words):
        short = []
    elif "--checkpoint" in words:  # which brings its own settings
        short = ["--images", "2", "--out", "{out}"]
    elif name.endswith("eval_dense.py") and "segment" in words:
        short += ["--epochs", "1"]
    if "--" in words:  # flags for the trainer stay behind
        at = words.index("--")
        tail = "--model nano --image-size 16 --patch-size 8 --batch-size 12 --warmup-epochs 0 "
        return words[:at] + short + words[at:] + (tail + "--workers 0").split()
    return words + short


def alike(command: str) -> tuple:
    """Equal for commands that are one once shortened; of a flag given twice the last counts."""
    words, flags = shortened(command), {}
    for number, word in enumerate(words):
        if word.startswith("--") and word != "--":
            end = next((i for i, w in enumerate(words[number + 1 :]) if w.startswith("--")), None)
            flags[word] = tuple(words[number + 1 :][:end])
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return tuple(words[:first]), tuple(sorted(flags.items()))


def is_run_elsewhere(command: str) -> bool:
    """A sweep with labels takes a dozen runs; `test_sweep.py` has a real one."""
    return "sweep.py" in command and "--script" not in command and "--table" not in command


DIFFERENT = {alike(c): c for c in reversed(printed_commands()) if not is_run_elsewhere(c)}


@pytest.fixture(scope="module")
def things(image_root, tmp_path_factory):
    """What the placeholders in printed commands stand for."""
    folder = tmp_path_factory.mktemp("things")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (folder / "scenes" / split / kind).mkdir(parents=True)
        for i in range(3):
            mask = rng.choice([0, 1, 11], (24, 32)).astype(np.uint8)
            pixels = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
            Image.fromarray(mask).save(folder / "scenes" / split / "masks" / f"{i}.png")
            Image.fromarray(pixels).save(folder / "scenes" / split / "images" / f"{i}.png")
    Image.fromarray(pixels).save(folder / "street.png")
    for run in ("a", "b"):
        words = ["--data", image_root, *SMALL, "--depth", "12", "--epochs", "1"]
        words += ["--warmup-epochs", "0", "--out", folder / run]
        assert run_script("train_cls.py", *words, cwd=folder).returncode == 0
    for kind in ("tune", "full"):
        log = folder / f"sweep/{kind}/residual-12-soap-lr0.001-seed0/log.jsonl"
        log.parent.mkdir(parents=True)
        epochs = {"tune": 3, "full": 5}[kind]
        row = dict(top1=50.0, val_loss=1.0, lr=1e-3, minutes=1.0, images_per_s=100.0)
        rows = [json.dumps(dict(epoch=epoch + 1, **row)) for epoch in range(epochs)]
        log.write_text("\n".join(rows) + "\n")
    (folder / "first").mkdir()
    (folder / "first/rows.jsonl").write_text(json.dumps(dict(part="machine", torch="2")) + "\n")
    files = dict(
        run="a/last.pt", other="b/last.pt", sweep="sweep", scenes="scenes", street="street.png"
    )
    files["first"] = "first"
    settings = dict(script="train_cls.py", classes=None, tune_epochs=3, epochs=5, flags=[])
    (folder / "sweep/sweep.json").write_text(json.dumps(settings))
    return {name: folder / file for name, file in files.items()} | dict(images=image_root)


@pytest.mark.parametrize("command", DIFFERENT.values())
def test_printed_commands_run_from_the_root(command, things, tmp_path):
    words = [word.format(**things, out=tmp_path / "out") for word in shortened(command)]
    environment = {k: v for k, v in script_environment().items() if k != "PYTHONPATH"}
    if words[1] == "-m":
        pipes = dict(capture_output=True, text=True, timeout=200)
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, **pipes)
    else:
        done = fresh_process.run(words[1:], ROOT, environment)
    assert done.returncode == 0, f"{words}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def test_every_file_named_in_the_pages_exists():
    for page, folder in zip(PAGES, (page.parent for page in PLACES)):
        for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|png|md))`", page):
            if name not in ("curves.png", "table.md"):
                assert (ROOT / name).exists(), name
        for name in re.findall(r"\]\(((?!http|#)[^)#]+)", page):
            assert (folder / name).exists(), name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_slurm_script_starts_a_run_and_then_goes_on_with_it(tmp_path):
    """Run by bash with Slurm's commands as stubs, one of which starts the trainer alone."""
    [block] = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/on_gpus.md").read_text(), re.S)
    (tmp_path / "job.sh").write_text(block)
    words = "--cpus-per-task=64 torchrun --nnodes=2 --nproc-per-node=8"
    srun = f'[ "$1 $2 $3 $4" = "{words}" ] || exit 9\n'
    srun += '[ $TORCH_ELASTIC_SHUTDOWN_TIMEOUT -lt 120 ] || exit 9\necho "$@"'
    stubs = dict(srun=srun, scontrol='echo "node7\nnode8"')
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", HOME=str(tmp_path))
    environment |= dict(SLURM_NNODES="2", SLURM_CPUS_PER_TASK="64", SLURM_JOB_NODELIST="node[7-8]")

    def submitted() -> str:
        command = ["bash", str(tmp_path / "job.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "--rdzv-endpoint=node7:29500" in done.stdout
        return done.stdout.split("train_cls.py ")[1].strip()

    run = tmp_path / "runs/skipless"
    assert submitted() == f"--data /imagenet --compile --out {run} --skipless"
    run.mkdir(parents=True)
    (run / "last.pt").touch()
    assert submitted() == f"--data /imagenet --compile --resume {run}/last.pt"


# ---- the snippet for one image -------------------------------------------------------------------


def test_the_readmes_snippet_shows_a_trained_network_one_image(things, capsys):
    """And gives the tokens after the last block, from which the logits come."""
    [block] = [x for x in re.findall(r"```python\n(.*?)```", README, re.S) if "trained_vit" in x]
    names = {}
    exec(
        block.replace("RUN/last.pt", str(things["run"])).replace(
            "street.png", str(things["street"])
        ),
        names,
    )
    label, probability = capsys.readouterr().out.split()
    probabilities, model = names["probabilities"], names["model"]
    assert label == f"class{probabilities.argmax()}" and 0.2 < float(probability) < 1
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert names["tokens"].shape == (1, 4 + (model.cls_token is not None), 64)
    assert torch.equal(model.classify(names["tokens"]).softmax(-1)[0], probabilities)
