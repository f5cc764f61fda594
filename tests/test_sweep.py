"""The sweep: what it trains, in which order, what it does when a run fails, what its tables say.

Most tests put a stub in the trainers' place, which writes a log in a moment; one trains for real.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import types

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main

spec = importlib.util.spec_from_file_location("sweep", ROOT / "experiments/sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

STUB = """
import json, os, signal, sys, time
from math import log10
from pathlib import Path

words, here = sys.argv[1:], Path(__file__).parent
flag = {a: b for a, b in zip(words, words[1:]) if a.startswith("--")}
out = Path(flag["--out"]) if "--out" in flag else Path(flag["--resume"]).parent
name = "/".join(out.parts[out.parts.index("tune" if "tune" in out.parts else "full"):])
orders = json.loads((here / "orders.json").read_text())
order = next((order for part, order in orders.items() if part in name), "")
begun = time.time()

def leave(code, text):
    print(text)
    call = dict(name=name, words=words, order=order, threads=os.environ["OMP_NUM_THREADS"])
    call |= dict(times=[begun, time.time()], code=code)
    with open(here / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")
    raise SystemExit(code)

if words[0] == "segment":
    at = dict(last=10.0, quarters=20.0)[out.name] + int(name.split("seed")[1][0])
    networks = {"class 3 everywhere": 2.0, "net": at, "net, untrained": at - 5}
    results = {key: dict(miou=miou) for key, miou in networks.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "segment.json").write_text(json.dumps(dict(results=results)))
    leave(0, "measured")
if "--resume" in flag:
    flag = json.loads(Path(flag["--resume"]).read_text()) | flag
if order == "diverge":
    leave(1, "error: the loss is nan at epoch 1, step 2; nothing saved yet. Usual causes: --lr")
if order == "refuse":
    leave(2, "error: --patch-size 7 does not divide --image-size 16")
if order == "bad rate":
    leave(2, "error: --lr must be positive")
if order == "full disk":
    leave(1, "error: cannot write last.pt")
if order == "crash":
    leave(1, "ValueError: --lr is not at fault")
if order == "wait" and "--resume" not in flag:
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    os.kill(int((here / "parent").read_text()), signal.SIGINT)
    while not signals:
        time.sleep(0.05)
    time.sleep(0.3)  # a second signal would be seen
    (out / "last.pt").write_text(json.dumps(flag))
    leave(100 + len(signals), "stopped")
if order == "slow":
    time.sleep(0.5)
best = 1e-2 if "--skipless" not in flag and "--skipless" not in words else 1e-4
away = abs(log10(float(flag["--lr"])) - log10(best))
value = 50 - 10 * away + int(flag["--seed"])
epochs = int(flag["--epochs"])
rows = [
    dict(epoch=e, top1=value + 2 * (e < epochs), knn=value, val_loss=1.0, images_per_s=1.0)
    | dict(minutes=3.0)
    for e in range(1, epochs + 1)
]
if order == "no last row":
    rows = rows[:-1]
(out / "last.pt").write_text(json.dumps(flag))
(out / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
leave(0, "top-1")
"""
FLAGS = "--classes 3 --depths 2 --jobs 2 --tune-epochs 1 --epochs 2 --seeds 0 1".split()


@pytest.fixture
def stubbed(tmp_path, image_root, monkeypatch, capsys):
    """`sweep.main` on stubs of the scripts: run(*words), end(*words) where it must end early,
    calls() what was called, order(**orders) what the stubs whose folder has these words do."""

    def words_of(words: tuple) -> list:
        return ["--data", image_root, "--work", tmp_path / "work", *FLAGS, *words]

    def calls() -> list[dict]:
        path = stubs / "calls.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for script in ("train_cls.py", "train_ssl.py", "eval_dense.py"):
        (stubs / script).write_text(STUB)
    (stubs / "parent").write_text(str(os.getpid()))
    (stubs / "orders.json").write_text("{}")
    monkeypatch.setattr(sweep, "ROOT", stubs)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield types.SimpleNamespace(
        work=tmp_path / "work",
        run=lambda *words: run_main(sweep.main, words_of(words), tmp_path, monkeypatch),
        end=lambda *words: run_here(sweep.main, words_of(words), tmp_path, monkeypatch, capsys),
        end_bare=lambda *words: run_here(sweep.main, words, tmp_path, monkeypatch, capsys),
        calls=calls,
        order=lambda **orders: (stubs / "orders.json").write_text(json.dumps(orders)),
        out=lambda: capsys.readouterr().out,
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flag(call: dict, name: str) -> str:
    return call["words"][call["words"].index(name) + 1]


def rates(calls: list[dict], part: str, arm: str) -> list[float]:
    return sorted(float(flag(c, "--lr")) for c in calls if c["name"].startswith(f"{part}/{arm}"))


def write_log(folder, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(table: str) -> list[list[str]]:
    return [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]


# --------------------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------------------


def test_rates_are_extended_until_the_best_has_a_worse_one_on_either_side(stubbed):
    stubbed.run("--arms", "residual", "skipless-paper", "--", "--batch-size", "12")
    calls = stubbed.calls()
    # the stub's best rates are 1e-2 with skips and 1e-4 without
    assert rates(calls, "tune", "residual") == [1e-3, 3e-3, 1e-2, 3e-2]
    assert rates(calls, "tune", "skipless-paper") == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert rates(calls, "full", "residual") == [1e-2, 1e-2]
    assert rates(calls, "full", "skipless-paper") == [1e-4, 1e-4]
    for call in calls:
        part, arm = call["name"].split("-2-soap")[0].split("/")
        assert flag(call, "--epochs") == {"tune": "1", "full": "2"}[part]
        assert flag(call, "--data").endswith(f"images/{part}")
        assert (flag(call, "--depth"), flag(call, "--opt")) == ("2", "soap")
        assert flag(call, "--batch-size") == "12" and call["threads"] == "1"
        if part == "tune":
            assert flag(call, "--seed") == "0"
        if arm == "residual":
            assert not {"--skipless", "--init"} & set(call["words"])
        else:
            assert "--skipless" in call["words"] and flag(call, "--init") == "paper"
    seeds = [flag(call, "--seed") for call in calls if call["name"].startswith("full/residual")]
    assert sorted(seeds) == ["0", "1"]


def test_given_rates_are_all_tried_and_extended_too(stubbed):
    stubbed.run("--arms", "residual", "--rates", "2e-3", "5e-3", "2e-4")
    assert rates(stubbed.calls(), "tune", "residual") == [2e-4, 2e-3, 5e-3, 1e-2, 3e-2]


def test_every_depth_and_optimizer_is_tuned_by_itself(stubbed):
    words = "--arms residual --depths 1 3 --opts soap adamw --rates 1e-2 --seeds 4".split()
    stubbed.run(*words)
    calls = stubbed.calls()
    full = [call for call in calls if call["name"].startswith("full")]
    cells = {(flag(call, "--depth"), flag(call, "--opt")) for call in full}
    assert len(calls) == 4 * (3 + 1) and len(full) == len(cells) == 4
    assert {flag(call, "--seed") for call in full} == {"4"}


def test_of_equal_rates_the_lower_loss_then_the_lower_rate_is_best():
    def log(top1: float, loss: float) -> list[dict]:
        return [dict(top1=99.0, val_loss=0.0), dict(top1=top1, val_loss=loss)]

    worse, equal, lower = log(10.0, 2.0), log(20.0, 2.5), log(20.0, 2.3)
    assert sweep.best_rate({1e-4: worse, 1e-3: equal, 1e-2: lower}, "top1") == 1e-2
    assert sweep.best_rate({1e-4: equal, 1e-3: equal, 1e-2: equal}, "top1") == 1e-4
    assert sweep.best_rate({1e-4: [], 1e-3: worse}, "top1") == 1e-3  # [] diverged
    knn = [dict(knn=20.0)]
    assert sweep.best_rate({3e-3: knn, 1e-3: knn, 1e-2: [dict(knn=21.0)]}, "knn") == 1e-2
    assert sweep.best_rate({3e-3: knn, 1e-3: knn}, "knn") == 1e-3


def test_the_held_back_part_is_every_fifth_training_image_by_links(stubbed, image_root):
    stubbed.run("--arms", "residual", "--classes", "2")
    images = stubbed.work / "images"

    def inside(folder) -> dict[str, list]:
        return {d.name: sorted(d.iterdir()) for d in sorted(folder.iterdir())}

    def names(folder) -> dict[str, list[str]]:
        return {name: [path.name for path in paths] for name, paths in inside(folder).items()}

    first_two = {name: names(image_root / "train")[name] for name in ("class0", "class1")}
    assert all(len(files) == 12 for files in first_two.values())
    assert names(images / "tune/val") == {k: v[::5] for k, v in first_two.items()}
    kept = {k: [f for f in v if f not in v[::5]] for k, v in first_two.items()}
    assert names(images / "tune/train") == kept
    assert names(images / "full/train") == first_two
    val = names(image_root / "val")
    assert names(images / "full/val") == {name: val[name] for name in first_two}
    for split, source in (("tune/val", "train"), ("full/train", "train"), ("full/val", "val")):
        for name, paths in inside(images / split).items():
            for path in paths:
                assert path.is_symlink()
                assert path.resolve() == (image_root / source / name / path.name).resolve()


# --------------------------------------------------------------------------------------------------
# Going on, going wrong
# --------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_made_again_and_a_new_seed_is_added(stubbed):
    stubbed.run("--arms", "residual")
    before = len(stubbed.calls())
    assert before == 4 + 2
    stubbed.run("--arms", "residual")
    assert len(stubbed.calls()) == before
    stubbed.run("--arms", "residual", "--seeds", "7", "0")
    assert [flag(c, "--seed") for c in stubbed.calls()[before:]] == ["7"]


def test_so_many_runs_at_a_time_as_jobs(stubbed):
    def most_at_once(calls: list[dict]) -> int:
        spans = [call["times"] for call in calls]
        return max(sum(a <= begun < b for a, b in spans) for begun, _ in spans)

    stubbed.order(**{"seed": "slow"})
    words = "--arms residual --seeds 0 --rates 1e-3 3e-3 1e-2 3e-2 1e-1 --jobs".split()
    stubbed.run(*words, "2")
    assert most_at_once(stubbed.calls()) == 2
    before = len(stubbed.calls())
    stubbed.run("--arms", "residual", "--seeds", "3", "4", "--jobs", "1")
    assert most_at_once(stubbed.calls()[before:]) == 1


def test_a_progress_line_for_each_run_counts_to_the_end(stubbed):
    stubbed.run("--arms", "residual", "--jobs", "1")
    lines = [line for line in stubbed.out().splitlines() if line.startswith("run ")]
    first = r"run 1 of 4  tune/residual-2-soap-lr0.001-seed0  top1 40.0  about \d+ min to go"
    assert re.fullmatch(first, lines[0])
    assert "full/residual-2-soap-lr0.01-seed0  top1 50.0  about" in lines[-2]  # of the last epoch
    assert [line.split("  ")[0] for line in lines[-2:]] == ["run 5 of 6", "run 6 of 6"]
    assert lines[-1].endswith("about 0 min to go") and max(map(len, lines)) <= 100


def test_interrupted_runs_are_told_once_saved_and_continued(stubbed):
    stubbed.order(**{"lr0.01-seed1": "wait"})
    done = stubbed.end("--arms", "residual", "--jobs", "1")
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; the same command continues\n"
    [stopped] = [call for call in stubbed.calls() if call["order"] == "wait"]
    assert stopped["code"] == 101  # one signal
    stubbed.run("--arms", "residual", "--jobs", "1")
    again = stubbed.calls()[-1]
    assert again["name"] == stopped["name"] and flag(again, "--resume").endswith("last.pt")
    assert set(again["words"]) & {"--lr", "--out"} == set()  # the checkpoint knows
    assert len(rows_of((stubbed.work / "table.md").read_text())) == 3


def test_a_diverged_run_is_recorded_not_repeated_and_shown(stubbed):
    stubbed.order(**{"tune/residual-2-soap-lr0.03": "diverge", "lr0.01-seed1": "diverge"})
    stubbed.run("--arms", "residual", "--seeds", "0", "1", "2")
    calls = stubbed.calls()
    assert rates(calls, "tune", "residual")[-1] == 3e-2
    stubbed.run("--arms", "residual", "--seeds", "0", "1", "2")
    assert len(stubbed.calls()) == len(calls)
    row = rows_of((stubbed.work / "table.md").read_text())[2]
    assert row[5:8] == ["51.0", "50.0 .. 52.0", "2 (1 diverged)"]
    assert "diverged" in stubbed.out()


def test_an_arm_that_diverges_at_every_rate_is_given_up(stubbed, monkeypatch):
    monkeypatch.setattr(sweep, "LADDER", [3e-4, 1e-3, 3e-3, 1e-2])
    stubbed.order(**{"skipless": "diverge"})
    stubbed.run("--arms", "residual", "skipless-default")
    assert rates(stubbed.calls(), "tune", "skipless-default") == [3e-4, 1e-3, 3e-3]
    assert rates(stubbed.calls(), "full", "skipless-default") == []
    assert len(rows_of((stubbed.work / "table.md").read_text())) == 3


@pytest.mark.parametrize(
    "order, words",
    [
        ("refuse", "ended with code 2: --patch-size 7 does not divide"),
        ("bad rate", "ended with code 2: --lr must be positive"),
        ("crash", "ended with code 1: ValueError"),
        ("full disk", "ended with code 1: cannot write last.pt"),
        ("no last row", "left no result; remove this folder"),
    ],
)
def test_a_run_that_fails_ends_the_sweep_in_one_line_and_is_not_repeated(stubbed, order, words):
    stubbed.order(**{"lr0.003": order, "lr0.001": "slow"})
    done = stubbed.end("--arms", "residual", "--jobs", "2")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
    assert [call["order"] for call in stubbed.calls()].count(order) == 1


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def test_the_tables_figures(stubbed, tmp_path, monkeypatch):
    """Two arms whose logs are written here, on the folder of a sweep."""

    def write(name: str, values: list, speed: float = 100.0) -> None:
        rows = [
            dict(epoch=i, top1=v, val_loss=1.0, images_per_s=speed, minutes=6.0 * i)
            for i, v in enumerate(values, start=1)
        ]
        write_log(work / name, rows)

    work = stubbed.work
    for rate, values in (("0.001", [20.0, 30.0, 35.0]), ("0.003", [40.0, 50.0, 31.0])):
        write(f"tune/residual-12-soap-lr{rate}-seed0", values)
        write(f"tune/skipless-paper-12-soap-lr{rate}-seed0", values)
    write("full/residual-12-soap-lr0.001-seed0", [10.0, 30.0, 60.0, 50.0], 90.0)
    write("full/residual-12-soap-lr0.001-seed1", [10.0, 10.0, 40.0, 60.0])
    write("full/residual-12-soap-lr0.001-seed2", [10.0, 90.0])  # stopped: not counted
    write("full/residual-12-soap-lr0.003-seed0", [90.0] * 4)  # of another rate
    write("full/skipless-paper-12-soap-lr0.001-seed0", [5.0, 15.0, 25.0, 35.0])
    facts = dict(script="train_cls.py", classes=3, tune_epochs=3, epochs=4, flags=[])
    (work / "sweep.json").write_text(json.dumps(facts))
    run_main(sweep.main, ["--table", work], tmp_path, monkeypatch)
    columns, _, residual, skipless = rows_of((work / "table.md").read_text())
    shown = "| residual | 12 | soap | 35.0 | 0.001 | 55.0 | 50.0 .. 60.0 | 2 | 1.00 | 95 | 0.80 |"
    assert shown in stubbed.out()
    assert dict(zip(columns, residual)) == {
        "arm": "residual",
        "blocks": "12",
        "optimizer": "soap",
        "held back": "35.0",  # the last epoch's, at the rate whose last epoch is best
        "rate": "0.001",
        "val": "55.0",
        "range": "50.0 .. 60.0",
        "seeds": "2",
        "steps": "1.00",
        "images/s": "95",
        "hours": "0.80",
    }
    # residual's mean is 10, 20, 50, 55: at 35 after 2.5 epochs, where this arm took 4
    assert dict(zip(columns, skipless))["steps"] == "1.60"
    assert (work / "curves.png").stat().st_size > 10_000


def test_a_curve_is_the_mean_and_range_of_the_measured_epochs():
    logs = [
        [dict(epoch=0, knn=1.0), dict(epoch=1, knn=None), dict(epoch=2, knn=5.0)],
        [dict(epoch=0, knn=2.0), dict(epoch=1, knn=None), dict(epoch=2, knn=9.0)],
    ]
    assert sweep.curve(logs, "knn").tolist() == [[0, 2], [1.5, 7], [1, 5], [2, 9]]


def test_steps_to_equal_accuracy_by_hand():
    def curve(*values: float):
        return sweep.curve([[dict(epoch=i, top1=v) for i, v in enumerate(values)]], "top1")

    residual = curve(0, 20, 30, 40)
    assert sweep.steps_multiple(curve(0, 40, 45, 50), residual) == "0.33"  # at 40 after 1 of 3
    assert sweep.steps_multiple(curve(0, 5, 8, 10), residual) == "6.00"  # 10: after 3 and a half
    early = curve(*range(6), 50, *[2] * 20, 60)  # at 40 first after 5 7/9, and later again
    assert sweep.steps_multiple(early, residual) == "1.93"
    assert sweep.steps_multiple(residual, None) == "-"


def test_dino_is_compared_by_knn_and_probed_at_the_last_block_and_at_quarters(stubbed, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "camvid/train" / part).mkdir(parents=True)
    words = ["--script", "train_ssl.py", "--arms", "residual", "--depths", "6"]
    stubbed.order(**{"seed2": "diverge"})
    stubbed.run(*words, "--seeds", "0", "1", "2", "--camvid", tmp_path / "camvid")
    looks = [call for call in stubbed.calls() if call["words"][0] == "segment"]
    assert len(looks) == 4
    for call in looks:
        trained = call["name"].rsplit("/", 1)[0]
        assert call["words"][1] == str(stubbed.work / trained / "last.pt")
        after = call["words"][call["words"].index("--blocks") + 1 :]
        blocks = after[: after.index("--out")]
        assert blocks == (["2", "3", "5", "6"] if call["name"].endswith("quarters") else ["6"])
        assert (flag(call, "--data"), flag(call, "--ignore")) == (str(tmp_path / "camvid"), "11")
    out = stubbed.out()
    last = re.findall(r"run (\d+) of (\d+)", out)[-1]
    assert "knn 50.0" in out and last[0] == last[1]  # nothing awaited from the one that diverged
    _, _, last, quarters = rows_of((stubbed.work / "probes.md").read_text())
    head = ["residual", "6", "soap"]
    assert last == [*head, "last", "10.5", "10.0 .. 11.0", "2", "5.5", "2.0"]
    assert quarters == [*head, "quarters", "20.5", "20.0 .. 21.0", "2", "15.5", "2.0"]


# --------------------------------------------------------------------------------------------------
# Refusals, all before anything is trained
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ("--jobs 0", "--jobs: must be at least 1"),
        ("--rates -1", "--rates"),
        ("--data nowhere", "nowhere: no such folder"),
        ("--camvid nowhere", "--camvid nowhere: no folder train/images"),
        ("--classes 9", "--classes 9: --data .* has 5"),
        ("--arms resnet", "--arms: invalid choice"),
        ("-- --lr 1", "--lr behind -- is for the sweep to set"),
        ("-- --init=paper", "--init=paper behind -- is for the sweep to set"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(stubbed, words, message):
    assert_fails_in_one_line(stubbed.end(*words.split()), message)
    assert stubbed.calls() == []


def test_no_data_and_a_foreign_folder_are_refused(stubbed, image_root):
    assert_fails_in_one_line(stubbed.end_bare(), "--data is needed")
    done = stubbed.end_bare("--table", str(image_root))
    assert_fails_in_one_line(done, "no sweep.json in it")


def test_a_folder_takes_one_comparison_only(stubbed, image_root, tmp_path):
    stubbed.run("--arms", "residual")
    made = len(stubbed.calls())
    for words, message in (
        ("--epochs 3", "runs with epochs 2, not 3"),
        ("--tune-epochs 2", "runs with tune_epochs 1, not 2"),
        ("--classes 2", "runs with classes 3, not 2"),
        ("-- --batch-size 6", r"runs with flags \[\], not"),
    ):
        assert_fails_in_one_line(stubbed.end("--arms", "residual", *words.split()), message)
    shutil.copytree(image_root, tmp_path / "copy")
    done = stubbed.end("--arms", "residual", "--data", str(tmp_path / "copy"))
    assert_fails_in_one_line(done, "links to another --data")
    assert len(stubbed.calls()) == made


# --------------------------------------------------------------------------------------------------
# For real
# --------------------------------------------------------------------------------------------------


def test_a_real_sweep_of_two_arms(tmp_path, image_root, monkeypatch):
    """Half of it is done already, by logs written here: each process takes seconds to start."""
    monkeypatch.setattr(sweep, "LADDER", [])  # one rate is enough
    row = dict(epoch=1, top1=20.0, val_loss=1.0, images_per_s=1.0, minutes=1.0)
    write_log(tmp_path / "w/tune/residual-1-soap-lr0.003-seed0", [row])
    rows = [row, row | dict(epoch=2)]
    write_log(tmp_path / "w/full/skipless-paper-1-soap-lr0.003-seed0", rows)
    words = "--arms residual skipless-paper --depths 1 --rates 3e-3 --seeds 0 --jobs 1".split()
    words += ["--tune-epochs", 1, "--epochs", 2, "--work", "w", "--data", image_root]
    trainer = "--model nano --image-size 16 --patch-size 8 --batch-size 12 --device cpu --workers 0"
    words += ["--", *trainer.split(), "--warmup-epochs", 0.5]
    run_main(sweep.main, words, tmp_path, monkeypatch)
    _, _, *table = rows_of((tmp_path / "w/table.md").read_text())
    for part, arm, column in (("full", "residual", 5), ("tune", "skipless-paper", 3)):
        folder = tmp_path / f"w/{part}/{arm}-1-soap-lr0.003-seed0"
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        [row] = [row for row in table if row[0] == arm]
        assert row[column] == f"{last['top1']:.1f}"
        checkpoint = torch.load(folder / "last.pt", weights_only=True)
        args = checkpoint["args"]
        assert (args["skipless"], args["depth"], args["lr"]) == (part == "tune", 1, 3e-3)
        assert last["epoch"] == args["epochs"] == (1 if part == "tune" else 2)
        assert checkpoint["images"] == (45 if part == "tune" else 60)  # of 60, 12 a class
