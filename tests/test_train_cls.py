"""The supervised trainer: its steps against the same steps by hand; run as a user runs it."""

import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    SMALL,
    TWO_PROCESSES,
    assert_fails_in_one_line,
    make_image_folder,
    passes_computed_twice,
    run_here,
    run_main,
    run_script,
    script_environment,
    share_of,
)
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import train_cls
from beyond.identity_init import COUNTS_ON, NEEDS, identity_init_
from minskip import PRESETS, ViT, conditioned_init_
from soap import SOAP
from support import data, memory
from support.run import Run
from support.shapes import draw_shapes


def load(path) -> dict:
    return torch.load(path, weights_only=True)


# ---- the loop, by hand ---------------------------------------------------------------------------

SEED = 5  # not the default, which a run might use whatever it is told

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]


def training_batch(root, epoch: int, step: int, size: int):
    """Images and labels of a step of 20, from the seeds that `data` documents."""
    folder, (transform, _) = data.image_folder(root, "train"), data.augmentations(16, drawn=False)
    [seed] = data.mixed_seeds(1, data.ORDER, SEED, epoch)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    chosen = order[step * size : (step + 1) * size].tolist()
    images = []
    for index, seed in zip(chosen, data.mixed_seeds(size, data.IMAGES, SEED, epoch, step)):
        torch.manual_seed(seed)
        images.append(transform(folder[index][0]))
    labels = torch.tensor([folder[index][1] for index in chosen])
    return (torch.stack(images).double() / 255 - MEAN) / STD, labels


def smoothed_cross_entropy(logits, targets, smoothing: float):
    """- sum over classes of target log p, the target spread over the classes by `smoothing`."""
    targets = F.one_hot(targets, 5).double() if targets.ndim == 1 else targets
    targets = targets * (1 - smoothing) + smoothing / 5
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def train_by_hand(root, model, on: bool, held: bool = False):
    """Two epochs of three steps. Returns the mean loss of the second and the averaged weights."""
    # up in 2 steps, then half a cosine
    lr = [0.25, 0.5] + [(1 + math.cos(math.pi * i / 4)) / 4 for i in range(4)] if on else None
    smoothing, decay, clip = (0.1, 0.2, 0.3) if on else (0.0, 0.0, None)
    accumulate = 2 if on or held else 1  # once with a gradient that is clipped, once without
    decayed = {n for n, p in model.named_parameters() if p.ndim > 1} - {"cls_token", "pos_embed"}
    average = copy.deepcopy(model)
    for epoch in range(2):
        losses = []
        for step in range(3):
            images, labels = training_batch(root, epoch, step, 20)
            torch.manual_seed(data.mixed_seeds(1, data.STEP, SEED, epoch, step, 0)[0])
            if on:
                mixes = v2.MixUp(alpha=0.8, num_classes=5), v2.CutMix(alpha=0.7, num_classes=5)
                images, labels = v2.RandomChoice(mixes)(images, labels)
            model.train().zero_grad()
            loss = 0.0
            for x, y in zip(images.chunk(accumulate), labels.chunk(accumulate)):
                part = smoothed_cross_entropy(model(x), y, smoothing) / accumulate
                part.backward()
                loss += part.item()
            losses.append(loss)
            gradients = {name: p.grad for name, p in model.named_parameters()}
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            factor = min(1, clip / (norm.item() + 1e-6)) if clip else 1
            i = 3 * epoch + step
            rate = lr[i] if on else 0.05 * (1 + torch.tensor(torch.pi * i / 6).cos().item()) / 2
            with torch.no_grad():
                for name, p in model.named_parameters():
                    update = rate * (factor * gradients[name] + decay * p * (name in decayed))
                    p -= update * share_of(name, p) if held else update
                d = [0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.37][
                    i
                ]  # (1 + i) / (10 + i), up to --ema
                for a, p in zip(average.parameters(), model.parameters()):
                    a.mul_(d).add_((1 - d) * p)
    return sum(losses) / 3, average


@torch.no_grad()
def measured_by_hand(root, model) -> dict:
    folder, (_, transform) = data.image_folder(root, "val"), data.augmentations(16, drawn=False)
    images = torch.stack([transform(image) for image, _ in folder])
    logits = model.eval()((images.double() / 255 - MEAN) / STD)
    labels = torch.tensor([label for _, label in folder])
    ranked = logits.argsort(1, descending=True)
    return dict(
        val_loss=-logits.log_softmax(1)[torch.arange(30), labels].mean().item(),
        top1=100 * (ranked[:, 0] == labels).double().mean().item(),
        top5=100 * (ranked[:, :5] == labels[:, None]).any(1).double().mean().item(),
    )


ON = "--mixup 0.8 --cutmix 0.7 --label-smoothing 0.1 --clip-grad 0.3 --ema 0.37 --grad-accum 2 "
ON += "--weight-decay 0.2 --warmup-epochs 0.7 --drop-path 0.4 --lr 0.5"
OFF = "--mixup 0 --cutmix 0 --label-smoothing 0 --clip-grad 0 --ema 0 --grad-accum 1 "
OFF += "--weight-decay 0 --warmup-epochs 0 --drop-path 0 --lr 0.05 --skipless --init"


@pytest.mark.parametrize(
    "init, ema",
    [(None, True), (None, False), ("default", None), ("paper", None), ("identity", None)],
)
def test_two_epochs_equal_the_same_steps_by_hand(
    init, ema, image_root, tmp_path, monkeypatch, capsys, float64_sgd
):
    """Every switch on, then every switch off: weights, averages, losses and accuracies.

    A warm-up of 0.7 epochs of three steps is two steps. --grad-accum halves what passes at once.
    """
    on, held = init is None, init == "identity"
    words = [*SMALL, "--data", image_root, "--out", tmp_path, "--batch-size", 20, "--seed", SEED]
    words += (ON if on else f"{OFF} {init}").split()
    words += ["--ema", 0, "--checkpoint-activations"] if ema is False else []
    words += ["--grad-accum", 2] if held else []
    words += "--alpha 1.5 --beta 0.9 --c 2.5".split() if init == "paper" else []
    twice = passes_computed_twice(monkeypatch)
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    assert bool(twice) == (ema is False)
    at_once = re.findall(r"MB for each of (\d+) images", capsys.readouterr().out)
    assert at_once == ([] if twice else ["10" if on or held else "20"])
    checkpoint = load(tmp_path / "last.pt")

    torch.manual_seed(SEED)
    shape = PRESETS["nano"] | dict(depth=2, residual=on, drop_path=0.4 * on)
    shape |= dict(pos_embed_std=train_cls.SETTINGS["pos_embed_std"][1])
    model = ViT(16, 8, 5, **shape | (COUNTS_ON | NEEDS if held else {}))
    if held:
        identity_init_(model)
    elif init == "paper":
        conditioned_init_(model, alpha=1.5, beta=0.9, c=2.5)
    start = copy.deepcopy(model.state_dict())
    loss, average = train_by_hand(image_root, model, on, held)
    measured = average if ema else model
    assert (model.head.weight - start["head.weight"]).norm() > 0.01  # it did move
    for name, weight in model.state_dict().items():
        assert torch.allclose(checkpoint["model"][name], weight, atol=1e-6), name
    if ema:
        for name, weight in average.state_dict().items():
            assert torch.allclose(checkpoint["ema"][name], weight, atol=1e-6), name
    row = checkpoint["history"][-1]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    by_hand = measured_by_hand(image_root, measured)
    assert {key: row[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-5)
    assert by_hand["top1"] < by_hand["top5"]


def test_top_5_counts_the_five_best_of_ten_classes():
    """The right class is the best for a fifth of the images, among five for three fifths."""
    ranks = torch.tensor([0, 1, 4, 5, 9])
    logits = torch.arange(10.0).flip(0).expand(5, 10)  # class k is the k-th best

    class Fixed(nn.Module):
        def forward(self, images):
            return logits

    batch = [(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), ranks)]
    result = train_cls.evaluate(Fixed(), batch, torch.device("cpu"), "off")
    assert (result["top1"], result["top5"]) == pytest.approx((20, 60))


def test_optimizers_and_what_they_decay():
    model = ViT(16, 8, 5, dim=16, depth=1, num_heads=2)
    settings = dict(lr=2e-3, weight_decay=0.1, init="default", refresh_every=7)
    args = argparse.Namespace(opt="soap", **settings)
    soap = train_cls.build_optimizer(args, model)
    args.opt = "adamw"
    adamw = train_cls.build_optimizer(args, model)
    assert isinstance(soap, SOAP) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in soap.param_groups:
        assert group["betas"] == (0.95, 0.95)
        assert group["stagger"] and group["precondition_frequency"] == 7
    decayed, plain = adamw.param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert decayed["lr"] == plain["lr"] == 2e-3 and decayed["betas"] == (0.9, 0.95)
    assert all("weight" in names[id(p)] and p.ndim > 1 for p in decayed["params"])
    undecayed = {names[id(p)] for p in plain["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= undecayed
    assert len(names) == len(decayed["params"]) + len(plain["params"])


def test_the_learning_rate_rises_and_falls():
    rates = [train_cls.lr_at(step, 10, 4, 0.6) for step in range(11)]
    assert rates[:5] == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6])
    assert rates[7] == pytest.approx(0.3) and rates[10] == pytest.approx(0, abs=1e-12)
    assert train_cls.lr_at(0, 10, 0, 1.0) == 1.0


# ---- what a run leaves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(image_root, tmp_path_factory):
    """A folder with one finished skipless run, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    args = ["--data", image_root, "--skipless", "--ema", "0.9", "--out", "runs/a", *SMALL]
    args += ["--init", "paper"]
    done = run_script("train_cls.py", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_says_and_leaves_what_it_promises(finished):
    folder, printed = finished
    last_line = printed.strip().splitlines()[-1]
    assert re.fullmatch(r"top-1 [\d.]+ %  top-5 [\d.]+ %  \(2 epochs, [\d.]+ min\)", last_line)
    assert "skipless-paper, 2 blocks" in printed and "lr 0.001" in printed
    assert "fewer than ten steps in an epoch: a smaller --batch-size" in printed
    rows = [json.loads(line) for line in (folder / "runs/a/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss", "val_loss", "top1", "top5", "lr", "images_per_s"} <= rows[0].keys()
    assert f"top-1 {rows[-1]['top1']:.1f} %" in last_line
    assert (folder / "runs/a/curves.png").read_bytes().startswith(b"\x89PNG")
    assert load(folder / "runs/a/last.pt")["model_config"]["residual"] is False
    names = {f.name for f in (folder / "runs/a").iterdir()}
    assert names == {".lock", "log.jsonl", "curves.png", "last.pt"}


def test_eval_needs_the_checkpoint_alone(finished, tmp_path):
    folder, printed = finished
    done = run_script("train_cls.py", "--eval", folder / "runs/a/last.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    top1 = printed.strip().splitlines()[-1].split("  ")[0]
    assert done.stdout.strip().splitlines()[-1].startswith(top1)
    assert not list(tmp_path.iterdir())


def test_folders_are_named_after_the_settings(finished, image_root):
    folder, _ = finished
    for _ in range(2):
        args = ["--data", image_root, "--opt", "adamw", "--init", "paper", *SMALL, "--workers", 1]
        done = run_script("train_cls.py", *args, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "--init paper without --skipless: a residual network" in done.stdout
    for run in ("cls-nano-residual-paper-adamw-seed0", "cls-nano-residual-paper-adamw-run2-seed0"):
        assert (folder / "runs" / run / "last.pt").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", dict(init="default", lr=5e-3, depth=12, pool="cls", epochs=3, alpha=2.0)),
        ("", dict(weight_decay=0.01, label_smoothing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0)),
        ("--data x", dict(weight_decay=0.05, label_smoothing=0.1, mixup=0.8, cutmix=1.0)),
        ("--skipless", dict(init="identity", lr=5e-3, drop_path=0.0, pool="mean")),
        ("--skipless --init paper", dict(lr=1e-3, pool="cls", beta=0.6, c=3.0)),
        ("--skipless --init default --opt adamw", dict(lr=2e-4, pos_embed_std=0.5)),
        ("--data x", dict(model="base", lr=3e-3, drop_path=0.1, batch_size=1024)),
        ("--data x --skipless --lr 1", dict(init="paper", lr=1.0, drop_path=0.0, c=3.0)),
        ("--data x --skipless --model small", dict(init="identity", pos_embed_std=0.5, lr=3e-3)),
        ("--skipless --pool cls", dict(init="identity", pool="cls", pos_embed_std=0.5)),
        ("--model large", dict(depth=24)),
    ],
)
def test_where_a_setting_comes_from(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *words.split()])
    args, *_ = train_cls.read_settings()
    assert {name: getattr(args, name) for name in expected} == expected


def test_help_names_every_default(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", "--help"])
    with pytest.raises(SystemExit):
        train_cls.read_settings()
    text = " ".join(capsys.readouterr().out.split())
    for words in ("[3; with --data 300]", "[64; with --data 1024]", "[0.5; with --data 0.02]"):
        assert words in text
    shown = {line.split()[0] for line in re.findall(r"(--[\w-]+) ", text)}
    assert {f"--{name.replace('_', '-')}" for name in train_cls.SETTINGS} <= shown


def test_the_demo_trains_on_shapes_and_measures_on_others(tmp_path, monkeypatch, capsys):
    """Those for training are only turned over, those for val as they were drawn."""
    drawn = {split: draw_shapes(list(range(30)), 16, split)[0] for split in ("train", "val")}
    seen, real = dict(train=[], val=[]), train_cls.normalise

    def normalise(images):
        seen["train" if len(images) == 2000 else "val"].append(images)
        return real(images)

    monkeypatch.setattr(train_cls, "normalise", normalise)
    flags = "--skipless --depth 1 --image-size 16 --batch-size 2000 --epochs 1 --warmup-epochs 0"
    run_main(train_cls.main, flags.split(), tmp_path, monkeypatch)
    assert "Shapes: 20000 training images" in capsys.readouterr().out
    assert (tmp_path / "runs/cls-nano-skipless-identity-soap-seed0/log.jsonl").exists()
    train, val = (torch.cat(seen[split]) for split in ("train", "val"))
    assert len(train) == 20_000 and len(val) == 2000
    assert torch.equal(val[:30], drawn["val"])
    for image in drawn["train"]:
        turned = [image, image.flip(1), image.flip(2), image.flip(1, 2)]
        assert sum((train == version).all((1, 2, 3)).sum() for version in turned) == 1


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


def heed_signals() -> None:
    """Also where the tests were started by cron or nohup, whose processes ignore some signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(args, cwd, **more) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_cls.py"), *map(str, args)]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)
    return subprocess.Popen(command, cwd=cwd, env=script_environment(), **how, **more)


def test_an_interrupted_run_resumes_exactly(image_root, tmp_path, monkeypatch, capsys):
    """Stopped in mid-epoch, then by Ctrl-C, with other numbers of workers: the same to the bit."""
    args = ["--data", image_root, "--drop-path", "0.2", "--ema", "0.9", *SMALL, "--epochs", "6"]
    args += ["--batch-size", "4", "--init", "identity"]  # whose pairs are held, resumed or not
    run_main(train_cls.main, [*args, "--out", "runs/a"], tmp_path, monkeypatch)

    lr_at = train_cls.lr_at

    def lr_and_a_signal(step, *rest):  # as if SIGTERM came in the sixth step
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(step, *rest)

    monkeypatch.setattr(train_cls, "lr_at", lr_and_a_signal)
    done = run_here(train_cls.main, [*args, "--out", "runs/b"], tmp_path, monkeypatch, capsys)
    monkeypatch.setattr(train_cls, "lr_at", lr_at)
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped at epoch 1, step 6; continue with --resume" in done.stdout
    out = tmp_path / "runs/b"
    assert (load(out / "last.pt")["epoch"], load(out / "last.pt")["step"]) == (0, 6)

    open(out / ".lock").close()  # which lets go of this process's lock
    process = start(["--resume", "runs/b/last.pt", "--workers", "2"], tmp_path)
    while process.poll() is None and not (out / "log.jsonl").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, stdout + stderr
    assert "resume  runs/b/last.pt at epoch 1, step 6" in stdout and not stderr
    assert 0 < load(out / "last.pt")["epoch"] < 6
    (out / "log.jsonl").unlink()  # as if killed before it was written: rebuilt from the checkpoint
    stopped = load(out / "last.pt")
    changed = dict(seconds=stopped["seconds"] + 3600, processes=2)  # as if there had been two
    torch.save(stopped | changed, out / "last.pt")
    run_main(train_cls.main, ["--resume", "runs/b/last.pt"], tmp_path, monkeypatch)
    assert "note    2 processes before, 1 now: the same batches" in capsys.readouterr().out
    a, b = load(tmp_path / "runs/a/last.pt"), load(out / "last.pt")
    assert_equal_runs(a, b)
    assert b["history"][-1]["minutes"] > 60 and b["seconds"] > 3600  # of all its parts
    assert len((out / "log.jsonl").read_text().splitlines()) == 6


def test_a_run_stopped_during_its_evaluation_measures_again(
    image_root, tmp_path, monkeypatch, capsys
):
    """At the second of eight batches, which is the last that it measures."""
    args = ["--data", image_root, *SMALL, "--batch-size", 4, "--ema", 0.9]
    run_main(train_cls.main, [*args, "--out", "a"], tmp_path, monkeypatch)
    measuring, numbers = Run.measuring, []

    def with_a_signal(run, loader):
        for number, batch in enumerate(measuring(run, loader), start=1):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            numbers.append(number)
            yield batch

    with monkeypatch.context() as p:
        p.setattr(Run, "measuring", with_a_signal)
        done = run_here(train_cls.main, [*args, "--out", "b"], tmp_path, p, capsys)
    assert done.returncode == 128 + signal.SIGTERM and numbers == [1, 2]
    assert "stopped at epoch 1, step 15; continue with --resume b/last.pt" in done.stdout
    for workers in (1, 0):
        words = ["--resume", "b/last.pt", "--workers", workers]
        run_main(train_cls.main, words, tmp_path, monkeypatch)
        assert_equal_runs(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))


def test_checkpoints_are_written_every_ten_minutes_and_at_both_ends(
    image_root, tmp_path, monkeypatch, capsys
):
    """Here an epoch takes five. A run that is killed in between goes on from the last one."""
    now, saved, save = [1000.0], [], Run.save
    monkeypatch.setattr("support.run.time.time", lambda: now[0])
    args = ["--data", image_root, *SMALL, "--epochs", 4, "--ema", 0.9]

    def noted(run):
        saved.append(run.epoch)
        save(run)

    def lr_and_time(*rest):
        now[0] += 60
        return lr_at(*rest)

    def evaluate(*rest):
        if now[0] == stop:
            raise train_cls.UserError("killed")
        return measured(*rest)

    measured, lr_at, stop = train_cls.evaluate, train_cls.lr_at, None
    monkeypatch.setattr(train_cls, "lr_at", lr_and_time)
    monkeypatch.setattr(Run, "save", noted)
    monkeypatch.setattr(train_cls, "evaluate", evaluate)
    run_main(train_cls.main, [*args, "--out", "a"], tmp_path, monkeypatch)
    assert saved == [1, 3, 4]
    stop = now[0] + 3 * 300
    run_here(train_cls.main, [*args, "--out", "b"], tmp_path, monkeypatch, capsys)
    log, last = tmp_path / "b/log.jsonl", tmp_path / "b/last.pt"
    assert len(log.read_text().splitlines()) == 2 and load(last)["epoch"] == 1
    saved.clear()
    words = ["--resume", "b/last.pt", "--save-every", 0]
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    assert saved == [2, 3, 4]
    assert_equal_runs(load(tmp_path / "a/last.pt"), load(last))
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_second_ctrl_c_ends_the_program_at_once_and_a_second_sigterm_does_not():
    """The batch system and torchrun may both send SIGTERM; who presses Ctrl-C twice means it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    noted = argparse.Namespace(signal=0)
    try:
        Run.receive(noted, signal.SIGTERM, None)
        assert noted.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_is_heeded_with_one_step_an_epoch(image_root, tmp_path):
    """Then there is no mid-epoch: the run must leave between two epochs. Workers get it too."""
    args = ["--data", image_root, *SMALL, "--batch-size", "60", "--epochs", "500", "--out", "run"]
    process = start([*args, "--workers", "1"], tmp_path, start_new_session=True)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stdout + stderr
    assert 1 <= load(tmp_path / "run/last.pt")["epoch"] < 500


def test_a_closed_terminal_is_heeded_and_a_reader_that_leaves_is_not(image_root, tmp_path):
    """SIGHUP ends and saves; `train_cls.py ... | head -1` trains on."""
    args = ["--data", image_root, *SMALL, "--batch-size", "60", "--out", "run"]
    process = start([*args, "--epochs", "500"], tmp_path)
    process.stdout.close()
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP, process.stderr.read()
    assert process.stderr.read() == ""
    assert 4 <= load(tmp_path / "run/last.pt")["epoch"] < 500
    process.stderr.close()


def test_under_nohup_a_closed_terminal_is_ignored(image_root, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        words = ["--data", image_root, *SMALL, "--batch-size", "60", "--out", "run"]
        run_main(train_cls.main, words, tmp_path, monkeypatch)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_runs_do_not_share_a_folder(image_root, tmp_path, monkeypatch, capsys):
    args = ["--data", image_root, *SMALL, "--out", "run"]
    (tmp_path / "run").mkdir()
    code = "import pathlib, time; from support import files"
    code += f"; files.lock(pathlib.Path({str(tmp_path / 'run')!r}))"
    words = [sys.executable, "-c", f"{code}; print(flush=True); time.sleep(100)"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        done = run_here(train_cls.main, args, tmp_path, monkeypatch, capsys)
        other.kill()
    assert_fails_in_one_line(done, f"run is in use by process {other.pid} on .*; wait")


def test_a_finished_run_resumed_mends_its_log_and_one_resumed_elsewhere_is_whole(
    finished, tmp_path, monkeypatch, capsys
):
    """As killed between the last checkpoint and the last line of the log."""
    shutil.copytree(finished[0] / "runs/a", tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    whole = log.read_text()
    log.write_text(whole.splitlines(keepends=True)[0])
    left = tmp_path / "run/last.pt.123.tmp"  # by a process that was killed as it wrote
    left.touch()
    (tmp_path / "run/notes.tmp").touch()  # not ours
    run_main(train_cls.main, ["--resume", "run/last.pt"], tmp_path, monkeypatch)
    assert "run/last.pt is finished: nothing is left to train" in capsys.readouterr().out
    assert log.read_text() == whole and not left.exists()
    assert (tmp_path / "run/notes.tmp").exists()
    words = ["--resume", "run/last.pt", "--out", "new"]
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    assert_equal_runs(load(tmp_path / "run/last.pt"), load(tmp_path / "new/last.pt"))
    assert (tmp_path / "new/log.jsonl").read_text() == whole
    assert (tmp_path / "new/curves.png").exists()


def test_a_full_disk_ends_a_run_in_one_line_its_workers_too(image_root, tmp_path):
    """Here a limit on the size of files, below a checkpoint's."""
    words = ["--data", image_root, *SMALL, "--workers", "1", "--out", "run"]
    command = (
        f"ulimit -f 100; exec {sys.executable} {ROOT}/train_cls.py {' '.join(map(str, words))}"
    )
    environment = script_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}  # cut short, for good
    how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    done = subprocess.run(["bash", "-c", command], **how)
    assert_fails_in_one_line(done, "cannot write run/last.pt .*; what it held before is kept")
    assert {f.name for f in (tmp_path / "run").iterdir()} == {".lock", "log.jsonl"}


def test_a_mistake_of_ours_ends_the_program_although_a_loader_works(image_root, tmp_path):
    """Workers heed no SIGTERM, with which multiprocessing would end them, waiting for ever."""
    words = ["--data", str(image_root), *SMALL, "--workers", "1", "--out", "run"]
    code = """
import train_cls
from support import errors, run
def mistake(self, **numbers): raise RuntimeError("a mistake of ours")
run.Run.add = mistake
with errors.errors_in_one_line("-"):
    train_cls.main()
"""
    (tmp_path / "broken.py").write_text(code)
    done = run_script(tmp_path / "broken.py", *words, cwd=tmp_path, launcher=["-u"])
    assert done.returncode == 1 and "RuntimeError: a mistake of ours" in done.stderr


@pytest.mark.parametrize("broken", ["gradient", "weights"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    broken, finished, tmp_path, monkeypatch, capsys
):
    """A loss that is not, and weights broken by the very step before a signal comes."""
    checkpoint = load(finished[0] / "runs/a/last.pt")
    checkpoint |= dict(epoch=1, history=checkpoint["history"][:1])
    path = tmp_path / "last.pt"
    if broken == "gradient":
        checkpoint["model"]["head.bias"][0] = float("nan")
    else:
        step = SOAP.step

        def breaking_step(self):
            step(self)
            self.param_groups[0]["params"][0].data[0] = float("inf")
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(SOAP, "step", breaking_step)
    torch.save(checkpoint, path)
    before = path.read_bytes()
    done = run_here(train_cls.main, ["--resume", path], tmp_path, monkeypatch, capsys)
    assert done.returncode == 1
    what = "the loss is nan at epoch 2, step 1;" if broken == "gradient" else "a weight is not fin"
    assert what in done.stderr and "is kept. Usual causes: --lr 0.001" in done.stderr
    assert path.read_bytes() == before


# ---- two processes -------------------------------------------------------------------------------


def test_a_killed_process_ends_the_others_and_what_was_saved_is_usable(
    image_root, tmp_path, monkeypatch
):
    words = ["--data", image_root, *SMALL, "--skipless", "--epochs", "5000", "--out", "run"]
    command = [sys.executable, *TWO_PROCESSES, ROOT / "train_cls.py", *words]
    how = dict(cwd=tmp_path, env=script_environment(), stderr=subprocess.PIPE, text=True)
    torchrun = subprocess.Popen([str(x) for x in command], stdout=subprocess.DEVNULL, **how)
    try:
        log, begun = tmp_path / "run/log.jsonl", time.time()
        while torchrun.poll() is None and not (log.exists() and log.read_text()):
            assert time.time() < begun + 100
            time.sleep(0.05)
        ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        _, stderr = torchrun.communicate(timeout=60)
    finally:
        torchrun.terminate()  # which ends its processes too
    assert torchrun.returncode == 1 and "Signal 9 (SIGKILL)" in stderr
    saved = load(tmp_path / "run/last.pt")
    shorter = saved["args"] | dict(epochs=saved["epoch"] + 1)
    torch.save(saved | dict(args=shorter), tmp_path / "run/last.pt")
    run_main(train_cls.main, ["--resume", "run/last.pt"], tmp_path, monkeypatch)
    assert load(tmp_path / "run/last.pt")["epoch"] == saved["epoch"] + 1


# ---- bad input -----------------------------------------------------------------------------------


BAD_FLAGS = {
    "--data nowhere": "nowhere: no such folder",
    "--data {root} --image-size 20": "patch size must divide image size: image 20, patch 8",
    "--data {root} --batch-size 61": "exceeds the 60 training images",
    "--data {root} --grad-accum 5": "multiple of processes x --grad-accum = 5",
    "--data {root} --device cuda:9": "CUDA devices? found here; use --device cpu",
    "--data {root} --device xpu": "is not known here; use auto, cpu, cuda",
    "--data {root} --skipless --drop-path 0.1": "leave it out with --skipless",
    "--data {root} --alpha 1": "--alpha is not part of --init default",
    "--data {root} --skipless --beta 1": "--beta is not part of --init identity",
    "--data {root} --skipless --pool cls --model tiny --depth 0": "--depth: must be at least 1",
    "--data {root} --skipless --init paper --c 0": "--c: must be positive; it is 0",
    "--data {root} --skipless --init paper --alpha 0 --beta 0": "not negative and not both 0",
    "--data {root} --warmup-epochs 2": "must be less than --epochs",
    "--data {root} --lr 0": "--lr: must be positive",
    "--data {root} --pos-embed-std inf": "must not be negative; it is inf",
    "--data {root} --epochs x": "argument --epochs: invalid int value",
    "--data {root} --epochs 1 --warmup-epochs 0.95": "leaves no step",
    "--data {root} --out {root}/val/class0/00.png": "cannot write into this folder",
    "--resume {done}/runs/a/last.pt --data {done}/other": "had 60 .*, this folder has 59; give",
    "--resume {done}/runs/a/last.pt --data {done}/renamed": "this folder has 60 others; give",
    "--data {root} --out=": "--out: must name a file or folder",
    "--data=": "--data: must name a file or folder",  # as an unset variable gives
    "--data {root} --resume=": "--resume: must name a file or folder",
    "--eval=": "--eval: must name a file or folder",
    "--resume {done}/runs/b/older.pt": "overwrite the last.pt beside it; add --out NEW",
    "--resume {done}/runs/a/last.pt --data {done}/changed": "this folder has 60 others; give",
    "--skipless --attention e-spa --image-size 8": "needs more than one token",
    "--resume {done}/runs/a/last.pt --out {done}/runs/b": "holds a run already",
    "--data {root} --ema 1": r"--ema: must lie in \[0, 1\)",
    "--data {root} --seed 4294967296": "must lie in 0 .. 2",
    "--data {root} --workers 257": "--workers: must lie in 0 .. 256; it is 257",
    "--data {root} --out {done}/runs/a": "holds a run already",
    "--resume nowhere.pt": "nowhere.pt: no such file",
    "--resume {done}/runs/a": r"no such file; .*runs/a/last.pt\?",
    "--resume {done}/runs/a/log.jsonl": "damaged or of another program",
    "--eval {root}/val/class0/00.png": "damaged or of another program",
    "--resume {done}/runs/a/last.pt --lr 0.5": "--lr 0.5 contradicts the checkpoint",
    "--resume {done}/runs/a/last.pt --batch-size 6": "--batch-size 6 contradicts the checkpoint",
    "--resume {done}/runs/a/last.pt --seed 1": "--seed 1 contradicts the checkpoint",
    "--resume {done}/runs/a/last.pt --amp off": "--amp off contradicts the checkpoint",
    "--resume a.pt --eval b.pt": "exclude each other",
    "--eval {done}/runs/a/last.pt --data {done}/three": "other classes than the checkpoint",
}


@pytest.fixture(scope="module")
def finished_and_others(finished):
    """The folder of `finished`, a copy of its run, and other images."""
    other = make_image_folder(finished[0] / "other")
    (other / "train/class0/00.png").unlink()
    renamed = make_image_folder(finished[0] / "renamed") / "train/class0"
    (renamed / "00.png").rename(renamed / "x.png")
    make_image_folder(finished[0] / "three", classes=3)
    changed = make_image_folder(finished[0] / "changed") / "train/class0/00.png"
    Image.open(changed).resize((30, 30)).save(changed)
    shutil.copytree(finished[0] / "runs/a", finished[0] / "runs/b")
    shutil.copy(finished[0] / "runs/a/last.pt", finished[0] / "runs/b/older.pt")
    return finished[0]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(
    flags, image_root, finished_and_others, tmp_path, monkeypatch, capsys
):
    words = flags.format(root=image_root, done=finished_and_others).split()
    base = [] if "--resume" in flags or "--eval" in flags else SMALL
    done = run_here(train_cls.main, [*base, *words], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])


@pytest.mark.parametrize("part", ["optimizer", "model", "step", "sums"])
def test_a_checkpoint_of_another_version_ends_in_one_line(
    part, finished, tmp_path, monkeypatch, capsys
):
    """Parts that do not fit this network, or are not there."""
    content = load(finished[0] / "runs/a/last.pt")
    others = dict(optimizer=torch.optim.SGD([torch.zeros(3)]).state_dict(), model={})
    if part in others:
        content[part] = others[part]
    else:
        del content[part]
    torch.save(content, tmp_path / "last.pt")
    done = run_here(train_cls.main, ["--resume", "last.pt"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "last.pt is damaged or of another version")


BAD_FOLDERS = {
    "no val": r"no folder .*val; expected ROOT/val/<class>/<image files>",
    "no classes": "Couldn't find any class folder",
    "empty class": "class1",
    "other classes": r"same classes; only in train: \['class1'\], only in val: \['class9'\]",
    "text": r"cannot read image .*train/class0/00\.png",
    "text in val": r"cannot read image .*val/class0/00\.png",
    "cut short": r"cannot read image .*00\.png",
    "integers": r"image .*00\.tiff has 32 bits per pixel; save it with 8 or 16",
    "fractions": r"image .*00\.tiff has 32 bits per pixel; save it with 8 or 16",
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_bad_folders_end_in_one_line(damage, tmp_path, monkeypatch, capsys):
    root = make_image_folder(tmp_path / "images")
    image = root / ("val" if damage == "text in val" else "train") / "class0/00.png"
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
    elif damage in ("text", "text in val"):
        image.write_text("this is no image")
    elif damage == "cut short":
        image.write_bytes(image.read_bytes()[:-200])
    elif damage in ("integers", "fractions"):
        Image.open(image).convert("IF"[damage == "fractions"]).save(image.with_suffix(".tiff"))
    done = run_here(train_cls.main, ["--data", root, *SMALL], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FOLDERS[damage])
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_the_same_pictures_stored_in_other_ways_train_the_same_network(tmp_path, monkeypatch):
    """With 16 bits a pixel, which Pillow would clip to white, and turned as a camera's tag says."""
    usual, other = (make_image_folder(tmp_path / name) for name in ("usual", "other"))
    tag = Image.Exif()
    tag[0x0112] = 6  # the stored picture's top is on the right
    for i, path in enumerate(sorted(usual.rglob("*.png"))):
        grey = Image.open(path).convert("L").crop((0, 0, 24, 20))
        grey.save(path)
        sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        stored, more = (sixteen, {}) if i % 2 else (grey.rotate(90, expand=True), dict(exif=tag))
        stored.save(other / path.relative_to(usual), **more)
    for root in (usual, other):
        words = ["--data", root, *SMALL, "--out", root / "run"]
        run_main(train_cls.main, words, tmp_path, monkeypatch)
    a, b = (load(root / "run/last.pt") for root in (usual, other))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert a["history"][-1]["val_loss"] == b["history"][-1]["val_loss"]


def test_a_picture_that_cannot_be_written_stops_no_run_and_one_that_learned_nothing_says_so(
    image_root, tmp_path, monkeypatch, capsys
):
    (tmp_path / "run/curves.png").mkdir(parents=True)
    (tmp_path / "run").rename(tmp_path / "ü$x^{$")  # no formula
    words = ["--data", image_root, *SMALL, "--out", "ü$x^{$", "--lr", "1e-9"]
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    (tmp_path / "ü$x^{$").rename(tmp_path / "run")
    out, err = capsys.readouterr()
    assert err.count("note    cannot write ü$x^{$/curves.png (Is a directory)") == 2  # epochs
    assert not list((tmp_path / "run").glob("*.tmp"))
    *_, note, last = out.strip().splitlines()
    assert note.startswith("note    nothing learned") and last.startswith("top-1")


@pytest.mark.parametrize("loss, told", [(0.98, False), (1.0, True)])
def test_nothing_learned_is_said_where_the_loss_is_that_of_guessing(
    loss, told, finished, tmp_path, monkeypatch, capsys
):
    """ln 5, for five classes; here of a finished run, which ends at once."""
    checkpoint = load(finished[0] / "runs/a/last.pt")
    checkpoint["history"][-1]["loss"] = loss * math.log(5)
    torch.save(checkpoint, tmp_path / "last.pt")
    run_main(train_cls.main, ["--resume", "last.pt"], tmp_path, monkeypatch)
    assert ("nothing learned" in capsys.readouterr().out) == told


def test_a_folder_that_cannot_be_written_is_found_before_training(
    image_root, tmp_path, monkeypatch, capsys
):
    """Here because its log's place is taken; a read-only or full disk ends in the same line."""
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    words = ["--data", image_root, *SMALL, "--out", "run"]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, r"cannot write run/log.jsonl \(Is a directory\)")
    assert {f.name for f in (tmp_path / "run").iterdir()} == {".lock", "log.jsonl"}
    (tmp_path / "other/.lock").mkdir(parents=True)
    words[-1] = "other"
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, r"other/.lock: Is a directory")
    words[-1] = "/proc/self"  # where nobody may write
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, r"/proc/self: cannot write into this folder")


def test_what_autograd_keeps_is_counted_and_let_go():
    """Softmax keeps its own output; GELU the hidden units; linear layers their inputs."""
    d, h, held = 300, 500, []

    def forward(images: int):
        hidden = nn.functional.linear(torch.zeros(images, d), torch.ones(h, d, requires_grad=True))
        held.append(weakref.ref(hidden))
        return nn.functional.gelu(hidden).softmax(-1)

    assert memory.saved_bytes(lambda: forward(2)) - memory.saved_bytes(lambda: forward(1)) == 4 * (
        d + h + h
    )
    assert [reference() for reference in held] == [None, None]


def test_memory_is_told_before_the_first_step(capsys, monkeypatch):
    d, h = 300, 500
    net = nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))
    an_image, weights = 4 * (d + 2 * h), 4 * (2 * d * h + d + h)
    cpu = torch.device("cpu")
    for opt in ("adamw", "soap"):
        fixed = 4 * weights  # they, their gradients, two moments
        if opt == "soap":  # two factors and two bases, of two matrices
            fixed += 4 * 2 * 2 * (d**2 + h**2)
        memory.say_memory(net, [(d,)], 10_000, opt, cpu, "off")
        told = re.findall(r"[\d.]+(?= GB| MB)", capsys.readouterr().out)
        total = fixed + 10_000 * an_image
        assert told == [f"{total / 1e9:.2f}", f"{an_image / 1e6:.1f}", f"{fixed / 1e9:.2f}"]
    long = nn.Linear(2, 20_000, bias=False)  # whose long side gets no factor
    memory.say_memory(long, [(2,)], 1, "soap", cpu, "off")
    assert " 0.00 GB for weights" in capsys.readouterr().out
    wide = nn.Linear(4000, 4000, bias=False)
    for processes, state in ((1, 6), (2, 3)):  # copies: two moments, two factors, two bases; shared
        for name, value in (("initialized", True), ("world_size", processes), ("rank", 0)):
            name = f"is_{name}" if value is True else f"get_{name}"
            monkeypatch.setattr(memory.dist, name, lambda value=value: value)
        memory.say_memory(wide, [(4000,)], 1, "soap", cpu, "off")
        expected = (2 + state) * 4 * 4000**2 / 1e9  # and weights and gradients
        assert f" {expected:.2f} GB for weights" in capsys.readouterr().out
