"""`first_gpu.py` on the CPU: what it does when a step fails, when it is killed, when time ends."""

import importlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import fresh_process
import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main, script_environment

sys.path.insert(0, str(ROOT / "experiments"))
first_gpu = importlib.import_module("first_gpu")
CPU = torch.device("cpu")
SHAPE = dict(image_size=64, patch_size=8, num_classes=10, dim=8, depth=1, num_heads=2)


@pytest.fixture
def small(monkeypatch):
    """A comparison of two tiny epochs at most, after one of tuning."""
    sizes = dict(BATCH=dict(cpu=8), IMAGES=dict(cpu=40))
    for name, value in (sizes | dict(LONGEST=2, LONGEST_TUNING=1)).items():
        monkeypatch.setattr(first_gpu, name, value)
    monkeypatch.setitem(first_gpu.PRESETS, "nano", dict(dim=8, depth=1, num_heads=2))


def scripts(tmp_path: Path, monkeypatch, **texts: str) -> None:
    """Stands these scripts in for the project's."""
    monkeypatch.setattr(first_gpu, "ROOT", tmp_path)
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)


def in_a_minute() -> float:
    return time.monotonic() + 60


# ---- the whole run -------------------------------------------------------------------------------


def test_a_run_reports_what_failed_and_goes_on(small, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    scripts(
        tmp_path, monkeypatch,
        good="import sys; print('fine', *sys.argv[1:])",
        bad="import sys; print('so far'); sys.exit('error: no\\nmore')",
        slow="import time; print('begun'); time.sleep(60)",
    )  # fmt: skip
    steps = [("slow", 2, "slow.py"), ("long", 999, "good.py"), ("bad", 9, "bad.py")]
    monkeypatch.setattr(first_gpu, "PATHS", [*steps, ("good", 9, "good.py --out {out}/a {on}")])
    monkeypatch.setattr(first_gpu, "IMPORTS", 0)
    monkeypatch.setattr(first_gpu, "SPEED", [("speed", 9, "good.py 3 |")])
    words = ["--minutes", 1, "--device", "cpu", "--out", "a o"]
    run_main(first_gpu.main, words, tmp_path, monkeypatch)

    out, printed = tmp_path / "a o", capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    steps = {row["step"]: (row["result"], row["output"]) for row in rows if "step" in row}
    assert steps == dict(
        slow=("stopped", ["begun"]), long=("skipped", []),
        bad=("failed, code 1", ["so far", "error: no", "more", "error: no"]),
        good=("ok", ["fine --out a o/a --device cpu".replace("a o", str(out))]),
        speed=("ok", ["fine 3 |"]),
    )  # fmt: skip
    assert (out / "paths-bad.txt").read_text() == "so far\nerror: no\nmore\n"
    assert rows[0]["torch"] == torch.__version__ and rows[0]["bf16"] is False

    tuning = [(row["arm"], row["rate"]) for row in rows if row["part"] == "tuning"]
    assert tuning == [(arm, rate) for arm in first_gpu.ARMS for rate in first_gpu.RATES]
    # in turns by the epoch, and all arms equally long
    epochs = [(row["epoch"], row["arm"]) for row in rows if row["part"] == "epoch"]
    assert epochs == [(epoch, arm) for epoch in (1, 2) for arm in first_gpu.ARMS]

    table = (out / "table.md").read_text()
    assert table in printed and "skipped for want of time: long" in table
    assert "| bad | failed, code 1 | " in table and "synthetic" in table and "fine 3 /" in table
    assert "2 of 2 epochs, tuned in 1" in table
    before = (out / "curves.png").read_bytes()
    for name in ("table.md", "curves.png"):
        (out / name).unlink()
    run_main(first_gpu.main, ["--table", out], tmp_path, monkeypatch)
    assert (out / "table.md").read_text() == table == capsys.readouterr().out[:-1]
    assert (out / "curves.png").read_bytes() == before


def test_a_real_script_runs_as_a_step(tmp_path, capsys):
    names = first_gpu.NAMES["cpu"]
    first_gpu.draw_images(tmp_path / "images", names["size"], names["images"])
    [step] = [x for x in first_gpu.PATHS if x[0] == "SOAP, identity"]
    first_gpu.add_row(tmp_path, part="machine")
    first_gpu.run_part("paths", [step], tmp_path, CPU, in_a_minute() + 60)
    [_, row] = first_gpu.rows_of(tmp_path)
    assert row["result"] == "ok" and row["output"][-1].startswith("top-1"), row
    assert (tmp_path / "soap/last.pt").exists() and "top-1" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_its_rows(number, tmp_path, monkeypatch, capsys):
    out, texts = tmp_path / "out", [str(tmp_path / name) for name in ("stdout", "stderr")]
    for text in texts:
        Path(text).touch()
    words = [ROOT / "experiments/first_gpu.py", "--minutes", 2, "--device", "cpu", "--out", out]
    process = fresh_process.FORKS.Process(
        target=fresh_process.become,
        args=(list(map(str, words)), tmp_path, script_environment(), *texts),
    )
    process.start()
    deadline = in_a_minute()
    while not list(out.glob("paths-*.txt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, number)
    process.join(30)
    if number == signal.SIGTERM:  # the child was told to end, and the table was written
        assert process.exitcode == 128 + number and (out / "table.md").exists()
        assert not Path(f"/proc/{child}").exists()
    else:
        os.kill(int(child), number)
        assert process.exitcode == -number and not (out / "table.md").exists()
    with open(out / "rows.jsonl", "a") as file:
        file.write('{"part": "epo')  # as a machine leaves it that goes down while writing
    run_main(first_gpu.main, ["--table", out], tmp_path, monkeypatch)
    assert "device cpu" in capsys.readouterr().out and (out / "table.md").exists()


REFUSED = {
    "--table none": "none/rows.jsonl: no such file",
    "--data none": "--data none: no folder train",
    "--out used": "used holds rows already",
    "--device cuda:99": "CUDA devices found here",
    "--minutes 0": "--minutes: must be positive",
}


@pytest.mark.parametrize("words, message", REFUSED.items())
def test_refusals(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/rows.jsonl").touch()
    words = words.split() + ["--device", "cpu"] * ("--device" not in words)
    done = run_here(first_gpu.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, message)


# ---- the commands --------------------------------------------------------------------------------

COMMANDS = [command for _, _, command in first_gpu.PATHS + first_gpu.SPEED]


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("command", [x for x in COMMANDS if "loading" not in x])
def test_the_scripts_understand_their_commands(command, kind, tmp_path, monkeypatch, capsys):
    """The device is looked at last, so all other flags have been understood."""
    names = first_gpu.NAMES[kind] | dict(on="--device tpu", out=tmp_path)
    script, *words = command.replace(first_gpu.TWO, "").format(**names).split()
    main = importlib.import_module(Path(script).stem).main
    done = run_here(main, words, tmp_path, monkeypatch, capsys)
    missing = "|checkpoint .*soap/last.pt: no such file"  # which is looked at before the device
    assert_fails_in_one_line(done, "'tpu' is not known here" + missing)


def test_two_processes_need_two_gpus(tmp_path, monkeypatch):
    """And on a GPU the seconds are those of the table, while a CPU gets a third."""
    ran = []
    monkeypatch.setattr(first_gpu, "run_child", lambda *x: ran.append(x) or x[2].touch() or "ok")
    steps = [x for x in first_gpu.PATHS if x[0] in ("two processes", "--ema")]
    first_gpu.add_row(tmp_path, part="machine")
    for device, gpus in (("cuda", 1), ("cuda", 2), ("cpu", 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        first_gpu.run_part("paths", steps, tmp_path, torch.device(device), math.inf)
    commands = [" ".join(words) for _, words, _, _ in ran]
    assert ["--nproc-per-node=2" in x for x in commands] == [False, False, True, False, True]
    assert [seconds for *_, seconds in ran] == [80, 80, 140, 40, 60]
    assert all(f"--device {x}" in y for x, y in zip(["cuda"] * 3 + ["cpu"] * 2, commands))


def test_of_a_failure_the_first_error_is_told(tmp_path):
    text = tmp_path / "text"
    text.write_text(
        "a\n[rank1]: torch.OutOfMemoryError: of 3\nb: error: no\nChildFailedError:\n=\n"
    )
    assert (
        first_gpu.output_of(text, "failed, code 1")[-1] == "[rank1]: torch.OutOfMemoryError: of 3"
    )
    assert first_gpu.output_of(text, "ok")[-1] == "="


# ---- the comparison ------------------------------------------------------------------------------


def images_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that tell their number and their columns."""
    number = torch.arange(count, dtype=torch.uint8)
    return number[:, None, None, None].expand(-1, 3, 64, 64), number.long() % 10


def test_what_is_held_back_is_not_trained_on():
    trained, held_back = first_gpu.held_back_fifth(*images_of(23))
    seen = [set(x[:, 0, 0, 0].tolist()) for x, _ in (trained, held_back)]
    assert seen[0] | seen[1] == set(range(23)) and not seen[0] & seen[1] and len(seen[1]) == 4
    assert all(torch.equal(x[:, 0, 0, 0] % 10, y) for x, y in (trained, held_back))


def test_images_are_read_at_random_with_their_labels_until_the_time_ends(image_root, tmp_path):
    (images, labels), (val, _) = first_gpu.both_sets(image_root, 3, CPU, in_a_minute())
    assert images.shape == (36, 3, 64, 64) and val.shape[0] == 18 and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [12, 12, 12] and not labels[:12].diff().min() >= 0
    with pytest.raises(first_gpu.UserError, match="no time was left to read"):
        first_gpu.both_sets(image_root, 3, CPU, time.monotonic() - 1)


def test_augmentation_shifts_and_mirrors_each_image_by_itself():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(64, 64)]).to(torch.uint8)
    out = first_gpu.augmented(image.expand(200, -1, -1, -1)).int()
    by = out[:, 0, 32, 0] - 32
    assert set(by.tolist()) == set(range(-6, 7)) and not out[:, 2].any()
    line = torch.arange(64) + by[:, None]
    mirrored = torch.where(line < 0, -line, torch.where(line > 63, 126 - line, line))
    assert torch.equal(out[:, 0], mirrored[:, :, None].expand(-1, -1, 64))
    step = out[:, 1, 0, 33] - out[:, 1, 0, 32]  # to the right, or turned
    assert 60 < (step == 1).sum() < 140 and set(step.tolist()) == {-1, 1}


def test_arms_that_take_turns_see_the_same_batches_at_the_same_rates(monkeypatch):
    monkeypatch.setattr(first_gpu, "BATCH", dict(cpu=8))
    seen, lrs, held, real = [], [], [], first_gpu.SOAP.step
    monkeypatch.setattr(first_gpu, "hold_pairs", lambda optimizer, model: held.append(model))

    def step(optimizer, closure=None):
        lrs.append([group["lr"] for group in optimizer.param_groups])
        return real(optimizer, closure)

    monkeypatch.setattr(first_gpu, "augmented", lambda x: seen.append(x[:, 0, 0, 0].tolist()) or x)
    monkeypatch.setattr(first_gpu.SOAP, "step", step)
    train, val = images_of(19), images_of(5)
    runs = [first_gpu.training(arm, SHAPE, 0.5, 5, train, val, in_a_minute())
            for arm in first_gpu.ARMS]  # fmt: skip
    rows = [[next(run) for run in runs] for _ in range(5)]
    assert all(next(run, None) is None for run in runs)
    batches = [seen[start : start + 2] for start in range(0, len(seen), 2)]  # of an arm's epoch
    for epoch in range(5):
        of_arms = batches[4 * epoch : 4 * epoch + 4]
        assert all(x == of_arms[0] for x in of_arms)
        assert len({*of_arms[0][0], *of_arms[0][1]}) == 16  # no image twice, the rest left out
    assert batches[0] != batches[4]
    expected = [0.25, 0.5, *(0.25 * (1 + math.cos(math.pi * i / 9)) for i in range(8))]
    for epoch in range(5):  # a line up in a fifth of the steps, then half a cosine down
        two = expected[2 * epoch : 2 * epoch + 2]
        for lr, groups in zip(two * 4, lrs[8 * epoch : 8 * epoch + 8]):
            assert groups == pytest.approx([lr, lr])
    assert [model.blocks[0].attention.diagonal_bias is not None for model in held] == [True]
    assert all({"loss", "top1", "seconds"} == row.keys() for of in rows for row in of)


def test_training_learns_and_leaves_off_in_time(monkeypatch):
    monkeypatch.setattr(first_gpu, "BATCH", dict(cpu=8))
    images, labels = images_of(40)
    bright = (labels % 2 * 200).to(torch.uint8)[:, None, None, None].expand_as(images).contiguous()
    data = bright, labels % 2
    shape = SHAPE | dict(num_classes=2)
    rows = list(first_gpu.training("residual", shape, 1e-2, 4, data, data, in_a_minute()))
    assert rows[-1]["top1"] == 100 and rows[-1]["loss"] < rows[0]["loss"]
    assert not list(first_gpu.training("residual", shape, 1e-2, 4, data, data, time.monotonic()))


def rows_for(arm: str, rate: float, epochs: int, losses: dict) -> list[dict]:
    loss = losses.get(arm, {}).get(rate, 2.0)
    row = dict(loss=loss, top1=50.0 - (loss or 0), seconds=0.01)
    return [row] * epochs


def test_each_arm_gets_its_best_rate_and_all_the_same_epochs(tmp_path, monkeypatch):
    """A run that diverged loses, and when the time ends, arms are compared where all have been."""
    monkeypatch.setattr(first_gpu, "LONGEST", 7)
    losses = {"residual": {1e-2: 1.0}, "skipless-paper": {1e-3: None, 3e-3: 1.5}}

    def training(arm, shape, rate, epochs, train, val, until):
        assert [len(train[0]), len(val[0])] == ([20, 7] if epochs == 7 else [16, 4])
        kept = 4 if epochs == 7 and arm == "skipless-paper-dino" else epochs
        yield from rows_for(arm, rate, epochs, losses)[:kept]

    monkeypatch.setattr(first_gpu, "training", training)
    first_gpu.compare(tmp_path, "nano/16", {}, [images_of(20), images_of(7)], in_a_minute())
    rows = first_gpu.rows_of(tmp_path)
    final = [row for row in rows if row["part"] == "epoch"]
    assert {row["arm"]: row["rate"] for row in final} == {
        "residual": 1e-2, "skipless-paper": 3e-3, "skipless-paper-dino": 1e-3,
        "skipless-identity": 1e-3,
    }  # fmt: skip
    assert {row["epochs"] for row in final} == {7} and len(final) == 4 * 4 + 2
    common = first_gpu.in_common(final)
    assert [len(x) for x in common.values()] == [4] * 4
    text = first_gpu.report(tmp_path)
    assert "4 of 7 epochs, tuned in 5" in text and (tmp_path / "curves.png").exists()
    assert "| residual | 0.001: 48.0, 0.003: 48.0, 0.01: 49.0 | 0.01 | 1.0 |" in text


@pytest.mark.parametrize("seconds, epochs", [(0.25, 43), (1.25, 8), (22.0, 0)])
def test_the_number_of_epochs_fits_the_time(seconds, epochs, tmp_path, monkeypatch):
    """Of 60 s, tuning takes none on this clock; an epoch of four arms on all images takes 5/4."""
    monkeypatch.setattr(first_gpu, "LONGEST", 1000)
    now = time.monotonic()
    monkeypatch.setattr(first_gpu.time, "monotonic", lambda: now)
    asked = []

    def training(arm, shape, rate, number, *_):
        asked.append(number)
        yield from [dict(loss=1.0, top1=2.0, seconds=seconds)] * number

    monkeypatch.setattr(first_gpu, "training", training)
    data = images_of(20)
    if epochs:
        first_gpu.compare(tmp_path, "m", {}, [data, data], now + 60)
        assert asked[-1] == epochs
    else:
        with pytest.raises(first_gpu.UserError, match="no time was left to train m after tuning"):
            first_gpu.compare(tmp_path, "m", {}, [data, data], now + 60)


def test_a_rate_that_diverges_is_a_row_like_others(monkeypatch, tmp_path):
    monkeypatch.setattr(first_gpu, "BATCH", dict(cpu=8))
    data = images_of(40)
    [row, *_] = first_gpu.training("skipless-paper", SHAPE, 1e30, 2, data, data, in_a_minute())
    first_gpu.add_row(tmp_path, **row)
    assert row["loss"] is None and "NaN" not in (tmp_path / "rows.jsonl").read_text()


def test_what_goes_wrong_in_the_comparison_is_a_row(small, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(first_gpu, "compare", fail)
    first_gpu.compare_all(tmp_path, None, 20, CPU, in_a_minute())
    assert "failed" in capsys.readouterr().out
    assert "comparison failed after 0" in first_gpu.report(tmp_path)
    assert "CUDA out of memory. Tried\n" in first_gpu.report(tmp_path)
