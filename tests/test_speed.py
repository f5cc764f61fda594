"""What `speed.py` times and how it says it; `test_readme.py` runs each command."""

import importlib
import re
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main
from torch import nn

sys.path.insert(0, str(ROOT / "experiments"))
speed = importlib.import_module("speed")


def ratios(out: str) -> list[float]:
    return [float(x) for x in re.findall(r" / .* ([\d.]+) \(", out)]


def test_turns_are_timed_alternately_on_a_clock_that_the_calls_move(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def take(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds * (50 if len(calls) < 5 else 1)  # the first turn takes long

    ways = dict(quick=partial(take, "quick", 1.0), slow=partial(take, "slow", 3.0))
    assert speed.in_turns(ways, 4, calls=2) == dict(quick=[2.0] * 4, slow=[6.0] * 4)
    assert calls == ["quick", "quick", "slow", "slow"] * 5


def test_a_ratio_has_the_quartiles_of_the_turns_not_of_the_medians(capsys):
    speed.report("nano", dict(ours=[1.0, 2.0, 4.0], theirs=[2.0, 6.0, 4.0]), ("theirs", "ours"))
    medians, ratio = capsys.readouterr().out.splitlines()
    assert medians == "nano: ours 2000 ms, theirs 4000 ms"
    assert ratio.strip() == "theirs / ours 2.000 (1.500 .. 2.500)"


def test_a_step_is_compared_between_networks_of_one_size():
    pytest.importorskip("timm")
    nets = speed.networks("tiny", 32)
    assert list(nets) == ["timm", "residual", "skipless"]
    assert len({sum(p.numel() for p in net.parameters()) for net in nets.values()}) == 1
    assert [bool(nets[kind].blocks[0].skips) for kind in ("residual", "skipless")] == [True, False]
    assert nets["timm"].blocks[0].attn.num_heads == 3


def test_without_timm_ours_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    words = "--device cpu --batch-size 1 --image-size 16 --steps 2 --models nano"
    run_main(speed.main, ["step", *words.split()], tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert "timm is not installed" in out and "skipless / residual" in out and len(ratios(out)) == 1
    run_main(speed.main, "soap --device cpu --tens 2".split(), tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert "pytorch-optimizer is not installed" in out and not ratios(out)
    assert re.search("ten steps: SOAP here .* ms, AdamW", out)


def test_the_parts_of_soaps_step(tmp_path, monkeypatch, capsys):
    """Moments 1 s, products 2 more, and where the bases are refreshed, 4 more."""

    class Stub:
        def __init__(self, _, max_precondition_dim=9, precondition_frequency=10, **__):
            self.seconds = {10**9: 3.0, 1: 7.0}.get(precondition_frequency, 5.0)
            self.seconds = 1.0 if max_precondition_dim == 1 else self.seconds

        def step(self):
            clock[0] += self.seconds

    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(speed, "SOAP", Stub)
    run_main(speed.main, "soap --device cpu --tens 2".split(), tmp_path, monkeypatch)
    expected = "moments 1000.0 ms, products 2000.0 ms, a refresh of all bases 4000.0 ms"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("opt", ["adamw", "soap"])
def test_a_steps_time_is_that_of_its_network(opt, tmp_path, monkeypatch, capsys):
    kinds = ("timm", "residual", "skipless")
    nets = {kind: nn.Sequential(nn.Flatten(), nn.Linear(768, 8)) for kind in kinds}
    nets["residual"].register_forward_hook(lambda *_: time.sleep(0.05))
    before = [net[1].weight.clone() for net in nets.values()]
    monkeypatch.setattr(speed, "networks", lambda name, size: nets)
    words = f"step --models tiny --batch-size 2 --image-size 16 --steps 4 --device cpu --opt {opt}"
    run_main(speed.main, words.split(), tmp_path, monkeypatch)
    slow, fast = ratios(capsys.readouterr().out)
    assert slow > 3 * fast
    assert not any(torch.equal(a, net[1].weight) for a, net in zip(before, nets.values()))


def test_the_soaps_are_told_apart(tmp_path, monkeypatch, capsys):
    for module, seconds in ((speed, 0.01), (pytest.importorskip("pytorch_optimizer"), 0.03)):
        stub = types.SimpleNamespace(step=partial(time.sleep, seconds))
        monkeypatch.setattr(module, "SOAP", lambda weights, stub=stub, **_: stub)
    run_main(speed.main, ["soap", "--tens", 2, "--device", "cpu"], tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert 1.5 < ratios(out)[0] < 3.5 and int(re.search(r"SOAP here (\d+) ms", out)[1]) >= 100
    longest = re.findall(r"refreshes (\w+).*: the longest step takes ([\d.]+) times", out)
    assert [how for how, _ in longest] == ["in", "staggered"]
    assert all(float(times) >= 1 for _, times in longest)


def test_one_svd_per_head_gives_the_papers_weights():
    """W_Q W_K^T of each head is the best approximation of alpha Z + beta I of rank d_h."""
    torch.manual_seed(0)
    weights = speed.one_svd_per_head(12, 3, alpha=2.0, beta=0.6)
    assert [w.shape for w in weights[6:]] == [(12, 12)] * 2 + [(12, 48), (48, 12)]
    torch.manual_seed(0)
    for W_Q, W_K in zip(weights[:6:2], weights[1:6:2]):
        U, S, V_T = torch.linalg.svd(2.0 * torch.randn(12, 12) / 12**0.5 + 0.6 * torch.eye(12))
        assert torch.allclose(W_Q @ W_K.T, U[:, :4] * S[:4] @ V_T[:4], atol=1e-5)


def test_photographs_are_as_large_as_photographs(tmp_path):
    speed.draw_photographs(tmp_path, 2)
    assert speed.data.open_rgb(tmp_path / "train/0/1.jpg").size == (500, 375)
    assert 30_000 < (tmp_path / "train/0/1.jpg").stat().st_size < 300_000


REFUSED = {
    "speed.py": "required: command",
    "speed.py step --steps 1": "--steps: must be at least 2",
    "speed.py step --image-size 20": "--image-size: must be a multiple of 16; it is 20",
    "speed.py dino --device tpu": "'tpu' is not known here",
    "speed.py loading --repeats 1": "--repeats: must be at least 2",
}


@pytest.mark.parametrize("command, message", REFUSED.items())
def test_refusals(command, message, tmp_path, monkeypatch, capsys):
    script, *words = command.split()
    main = importlib.import_module(Path(script).stem).main
    assert_fails_in_one_line(run_here(main, words, tmp_path, monkeypatch, capsys), message)
