"""Each benchmark runs, at its smallest, from a folder that is not the repository's."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_script
from torch import nn

from minskip import PRESETS

SMALLEST = {
    "init_speed": "--models nano --repeats 1",
    "soap_speed": "--model nano --tens 2 --device cpu",
    "step_speed": "--models nano --image-size 16 --batch-size 2 --steps 2 --warmup 1 --device cpu",
}
NUMBER = r"\d+\.\d+"
SPREAD = rf"({NUMBER}) \(({NUMBER}) \.\. ({NUMBER})\)"


def load(name: str):
    pytest.importorskip("timm")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_from_anywhere_and_says_on_what(name, tmp_path):
    pytest.importorskip(dict(soap_speed="pytorch_optimizer", step_speed="timm").get(name, "torch"))
    done = run_script(f"benchmarks/{name}.py", *SMALLEST[name].split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout and "1 threads" in done.stdout
    assert "cpu" in done.stdout or name == "init_speed"
    spreads = re.findall(SPREAD, done.stdout)
    assert len(spreads) == (2 if name == "step_speed" else 1), done.stdout
    for middle, low, high in spreads:
        assert 0 < float(low) <= float(middle) <= float(high)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_plain_init_has_the_paper_s_weights():
    """The peer of the init's benchmark: W_Q W_K^T of each head is of rank d_h, and the best."""
    bench = load("init_speed")
    torch.manual_seed(0)
    weights = bench.an_svd_a_head(12, 3, alpha=0.0, beta=2.0)
    assert [tuple(w.shape) for w in weights] == [(12, 4)] * 6 + [(12, 12)] * 2 + [
        (12, 48),
        (48, 12),
    ]
    for W_Q, W_K in zip(weights[:6:2], weights[1:6:2]):
        singular = torch.linalg.svdvals(W_Q @ W_K.T)
        assert torch.allclose(singular, torch.tensor([2.0] * 4 + [0.0] * 8), atol=1e-5)
    torch.manual_seed(0)
    weights = bench.an_svd_a_head(64, 1, alpha=2.0, beta=0.0)
    spread = (weights[0] @ weights[1].T).std().item() * 64**0.5
    assert spread == pytest.approx(2.0, rel=0.05)  # alpha Z, Z of variance 1/d


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
    times = bench.step_times(args, "any", torch.device("cpu"))
    assert [len(x) for x in times.values()] == [4, 4] and Slow.calls == 5
    assert all(0.03 <= x < 0.3 for x in times["timm"])
    assert min(times["residual"]) < 0.02
    assert not torch.equal(before, nets["residual"][1].weight)  # trained


def test_what_cannot_be_measured_is_refused(tmp_path):
    done = run_script("benchmarks/step_speed.py", "--steps", 1, cwd=tmp_path)
    assert_fails_in_one_line(done, "--steps must be at least 2")
