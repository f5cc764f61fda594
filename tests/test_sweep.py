"""The sweep: what it trains, in which order, what it does when a run fails, what its tables say.

Most tests put a stub in the trainers' place, which writes a log in a moment; one trains for real.
"""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
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
name = str(out.relative_to(here.parent / "work"))
orders = json.loads((here / "orders.json").read_text())
order = next((order for part, order in orders.items() if part in name), "")

def leave(code, text):
    print(text)
    call = dict(name=name, words=words, code=code, threads=os.environ["OMP_NUM_THREADS"])
    with open(here / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")
    raise SystemExit(code)

if words[0] == "segment":
    at = dict(last=10.0, quarters=20.0)[out.name] + int(name.split("seed")[1][0])
    networks = {"class 3 everywhere": 2.0, "net": at, "net, untrained": at - 5}
    results = {key: dict(miou=miou) for key, miou in networks.items()}
    (out / "segment.json").write_text(json.dumps(dict(results=results)))
    leave(0, "measured")
if isinstance(order, list):
    leave(*order)
if order == "hang":
    time.sleep(100)
if order == "wait" and "--resume" not in flag:
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    os.kill(os.getppid(), signal.SIGINT)
    while not signals:
        time.sleep(0.05)
    time.sleep(0.3)  # a second signal would be seen
    (out / "last.pt").write_text(json.dumps(flag))
    leave(100 + len(signals), "stopped")
if "--resume" in flag:
    flag = json.loads(Path(flag["--resume"]).read_text())
best = 1e-4 if "skipless" in name else 1e-2
value = 50 - 10 * abs(log10(float(flag["--lr"]) / best)) + int(flag["--seed"])
rows = [dict(epoch=e + 1, top1=value + 2, knn=value) for e in range(int(flag["--epochs"]))]
rows[-1]["top1"] = value  # lower than before: the last counts, not the best
if order == "no last row":
    rows.pop()
(out / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
leave(0, "top-1")
"""
FLAGS = "--classes 3 --depths 2 --jobs 2 --tune-epochs 1 --epochs 2 --seeds 0 1".split()
DIVERGED = [1, "error: the loss is nan at epoch 1, step 2; nothing saved yet. Usual causes: --lr"]


@pytest.fixture
def stubbed(tmp_path, image_root, monkeypatch, capsys):
    """`sweep.main` on stubs of the scripts: run(*words), end(*words) where it must end early,
    order(**orders) what the stubs whose folder has these words do ("hang", "wait", "no last row" or
    [code, words] to end with), calls() what they were called with, table() its rows, processes all
    that were started, alive how many of them the sweep held at each start."""

    def words_of(words: tuple) -> list:
        return ["--data", image_root, "--work", tmp_path / "work", *FLAGS, *words]

    def calls() -> list[dict]:
        path = stubs / "calls.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def start(args, folder):
        processes.append(real_start(args, folder))
        alive.append(sum(process.returncode is None for process in processes))
        return processes[-1]

    stubs, processes, alive, real_start = tmp_path / "stubs", [], [], sweep.start
    stubs.mkdir()
    for script in ("train_cls.py", "train_ssl.py", "eval_dense.py"):
        (stubs / script).write_text(STUB)
    (stubs / "orders.json").write_text("{}")
    monkeypatch.setattr(sweep, "ROOT", stubs)
    monkeypatch.setattr(sweep, "start", start)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield types.SimpleNamespace(
        work=tmp_path / "work",
        run=lambda *words: run_main(sweep.main, words_of(words), tmp_path, monkeypatch),
        end=lambda *words: run_here(sweep.main, words_of(words), tmp_path, monkeypatch, capsys),
        calls=calls,
        processes=processes,
        alive=alive,
        order=lambda **orders: (stubs / "orders.json").write_text(json.dumps(orders)),
        out=lambda: capsys.readouterr().out,
        table=lambda name="table.md": rows_of((tmp_path / "work" / name).read_text())[2:],
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flag(call: dict, name: str) -> str:
    return call["words"][call["words"].index(name) + 1]


def rates(calls: list[dict], part: str, arm: str) -> list[float]:
    return sorted(float(flag(c, "--lr")) for c in calls if c["name"].startswith(f"{part}/{arm}"))


def seeds(calls: list[dict], start: str) -> list[str]:
    return sorted(flag(call, "--seed") for call in calls if call["name"].startswith(start))


def write_log(folder, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    sweep.files.write_log(folder / "log.jsonl", rows)


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
        given = {name: flag(call, f"--{name}") for name in ("epochs", "depth", "opt", "batch-size")}
        epochs = {"tune": "1", "full": "2"}[part]
        assert given == {"epochs": epochs, "depth": "2", "opt": "soap", "batch-size": "12"}
        assert flag(call, "--data").endswith(f"images/{part}") and call["threads"] == "1"
        init = [word for word in call["words"] if word in ("--skipless", "--init", "paper")]
        assert init == ([] if arm == "residual" else ["--skipless", "--init", "paper"])
    assert seeds(calls, "tune") == ["0"] * (4 + 5)
    assert seeds(calls, "full") == ["0", "0", "1", "1"]


def test_a_variant_is_trained_with_its_flags(stubbed):
    stubbed.run("--arms", "residual+dyt", "skipless-paper+none+e-spa+tat", "--seeds", "0")
    dyt, vanilla = (
        next(c["words"] for c in stubbed.calls() if c["name"].startswith(f"full/{arm}"))
        for arm in ("residual+dyt", "skipless-paper+none")
    )
    assert dyt[-2:] == ["--norm", "dyt"] and "--skipless" not in dyt
    flags = "--norm none --attention e-spa --activation tat --skipless --init paper"
    assert vanilla[-9:] == flags.split()
    assert {row[0] for row in stubbed.table()} == {"residual+dyt", "skipless-paper+none+e-spa+tat"}


def test_arms_without_skips_may_train_longer(stubbed):
    stubbed.run("--arms", "residual", "skipless-paper", "--skipless-epochs", "6")
    for call in stubbed.calls():
        longer = call["name"].startswith("full/skipless")
        assert flag(call, "--epochs") == ("6" if longer else "2" if "full" in call["name"] else "1")
    assert len(stubbed.table()) == 2
    message = "has runs with skipless_epochs 6, not None"
    assert message in stubbed.end("--arms", "residual").stderr


def test_given_rates_are_all_tried_and_extended_too(stubbed):
    stubbed.run("--arms", "residual", "--rates", "2e-3", "5e-3", "2e-4")
    assert rates(stubbed.calls(), "tune", "residual") == [2e-4, 2e-3, 5e-3, 1e-2, 3e-2]


def test_every_depth_and_optimizer_is_tuned_by_itself(stubbed):
    words = "--arms residual --depths 1 3 --opts soap adamw --rates 1e-2 --seeds 4".split()
    stubbed.run(*words)
    cells = [(flag(call, "--depth"), flag(call, "--opt")) for call in stubbed.calls()]
    assert len(set(cells)) == 4 and sorted(cells) == sorted([*set(cells)] * (3 + 1))
    assert seeds(stubbed.calls(), "full") == ["4"] * 4


def test_of_equal_rates_the_lower_loss_then_the_lower_rate_is_best():
    worse, equal, lower = ([dict(top1=a, val_loss=b)] for a, b in ((10, 2.0), (20, 2.5), (20, 2.3)))
    assert sweep.best_rate({1e-4: worse, 1e-3: equal, 1e-2: lower}, "top1") == 1e-2
    assert sweep.best_rate({1e-4: equal, 1e-3: equal, 1e-2: equal}, "top1") == 1e-4
    assert sweep.best_rate({1e-4: [None], 1e-3: worse}, "top1") == 1e-3  # None diverged
    assert sweep.best_rate({1e-4: [*equal, None], 1e-3: worse}, "top1") == 1e-3  # with one seed
    knn = [dict(knn=20.0)]
    assert sweep.best_rate({3e-3: knn, 1e-3: knn, 1e-2: [dict(knn=21.0)]}, "knn") == 1e-2
    assert sweep.best_rate({3e-3: knn, 1e-3: knn}, "knn") == 1e-3
    twice = {1e-4: [dict(knn=20.0), dict(knn=23.0)], 1e-3: [dict(knn=22.0)]}
    assert sweep.best_rate(twice, "knn") == 1e-3  # means over seeds


def test_what_is_tried_when_rates_are_equal():
    """Three that are all equal end the tuning, which would otherwise try every rate there is. Where
    all diverge, a lower one may still help. Two that are best get a second seed, once."""

    def then(results: dict) -> list[tuple[float, int]]:
        rows = {rate: [dict(knn=v) if v else None for v in x] for rate, x in results.items()}
        return sweep.next_runs(rows, "knn", [1e-3])

    assert then({1e-3: [20], 3e-3: [20]}) == [(3e-4, 0)]
    assert then({3e-4: [20], 1e-3: [20], 3e-3: [20]}) == []
    assert then({3e-4: [None], 1e-3: [None], 3e-3: [None]}) == [(1e-4, 0)]
    assert then({1e-4: [19], 3e-4: [20], 1e-3: [20], 3e-3: [19]}) == [(3e-4, 1), (1e-3, 1)]
    assert then({1e-4: [19], 3e-4: [20, 18], 1e-3: [20, 21], 3e-3: [19]}) == []
    assert then({1e-4: [19], 3e-4: [20, 21], 1e-3: [20, 21], 3e-3: [19]}) == []


def test_the_held_back_part_is_every_fifth_training_image_by_links(stubbed, image_root):
    stubbed.run("--arms", "residual", "--classes", "2")

    def images_in(folder) -> dict[str, list]:
        return {d.name: sorted(d.iterdir()) for d in sorted(folder.iterdir())}

    def originals(part: str) -> dict[str, list]:
        found = images_in(stubbed.work / "images" / part)
        return {name: [path.resolve() for path in paths] for name, paths in found.items()}

    train, val = images_in(image_root / "train"), images_in(image_root / "val")
    train, val = ({name: x[name] for name in ("class0", "class1")} for x in (train, val))
    assert all(len(paths) == 12 for paths in train.values())
    assert originals("full/train") == train and originals("full/val") == val
    assert originals("tune/val") == {name: paths[::5] for name, paths in train.items()}
    kept = {name: [x for x in paths if x not in paths[::5]] for name, paths in train.items()}
    assert originals("tune/train") == kept


@pytest.mark.parametrize("name", ["0.png", "zz.png"])
def test_images_added_later_do_not_move_what_was_held_back(name, stubbed, tmp_path, image_root):
    """The first in order, it would make of the second the first: held back, and trained on."""
    shutil.copytree(image_root, tmp_path / "data")
    stubbed.run("--data", tmp_path / "data", "--arms", "residual")
    some = next((tmp_path / "data/train/class0").iterdir())
    shutil.copy(some, some.with_name(name))
    done = stubbed.end("--data", tmp_path / "data", "--arms", "residual")
    assert_fails_in_one_line(done, "has runs with images .*name another folder")


def test_data_may_move(stubbed, tmp_path, image_root):
    shutil.copytree(image_root, tmp_path / "old")
    stubbed.run("--data", tmp_path / "old", "--arms", "residual")
    (tmp_path / "old").rename(tmp_path / "new")
    stubbed.run("--data", tmp_path / "new", "--arms", "residual", "--seeds", "5")
    assert seeds(stubbed.calls(), "full") == ["0", "1", "5"]
    assert all(link.exists() for link in (stubbed.work / "images").rglob("*"))


def test_a_class_of_one_image_is_refused_before_training(stubbed, tmp_path, image_root):
    """It would be held back, and nothing of its class trained on."""
    shutil.copytree(image_root, tmp_path / "data")
    _, *others = sorted((tmp_path / "data/train/class1").iterdir())
    for path in others:
        path.unlink()
    done = stubbed.end("--data", tmp_path / "data", "--arms", "residual")
    assert_fails_in_one_line(done, "class class1 has one training image, and tuning needs two")
    assert stubbed.calls() == []


# --------------------------------------------------------------------------------------------------
# Going on, going wrong
# --------------------------------------------------------------------------------------------------


def test_a_copy_of_a_run_put_aside_does_not_count(stubbed):
    stubbed.run("--arms", "residual")
    table = stubbed.table()
    for part in ("tune", "full"):
        run = stubbed.work / part / "residual-2-soap-lr0.01-seed0"
        shutil.copytree(run, run.with_name(f"{run.name}-before"))
    stubbed.run("--arms", "residual")
    assert stubbed.table() == table and len(stubbed.calls()) == 4 + 2


def test_what_is_finished_is_not_made_again_and_a_new_seed_is_added_once(stubbed):
    stubbed.run("--arms", "residual")
    assert len(stubbed.calls()) == 4 + 2
    stubbed.run("--arms", "residual")
    assert len(stubbed.calls()) == 4 + 2
    stubbed.run("--arms", "residual", "--seeds", "7", "0", "7")
    assert seeds(stubbed.calls()[4 + 2 :], "full") == ["7"] and len(stubbed.calls()) == 4 + 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_runs_at_a_time_as_jobs(stubbed, jobs):
    words = "--arms residual --seeds 0 --rates 1e-3 3e-3 1e-2 3e-2 1e-1 --jobs".split()
    stubbed.run(*words, str(jobs))
    assert max(stubbed.alive) == jobs and len(stubbed.alive) == 5 + 1


def test_a_progress_line_for_each_run_counts_to_the_end_of_a_round(stubbed):
    stubbed.run("--arms", "residual", "--jobs", "1")
    cell = "residual-2-soap"
    assert [line for line in stubbed.out().splitlines() if line.startswith("run ")] == [
        f"run 1 of 2  tune/{cell}-lr0.001-seed0  top1 40.0",
        f"run 2 of 2  tune/{cell}-lr0.003-seed0  top1 44.8",
        f"run 1 of 1  tune/{cell}-lr0.01-seed0  top1 50.0",
        f"run 1 of 1  tune/{cell}-lr0.03-seed0  top1 45.2",
        f"run 1 of 2  full/{cell}-lr0.01-seed0  top1 50.0",  # of the last epoch
        f"run 2 of 2  full/{cell}-lr0.01-seed1  top1 51.0",
    ]


def test_interrupted_runs_are_told_once_saved_and_continued(stubbed):
    stubbed.order(**{"lr0.01-seed1": "wait"})
    done = stubbed.end("--arms", "residual", "--jobs", "1")
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; the same command continues\n"
    stopped = stubbed.calls()[-1]
    assert stopped["code"] == 101  # one signal
    stubbed.run("--arms", "residual", "--jobs", "1")
    again = stubbed.calls()[-1]
    assert again["name"] == stopped["name"] and flag(again, "--resume").endswith("last.pt")
    assert set(again["words"]) & {"--lr", "--out"} == set()  # the checkpoint knows
    assert len(stubbed.table()) == 1


def test_a_diverged_run_is_recorded_not_repeated_and_shown(stubbed):
    stubbed.order(**{"tune/residual-2-soap-lr0.03": DIVERGED, "lr0.01-seed1": DIVERGED})
    stubbed.run("--arms", "residual", "--seeds", "0", "1", "2")
    calls = stubbed.calls()
    assert rates(calls, "tune", "residual")[-1] == 3e-2
    stubbed.run("--arms", "residual", "--seeds", "0", "1", "2")
    assert len(stubbed.calls()) == len(calls)
    assert stubbed.table()[0][5:8] == ["51.0", "50.0 .. 52.0", "2 (1 diverged)"]
    assert "lr0.01-seed1  diverged" in stubbed.out()


def test_an_arm_that_diverges_at_every_rate_is_given_up(stubbed, monkeypatch):
    monkeypatch.setattr(sweep, "RATES", [3e-4, 1e-3, 3e-3, 1e-2])
    stubbed.order(skipless=DIVERGED)
    stubbed.run("--arms", "residual", "skipless-default")
    assert rates(stubbed.calls(), "tune", "skipless-default") == [3e-4, 1e-3, 3e-3]
    assert rates(stubbed.calls(), "full", "skipless-default") == []
    assert [row[0] for row in stubbed.table()] == ["residual"]


@pytest.mark.parametrize(
    "order, words",
    [
        ([2, "error: --patch-size 7 is odd"], "ended with code 2: --patch-size 7 is odd"),
        ([2, "error: --lr must be positive"], "ended with code 2: --lr must be positive"),
        ([1, "ValueError: --lr is not at fault"], "ended with code 1: ValueError"),
        ([1, "error: cannot write last.pt"], "ended with code 1: cannot write last.pt"),
        ("no last row", "left no result; remove this folder"),
    ],
)
def test_a_run_that_fails_ends_the_sweep_in_one_line_and_is_not_repeated(stubbed, order, words):
    stubbed.order(**{"lr0.003": order, "lr0.001": "hang"})
    done = stubbed.end("--arms", "residual", "--jobs", "2")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
    hung, failed = stubbed.processes
    assert hung.returncode == -signal.SIGTERM  # ended with the sweep
    assert failed.returncode == (0 if order == "no last row" else order[0])


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def test_the_tables_figures(stubbed, tmp_path, monkeypatch):
    """Two arms whose logs are written here, on the folder of a sweep."""

    def write(name: str, *values: float) -> None:
        rows = [dict(epoch=i, top1=v, val_loss=1.0) for i, v in enumerate(values, start=1)]
        write_log(work / name, rows)

    work = stubbed.work
    for arm in ("residual", "skipless-paper"):
        write(f"tune/{arm}-12-soap-lr0.001-seed0", 20, 30, 35)
        write(f"tune/{arm}-12-soap-lr0.003-seed0", 40, 50, 31)
    write("tune/residual-12-soap-lr0.001-seed1", 20, 30, 37)  # as if rates had been equal
    write("full/residual-12-soap-lr0.001-seed0", 10, 30, 60, 50)
    write("full/residual-12-soap-lr0.001-seed1", 10, 10, 40, 60)
    write("full/residual-12-soap-lr0.001-seed2", 10, 90)  # stopped: not counted
    write("full/residual-12-soap-lr0.003-seed0", 90, 90, 90, 90)  # of another rate
    write("full/skipless-paper-12-soap-lr0.001-seed0", 5, 15, 25, 35)
    facts = dict(script="train_cls.py", classes=3, tune_epochs=3, epochs=4, flags=[])
    (work / "sweep.json").write_text(json.dumps(facts))
    run_main(sweep.main, ["--table", work], tmp_path, monkeypatch)
    # held back: the last epoch's, a mean over seeds, at the rate whose last epoch is best
    # steps: residual's mean is 10, 20, 50, 55: at 35 after 2.5 epochs, where the other took 4
    table = """
| arm | blocks | optimizer | held back | rate | val | range | seeds | steps |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| residual | 12 | soap | 36.0 | 0.001 | 55.0 | 50.0 .. 60.0 | 2 | 1.00 |
| skipless-paper | 12 | soap | 35.0 | 0.001 | 35.0 | 35.0 .. 35.0 | 1 | 1.60 |
"""
    assert table in stubbed.out() and table == "\n" + (work / "table.md").read_text()
    assert (work / "curves.png").stat().st_size > 10_000
    assert (work / "rates.png").stat().st_size > 10_000


def test_damaged_files_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    work = tmp_path
    log, facts = work / "tune/residual-12-soap-lr0.001-seed0/log.jsonl", work / "sweep.json"
    probe = work / "full/residual-12-soap-lr0.001-seed0/last/segment.json"
    rows = [dict(epoch=i, top1=20.0) for i in (1, 2, 3)]
    fine = {log: "\n".join(map(json.dumps, rows)), probe: '{"results": {}}'}
    fine[facts] = json.dumps(
        dict(script="train_cls.py", classes=3, tune_epochs=3, epochs=4, flags=[])
    )
    fine[probe.parent.parent / "log.jsonl"] = fine[log] + '\n{"epoch": 4, "top1": 30}'
    damaged = [
        (log, fine[log][:-9]),  # cut in mid-line
        (log, '{"epoch": 1, "top1": 1}\n' + fine[log].splitlines()[-1]),  # a line lost
        (log, fine[log].replace("top1", "top2")),
        (log, "[3]\n"),
        (log, "\x00\xff"),
        (facts, "{"),
        (facts, "[1]"),
        (probe, "{}"),
        (probe, '{"results": {"a": {"miou": 1.0}, "b": {}}}'),
    ]
    for path, text in damaged:
        for name, whole in fine.items():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(text if name == path else whole)
        done = run_here(sweep.main, ["--table", work], tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, f"{path.name} is damaged .*; restore it")


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """`sweep.draw` -> title of a panel -> its axes."""

    def draw(curves: dict, **words) -> dict:
        figures = []
        monkeypatch.setattr(sweep.pictures, "save_figure", lambda figure, _: figures.append(figure))
        sweep.draw("path", curves, "val top-1, %", **words)
        sweep.pictures.plt.close(figures[0])
        return {ax.get_title(): ax for ax in figures[0].axes} | dict(legends=figures[0].legends)

    return draw


def logs_of(*runs: list[float]) -> list[list[dict]]:
    return [[dict(epoch=i, top1=v) for i, v in enumerate(run, start=1)] for run in runs]


def texts(items) -> list[str]:
    return [item.get_text() for item in items]


def test_a_panel_per_depth_shows_the_mean_of_the_seeds_and_their_range(drawn):
    curves = {}
    for depth in (24, 4):
        logs = dict(residual=[[10, 30], [20, 70]]) | {"skipless-paper": [[5, depth]]}
        for arm, values in logs.items():
            curves["soap", depth, arm] = sweep.mean_curve(logs_of(*values), "top1")
    curves["adamw", 4, "residual"] = sweep.mean_curve(logs_of([1, 2]), "top1")
    figure = drawn(curves)
    assert list(figure)[:-1] == ["4 blocks, AdamW", "4 blocks, SOAP", "24 blocks, SOAP"]
    for depth in (4, 24):
        title = f"{depth} blocks, SOAP"
        residual, paper = figure[title].get_lines()
        assert residual.get_xydata().tolist() == [[1, 15], [2, 50]]  # not 20, 70, the best seed
        assert paper.get_xydata().tolist() == [[1, 5], [2, depth]]
        assert residual.get_color() == sweep.pictures.ARM_COLOURS["residual"]
        band = figure[title].collections[0].get_paths()[0].vertices.tolist()
        assert {tuple(xy) for xy in band} == {(1, 10), (1, 20), (2, 30), (2, 70)}
        assert figure[title].get_xscale() == "linear" and figure[title].get_xlabel() == "epoch"
    assert figure["4 blocks, AdamW"].get_lines()[0].get_xydata().tolist() == [[1, 1], [2, 2]]
    assert figure["4 blocks, AdamW"].get_ylabel() == "val top-1, %"
    assert texts(figure["24 blocks, SOAP"].texts) == ["skipless-paper", "residual"]
    assert texts(figure["4 blocks, SOAP"].texts) == []


def test_residual_s_last_value_is_marked_where_others_train_longer(drawn):
    """Variants share their arm's colour in shades, and differ by markers."""
    short, long = sweep.mean_curve(logs_of([10, 28]), "top1"), sweep.mean_curve(
        logs_of([5, 9, 30, 31]), "top1"
    )  # fmt: skip
    arms = {"residual": short, "residual+dyt": short - 1, "skipless-paper": long}
    figure = drawn({("soap", 12, arm): x for arm, x in arms.items()})
    *lines, target = figure["12 blocks, SOAP"].get_lines()
    assert target.get_ydata() == [28, 28] and target.get_linestyle() == ":"
    assert len({line.get_color() for line in lines}) == 3
    assert [line.get_marker() for line in lines] == ["o", "s", "o"]
    assert texts(figure["12 blocks, SOAP"].texts) == ["skipless-paper"]  # at the right edge
    [legend] = figure["legends"]
    assert texts(legend.get_texts()) == ["residual", "residual+dyt", "residual's last, 28.0"]
    assert len(drawn({("soap", 12, "residual"): short})["12 blocks, SOAP"].get_lines()) == 1


def test_rates_are_drawn_on_a_log_axis_without_those_that_diverged(drawn):
    results = {3e-3: [dict(top1=50), dict(top1=40)], 1e-3: [dict(top1=35)], 1.0: [None]}
    curve = sweep.tuning_curve(results, "top1")
    assert curve.tolist() == [[1e-3, 3e-3], [35, 45], [35, 40], [35, 50]]
    figure = drawn({("soap", 12, "skipless-paper"): curve}, against="learning rate")
    ax = figure["12 blocks, SOAP"]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate"
    assert ax.get_lines()[0].get_xydata().tolist() == [[1e-3, 35], [3e-3, 45]]
    assert texts(figure["legends"][0].get_texts()) == ["skipless-paper"]


# --------------------------------------------------------------------------------------------------
# Steps to equal accuracy
# --------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_and_range_of_the_measured_epochs():
    logs = [
        [dict(epoch=0, knn=1.0), dict(epoch=1, knn=None), dict(epoch=2, knn=5.0)],
        [dict(epoch=0, knn=2.0), dict(epoch=1, knn=None), dict(epoch=2, knn=9.0)],
    ]
    assert sweep.mean_curve(logs, "knn").tolist() == [[0, 2], [1.5, 7], [1, 5], [2, 9]]


def test_steps_to_equal_accuracy_by_hand():
    def curve(*values: float):
        return sweep.mean_curve([[dict(epoch=i, top1=v) for i, v in enumerate(values)]], "top1")

    residual = curve(0, 20, 30, 40)
    assert sweep.relative_steps(curve(0, 40, 45, 50), residual) == "0.33"  # at 40 after 1 of 3
    assert sweep.relative_steps(curve(0, 5, 8, 10), residual) == "6.00"  # 10: after 3 and a half
    early = curve(*range(6), 50, *[2] * 20, 60)  # at 40 first after 5 7/9, and later again
    assert sweep.relative_steps(early, residual) == "1.93"
    assert sweep.relative_steps(residual, None) == "-"
    plateau = curve(10, 20, 30, 30, 30)  # at 30 after 2 of 4, not at the plateau's end
    assert sweep.first_reached(30, plateau) == 2 and sweep.first_reached(5, plateau) == 0
    assert sweep.relative_steps(plateau, curve(0, 10, 20, 30, 40)) == "0.67"
    assert sweep.relative_steps(curve(0, 10, 20, 25, 31), plateau) == "1.92"  # 3 5/6 over 2
    slow = curve(0, 10, 20, 30, 40, 50, 60)  # trained twice as long
    assert sweep.relative_steps(slow, residual) == "1.33"  # at 40 after 4, residual after 3
    assert sweep.relative_steps(curve(*[5] * 7), residual) == "> 2"


def test_dino_is_compared_by_knn_and_probed_at_the_last_block_and_at_quarters(stubbed, tmp_path):
    camvid = ["--camvid", tmp_path / "camvid"]
    (tmp_path / "camvid/train/images").mkdir(parents=True)
    assert_fails_in_one_line(stubbed.end(*camvid), "no folder train/masks in it")  # now, not later
    (tmp_path / "camvid/train/masks").mkdir()
    words = ["--script", "train_ssl.py", "--arms", "residual", "--depths", "6"]
    stubbed.order(seed2=DIVERGED)
    stubbed.run(*words, "--seeds", "0", "1", "2", *camvid)
    looks = [call for call in stubbed.calls() if call["words"][0] == "segment"]
    assert len(looks) == 4
    for call in looks:
        trained = call["name"].rsplit("/", 1)[0]
        assert call["words"][1] == str(stubbed.work / trained / "last.pt")
        blocks = call["words"][call["words"].index("--blocks") + 1 :]
        assert blocks == (["2", "3", "5", "6"] if call["name"].endswith("quarters") else ["6"])
        assert (flag(call, "--data"), flag(call, "--ignore")) == (str(tmp_path / "camvid"), "11")
    out = stubbed.out()
    assert "knn 50.0" in out and "run 4 of 4  full" in out  # none of the one that diverged
    head = ["residual", "6", "soap"]
    assert stubbed.table("probes.md") == [
        [*head, "last", "10.5", "10.0 .. 11.0", "2", "5.5", "2.0"],
        [*head, "quarters", "20.5", "20.0 .. 21.0", "2", "15.5", "2.0"],
    ]


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
        ("--seeds -1", "--seeds: must lie in 0"),
        ("--classes 9", "--classes 9: --data .* has only 5"),
        ("--arms resnet", "--arms: resnet is no arm"),
        ("-- --lr 1", "--lr behind -- is for the sweep to set"),
        ("-- --init=paper", "--init=paper behind -- is for the sweep to set"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(stubbed, words, message):
    assert_fails_in_one_line(stubbed.end(*words.split()), message)
    assert stubbed.calls() == []


def test_no_data_and_a_foreign_folder_are_refused(image_root, tmp_path, monkeypatch, capsys):
    for words, message in (
        ([], "--data is needed"),
        (["--table", image_root], "no sweep.json in it"),
    ):
        done = run_here(sweep.main, words, tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, message)


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
    for split in ("train", "val"):
        shutil.copytree(image_root / "val", tmp_path / "copy" / split)
    done = stubbed.end("--arms", "residual", "--data", str(tmp_path / "copy"))
    assert_fails_in_one_line(done, "has runs with images")
    assert len(stubbed.calls()) == made


def test_a_folder_is_swept_by_one_process_at_a_time(stubbed):
    """The other one holds it until its standard input ends."""
    stubbed.work.mkdir()
    code = "import sys; from pathlib import Path; from support.files import lock; "
    code += f"lock(Path({str(stubbed.work)!r})); print('locked', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        assert_fails_in_one_line(
            stubbed.end("--arms", "residual"), f"in use by process {other.pid}"
        )
        assert stubbed.calls() == []
        other.stdin.close()
    stubbed.run("--arms", "residual")
    assert len(stubbed.table()) == 1


# --------------------------------------------------------------------------------------------------
# For real
# --------------------------------------------------------------------------------------------------


def test_a_real_sweep_of_two_arms(tmp_path, image_root, monkeypatch):
    """Half of it is done already, by logs written here: each process takes seconds to start."""
    monkeypatch.setattr(sweep, "RATES", [])  # one rate is enough
    rows = [dict(epoch=epoch, top1=20.0, val_loss=1.0) for epoch in (1, 2)]
    write_log(tmp_path / "w/tune/residual-1-soap-lr0.003-seed0", rows[:1])
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
