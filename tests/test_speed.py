"""What the speed_*.py scripts time, and how they say it; `test_readme.py` runs each of them."""

import argparse
import importlib.util
import re
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main
from torch import nn

from minskip import PRESETS

sys.path.insert(0, str(ROOT / "experiments"))  # as when one of them is run


def load(name: str):
    for package in ("timm", "pytorch_optimizer"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, ROOT / f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_svd_per_head_gives_the_paper_s_weights():
    """W_Q W_K^T of each head is the best approximation of alpha Z + beta I of rank d_h."""
    script = load("speed_init")
    torch.manual_seed(0)
    weights = script.one_svd_per_head(12, 3, alpha=0.0, beta=2.0)
    sizes = [(12, 4)] * 6 + [(12, 12)] * 2 + [(12, 48), (48, 12)]
    assert [tuple(w.shape) for w in weights] == sizes
    for W_Q, W_K in zip(weights[:6:2], weights[1:6:2]):
        singular = torch.linalg.svdvals(W_Q @ W_K.T)
        assert torch.allclose(singular, torch.tensor([2.0] * 4 + [0.0] * 8), atol=1e-5)
    torch.manual_seed(0)
    W_Q, W_K = script.one_svd_per_head(12, 3, alpha=2.0, beta=0.6)[:2]
    torch.manual_seed(0)
    Z = torch.randn(12, 12) / 12**0.5
    U, S, V_T = torch.linalg.svd(2.0 * Z + 0.6 * torch.eye(12))
    assert torch.allclose(W_Q @ W_K.T, U[:, :4] @ torch.diag(S[:4]) @ V_T[:4], atol=1e-5)


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_a_step_is_compared_between_networks_of_one_size(name):
    nets = load("speed_step").networks(name, 32)
    assert list(nets) == ["timm", "residual", "skipless"]
    assert len({sum(p.numel() for p in net.parameters()) for net in nets.values()}) == 1
    assert [nets[kind].blocks[0].residual for kind in ("residual", "skipless")] == [True, False]
    assert len(nets["timm"].blocks) == PRESETS[name]["depth"]
    assert nets["timm"].blocks[0].attn.num_heads == PRESETS[name]["num_heads"]


@pytest.mark.parametrize("opt", ["adamw", "soap"])
def test_a_step_s_time_is_that_of_its_network(opt, monkeypatch):
    """A network that sleeps is the one whose time is long, and the warm-up is left out."""

    class Slow(nn.Linear):
        calls = 0

        def forward(self, images):
            Slow.calls += 1
            time.sleep(0.5 if Slow.calls == 1 else 0.05)
            return super().forward(images.flatten(1))

    script = load("speed_step")
    nets = dict(timm=Slow(768, 8), residual=nn.Sequential(nn.Flatten(), nn.Linear(768, 8)))
    monkeypatch.setattr(script, "networks", lambda name, size: nets)
    before = nets["residual"][1].weight.clone()
    words = dict(batch_size=2, image_size=16, opt=opt, compile=False, warmup=1, steps=4)
    times, peaks = script.time_steps(argparse.Namespace(**words), "any", torch.device("cpu"))
    assert not peaks  # on a CPU
    assert [len(x) for x in times.values()] == [4, 4] and Slow.calls == 5
    assert all(0.05 <= x < 0.5 for x in times["timm"]) and min(times["residual"]) < 0.05
    assert not torch.equal(before, nets["residual"][1].weight)  # trained


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("speed_step", "--steps 1", "--steps: must be at least 2"),
        ("speed_step", "--image-size 20", "--image-size must be a multiple of 16; it is 20"),
        ("speed_soap", "--tens 1", "--tens: must be at least 2"),
        ("speed_init", "--repeats 1", "--repeats: must be at least 2"),
        ("speed_dino", "--repeats 1", "--repeats: must be at least 2"),
        ("speed_loading", "--repeats 1", "--repeats: must be at least 2"),
        ("speed_checkpoint", "--repeats 1", "--repeats: must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, words, message, tmp_path, monkeypatch, capsys):
    done = run_here(load(name).main, words.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, message)


def test_turns_are_timed_alternately_on_a_clock_that_the_calls_move(monkeypatch):
    turns = load("turns")
    calls, clock = [], [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])

    def taking(name: str, seconds: float):
        def call():
            calls.append(name)
            clock[0] += seconds * (50 if len(calls) < 5 else 1)  # the warm-up takes long

        return call

    times = turns.in_turns(dict(quick=taking("quick", 1.0), slow=taking("slow", 3.0)), 4, warmup=2)
    assert calls == ["quick", "slow"] * 6
    assert times == dict(quick=[1.0] * 4, slow=[3.0] * 4)


def test_a_ratio_has_the_quartiles_of_the_turns_not_of_the_medians():
    turns = load("turns")
    times = dict(ours=[1.0, 2.0, 4.0], theirs=[2.0, 6.0, 4.0])
    assert turns.ratio(times, "theirs", "ours") == "theirs / ours 2.000 (1.500 .. 2.500)"
    assert turns.medians(times) == "ours 2000 ms, theirs 4000 ms"


def test_photographs_are_loaded_by_both(tmp_path, monkeypatch, capsys):
    script = load("speed_loading")
    words = "--images 8 --workers 0 --repeats 2".split()
    run_main(script.main, words, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith("8 JPEGs of 500 x 375 px") and "customary / ours" in out
    script.draw_photographs(tmp_path, 2)
    image = script.data.open_rgb(tmp_path / "train/0/1.jpg")
    assert image.size == (500, 375)
    size = (tmp_path / "train/0/1.jpg").stat().st_size
    assert 30_000 < size < 300_000  # a photograph's
    assert script.customary()(image).shape == (3, 224, 224)


def test_the_soaps_are_told_apart(tmp_path, monkeypatch, capsys):
    """Stubs that sleep 10 and 30 ms in each step stand for ours and the peer's."""

    def stub(seconds: float):
        return lambda weights, lr: types.SimpleNamespace(step=lambda: time.sleep(seconds))

    script = load("speed_soap")
    monkeypatch.setattr(script, "SOAP", stub(0.01))
    monkeypatch.setattr(script, "PeerSOAP", stub(0.03))
    run_main(script.main, ["--tens", 2, "--device", "cpu"], tmp_path, monkeypatch)
    ours, peer, ratio = re.search(
        r"SOAP here (\d+) ms, pytorch-optimizer's (\d+) ms.*\n.*'s / SOAP here ([\d.]+)",
        capsys.readouterr().out,
    ).groups()
    assert 100 <= int(ours) < 250 and 300 <= int(peer) < 600 and 1.5 < float(ratio) < 3.5


def test_the_gpu_s_script_runs_all_and_says_what_failed(tmp_path, monkeypatch, capfd):
    script = load("gpu")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "good.py").write_text("import sys; print('fine', *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("import sys; print('so far'); sys.exit('error: no')")
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setattr(script, "COMMANDS", ["slow.py", "bad.py", "good.py --out {out}/a"])
    run_main(
        script.main, ["--device", "cpu", "--out", "a o", "--patience", 2], tmp_path, monkeypatch
    )
    slow, bad, good = capfd.readouterr().out.split("$ python ")[1:]
    assert "begun\n(no code: stopped after 2 s)" in slow
    assert "so far\n" in bad and "error: no\n" in bad and "(code 1 after 0 s)" in bad
    assert f"fine --out {tmp_path}/a o/a --device cpu\n(code 0" in good


def test_the_gpu_s_commands_are_commands():
    """Every script and flag of them exists."""
    for command in load("gpu").COMMANDS:
        name, *words = command.split()
        text = (ROOT / name).read_text()
        for word in words:
            if word.startswith("--"):
                row = f"\n    {word[2:].replace('-', '_')}="  # of a trainer's table
                table = text + (ROOT / "support/flags.py").read_text()
                assert f'"{word}"' in text or row in table, command


def test_without_a_gpu_its_script_says_so(tmp_path, monkeypatch, capsys):
    script = load("gpu")
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 0)
    done = run_here(script.main, [], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "no CUDA devices? found")
