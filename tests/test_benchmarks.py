"""What the benchmarks time, and how they say it; `test_readme.py` runs each as a user does."""

import importlib.util
import re
import sys
import types

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main
from torch import nn

from minskip import PRESETS

sys.path.insert(0, str(ROOT / "benchmarks"))  # as when one of them is run
NUMBER = r"\d+\.\d+"


def load(name: str):
    for package in ("timm", "pytorch_optimizer"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_init_has_the_paper_s_weights():
    """The peer of the init's benchmark: W_Q W_K^T of each head is of rank d_h, and the best."""
    bench = load("init_speed")
    torch.manual_seed(0)
    weights = bench.an_svd_a_head(12, 3, alpha=0.0, beta=2.0)
    sizes = [(12, 4)] * 6 + [(12, 12)] * 2 + [(12, 48), (48, 12)]
    assert [tuple(w.shape) for w in weights] == sizes
    for W_Q, W_K in zip(weights[:6:2], weights[1:6:2]):
        singular = torch.linalg.svdvals(W_Q @ W_K.T)
        assert torch.allclose(singular, torch.tensor([2.0] * 4 + [0.0] * 8), atol=1e-5)
    torch.manual_seed(0)
    W_Q, W_K = bench.an_svd_a_head(12, 3, alpha=2.0, beta=0.6)[:2]
    torch.manual_seed(0)
    Z = torch.randn(12, 12) / 12**0.5
    U, S, V_T = torch.linalg.svd(2.0 * Z + 0.6 * torch.eye(12))
    assert torch.allclose(W_Q @ W_K.T, U[:, :4] @ torch.diag(S[:4]) @ V_T[:4], atol=1e-5)


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_a_step_is_compared_between_networks_of_one_size(name):
    nets = load("step_speed").networks(name, 32)
    assert list(nets) == ["timm", "residual", "skipless"]
    assert len({sum(p.numel() for p in net.parameters()) for net in nets.values()}) == 1
    assert [b.residual for net in list(nets.values())[1:] for b in net.blocks[:1]] == [True, False]
    assert len(nets["timm"].blocks) == PRESETS[name]["depth"]
    assert nets["timm"].blocks[0].attn.num_heads == PRESETS[name]["num_heads"]


def test_a_step_s_time_is_that_of_its_network(monkeypatch):
    """A network that sleeps is the one whose time is long, and the warm-up is left out."""

    class Slow(nn.Linear):
        calls = 0

        def forward(self, images):
            Slow.calls += 1
            bench.time.sleep(0.3 if Slow.calls == 1 else 0.03)
            return super().forward(images.flatten(1))

    bench = load("step_speed")
    nets = dict(timm=Slow(768, 8), residual=nn.Sequential(nn.Flatten(), nn.Linear(768, 8)))
    monkeypatch.setattr(bench, "networks", lambda name, size: nets)
    before = nets["residual"][1].weight.clone()
    words = dict(batch_size=2, image_size=16, opt="adamw", compile=False, warmup=1, steps=4)
    args = bench.argparse.Namespace(**words)
    times, peaks = bench.step_times(args, "any", torch.device("cpu"))
    assert not peaks
    assert [len(x) for x in times.values()] == [4, 4] and Slow.calls == 5
    assert all(0.03 <= x < 0.3 for x in times["timm"])
    assert min(times["residual"]) < 0.02
    assert not torch.equal(before, nets["residual"][1].weight)  # trained


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("step_speed", "--steps 1", "--steps must be at least 2"),
        ("step_speed", "--image-size 20", "--image-size a multiple of 16"),
        ("soap_speed", "--tens 1", "--tens: must be at least 2"),
        ("init_speed", "--repeats 0", "must be at least 1"),
        ("dino_speed", "--repeats 1", "--repeats: must be at least 2"),
        ("loading_speed", "--repeats 1", "--repeats: must be at least 2"),
        ("kappa_speed", "--repeats 1", "--repeats: must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, words, message, tmp_path, monkeypatch, capsys):
    done = run_here(load(name).main, words.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, message)


def test_turns_are_timed_alternately_and_the_ratio_is_the_peer_s_time_over_ours(monkeypatch):
    """On a clock that the calls move; the first two take long and do not count."""
    turns = load("turns")
    calls, clock = [], [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])

    def taking(name: str, seconds: float):
        def call():
            calls.append(name)
            clock[0] += seconds * (50 if len(calls) < 3 else 1)

        return call

    times = turns.in_turns(dict(quick=taking("quick", 1.0), slow=taking("slow", 3.0)), 4)
    assert calls == ["quick", "slow"] * 5
    assert times == dict(quick=[1.0] * 4, slow=[3.0] * 4)
    exact = dict(ours=[1.0, 2.0, 4.0], theirs=[2.0, 6.0, 4.0])
    assert turns.ratio(exact, "theirs", "ours") == "theirs / ours 2.00 (1.00 .. 3.00)"
    assert turns.medians(exact) == "ours 2000 ms, theirs 4000 ms"


def test_photographs_are_loaded_by_both(tmp_path, monkeypatch, capsys):
    bench = load("loading_speed")
    words = "--images 8 --workers 0 --repeats 2".split()
    run_main(bench.main, words, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith("8 JPEGs of 500 x 375 px") and "customary / ours" in out
    bench.draw_photographs(tmp_path, 2)
    image = bench.data.open_rgb(tmp_path / "train/0/1.jpg")
    assert image.size == (500, 375)
    size = (tmp_path / "train/0/1.jpg").stat().st_size
    assert 30_000 < size < 300_000  # a photograph's
    assert bench.customary()(image).shape == (3, 224, 224)


def test_the_soaps_are_told_apart(tmp_path, monkeypatch, capsys):
    """Stubs that sleep 10 and 30 ms a step stand for ours and the peer's."""

    def stub(seconds: float):
        step = types.MethodType(lambda self: bench.time.sleep(seconds), object())
        return lambda parameters, lr: types.SimpleNamespace(step=step)

    bench = load("soap_speed")
    monkeypatch.setattr(bench, "SOAP", stub(0.01))
    monkeypatch.setattr(bench, "PeerSOAP", stub(0.03))
    run_main(bench.main, ["--tens", 2, "--device", "cpu"], tmp_path, monkeypatch)
    numbers = [float(x) for x in re.findall(NUMBER, capsys.readouterr().out.split("ms a step")[1])]
    ours, peer, _, ratio, _, _ = numbers
    assert 10 <= ours < 25 and 30 <= peer < 60 and 1.5 < ratio < 3.5


def test_the_gpu_s_script_runs_all_and_tells_what_failed(tmp_path, monkeypatch, capsys):
    bench = load("gpu")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "good.py").write_text("import sys; print('fine', *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("import sys; print('so far'); sys.exit('error: no')")
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setattr(bench, "COMMANDS", ["good.py --out {out}/a", "bad.py", "slow.py"])
    words = "--device cpu --out o --patience 2".split()
    run_main(bench.main, words, tmp_path, monkeypatch)
    report = (tmp_path / "o/report.txt").read_text()
    said = capsys.readouterr().out
    assert said.startswith("$ python good.py") and said.endswith("report.txt\n")
    good, bad, slow = report.split("$ python ")[1:]
    assert f"good.py --out {tmp_path}/o/a --device cpu\nfine --out" in good and "ended" not in good
    assert "so far\nerror: no\nended with code 1" in bad
    assert "begun\nstopped after 2 s" in slow


def test_the_gpu_s_commands_are_commands():
    """Every script and flag of them exists."""
    bench = load("gpu")
    for command in bench.COMMANDS:
        script, *words = command.format(out="o").split()
        text = (ROOT / script).read_text()
        if script.startswith("train"):
            text += (ROOT / "cli.py").read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), command


def test_without_a_gpu_its_script_says_so(tmp_path, monkeypatch, capsys):
    bench = load("gpu")
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 0)
    done = run_here(bench.main, [], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "no CUDA devices found here")
