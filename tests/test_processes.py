"""Several processes that train together, and the precision of what they compute.

`torchrun` itself starts those of test_soap.py and one run of test_train_cls.py.
"""

import re
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh_process
import pytest
import torch
from conftest import SMALL, run_main, script_environment

import train_cls
import train_ssl
from minskip import ViT
from support import data, processes


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def run_two(code: str, words: list, cwd: Path) -> list[subprocess.CompletedProcess]:
    """A script in two processes that know each other as torchrun's do."""
    (cwd / "script.py").write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> subprocess.CompletedProcess:
        joined = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2)
        joined |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environment = script_environment() | {name: str(x) for name, x in joined.items()}
        return fresh_process.run([cwd / "script.py", *words], cwd, environment)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def assert_both_ended(done: list, code: int = 0) -> None:
    assert [x.returncode for x in done] == [code, code], "\n".join(x.stderr for x in done)


# ---- what they exchange --------------------------------------------------------------------------

EXCHANGE = """
import argparse, math
import torch
import support.run
from support import knn, processes
from support.run import Run
_, rank, world = processes.start_processes("cpu")
assert world == 2
rows = torch.arange(14.0).reshape(7, 2) + 1
assert torch.equal(knn.gathered(rows[:4] if rank == 0 else rows[4:]), rows)
assert torch.equal(knn.gathered(rows[:4, 0] if rank == 0 else rows[4:, 0]), rows[:, 0])
mine = torch.tensor([1.0 + 4 * rank, 5.0])
assert processes.mean_over_processes(mine).tolist() == [3, 5]
assert mine.tolist() == [1 + 4 * rank, 5]
problems = []
noted = dict(sums={}, step=0, reading=True, break_off=problems.append)
Run.add(argparse.Namespace(**noted), loss=torch.tensor(math.nan if rank else 1.0))
assert problems == ["the loss is nan"]
assert processes.max_over_processes(3.5 - rank, torch.device("cpu")) == 3.5

now, looks = 100.0, []
support.run.time = argparse.Namespace(time=lambda: now)
run = argparse.Namespace(rarest=20, device=torch.device("cpu"))
run.leave_if_asked = lambda: looks.append(number)
for number in Run.watched(run, range(1, 14 - rank), 13):
    now += 0.5 if rank else 0.3
    assert run.reading == (number in (1, 5, 9, 13))
assert looks == [1, 5, 9]
processes.end_processes()
"""


def test_two_processes_gather_features_average_numbers_and_leave_together(tmp_path):
    """The k-NN bank: four images of one process and three of the other, in order and without
    padding. A loss that is not finite in one of them is noted by both. Where a batch takes one .3
    and the other .5 seconds, both look after each fourth whether to stop; of the
    thirteenth, the last, one has no part."""
    assert_both_ended(run_two(EXCHANGE, [], tmp_path))


COUNTED = """
import torch.distributed as dist
import train_cls
sent, real = [], dist.broadcast
dist.broadcast = lambda tensor, *rest, **more: sent.append(tensor) or real(tensor, *rest, **more)
train_cls.SHAPES_TRAIN = train_cls.SHAPES_VAL = 13
train_cls.main()
print("sent", len(sent), "with", max(x.numel() for x in sent))
"""


def test_a_step_sends_the_weights_in_few_messages(tmp_path):
    """Each of two processes sends all that it has updated at once, in the one step of this run."""
    done = run_two(COUNTED, [*SMALL, "--epochs", 1, "--warmup-epochs", 0, "--out", "run"], tmp_path)
    assert_both_ended(done)
    sent, largest = map(int, done[0].stdout.split("sent")[-1].split("with"))
    weights = sum(x.numel() for x in torch.load(tmp_path / "run/last.pt")["model"].values())
    assert sent == 2 and largest >= weights / 2


UNEVEN = """
import os, time
import torch
import {trainer} as trainer
from support import errors, files

def another(*args):
    model = build(*args)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model

def late(*args):
    time.sleep(3)
    return run_folder(*args)

build, run_folder = trainer.{build}, files.run_folder
if os.environ["RANK"] == "1":
    trainer.{build}, files.run_folder = another, late
with errors.errors_in_one_line("-"):
    trainer.main()
"""  # the second process draws other weights, as on another machine, and comes late
UNEVEN_CLS = UNEVEN.format(trainer="train_cls", build="build_network")
UNEVEN_SSL = UNEVEN.format(trainer="train_ssl", build="build_backbone")


def test_two_processes_compute_the_gradient_of_one(image_root, tmp_path, monkeypatch):
    """After one step AdamW's first moment is a tenth of the gradient: compare it. And averaged
    weights are the same everywhere, so that val is measured on one network."""
    args = ["--data", image_root, *SMALL, "--batch-size", "60", "--epochs", "1", "--opt", "adamw"]
    args += "--warmup-epochs 0 --mixup 0 --cutmix 0 --drop-path 0 --clip-grad 0 --ema 0.9".split()
    run_main(train_cls.main, [*args, "--out", "one"], tmp_path, monkeypatch)
    args += ["--grad-accum", "3", "--out", "two"]
    assert_both_ended(run_two(UNEVEN_CLS, args, tmp_path))
    a, b = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    moments = [c["optimizer"]["state"] for c in (a, b)]
    for i in moments[0]:
        g, h = (m[i]["exp_avg"] for m in moments)
        assert torch.allclose(g, h, rtol=1e-3, atol=1e-6 * g.abs().max().item() + 1e-9)
    assert a["history"][0]["loss"] == pytest.approx(b["history"][0]["loss"], rel=1e-5)
    assert a["history"][0]["val_loss"] == pytest.approx(b["history"][0]["val_loss"], rel=1e-3)


def test_two_processes_train_with_dino_what_one_does(image_root, tmp_path, monkeypatch):
    """Crops come of the image's seed, the centre is synchronised, and both teachers start from the
    first process's weights: the same up to rounding."""
    args = ["--data", image_root, *SMALL, "--prototypes", 32, "--skipless", "--opt", "adamw"]
    run_main(train_ssl.main, [*args, "--out", "one"], tmp_path, monkeypatch)
    assert_both_ended(run_two(UNEVEN_SSL, [*args, "--out", "two"], tmp_path))
    a, b = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert torch.allclose(a["centre"], b["centre"], atol=1e-4)
    rows = [c["history"][-1] for c in (a, b)]
    for key, close in (("loss", 1e-3), ("teacher_entropy", 1e-3), ("knn", 100 / 30 + 1e-6)):
        assert rows[0][key] == pytest.approx(rows[1][key], abs=close)  # one image of 30


def test_two_processes_resume_into_another_folder(image_root, tmp_path, monkeypatch):
    """The first must not save into it before the second has asked whether it holds a run."""
    words = ["--data", image_root, *SMALL, "--opt", "adamw", "--ema", "0.9", "--out", "run"]
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    assert_both_ended(run_two(UNEVEN_CLS, "--resume run/last.pt --out moved".split(), tmp_path))
    a, b = (load(tmp_path / f"{name}/last.pt") for name in ("run", "moved"))
    assert a["history"] == b["history"]
    for key in ("model", "ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


# ---- interrupted ---------------------------------------------------------------------------------

SIGNALLED = """
import os, signal
import torch
import train_cls
from support import errors

def lr_and_a_signal(step, *rest):
    print("seed", torch.initial_seed(), flush=True)  # that MixUp and drop-path draw from
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return lr_at(step, *rest)

lr_at, train_cls.lr_at = train_cls.lr_at, lr_and_a_signal
with errors.errors_in_one_line("-"):
    train_cls.main()
"""


def test_a_signal_to_one_of_two_processes_stops_both_and_one_goes_on(
    image_root, tmp_path, monkeypatch, capsys
):
    """Each process keeps SOAP's state of some weights; the checkpoint holds all of it, and the mean
    of both processes' losses. The two draw different random numbers."""
    args = ["--data", image_root, *SMALL, "--skipless", "--mixup", 0, "--cutmix", 0, "--seed", 3]
    done = run_two(SIGNALLED, [*args, "--out", "two"], tmp_path)
    assert_both_ended(done, 128 + signal.SIGTERM)
    for rank, process in enumerate(done):
        seeds = [int(x) for x in re.findall(r"seed (\d+)", process.stdout)]
        assert seeds == [data.mixed_seeds(1, data.STEP, 3, 0, i, rank)[0] for i in range(3)]
    two = load(tmp_path / "two/last.pt")
    run_main(train_cls.main, ["--resume", "two/last.pt"], tmp_path, monkeypatch)
    for out, at_once in ((done[0].stdout, 6), (capsys.readouterr().out, 12)):
        assert f" MB for each of {at_once} images" in out
    one = load(tmp_path / "two/last.pt")
    for steps, checkpoint in ((3, two), (10, one)):
        states = checkpoint["optimizer"]["state"]
        assert len(states) == len(checkpoint["model"])
        assert {state["step"] for state in states.values()} == {steps}
    moved = one["model"]["blocks.0.mlp.fc1.weight"] - two["model"]["blocks.0.mlp.fc1.weight"]
    assert 1e-4 < moved.abs().max() < 0.1  # bases and moments are of a size

    run_main(train_cls.main, [*args, "--out", "alone"], tmp_path, monkeypatch)
    for a, b in zip(load(tmp_path / "alone/last.pt")["history"], one["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


MEASURED = """
import os, signal, sys
import train_ssl
from support import errors, run

def measuring(self, loader):
    calls.append(loader)
    for number, batch in enumerate(real(self, loader), start=1):
        if len(calls) == stopped_in and number == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == stopped_in:
            print("measured", number, flush=True)
        yield batch

stopped_in, calls, Batches = int(sys.argv.pop()), [], train_ssl.Batches
def smaller(length, size, *rest):
    return Batches(length, 4 if size == 256 else size, *rest)

train_ssl.Batches = smaller
real, run.Run.measuring = run.Run.measuring, measuring
with errors.errors_in_one_line("-"):
    train_ssl.main()
"""  # k-NN in batches of 4, with a signal at the fourth of the loader that is named last


def test_a_signal_during_knn_stops_both_processes_at_once_and_the_run_resumes_exactly(
    image_root, tmp_path
):
    """On the images of val after the last epoch. Of their last batch one process has no part."""
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    next((root / "val/class1").iterdir()).unlink()
    words = ["--data", root, *SMALL, "--skipless", "--prototypes", 16]
    words += ["--epochs", 1, "--warmup-epochs", 0.5]
    assert_both_ended(run_two(MEASURED, [*words, "--out", "a", 0], tmp_path))
    done = run_two(MEASURED, [*words, "--out", "b", 4], tmp_path)
    assert_both_ended(done, 128 + signal.SIGTERM)
    assert [x.stdout.count("measured") for x in done] == [4, 4]
    stopped = load(tmp_path / "b/last.pt")
    assert (stopped["epoch"], stopped["step"]) == (0, 5)
    assert_both_ended(run_two(MEASURED, ["--resume", "b/last.pt", 0], tmp_path))
    a, b = (load(tmp_path / name / "last.pt") for name in "ab")
    assert all(torch.equal(x, b["student"][name]) for name, x in a["student"].items())
    for row, other in zip(a["history"], b["history"], strict=True):
        timing = ("minutes", "images_per_s")
        assert all(other[name] == x for name, x in row.items() if name not in timing)
    assert b["history"][-1]["images_per_s"] == round(stopped["rate"], 1) > 0


def test_on_gpus_each_process_is_bound_to_its_own(monkeypatch):
    """Otherwise NCCL guesses, when the processes first meet."""
    asked = {}

    def init_process_group(backend, **how):
        asked.update(how, backend=backend)
        raise RuntimeError("no GPU")

    device = torch.device("cuda", 1)
    monkeypatch.setattr(processes, "chosen_device", lambda _: device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(processes.dist, "init_process_group", init_process_group)
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        with pytest.raises(processes.UserError, match="no GPU"):
            processes.start_processes("cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    assert asked["backend"] == "nccl" and asked["device_id"] == device


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, supported, expected",
    [("cuda", True, (True, True, False)), ("cuda", False, (False, True, False)),
     ("cpu", True, (False, True, False))],
)  # fmt: skip
def test_bf16_is_used_where_asked_for_and_by_default_on_gpus_that_have_it(
    device, supported, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    amps = ("auto", "bf16", "off")
    assert tuple(processes.uses_bf16(torch.device(device), amp) for amp in amps) == expected


@pytest.mark.parametrize("trainer, more", [(train_cls, []), (train_ssl, ["--prototypes", 8])])
def test_amp_holds_in_every_pass(trainer, more, image_root, tmp_path, monkeypatch, capsys):
    """In training, on val, for k-NN, and in the estimate of memory."""
    seen, classify = [], ViT.classify

    def noted(self, x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return classify(self, x)

    monkeypatch.setattr(ViT, "classify", noted)
    words = ["--data", image_root, *SMALL, "--epochs", 1, "--warmup-epochs", 0, *more]
    run_main(trainer.main, [*words, "--amp", "bf16"], tmp_path, monkeypatch)
    assert len(seen) > 5 and all(seen)
    assert "on cpu x 1, bf16" in capsys.readouterr().out
