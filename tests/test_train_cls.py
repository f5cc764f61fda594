"""The supervised trainer, run as a user runs it: on files, from the command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    assert_fails_in_one_line,
    make_image_folder,
    run_here,
    run_interrupted,
    run_script,
    script_environment,
)

import train_cls

RUN = [*SMALL, "--epochs", "2", "--warmup-epochs", "1", "--workers", "0"]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def finished(image_root, tmp_path_factory):
    """A folder with one finished skipless run, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    args = ["--data", image_root, "--skipless", "--ema", "0.9", "--out", "runs/a", *RUN]
    done = run_script("train_cls.py", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_says_and_leaves_what_it_promises(finished):
    folder, printed = finished
    last_line = printed.strip().splitlines()[-1]
    assert re.fullmatch(r"top-1 [\d.]+ %  top-5 [\d.]+ %  \(2 epochs, [\d.]+ min\)", last_line)
    assert "skipless, conditioned init" in printed and "lr 0.001" in printed
    rows = [json.loads(line) for line in (folder / "runs/a/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"train_loss", "val_loss", "top1", "top5", "lr", "images_per_s"} <= rows[0].keys()
    assert f"top-1 {rows[-1]['top1']:.1f} %" in last_line
    assert (folder / "runs/a/curves.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = load(folder / "runs/a/last.pt")
    assert checkpoint["model_config"]["residual"] is False
    assert load(folder / "runs/a/best.pt")["history"]
    assert not list(folder.rglob("*.tmp"))


def test_eval_needs_the_checkpoint_alone(finished):
    folder, printed = finished
    done = run_script("train_cls.py", "--eval", "runs/a/last.pt", cwd=folder)
    assert done.returncode == 0, done.stderr
    top1 = printed.strip().splitlines()[-1].split("  ")[0]
    assert done.stdout.strip().splitlines()[-1].startswith(top1)


def test_every_optimizer_and_the_residual_network_run(finished, image_root):
    folder, _ = finished
    for opt in ("adamw", "muon"):
        args = ["--data", image_root, "--opt", opt, "--grad-accum", "3", *RUN, "--workers", "1"]
        done = run_script("train_cls.py", *args, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert (folder / f"runs/cls-nano-residual-{opt}-seed0/last.pt").exists()


@pytest.mark.parametrize(
    "words, init, pool, position_std",
    [
        ("", "default", "cls", 0.5),
        ("--skipless", "conditioned", "cls", 0.5),
        ("--skipless --depth 24", "depth", "mean", 1.0),
        ("--skipless --model large --init conditioned", "conditioned", "cls", 0.5),
        ("--skipless --init depth --pool cls --position-std 0.1", "depth", "cls", 0.1),
    ],
)
def test_the_init_goes_by_depth_and_brings_what_it_counts_on(
    words, init, pool, position_std, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *words.split()])
    args = train_cls.settle(train_cls.parse_arguments(), None)
    assert (args.init, args.pool, args.position_std) == (init, pool, position_std)


def test_a_checkpoint_from_before_pooling_was_a_choice_has_a_class_token(finished, monkeypatch):
    stored = load(finished[0] / "runs/a/last.pt")["args"]
    del stored["pool"]
    monkeypatch.setattr(sys, "argv", "train_cls.py --resume x --pool cls".split())
    assert train_cls.settle(train_cls.parse_arguments(), stored).pool == "cls"


def test_the_demo_draws_its_own_images(tmp_path):
    flags = "--skipless --depth 1 --image-size 16 --batch-size 2000 --epochs 1 --warmup-epochs 0"
    done = run_script("train_cls.py", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Shapes: 20000 train, 2000 val, 10 classes" in done.stdout
    assert (tmp_path / "runs/cls-nano-skipless-conditioned-soap-seed0/log.jsonl").exists()


# ---- interruption --------------------------------------------------------------------------------


def assert_equal_runs(a: dict, b: dict) -> None:
    for key in ("model", "ema"):
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), name
    timing = ("minutes", "images_per_s")
    rows = [
        [{k: v for k, v in row.items() if k not in timing} for row in c["history"]] for c in (a, b)
    ]
    assert rows[0] == rows[1]


def test_an_interrupted_run_resumes_exactly(image_root, tmp_path):
    """Stopped in mid-epoch, then by Ctrl-C and SIGTERM, with other numbers of workers: the same."""
    args = ["--data", image_root, "--drop-path", "0.2", "--ema", "0.9", *SMALL, "--epochs", "8"]
    args += ["--batch-size", "4", "--warmup-epochs", "1"]
    straight = run_script("train_cls.py", *args, "--out", "runs/a", "--workers", "0", cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr

    out = tmp_path / "runs/b"
    first = run_interrupted("train_cls", 6, [*args, "--out", "runs/b", "--workers", "2"], tmp_path)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert load(out / "last.pt")["step"] == 6
    flags = ["--resume", "runs/b/last.pt", "--workers", "2"]
    for number, epochs_before in ((signal.SIGINT, 1), (signal.SIGTERM, 3)):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_cls.py"), *map(str, flags)],
            cwd=tmp_path,
            env=script_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            log = out / "log.jsonl"
            if log.exists() and len(log.read_text().splitlines()) >= epochs_before:
                break
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 128 + number, stdout + stderr
        assert "continue with --resume" in stdout and not stderr
        flags = ["--resume", "runs/b/last.pt", "--workers", "1"]
        assert 0 < load(out / "last.pt")["epoch"] < 8
    resumed = run_script("train_cls.py", *flags, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_runs(load(tmp_path / "runs/a/last.pt"), load(out / "last.pt"))


def test_a_signal_is_heeded_with_one_step_an_epoch(image_root, tmp_path):
    """Then there is no mid-epoch: the run must leave between two epochs. Workers get it too."""
    args = ["--data", image_root, *SMALL, "--batch-size", "60", "--epochs", "500", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_cls.py"), *map(str, args), "--workers", "1"],
        cwd=tmp_path,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run/log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stdout + stderr
    assert 1 <= load(tmp_path / "run/last.pt")["epoch"] < 500


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(finished, tmp_path):
    folder, _ = finished
    path = tmp_path / "last.pt"
    checkpoint = load(folder / "runs/a/last.pt")
    checkpoint["epoch"] = 1
    checkpoint["model"]["head.bias"][0] = float("nan")
    torch.save(checkpoint, path)
    before = path.read_bytes()
    done = run_script("train_cls.py", "--resume", path, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"error: the loss is nan at epoch 2, step 1, lr .* is kept", done.stderr)
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == before


# ---- two processes -------------------------------------------------------------------------------


def test_two_processes_compute_the_gradient_of_one(image_root, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient: compare it."""
    args = ["--data", image_root, *SMALL, "--batch-size", "60", "--epochs", "1", "--opt", "adamw"]
    args += "--warmup-epochs 0 --mixup 0 --cutmix 0 --drop-path 0 --clip-grad 0 --workers 0".split()
    one = run_script("train_cls.py", *args, "--out", "one", cwd=tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = run_script("train_cls.py", *args, "--out", "two", cwd=tmp_path, launcher=launcher)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    moments = [c["optimizers"][0]["state"] for c in (a, b)]
    for i in moments[0]:
        g, h = (m[i]["exp_avg"] for m in moments)
        assert torch.allclose(g, h, rtol=1e-3, atol=1e-6 * g.abs().max().item() + 1e-9)
    assert a["history"][0]["train_loss"] == pytest.approx(b["history"][0]["train_loss"], rel=1e-5)
    assert a["history"][0]["val_loss"] == pytest.approx(b["history"][0]["val_loss"], rel=1e-3)


# ---- bad input -----------------------------------------------------------------------------------


BAD_FLAGS = {
    "--data nowhere": "nowhere: no such folder",
    "--data {root} --image-size 20": "patch size must divide image size: image 20, patch 8",
    "--data {root} --batch-size 61": "exceeds the 60 training images",
    "--data {root} --grad-accum 5": "multiple of processes x --grad-accum",
    "--data {root} --device cuda:9": "CUDA devices? found here; use --device cpu",
    "--data {root} --device mps": "is not known here; use auto, cpu, cuda",
    "--data {root} --skipless --drop-path 0.1": "leave it out with --skipless",
    "--data {root} --alpha 1": "--alpha set the conditioned init",
    "--data {root} --skipless --c 0": "c and at least one of alpha and beta",
    "--data {root} --warmup-epochs 2": "must be less than --epochs",
    "--data {root} --lr 0": "--lr must be positive",
    "--data {root} --epochs x": "argument --epochs: invalid int value",
    "--data {root} --epochs 1 --warmup-epochs 0.95": "leaves no step",
    "--data {root} --out {root}/val/class0/00.png": "cannot make this folder",
    "--resume {done}/runs/a/last.pt --data {done}/other": "that run had 60 training images",
    "--resume {done}/runs/a/last.pt --out {done}/runs/b": "holds a run already",
    "--data {root} --ema 1": r"--ema must lie in \[0, 1\)",
    "--data {root} --out {done}/runs/a": "holds a run already",
    "--resume nowhere.pt": "nowhere.pt: no such file",
    "--resume {done}/runs/a/log.jsonl": "damaged or of another program",
    "--eval {root}/val/class0/00.png": "damaged or of another program",
    "--resume {done}/runs/a/last.pt --lr 0.5": "--lr 0.5 contradicts the checkpoint",
    "--resume a.pt --eval b.pt": "exclude each other",
}


@pytest.fixture(scope="module")
def finished_and_others(finished):
    """The folder of `finished`, a copy of its run, and other images."""
    other = make_image_folder(finished[0] / "other")
    (other / "train/class0/00.png").unlink()
    shutil.copytree(finished[0] / "runs/a", finished[0] / "runs/b")
    return finished[0]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(
    flags, image_root, finished_and_others, tmp_path, monkeypatch, capsys
):
    words = flags.format(root=image_root, done=finished_and_others).split()
    base = [] if "--resume" in flags or "--eval" in flags else RUN
    done = run_here(train_cls.main, [*base, *words], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])


BAD_FOLDERS = {
    "no val": r"no folder .*val; expected ROOT/val/<class>/<image files>",
    "no classes": "Couldn't find any class folder",
    "empty class": "class1",
    "other classes": r"same classes; only in train: \['class1'\], only in val: \['class9'\]",
    "text": r"cannot read image .*00\.png",
    "cut short": r"cannot read image .*00\.png",
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_bad_folders_end_in_one_line(damage, tmp_path, monkeypatch, capsys):
    root = make_image_folder(tmp_path / "images")
    image = root / "train/class0/00.png"
    if damage == "no val":
        shutil.rmtree(root / "val")
    elif damage == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    elif damage == "empty class":
        shutil.rmtree(root / "train/class1")
        (root / "train/class1").mkdir()
    elif damage == "other classes":
        (root / "val/class1").rename(root / "val/class9")
    elif damage == "text":
        image.write_text("this is no image")
    elif damage == "cut short":
        image.write_bytes(image.read_bytes()[:-200])
    done = run_here(train_cls.main, ["--data", root, *RUN], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FOLDERS[damage])
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_eval_on_other_classes_is_refused(finished, tmp_path):
    root = make_image_folder(tmp_path / "images", classes=3)
    checkpoint = finished[0] / "runs/a/last.pt"
    done = run_script("train_cls.py", "--eval", checkpoint, "--data", root, cwd=tmp_path)
    assert_fails_in_one_line(done, "other classes than checkpoint")


def test_help_names_every_default(tmp_path):
    done = run_script("train_cls.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("[soap]", "[demo 4, --data 300]", "[demo 64, --data 1024]"):
        assert words in " ".join(done.stdout.split())
