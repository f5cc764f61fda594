"""The sweep: what it trains, in which order, what it does when a run fails, what its tables say.

Most tests put a stub in the place of its processes; the last two start real ones.
"""

import importlib.util
import json
import shutil
import signal
import types
from itertools import pairwise
from math import inf, log10

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main

spec = importlib.util.spec_from_file_location("sweep", ROOT / "experiments/sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)
START = sweep.start

FLAGS = "--classes 3 --depths 2 --jobs 2 --tune-epochs 1 --epochs 2 --seeds 0 1 --arms residual"
DIVERGED = 1, "error: the loss is nan at epoch 1, step 2; nothing saved yet. Usual causes: --lr"


class Process(types.SimpleNamespace):
    """One that ends with its code when it is looked at; if that is None, when it is terminated."""

    def poll(self) -> int | None:
        self.returncode = self.code
        return self.returncode

    wait = poll

    def terminate(self) -> None:
        self.code = -signal.SIGTERM


@pytest.fixture
def stubbed(tmp_path, image_root, monkeypatch, capsys):
    """The sweep on processes that end at once: run(words), or run(words, ends=True) where it must
    end early; calls, their flags; orders, (code, last line) by words in a run's name; processes,
    and alive, how many of them there were at each start."""

    def run(words: str = "", data=image_root, ends: bool = False):
        words = ["--data", data, "--work", work, *FLAGS.split(), *words.split()]
        if ends:
            return run_here(sweep.main, words, tmp_path, monkeypatch, capsys)
        run_main(sweep.main, words, tmp_path, monkeypatch)

    def start(args, folder):
        words, name = list(map(str, sweep.command_of(args, folder))), str(folder.relative_to(work))
        calls.append(dict(pairwise(words)) | dict(name=name, words=words))
        code, last = next((order for part, order in orders.items() if part in name), (0, "top-1"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "output.txt").write_text(f"some\n{last}\n")
        if folder.name == "last":
            miou = 10.0 + int(name.split("seed")[1][0])
            miou = {"class 3 everywhere": 2.0, "net": miou, "net, untrained": miou - 5}
            results = dict(results={key: dict(miou=value) for key, value in miou.items()})
            (folder / "segment.json").write_text(json.dumps(results))
        elif last == "top-1":
            arm, _, _, rate, seed = sweep.settings_of(folder)
            value = 50 - 10 * abs(log10(rate / (1e-2 if "residual" in arm else 1e-4))) + seed
            epochs = range(1, sweep.epochs_of(args, folder) + 1)
            rows = [dict(epoch=epoch, top1=value + 2, knn=value) for epoch in epochs]
            rows[-1]["top1"] = value  # lower than before: the last counts, not the best
            sweep.files.write_log(folder / "log.jsonl", rows)
        processes.append(Process(code=code, returncode=None))
        alive.append(sum(process.returncode is None for process in processes))
        return processes[-1]

    work, calls, orders, processes, alive = tmp_path / "work", [], {}, [], []
    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep, "draw", lambda *_, **__: None)  # takes a second
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    parts = dict(run=run, calls=calls, orders=orders, processes=processes, alive=alive)
    yield types.SimpleNamespace(**parts, work=work)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def values(calls: list[dict], start: str, flag: str = "--lr") -> list[float]:
    return sorted(float(call[flag]) for call in calls if call["name"].startswith(start))


def write_log(folder, *values: float) -> None:
    folder.mkdir(parents=True)
    rows = [dict(epoch=i, top1=v, val_loss=1.0) for i, v in enumerate(values, start=1)]
    sweep.files.write_log(folder / "log.jsonl", rows)


def table(work) -> list[list[str]]:
    _, _, *lines = (work / "table.md").read_text().splitlines()
    return [[x.strip() for x in line.strip("|").split("|")] for line in lines]


# ---- tuning --------------------------------------------------------------------------------------


def test_rates_are_extended_until_the_best_has_a_worse_one_on_either_side(stubbed):
    stubbed.run("--arms residual skipless-paper -- --batch-size 12")
    calls = stubbed.calls
    # the stub's best rates are 1e-2 with skips and 1e-4 without
    assert values(calls, "tune/residual") == [1e-3, 3e-3, 1e-2, 3e-2]
    assert values(calls, "tune/skipless-paper") == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert values(calls, "full/residual") == [1e-2, 1e-2]
    assert values(calls, "full/skipless-paper") == [1e-4, 1e-4]
    for call in calls:
        part, arm = call["name"].split("-2-soap")[0].split("/")
        given = [call[f"--{name}"] for name in ("epochs", "depth", "opt", "batch-size")]
        assert given == [{"tune": "1", "full": "2"}[part], "2", "soap", "12"]
        assert call["--data"].endswith(f"images/{part}")
        assert ("--skipless" in call["words"]) == (arm == "skipless-paper")
    assert values(calls, "tune", "--seed") == [0] * (4 + 5)
    assert values(calls, "full", "--seed") == [0, 0, 1, 1]


def test_variants_have_flags_and_arms_without_skips_may_train_longer(stubbed):
    stubbed.run("--arms residual+dyt skipless-paper+none+e-spa+tat --skipless-epochs 6")
    for start, epochs in (("tune", 1), ("full/residual", 2), ("full/skipless", 6)):
        assert set(values(stubbed.calls, start, "--epochs")) == {epochs}
    words = {call["name"].split("-2-")[0]: call["words"] for call in stubbed.calls}
    dyt = words["full/residual+dyt"]
    assert dyt[-2:] == ["--norm", "dyt"] and "--skipless" not in dyt
    flags = "--norm none --attention e-spa --activation tat --skipless --init paper"
    assert words["full/skipless-paper+none+e-spa+tat"][-9:] == flags.split()
    assert "has runs with skipless_epochs 6, not None" in stubbed.run(ends=True).stderr


def test_every_depth_and_optimizer_is_tuned_by_itself_from_the_given_rates(stubbed):
    stubbed.run("--depths 1 3 --opts soap adamw --rates 2e-3 5e-3 2e-4 --seeds 4")
    cells = [f"residual-{depth}-{opt}" for depth in (1, 3) for opt in ("soap", "adamw")]
    for cell in cells:
        assert values(stubbed.calls, f"tune/{cell}") == [2e-4, 2e-3, 5e-3, 1e-2, 3e-2]
        assert values(stubbed.calls, f"full/{cell}", "--seed") == [4]
    named = {f"residual-{call['--depth']}-{call['--opt']}" for call in stubbed.calls}
    assert named == set(cells) and max(stubbed.alive) == 2  # the --jobs


def test_of_equal_rates_the_lower_loss_then_the_lower_rate_is_best():
    """Results are (metric, minus validation loss) of each seed."""
    worse, equal, lower, diverged = [(10, -2.0)], [(20, -2.5)], [(20, -2.3)], (-inf, 0)
    assert sweep.best_rate({1e-4: worse, 1e-3: equal, 1e-2: lower}) == 1e-2
    assert sweep.best_rate({1e-4: equal, 1e-3: equal, 1e-2: equal}) == 1e-4
    assert sweep.best_rate({1e-4: [*equal, diverged], 1e-3: worse}) == 1e-3  # with one seed
    assert sweep.best_rate({1e-4: [(20.0, 0), (23.0, 0)], 1e-3: [(22.0, 0)]}) == 1e-3  # means


def test_what_is_tried_when_rates_are_equal():
    """Three that are all equal end the tuning, which would otherwise try every rate there is. Where
    all diverge, a lower one may still help. Two that are best get a second seed, once."""

    def then(results: dict) -> list[tuple[float, int]]:
        return sweep.next_runs({rate: [(v, 0) for v in x] for rate, x in results.items()}, [1e-3])

    assert then({1e-3: [20], 3e-3: [20]}) == [(3e-4, 0)]
    assert then({3e-4: [20], 1e-3: [20], 3e-3: [20]}) == []
    assert then({3e-4: [-inf], 1e-3: [-inf], 3e-3: [-inf]}) == [(1e-4, 0)]
    assert then({1e-4: [19], 3e-4: [20], 1e-3: [20], 3e-3: [19]}) == [(3e-4, 1), (1e-3, 1)]
    assert then({1e-4: [19], 3e-4: [20, 18], 1e-3: [20, 21], 3e-3: [19]}) == []
    assert then({1e-4: [19], 3e-4: [20, 21], 1e-3: [20, 21], 3e-3: [19]}) == []


def test_the_held_back_part_is_every_fifth_training_image_by_links(stubbed, image_root):
    def contents(folder) -> list:
        return [path.resolve() for path in sorted(folder.iterdir())]

    stubbed.run("--classes 2")
    images = stubbed.work / "images"
    for split in ("train", "val"):
        assert contents(images / "full" / split) == contents(image_root / split)[:2]
    for name in ("class0", "class1"):
        train = contents(image_root / "train" / name)
        assert contents(images / "tune/val" / name) == train[::5] and len(train) == 12
        assert contents(images / "tune/train" / name) == [x for x in train if x not in train[::5]]


def test_data_may_move_but_not_change(stubbed, tmp_path, image_root):
    """An image that comes first would shift the others: those held back would be trained on."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(image_root, old)
    stubbed.run(data=old)
    old.rename(new)
    stubbed.run("--seeds 5", data=new)
    assert values(stubbed.calls, "full", "--seed") == [0, 1, 5]
    assert all(link.exists() for link in (stubbed.work / "images").rglob("*"))
    some = next((new / "train/class0").iterdir())
    shutil.copy(some, some.with_name("0.png"))
    done = stubbed.run(data=new, ends=True)
    assert_fails_in_one_line(done, "has runs with images .*name another")


def test_what_is_finished_is_not_repeated_and_a_copy_put_aside_does_not_count(stubbed):
    stubbed.run()
    before = table(stubbed.work)
    for part in ("tune", "full"):
        run = stubbed.work / part / "residual-2-soap-lr0.01-seed0"
        shutil.copytree(run, run.with_name(f"{run.name}-before"))
    stubbed.run()
    assert table(stubbed.work) == before and len(stubbed.calls) == 4 + 2
    stubbed.run("--seeds 7 0 7")
    assert [call["--seed"] for call in stubbed.calls[4 + 2 :]] == ["7"]


def test_a_progress_line_for_each_run_counts_to_the_end_of_a_round(stubbed, capsys):
    stubbed.run("--jobs 1")
    cell = "residual-2-soap"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")] == [
        f"run 1 of 2  tune/{cell}-lr0.001-seed0  top1 40.0",
        f"run 2 of 2  tune/{cell}-lr0.003-seed0  top1 44.8",
        f"run 1 of 1  tune/{cell}-lr0.01-seed0  top1 50.0",
        f"run 1 of 1  tune/{cell}-lr0.03-seed0  top1 45.2",
        f"run 1 of 2  full/{cell}-lr0.01-seed0  top1 50.0",  # of the last epoch
        f"run 2 of 2  full/{cell}-lr0.01-seed1  top1 51.0",
    ]
    assert stubbed.alive == [1] * 6


def test_diverged_runs_are_recorded_not_repeated_and_shown(stubbed, capsys, monkeypatch):
    """An arm that diverges at every rate is given up."""
    monkeypatch.setattr(sweep, "RATES", [3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    stubbed.orders |= {"tune/residual-2-soap-lr0.03": DIVERGED, "lr0.01-seed1": DIVERGED}
    stubbed.orders |= {"skipless": DIVERGED}
    for _ in range(2):
        stubbed.run("--arms residual skipless-default --seeds 0 1 2")
    assert values(stubbed.calls, "tune/residual") == [1e-3, 3e-3, 1e-2, 3e-2]
    assert values(stubbed.calls, "full", "--seed") == [0, 1, 2]
    assert values(stubbed.calls, "tune/skipless-default") == [3e-4, 1e-3, 3e-3]
    [residual] = table(stubbed.work)
    assert residual[5:8] == ["51.0", "50.0 .. 52.0", "2 (1 diverged)"]
    assert "lr0.01-seed1  diverged" in capsys.readouterr().out


FAILURES = [(2, "error: --lr must be positive"), (1, "ValueError: --lr is not at fault")]
FAILURES += [(1, "error: cannot write last.pt"), (0, "no log")]


@pytest.mark.parametrize("code, last", FAILURES)
def test_a_run_that_fails_ends_the_sweep_in_one_line(stubbed, code, last):
    stubbed.orders |= {"lr0.003": (code, last), "lr0.001": (None, "hangs")}
    done = stubbed.run(ends=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"lr0.003-seed0 ended with code {code} and no result: {last}" in done.stderr
    assert [process.returncode for process in stubbed.processes] == [-signal.SIGTERM, code]


def test_the_tables_figures(tmp_path, monkeypatch, capsys):
    done = run_here(sweep.main, ["--table", "."], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "sweep.json: No such file")
    for arm in ("residual", "skipless-paper"):
        write_log(tmp_path / f"tune/{arm}-12-soap-lr0.001-seed0", 20, 30, 35)
        write_log(tmp_path / f"tune/{arm}-12-soap-lr0.003-seed0", 40, 50, 31)
    write_log(tmp_path / "tune/residual-12-soap-lr0.001-seed1", 20, 30, 37)  # as if rates had tied
    write_log(tmp_path / "full/residual-12-soap-lr0.001-seed0", 10, 30, 60, 50)
    write_log(tmp_path / "full/residual-12-soap-lr0.001-seed1", 10, 10, 40, 60)
    write_log(tmp_path / "full/residual-12-soap-lr0.001-seed2", 10, 90)  # stopped: not counted
    write_log(tmp_path / "full/residual-12-soap-lr0.003-seed0", 90, 90, 90, 90)  # of another rate
    write_log(tmp_path / "full/skipless-paper-12-soap-lr0.001-seed0", 5, 15, 25, 35)
    settings = dict(script="train_cls.py", classes=3, tune_epochs=3, epochs=4, flags=[])
    (tmp_path / "sweep.json").write_text(json.dumps(settings))
    run_main(sweep.main, ["--table", "."], tmp_path, monkeypatch)
    # held back: the last epoch's, a mean over seeds, at the rate whose last epoch is best
    # steps: residual's mean is 10, 20, 50, 55: at 35 after 2.5 epochs, where the other took 4
    assert (
        (tmp_path / "table.md").read_text()
        == """\
| arm | blocks | optimizer | held back | rate | val | range | seeds | steps |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| residual | 12 | soap | 36.0 | 0.001 | 55.0 | 50.0 .. 60.0 | 2 | 1.00 |
| skipless-paper | 12 | soap | 35.0 | 0.001 | 35.0 | 35.0 .. 35.0 | 1 | 1.60 |
"""
    )
    assert all((tmp_path / x).stat().st_size > 10_000 for x in ("curves.png", "rates.png"))


SETTINGS = dict(script="train_cls.py", tune_epochs=1, epochs=2, flags=[])
WORD = b'{"epoch": 1, "top1": "5"}\n{"epoch": 2, "top1": 5.0}'
HALF = b'{"epoch": 1, "top1": 5.0}\n{"epo'
DAMAGES = {
    "tune/residual-2-soap-lr0.001-seed0/log.jsonl": [HALF, b"\xe9\x00\xff", b"7", b'{"epoch": 1}'],
    "full/residual-2-soap-lr0.001-seed0/log.jsonl": [HALF, WORD, b"[]"],
    "full/residual-2-soap-lr0.001-seed0/last/segment.json": [b"", b"[]", b'{"results": [1]}'],
    "sweep.json": [b"", b"\xe9\x00\xff", b"7", b'{"script": "train_cls.py"}', b'{"script": "x"}'],
}


@pytest.mark.parametrize("name, content", [(x, content) for x in DAMAGES for content in DAMAGES[x]])
def test_a_damaged_file_is_named_in_one_line(tmp_path, monkeypatch, capsys, name, content):
    write_log(tmp_path / "tune/residual-2-soap-lr0.001-seed0", 20)
    write_log(tmp_path / "full/residual-2-soap-lr0.001-seed0", 10, 30)
    (tmp_path / "full/residual-2-soap-lr0.001-seed0/last").mkdir()
    (tmp_path / "sweep.json").write_text(json.dumps(SETTINGS))
    (tmp_path / name).write_bytes(content)
    done = run_here(sweep.main, ["--table", "."], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, f"^error: {name} is damaged .*run the sweep again")


def test_a_sweep_goes_on_only_where_its_settings_can_be_read(stubbed):
    stubbed.run()
    (stubbed.work / "sweep.json").write_text("{")
    assert_fails_in_one_line(stubbed.run("--seeds 5", ends=True), "sweep.json is damaged")
    (stubbed.work / "sweep.json").unlink()
    stubbed.run("--seeds 5")
    assert len(stubbed.calls) == 4 + 2 + 1


def test_the_table_names_the_runs_that_it_leaves_out(stubbed, monkeypatch, capsys):
    stubbed.run()
    for name in ("tune/residual-2-soap-lr0.001-seed0", "full/residual-2-soap-lr0.01-seed1"):
        (stubbed.work / name / "log.jsonl").write_text("")  # as a run leaves it that has begun
    capsys.readouterr()
    run_main(sweep.main, ["--table", stubbed.work], stubbed.work, monkeypatch)
    left_out = capsys.readouterr().out.split("\n\n")[0].split("\n  ")
    assert left_out[1:] == [
        f"{x}-seed{i}"
        for i, x in enumerate(("tune/residual-2-soap-lr0.001", "full/residual-2-soap-lr0.01"))
    ]
    assert table(stubbed.work)[0][7] == "1"


def test_a_class_of_one_image_is_refused_before_anything_is_trained(stubbed, tmp_path, image_root):
    """It would be held back, and the trainer would then miss the class. The folder of the runs can
    still be used after a refusal."""
    data = shutil.copytree(image_root, tmp_path / "data")
    first, second, *others = sorted((data / "train/class2").iterdir())
    for path in (second, *others):
        path.unlink()
    done = stubbed.run(data=data, ends=True)
    assert_fails_in_one_line(done, "train/class2 holds a single image: .*add another, or drop")
    done = stubbed.run("--classes 7", data=data, ends=True)
    assert_fails_in_one_line(done, "--classes 7: .* has only 5")
    assert stubbed.calls == []
    shutil.copy(first, second)
    stubbed.run("--classes 5", data=data)
    held_back, trained = (stubbed.work / f"images/tune/{part}/class2" for part in ("val", "train"))
    assert [x.name for x in (*held_back.iterdir(), *trained.iterdir())] == [first.name, second.name]


def test_dino_is_compared_by_knn_and_probed(stubbed, tmp_path, capsys):
    masks, words = tmp_path / "camvid/train/masks", "--script train_ssl.py --seeds 0 1 2"
    (masks.parent / "images").mkdir(parents=True)
    words += f" --camvid {tmp_path}/camvid"
    done = stubbed.run(words, ends=True)
    assert_fails_in_one_line(done, "no folder train/masks in it")  # now, not after the training
    masks.mkdir()
    stubbed.orders["seed2"] = DIVERGED
    stubbed.run(words)
    probes = [call["words"] for call in stubbed.calls if call["name"].endswith("/last")]
    for seed, probe in enumerate(probes):  # none of seed 2
        run = f"{stubbed.work}/full/residual-2-soap-lr0.01-seed{seed}"
        flags = f"--data {tmp_path}/camvid --ignore 11 --epochs 10 --out {run}/last"
        assert probe == ["eval_dense.py", "segment", f"{run}/last.pt", *flags.split()]
    out, end = capsys.readouterr().out, "| 1.00 | 10.5 | 10.0 .. 11.0 | 5.5 | 2.0 |"
    assert len(probes) == 2 and "knn 50.0" in out and "| steps | mIoU |" in out and end in out


@pytest.mark.parametrize("script, metric", sweep.METRICS.items())
def test_table_and_pictures_are_of_the_trainers_own_metric(tmp_path, monkeypatch, script, metric):
    """Beside which the logs hold other figures: losses, top-5, and here the other trainer's."""
    others = dict(top1=91.0, knn=92.0, top5=93.0, loss=94.0, val_loss=95.0)
    logs = {"tune/residual-2-soap-lr0.001": [7.0], "tune/residual-2-soap-lr0.003": [5.0]}
    logs |= {"full/residual-2-soap-lr0.001": [11.0, 23.0]}
    for name, curve in logs.items():
        (tmp_path / f"{name}-seed0").mkdir(parents=True)
        rows = [others | {"epoch": i, metric: y} for i, y in enumerate(curve, start=1)]
        sweep.files.write_log(tmp_path / f"{name}-seed0/log.jsonl", rows)
    (tmp_path / "sweep.json").write_text(json.dumps(SETTINGS | dict(script=script)))
    drawn = {}
    monkeypatch.setattr(
        sweep, "draw", lambda path, *x, **axis: drawn.update({path.stem: (*x, axis)})
    )
    run_main(sweep.main, ["--table", "."], tmp_path, monkeypatch)
    assert table(tmp_path)[0][3:7] == ["7.0", "0.001", "23.0", "23.0 .. 23.0"]
    (rates, held_back, axis), (curves, val, _) = drawn["rates"], drawn["curves"]
    cell = "soap", 2, "residual"
    assert rates[cell][:2].tolist() == [[1e-3, 3e-3], [7, 5]]
    assert curves[cell][:2].tolist() == [[1, 2], [11, 23]]
    title = dict(top1="top-1, %", knn="k-NN accuracy, %")[metric]
    assert (held_back, val, axis) == (
        f"held-back {title}",
        f"val {title}",
        dict(against="learning rate"),
    )


# ---- pictures ------------------------------------------------------------------------------------


def drawn(monkeypatch, curves: dict, **words) -> tuple[list, list[str]]:
    """`sweep.draw`: its panels, and the legend's labels."""
    figures = []
    monkeypatch.setattr(sweep.pictures, "save_figure", lambda figure, _: figures.append(figure))
    sweep.draw("path", curves, "val top-1, %", **words)
    sweep.pictures.plt.close(figures[0])
    return figures[0].axes, texts(figures[0].legends[0].get_texts())


def curve(*of_seeds: list[float], first: int = 1):
    logs = [[dict(epoch=i, top1=v) for i, v in enumerate(x, start=first)] for x in of_seeds]
    return sweep.curve_of_logs(logs, "top1")


def texts(items) -> list[str]:
    return [item.get_text() for item in items]


def test_a_panel_per_depth_shows_the_mean_of_the_seeds_and_their_range(monkeypatch):
    curves = {("adamw", 4, "residual"): curve([1, 2])}
    for depth in (24, 4):
        curves["soap", depth, "residual"] = curve([10, None, 30], [20, 90, 70])
        curves["soap", depth, "skipless-paper"] = curve([5, 6, depth])
    (adamw, four, ax), _ = drawn(monkeypatch, curves)
    assert adamw.get_title() == "4 blocks, AdamW" and adamw.get_ylabel() == "val top-1, %"
    assert four.get_title() == "4 blocks, SOAP" and ax.get_title() == "24 blocks, SOAP"
    residual, paper = ax.get_lines()
    assert residual.get_xydata().tolist() == [[1, 15], [3, 50]]  # not 20, 70, the best seed
    assert paper.get_xydata().tolist() == [[1, 5], [2, 6], [3, 24]]
    band = ax.collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(xy) for xy in band} == {(1, 10), (1, 20), (3, 30), (3, 70)}
    assert ax.get_xscale() == "linear" and ax.get_xlabel() == "epoch"
    assert texts(ax.texts) == ["skipless-paper", "residual"] and texts(four.texts) == []


def test_residuals_last_value_is_marked_where_others_train_longer(monkeypatch):
    """Variants share their arm's colour in shades, and differ by markers."""
    short, long = curve([10, 28]), curve([5, 9, 30, 31])
    arms = {"residual": short, "residual+dyt": short - 1, "skipless-paper": long}
    [ax], legend = drawn(monkeypatch, {("soap", 12, arm): x for arm, x in arms.items()})
    *lines, target = ax.get_lines()
    assert target.get_ydata() == [28, 28] and target.get_linestyle() == ":"
    assert len({line.get_color() for line in lines}) == 3
    assert [line.get_marker() for line in lines] == ["o", "s", "o"]
    assert texts(ax.texts) == ["skipless-paper"]  # at the right edge
    assert legend == ["residual", "residual+dyt", "residual's last, 28.0"]


def test_rates_are_drawn_on_a_log_axis(monkeypatch):
    curves = {("soap", 12, "skipless-paper"): sweep.curve_of({3e-3: [50, 40], 1e-3: [35]})}
    [ax], _ = drawn(monkeypatch, curves, against="learning rate")
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate"
    assert ax.get_lines()[0].get_xydata().tolist() == [[1e-3, 35], [3e-3, 45]]


def test_steps_to_equal_accuracy_by_hand():
    def steps(own: list[float], residual: list[float]) -> str:
        return sweep.relative_steps(curve(own, first=0), curve(residual, first=0))

    residual = [0, 20, 30, 40]
    assert steps([0, 40, 45, 50], residual) == "0.33"  # at 40 after 1 of 3
    assert steps([0, 5, 8, 10], residual) == "6.00"  # 10: after 3 and a half
    early = [*range(6), 50, *[2] * 20, 60]  # at 40 first after 5 7/9, and later again
    assert steps(early, residual) == "1.93"
    assert sweep.relative_steps(curve(residual), None) == "-"
    plateau = [10, 20, 30, 30, 30]  # at 30 after 2 of 4, not at the plateau's end
    assert steps(plateau, [0, 10, 20, 30, 40]) == "0.67"
    assert steps([0, 10, 20, 25, 31], plateau) == "1.92"  # 3 5/6 over 2
    assert steps([0, 5, 5, 5, 9], plateau) == "-"  # residual is past 9 before the first step
    slow = [0, 10, 20, 30, 40, 50, 60]  # trained twice as long
    assert steps(slow, residual) == "1.33"  # at 40 after 4, residual after 3
    assert steps([5] * 7, residual) == "> 2"


REFUSED = {
    "--rates -1": "--rates",
    "--data nowhere": "nowhere: no such folder",
    "--camvid nowhere": "--camvid nowhere: no folder train/images",
    "--classes 9": "--classes 9: --data .* has only 5",
    "--arms resnet": "--arms: resnet is no arm",
    "-- --lr 1": "--lr behind -- is for the sweep to set",
    "-- --init-from a.pt": "--init-from behind -- is for the sweep to set",
    "-- --init=paper": "--init behind -- is for the sweep to set",
}


@pytest.mark.parametrize("words, message", REFUSED.items())
def test_what_cannot_be_is_refused_in_one_line(stubbed, words, message):
    assert_fails_in_one_line(stubbed.run(words, ends=True), message)
    assert stubbed.calls == []


def test_a_folder_takes_one_comparison_only_by_one_process_at_a_time(stubbed, monkeypatch):
    def in_use(folder):
        raise sweep.UserError(f"{folder.name} is in use by process 7")

    stubbed.run()
    made = len(stubbed.calls)
    others = {"--epochs 3": "epochs 2, not 3", "--tune-epochs 2": "tune_epochs 1, not 2"}
    others |= {"--classes 2": "classes 3, not 2", "-- --batch-size 6": r"flags \[\], not"}
    for words, message in others.items():
        assert_fails_in_one_line(stubbed.run(words, ends=True), f"has runs with {message}")
    monkeypatch.setattr(sweep.files, "lock", in_use)
    assert_fails_in_one_line(stubbed.run("--seeds 5", ends=True), "work is in use")
    assert len(stubbed.calls) == made


WAITS = """
import os, signal, sys, time
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
os.kill(os.getppid(), signal.SIGINT)
while not signals:
    time.sleep(0.05)
time.sleep(0.3)  # a second signal would be seen
open(sys.argv[sys.argv.index("--out") + 1] + "/last.pt", "w")
print(len(signals), "signal", os.environ["OMP_NUM_THREADS"], "thread")
"""


def test_interrupted_runs_are_told_once_saved_and_continued(stubbed, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which cron's processes ignore
    (tmp_path / "train_cls.py").write_text(WAITS)
    with monkeypatch.context() as real:
        real.setattr(sweep, "start", START)
        real.setattr(sweep, "ROOT", tmp_path)
        done = stubbed.run("--jobs 1", ends=True)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1) and "interrupted" in done.stderr
    [run] = (stubbed.work / "tune").iterdir()
    assert (run / "output.txt").read_text() == "1 signal 1 thread\n"
    stubbed.run("--jobs 1")
    first = stubbed.calls[0]  # the checkpoint knows the rest
    assert first["--resume"] == str(run / "last.pt") and not set(first) & {"--lr", "--out"}


def test_a_real_sweep_of_two_arms(tmp_path, image_root, monkeypatch):
    """Half of it is done already, by logs written here: each process takes seconds to start."""
    monkeypatch.setattr(sweep, "RATES", [])  # one rate is enough
    write_log(tmp_path / "w/tune/residual-1-soap-lr0.003-seed0", 20.0)
    write_log(tmp_path / "w/full/skipless-paper-1-soap-lr0.003-seed0", 20.0, 20.0)
    words = f"--data {image_root} --work w --arms residual skipless-paper --depths 1 --rates 3e-3 "
    words += "--seeds 0 --jobs 1 --tune-epochs 1 --epochs 2 -- --model nano --image-size 16 "
    words += "--patch-size 8 --batch-size 12 --device cpu --workers 0 --warmup-epochs 0.5"
    run_main(sweep.main, words.split(), tmp_path, monkeypatch)
    for part, arm, column in (("full", "residual", 5), ("tune", "skipless-paper", 3)):
        folder = tmp_path / f"w/{part}/{arm}-1-soap-lr0.003-seed0"
        last = sweep.files.read_log(folder / "log.jsonl")[-1]
        assert [arm, f"{last['top1']:.1f}"] in [[x[0], x[column]] for x in table(tmp_path / "w")]
        content = torch.load(folder / "last.pt", weights_only=True)
        args, images = content["args"], content["images"]
        assert images == (45 if part == "tune" else 60)  # of 60, 12 a class
        assert (args["skipless"], args["depth"], args["lr"]) == (part == "tune", 1, 3e-3)
        assert last["epoch"] == args["epochs"] == (1 if part == "tune" else 2)
