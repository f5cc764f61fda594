"""What surrounds a training: how runs begin from others, go on, and what they say on the way."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    assert_fails_in_one_line,
    make_image_folder,
    run_here,
    run_main,
    script_environment,
)

import train_cls
import train_ssl
from beyond.arms import trained_vit, untrained_vit
from support import files, processes

DINO = [*SMALL, "--local-crops", "1", "--prototypes", "16"]
IDENTITY = ["--skipless", "--init", "identity"]


@pytest.fixture(scope="module")
def runs(image_root, tmp_path_factory):
    """A folder with runs of both trainers on five classes; `cls` has averaged weights."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    common = ["--data", image_root, *IDENTITY, "--seed", "3"]
    with patch.context() as p:
        run_main(train_cls.main, [*SMALL, *common, "--ema", 0.9, "--out", "cls"], folder, p)
        run_main(train_ssl.main, [*DINO, *common, "--out", "ssl"], folder, p)
    return folder


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- --init-from ---------------------------------------------------------------------------------

# The network comes from the checkpoint, so only how to train is given, at a rate that moves nothing
TUNED = "--batch-size 12 --epochs 1 --warmup-epochs 0 --workers 0 --lr 1e-30".split()


def begun_from(source, root, more, trainer, cwd, monkeypatch, capsys) -> tuple[dict, str]:
    """(model that a run from this checkpoint ends with, what it printed at its start)."""
    words = [*TUNED, "--init-from", source, "--data", root, "--out", "new", *more]
    if trainer is train_ssl:
        words += DINO[-4:]
    capsys.readouterr()
    run_main(trainer.main, words, cwd, monkeypatch)
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("start ")]
    return files.load_checkpoint(str(cwd / "new/last.pt"))["model"], line


@pytest.mark.parametrize("first", ["cls", "ssl"])
@pytest.mark.parametrize("trainer", [train_cls, train_ssl])
@pytest.mark.parametrize("classes", [5, 3, "other names"])
def test_a_run_begins_from_the_weights_of_another(
    first, trainer, classes, runs, tmp_path, monkeypatch, capsys
):
    """All of them, averaged ones if there are any; the head only for the same classes."""
    root = make_image_folder(tmp_path / "images", 5 if classes == "other names" else classes)
    if classes == "other names":
        for split in ("train", "val"):
            (root / split / "class0").rename(root / split / "class5")
    last = files.load_checkpoint(str(runs / first / "last.pt"))
    source = last["ema"] if first == "cls" else last["model"]
    weights, said = begun_from(last["path"], root, [], trainer, tmp_path, monkeypatch, capsys)
    same = (first, trainer, classes) == ("cls", train_cls, 5)
    for name, x in weights.items():
        kept = name in source and x.shape == source[name].shape
        kept = kept and torch.allclose(x, source[name], rtol=1e-5, atol=1e-7)
        assert kept == (same or not name.startswith("head.")) or name == "head.bias", name
    assert ("but the head's" in said) == (trainer is train_cls and not same)
    assert said.endswith(f"{first}/last.pt, epoch 2") and "resized" not in said


def test_larger_images_get_a_resized_position_embedding_and_keepers_that_follow(
    runs, image_root, tmp_path, monkeypatch, capsys
):
    """From 4 tokens to 16: b + log(15 / 3) for the six keepers, b for the two fetchers."""
    last = runs / "ssl/last.pt"
    source = trained_vit(files.load_checkpoint(str(last)))
    larger = ["--image-size", "32"]
    weights, said = begun_from(last, image_root, larger, train_cls, tmp_path, monkeypatch, capsys)
    assert "resized" in said
    expected = source.interpolate_pos_embed(4, 4)
    assert torch.allclose(weights["pos_embed"], expected, atol=1e-6)
    b = source.blocks[1].attention.diagonal_bias.detach().clone()
    b[:6] += torch.tensor(5.0).log()
    assert torch.allclose(weights["blocks.1.attention.diagonal_bias"], b, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)  # and so it computes what the first one does
    fresh = trained_vit(files.load_checkpoint(str(tmp_path / "new/last.pt")))
    for ours, theirs in zip(
        fresh.forward_features(images, [0, 2]), source.forward_features(images, [0, 2])
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_settings_of_a_run_from_a_checkpoint(runs, monkeypatch):
    """The network is the checkpoint's; how to train follows from the flags, as for a fresh one."""

    def settings(*words):
        words = ["t", "--init-from", str(runs / "ssl/last.pt"), *words]
        monkeypatch.setattr(sys, "argv", words)
        return train_cls.read_settings()

    args, checkpoint, source = settings("--data", "x")
    assert checkpoint is None and source["script"] == "train_ssl"
    network = dict(model="nano", depth=2, image_size=16, patch_size=8, skipless=True)
    network |= dict(init="identity", pool="mean", pos_embed_std=0.5)
    assert {name: vars(args)[name] for name in network} == network
    assert (args.epochs, args.lr, args.drop_path, args.seed) == (300, 3e-3, 0.0, 0)
    assert settings()[0].epochs == 3
    for words in (["--depth", "3"], ["--pool", "cls"], ["--init", "paper"], ["--alpha", "1"]):
        with pytest.raises(train_cls.UserError, match=f"{words[0]} .* contradicts the checkpoint"):
            settings(*words)


def test_a_run_from_a_checkpoint_resumes_exactly(runs, image_root, tmp_path, monkeypatch):
    """Its first weights are not put in again."""
    words = ["--data", image_root, *TUNED[:2], "--epochs", 2, "--warmup-epochs", 1, "--workers", 0]
    words += ["--init-from", runs / "cls/last.pt"]
    run_main(train_cls.main, [*words, "--out", "a"], tmp_path, monkeypatch)
    end_epoch = train_cls.Run.end_epoch

    def end_and_stop(run, **measured):
        end_epoch(run, **measured)
        raise train_cls.UserError("stopped")

    with monkeypatch.context() as p, pytest.raises(SystemExit):
        p.setattr(train_cls.Run, "end_epoch", end_and_stop)
        run_main(train_cls.main, [*words, "--out", "b"], tmp_path, p)
    run_main(train_cls.main, ["--resume", "b/last.pt"], tmp_path, monkeypatch)
    a, b = (files.load_checkpoint(str(tmp_path / x / "last.pt"))["model"] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- resuming ------------------------------------------------------------------------------------


def test_a_finished_run_is_prolonged_or_says_that_it_is_finished(
    runs, tmp_path, monkeypatch, capsys
):
    """The rate is that of the longer run, from the third of five epochs on."""
    last = runs / "cls/last.pt"
    run_main(
        train_cls.main, ["--resume", last, "--epochs", "2", "--out", "a"], tmp_path, monkeypatch
    )
    out = capsys.readouterr().out
    assert "is finished: nothing is left to train" in out and "epochs before" not in out
    run_main(
        train_cls.main, ["--resume", last, "--epochs", "5", "--out", "b"], tmp_path, monkeypatch
    )
    assert (
        "2 epochs before, 5 now: from here on the schedule is that of 5" in capsys.readouterr().out
    )
    rows = log_of(tmp_path / "b")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    rates = [train_cls.lr_at(5 * epoch - 1, 25, 5, 3e-3) for epoch in (3, 4, 5)]
    assert [row["lr"] for row in rows[2:]] == pytest.approx(rates) and rates[0] > 1e-3
    stored = files.load_checkpoint(str(tmp_path / "b/last.pt"))["args"]
    assert stored["epochs"] == 5
    for words in (["--resume", last, "--epochs", "1"], ["--eval", last, "--epochs", "5"]):
        done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, r"--epochs \d contradicts the checkpoint, trained with 2")


# ---- what a run says -----------------------------------------------------------------------------


def test_averaged_weights_follow_in_a_short_run(image_root, tmp_path, monkeypatch):
    """At .9999, usual in long runs, after 20 steps: with that decay from the first step on, val and
    --eval would measure the untrained network."""
    words = ["--data", image_root, *SMALL, "--epochs", 4, "--ema", 0.9999, "--out", "r"]
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    checkpoint = files.load_checkpoint(str(tmp_path / "r/last.pt"))
    name = "blocks.1.mlp.fc1.weight"
    before = untrained_vit(checkpoint).state_dict()[name]
    last, averaged = checkpoint["model"][name], checkpoint["ema"][name]
    assert 0 < (averaged - last).norm() < 0.3 * (last - before).norm()


@pytest.mark.parametrize(
    "words, also",
    [
        ("", "--pool mean --pos-embed-std 0.5 --drop-path 0.0"),
        ("--drop-path 0 --pool mean", "--pos-embed-std 0.5"),
        ("--pool mean --pos-embed-std 0.5 --drop-path 0", None),
        ("--skipless --pool cls", None),
        ("--model base --depth 1", "--drop-path 0.0"),  # where --skipless takes the paper's init
    ],
)
def test_a_residual_run_says_in_what_else_its_twin_differs(
    words, also, image_root, tmp_path, monkeypatch, capsys
):
    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    monkeypatch.setattr(train_cls.Run, "describe_memory", enough)
    with pytest.raises(Enough):
        words = ["--data", image_root, *SMALL, *words.split(), "--out", "r"]
        run_main(train_cls.main, words, tmp_path, monkeypatch)
    said = re.findall("note    --skipless also sets (.*): set it here", capsys.readouterr().out)
    assert said == ([also] if also else [])


def test_dino_that_learned_nothing_says_so(image_root, tmp_path, monkeypatch, capsys):
    for rate, ends in ((10, True), (1e-3, False)):
        words = ["--data", image_root, *DINO, "--lr", rate, "--out", rate]
        run_main(train_ssl.main, words, tmp_path, monkeypatch)
        out = capsys.readouterr().out
        assert ("note    nothing learned: the loss is above a uniform guess's" in out) == ends


def test_a_log_file_shows_a_step_within_the_first_minute(image_root, tmp_path, monkeypatch, capsys):
    """Once, 30 seconds in: here a step takes 7, and 11 after a resume in the seventh of ten, whose
    pace is that of the steps made since. A terminal has its bar."""
    now, seconds, stopped = [1000.0], [7], []
    monkeypatch.setattr("support.run.time.time", lambda: now[0])
    lr_at = train_cls.lr_at

    def slowly(step, *rest):
        now[0] += seconds[0]
        if step == 6 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        return lr_at(step, *rest)

    monkeypatch.setattr(train_cls, "lr_at", slowly)
    words = ["--data", image_root, *SMALL, "--batch-size", "6", "--out", "r"]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    [line] = re.findall(r"epoch \d/2, step.*", done.stdout)
    assert re.fullmatch(r"epoch 1/2, step 5: loss \d\.\d{3}, 1\.2 minutes an epoch", line)
    seconds[0] = 11
    run_main(train_cls.main, ["--resume", "r/last.pt"], tmp_path, monkeypatch)
    [line] = re.findall(r"epoch \d/2, step.*", capsys.readouterr().out)
    assert re.fullmatch(r"epoch 1/2, step 10: loss \d\.\d{3}, 1\.8 minutes an epoch", line)


# ---- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, says",
    [
        (dict(WORLD_SIZE=None), "WORLD_SIZE"),
        (dict(MASTER_PORT=None), "MASTER_PORT"),
        (dict(RANK="first"), "first"),
    ],
)
def test_half_of_torchruns_variables_end_in_one_line(
    variables, says, image_root, tmp_path, monkeypatch, capsys
):
    whole = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    for name, value in (whole | variables).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    words = ["--data", image_root, *SMALL, "--out", "r"]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, f"these processes cannot meet .*{says}.*torchrun")


def test_without_file_locks_one_line_names_the_systems(image_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    words = ["--data", image_root, *SMALL, "--out", "r"]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "Linux and macOS")


def test_an_apple_gpu_needs_torchs_fallback(image_root, tmp_path, monkeypatch, capsys):
    words = ["--data", image_root, *SMALL, "--device", "mps", "--out", "r"]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "finds no Apple GPU here; use --device cpu or auto")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "set PYTORCH_ENABLE_MPS_FALLBACK=1")
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    device = processes.chosen_device("mps")
    assert device.type == "mps" and not processes.uses_bf16(device, "auto")
    assert processes.chosen_device("auto").type == "cpu"  # only when asked for: it is untried


def test_names_that_the_terminal_cannot_write_are_written_in_ascii(tmp_path):
    """A folder's name beyond ASCII, of which one byte is no text at all."""
    name = os.fsdecode("bilder-ü".encode() + b"\xff")
    make_image_folder(tmp_path / name)
    words = ["--data", name, *SMALL, "--epochs", "1", "--warmup-epochs", "0", "--out", "r" + name]
    command = [sys.executable, str(ROOT / "train_cls.py"), *words]
    environment = script_environment() | dict(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"data    bilder-\xfc\udcff: 60 training images" in done.stdout
