"""The tables of README.md and results/README.md say what the logs in results/ say.

Every cell that the logs can give is computed from them again, by other code than the sweep's, and
compared to the printed precision; the columns in NOT_IN_LOGS alone are left out.
"""

import json
import re
import shutil
from pathlib import Path
from statistics import mean, variance

import pytest
import torch
from conftest import ROOT

from beyond.arms import fresh_arm
from experiments import draw_readme
from minskip import PRESETS

FOLDERS = {  # heading in results/README.md -> folder of its logs
    "Tiny-ImageNet, with labels": "tiny-imagenet",
    "Tiny-ImageNet, without labels": "dino",
    "The neighbours": "neighbours",
    "Which half needs its skip": "halves",
    "Synthetic images": "shapes",
}
NOT_IN_LOGS = {"arm", "blocks", "optimizer", "what"}
NAME = re.compile(r"(.+)-(\d+)-(soap|adamw)-lr([\de.-]+)-seed(\d+)")
Facts = dict[str, list[float]]  # column -> one value per seed


def read_tables(text: str) -> dict[str, list[list[tuple[str, str]]]]:
    """Heading -> the rows of the first table below it, as (column, cell) pairs."""
    tables = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        if table := re.search(r"^\|.*(\n\|.*)*", section, flags=re.M):
            lines = [line.strip("|").split("|") for line in table[0].splitlines()]
            columns, _, *rows = [[cell.strip() for cell in line] for line in lines]
            tables[section.splitlines()[0]] = [list(zip(columns, row, strict=True)) for row in rows]
    return tables


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean_curve(logs: list[list[dict]], metric: str) -> list[tuple[int, float]]:
    measured = [{row["epoch"]: row[metric] for row in log if row.get(metric) is not None}
                for log in logs]  # fmt: skip
    return [(epoch, mean(log[epoch] for log in measured)) for epoch in sorted(measured[0])]


def crossing(curve: list[tuple[int, float]], target: float) -> float:
    """The epoch, on a line between two epochs, at which the curve first comes to the target."""
    last = curve[0]
    for x, y in curve:
        if y >= target:
            return (
                x if y == last[1] else last[0] + (target - last[1]) / (y - last[1]) * (x - last[0])
            )
        last = x, y
    raise ValueError(f"the curve never comes to {target}")


def steps_of(own: list[tuple], residual: list[tuple]) -> str | list[float]:
    if own[-1][0] > residual[-1][0]:
        target = residual[-1][1]
        if max(y for _, y in own) < target:
            return f"> {own[-1][0] // residual[-1][0]}"
    else:
        target = min(own[-1][1], residual[-1][1])
    before = crossing(residual, target)  # 0 where residual has it untrained
    return [crossing(own, target) / before] if before else "-"


def facts_of_sweep(folder: Path) -> dict[tuple[str, str, str], Facts]:
    """(arm, blocks, optimizer) -> what the logs of a sweep say."""
    settings = json.loads((folder / "sweep.json").read_text())
    metric = {"train_cls.py": "top1", "train_ssl.py": "knn"}[settings["script"]]
    tuned, final = {}, {}
    for path in sorted(folder.glob("*/*/log.jsonl")):
        arm, blocks, opt, rate, _ = NAME.fullmatch(path.parent.name).groups()
        cells = dict(tune=tuned, full=final).get(path.parent.parent.name)
        if cells is not None:
            rates = cells.setdefault((arm, blocks, opt), {})
            rates.setdefault(float(rate), []).append(path)
    facts = {}
    for cell, rates in tuned.items():
        scores = {}
        for rate, paths in rates.items():
            logs = [read_log(path) for path in paths]
            assert {log[-1]["epoch"] for log in logs} == {settings["tune_epochs"]}, paths
            lasts = [(log[-1][metric], -log[-1].get("val_loss", 0)) for log in logs]
            scores[rate] = [mean(values) for values in zip(*lasts)]
        rate = min(scores, key=lambda x: ([-value for value in scores[x]], x))
        paths = final.get(cell, {}).get(rate, [])
        logs = [read_log(path) for path in paths]
        facts[cell] = found = {"held back": [scores[rate][0]], "rate": [rate]}
        if logs:
            found |= {"val": [log[-1][metric] for log in logs], "logs": logs}
            found["before"] = [log[0][metric] for log in logs if log[0]["epoch"] == 0]
            [epochs] = {log[-1]["epoch"] for log in logs}
            longer = settings.get("skipless_epochs") if cell[0].startswith("skipless") else None
            assert epochs == (longer or settings["epochs"])
            found["epochs"] = [epochs]
        for path in paths:
            if (probe := path.parent / "last/segment.json").exists():
                results = json.loads(probe.read_text())["results"].values()
                one_class, trained, untrained = (result["miou"] for result in results)
                for name, value in dict(mIoU=trained, untrained=untrained).items():
                    found.setdefault(name, []).append(value)
                found.setdefault("one class", []).append(one_class)
    for (_, *cell), found in facts.items():
        residual = facts.get(("residual", *cell), {})
        if {"logs"} <= residual.keys() & found.keys():
            curves = (mean_curve(x["logs"], metric) for x in (found, residual))
            found["steps"] = steps_of(*curves)
    return facts


def facts_of_shapes(folder: Path) -> dict[tuple[str, str, str], Facts]:
    facts = {}
    for path in sorted(folder.glob("*-seed?.jsonl")):
        kind, arm = path.stem.rsplit("-", 1)[0].split("-", 1)
        found, log = facts.setdefault((arm, "12", "soap"), {}), read_log(path)
        if kind == "cls":
            found.setdefault("val", []).append(log[-1]["top1"])
        else:
            found.setdefault("before", []).append(log[0]["knn"])
            found.setdefault("after", []).append(log[-1]["knn"])
    return facts


def facts_of(folder: Path) -> dict[tuple[str, str, str], Facts]:
    return (facts_of_shapes if folder.name == "shapes" else facts_of_sweep)(folder)


def agrees(cell: str, value: float) -> bool:
    """Whether the printed number is this one, to its own precision."""
    digits, _, exponent = cell.partition("e")
    decimals = len(digits.partition(".")[2])
    return f"{value / float(f'1e{exponent or 0}'):.{decimals}f}" == digits


def column_of(title: str) -> str:
    """The fact behind a column: `steps to residual's 28.6` is steps."""
    if "before" in title:
        return "before"
    if title.endswith("after"):
        return "after"
    return re.split(r"[ ,]", title)[0] if title != "held back" else title


def check_row(row: list[tuple[str, str]], facts: Facts) -> list[str]:
    """What is wrong with a row; a range and a number of seeds belong to the column before them."""
    wrong, values = [], []
    facts = dict(after=facts.get("val", [])) | facts
    for title, cell in row:
        column = column_of(title)
        if column in NOT_IN_LOGS or (column == "steps" and cell == "-"):
            continue
        if column == "range":
            ends = cell.split(" .. ") if cell != "-" else []
            expected = [min(values), max(values)] if len(values) > 1 else []
            right = len(ends) == len(expected) and all(map(agrees, ends, expected))
        elif column == "seeds":
            right, expected = cell == str(len(values)), [len(values)]
        else:
            expected = values = facts.get(column, [])
            right = cell == values if isinstance(values, str) else (
                bool(values) and cell != "-" and agrees(cell, mean(values))
            )  # fmt: skip
        if not right:
            wrong.append(f"{title}: {cell}, but the logs say {expected}")
    return wrong


def wrong_in_results(text: str, results: Path) -> list[str]:
    wrong, tables = [], read_tables(text)
    for heading, name in FOLDERS.items():
        facts = facts_of(results / name)
        missing = set(facts)
        for row in tables[heading]:
            by_title = dict(row)
            cell = by_title["arm"], by_title.get("blocks", "12"), by_title.get("optimizer", "soap")
            wrong += [f"{heading}, {cell}: {x}" for x in check_row(row, facts.get(cell, {}))]
            missing.discard(cell)
            if target := re.search(r"residual's ([\d.]+)$", row[-1][0]):
                residual = mean(facts["residual", "12", "soap"]["val"])
                if not agrees(target[1], residual):
                    wrong.append(f"{heading}: {target[0]}, but the logs say {residual}")
        wrong += [f"{heading}: {cell} is not in the table" for cell in missing]
    return wrong


NETWORKS = {
    "residual": "residual", "skipless, identity init (ours)": "skipless-identity",
    "skipless, paper's init": "skipless-paper", "skipless, usual init": "skipless-default",
    "skips around attention only, MLPs as ours": "attention-skip-identity",
}  # fmt: skip
LENGTHS = {"5": "tiny-imagenet", "20": "tiny-imagenet-long", "40": "tiny-imagenet-40"}
WIDER = {"5": "width-192"}
HALVES = {"5": "halves", "20": "halves-20", "40": "halves-40"}


def facts_by_length(results: Path) -> dict[tuple[str, str], dict]:
    """(width, epochs) -> the facts of all arms that were trained so."""
    facts = {("64", epochs): facts_of(results / name) for epochs, name in LENGTHS.items()}
    facts |= {("192", epochs): facts_of(results / name) for epochs, name in WIDER.items()}
    for epochs, name in HALVES.items():
        more = facts_of(results / name)
        assert not more.keys() & facts["64", epochs].keys()
        facts["64", epochs] |= more
    return facts


def wrong_in_readme(text: str, results: Path) -> list[str]:
    wrong, facts = [], facts_by_length(results)
    for (_, network), *row in read_tables(text)["Results"]:
        for title, cell in row:
            pattern = r"(?:width (192): )?(\d+) blocks, (\d+)(?: epochs)?"
            wide, blocks, epochs = re.fullmatch(pattern, title).groups()
            found = facts[wide or "64", epochs].get((NETWORKS[network], blocks, "soap"))
            if not (agrees(cell, mean(found["val"])) if found and cell != "-" else cell == "-"):
                wrong.append(
                    f"{network}, {title}: {cell}, but the logs say {found and found['val']}"
                )
            if found and cell == "-":
                wrong.append(f"{network}, {title}: nothing, but there are logs")
    return wrong


def test_the_tables_of_results_are_what_the_logs_say():
    text = (ROOT / "results/README.md").read_text()
    assert wrong_in_results(text, ROOT / "results") == []


def test_the_table_of_lengths_and_widths_is_what_the_logs_say():
    results, residual, lengths = ROOT / "results", [], set()
    by_length = facts_by_length(results)
    for row in read_tables((results / "README.md").read_text())["Longer and wider"]:
        (_, arm), (_, width), *row, (_, ahead), (_, error) = row
        epochs = dict(row)["epochs"]
        facts = by_length[width, epochs][arm, "12", "soap"]
        assert not check_row(row, facts), (arm, width, epochs)
        if arm == "residual":
            residual = facts["val"]
            lengths.add((width, epochs))
        else:
            both = facts["val"], residual
            gap = mean(both[0]) - mean(both[1])
            assert agrees(ahead.lstrip("+"), gap) and ahead[0] == ("+" if gap > 0 else "-")
            assert agrees(error, sum(variance(x) / len(x) for x in both) ** 0.5)
    assert lengths == set(by_length)


def test_the_picture_of_lengths_shows_that_table():
    rows = map(dict, read_tables((ROOT / "results/README.md").read_text())["Longer and wider"])
    table = {(row["arm"], row["width"], row["epochs"]): row for row in rows}
    for arm, folders, residuals, _ in draw_readme.LENGTHS.values():
        width = "192" if folders == draw_readme.WIDER else "64"
        for epochs, *found in draw_readme.ahead(arm, folders, residuals).tolist():
            row = table[arm, width, f"{epochs:.0f}"]
            assert agrees(row["ahead of residual"].lstrip("+"), found[0])
            assert agrees(row["standard error"], found[1])


def test_the_table_of_tokens_is_what_the_two_looks_say():
    results = ROOT / "results"
    section = (results / "README.md").read_text().split("### What the tokens know")[1]
    [rows] = read_tables("## tokens" + section.split("\n## ")[0]).values()
    looks = []
    for look, figure in (("segment", "miou"), ("discover", "corloc")):
        paths = sorted(results.glob(f"dino/tokens/*/{look}.json"))
        networks = [x for path in paths for x in json.loads(path.read_text())["results"].items()]
        looks.append([(name, result[figure]) for name, result in networks if "-12-" in name])
    arms = {name.split("-12-")[0] for values in looks for name, _ in values}
    assert sorted(arms) == sorted(dict(row)["arm"] for row in rows)
    for row in rows:
        arm, *printed = (cell for _, cell in row)
        found = []
        for values in looks:
            own = [(name, value) for name, value in values if name.startswith(f"{arm}-12-")]
            fresh = [value for name, value in own if name.endswith(", untrained")]
            trained = [value for name, value in own if "," not in name]
            assert len(fresh) == len(trained) == 3
            found += [mean(trained), min(trained), max(trained), mean(fresh)]
        says = " .. ".join(printed).split(" .. ")
        assert len(says) == len(found) == 8 and all(map(agrees, says, found)), (says, found)


@pytest.mark.parametrize(
    "heading, runs",
    [("SOAP", "soap/{logs}-{arm}-?"),
     ("A reproduction's setting", "reproduction/{arm}-lr{rate}-seed?")],
)  # fmt: skip
def test_the_tables_of_single_runs_are_what_the_logs_say(heading, runs):
    results = ROOT / "results"
    for row in read_tables((results / "README.md").read_text())[heading]:
        paths = results.glob(runs.format(**dict(row)) + "/log.jsonl")
        val = [read_log(path)[-1]["top1"] for path in paths]
        assert not check_row(row[-3:], dict(val=val)), row  # val, range and seeds


def test_the_table_of_ideas_is_what_the_logs_say():
    results = ROOT / "results"
    section = (results / "README.md").read_text().split("### What attention lacks")[1]
    [rows] = read_tables("## ideas" + section.split("\n## ")[0]).values()
    logs = {x.stem: read_log(x)[-1] for x in results.glob("ideas/*.jsonl")}
    assert {dict(row)["log"] for row in rows} == {x for x in logs if "val" not in x}
    of_val = re.findall(r"([\d.]+) \(([\d.]+) \.\. ([\d.]+)\) after (\d+)", section)
    assert len(of_val) == 2
    for *says, epochs in of_val:
        val = [log["top1"] for name, log in logs.items() if f"own-val-{epochs}-" in name]
        assert len(val) == 3 and all(map(agrees, says, (mean(val), min(val), max(val)))), says
    for row in rows:
        printed = dict(row)
        found = [logs[printed["log"]][key] for key in ("epoch", "top1", "val_loss", "loss")]
        says = ["20", *(printed[title] for title in ("top-1, %", "val loss", "training loss"))]
        assert all(map(agrees, says, found)), (says, found)


def test_the_snippet_that_measures_what_moved(tmp_path, monkeypatch, capsys):
    """0 before training; in block 12 no longer when a coordinate and a hidden unit are doubled."""
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "results/README.md").read_text(), re.S)
    model = fresh_arm("skipless-identity", image_size=16, patch_size=8, **PRESETS["nano"])
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    for larger in (1, 2):
        with torch.no_grad():
            model.blocks[11].mlp.fc2.weight[:, 7] *= larger
            model.blocks[11].attention.W_O.weight[3, 3] *= larger
        torch.save(dict(model=model.state_dict()), "RUN/last.pt")
        exec(snippet, {})
    moved = [float(line) for line in capsys.readouterr().out.split()]
    assert max(moved[:6]) < 1e-5 and 0.1 < moved[6] < 0.2 and 0.01 < moved[7] < 0.2


def test_the_vanilla_arm_takes_longer_in_accuracy_than_in_training_loss():
    text, results = (ROOT / "results/README.md").read_text(), ROOT / "results/neighbours/full"
    section = text.split("### Beside SimplEsT-ViT")[1].split("\n## ")[0].replace("\n", " ")
    says = re.search(r"takes ([\d.]+) times the steps in training loss, ([\d.]+) times", section)
    names = "skipless-paper+none+e-spa+tat-12-soap", "residual-12-soap"
    logs = [[read_log(log) for log in results.glob(f"{name}*/log.jsonl")] for name in names]
    assert [len(seeds) for seeds in logs] == [3, 3]
    for figure, key, sign in zip(says.groups(), ("loss", "top1"), (-1, 1)):
        own, residual = ([(x, sign * y) for x, y in mean_curve(seeds, key)] for seeds in logs)
        assert agrees(figure, crossing(own, residual[-1][1]) / residual[-1][0]), key


def test_the_table_of_the_readme_is_what_the_logs_say():
    assert wrong_in_readme((ROOT / "README.md").read_text(), ROOT / "results") == []


def test_a_wrong_figure_is_noticed():
    """In any cell that is checked: its last digit, or its first, is one more."""
    for heading, rows in read_tables((ROOT / "results/README.md").read_text()).items():
        facts = facts_of(ROOT / "results" / FOLDERS[heading]) if heading in FOLDERS else {}
        for row in rows if facts else []:
            by_title = dict(row)
            cell = by_title["arm"], by_title.get("blocks", "12"), by_title.get("optimizer", "soap")
            for i, (title, text) in enumerate(row):
                digits = [x.start() for x in re.finditer(r"\d", text)]
                if column_of(title) in NOT_IN_LOGS or not digits:
                    continue
                for at in (digits[0], digits[-1]):
                    wrong = f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"
                    assert check_row([*row[:i], (title, wrong), *row[i + 1 :]], facts[cell]), wrong


LOGS = {
    "tiny-imagenet/full/skipless-paper-24-soap-lr0.001-seed2/log.jsonl": "top1",
    "tiny-imagenet/tune/residual-4-soap-lr0.003-seed0/log.jsonl": "top1",  # then it is the best
    "neighbours/full/residual-12-soap-lr0.01-seed1/log.jsonl": "top1",
    "dino/full/*/log.jsonl": "knn",
    "dino/full/*/last/segment.json": "miou",
    "shapes/ssl-skipless-identity-seed1.jsonl": "knn",
}


@pytest.mark.parametrize("name", LOGS)
def test_a_wrong_log_is_noticed(name, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results, ignore=shutil.ignore_patterns("*.png"))
    path = sorted(results.glob(name))[0]
    key = f'"{LOGS[name]}": '
    head, found, tail = path.read_text().rpartition(key)
    path.write_text(f"{head}{found}9{tail}")  # 9 in front of the last one
    assert wrong_in_results((ROOT / "results/README.md").read_text(), results)


def test_a_wrong_figure_or_log_of_the_readme_is_noticed(tmp_path):
    text = (ROOT / "README.md").read_text()
    for figure in re.findall(r"\d+\.\d", text[text.index("| residual | ") :].split("\n\n")[0]):
        changed = text.replace(f"| {figure} |", f"| {float(figure) + 0.1:.1f} |")
        assert wrong_in_readme(changed, ROOT / "results"), figure
    for name in [*LENGTHS.values(), *HALVES.values(), *WIDER.values()]:
        shutil.copytree(ROOT / "results" / name, tmp_path / name)
    log = tmp_path / "tiny-imagenet-40/full/skipless-identity-12-soap-lr0.01-seed1/log.jsonl"
    log.write_text(
        log.read_text().replace('"top1": 4', '"top1": 3').replace('"top1": 5', '"top1": 4')
    )
    assert wrong_in_readme(text, tmp_path)
