"""Each benchmark runs, at its smallest, from a folder that is not the repository's."""

import importlib.util
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main, script_environment
from torch import nn

from minskip import PRESETS

SMALLEST = {
    "benchmarks/init_speed.py": "--models nano --repeats 3",
    "benchmarks/soap_speed.py": "--model nano --tens 2 --device cpu",
    "benchmarks/step_speed.py": "--models nano --image-size 16 --batch-size 2 --steps 2",
    "experiments/sweep.py": "--table .",
}
DRIVER = """
import runpy, sys
path = list(sys.path)
for line in sys.stdin:
    sys.argv = line.split()
    sys.path[:] = [sys.argv[0].rpartition("/")[0], *path[1:]]  # as `python SCRIPT` has it
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(ROOT):
            del sys.modules[name]
    print("ran", sys.argv[0], flush=True)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        print("exit code", ended.code, flush=True)
"""
NUMBER = r"\d+\.\d+"
SPREAD = rf"({NUMBER}) \(({NUMBER}) \.\. ({NUMBER})\)"


def load(name: str):
    for package in ("timm", "pytorch_optimizer"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, str]:
    """Script -> what it prints when run elsewhere than in the repository; one process for all,
    which before each forgets what it imported from here: importing torch takes seconds."""
    for package in ("timm", "pytorch_optimizer"):
        pytest.importorskip(package)
    environment = {k: v for k, v in script_environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"ROOT = {str(ROOT) + '/'!r}\n" + DRIVER],
        input="".join(f"{ROOT / script} {words}\n" for script, words in SMALLEST.items()),
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
    )
    parts = done.stdout.split("ran ")[1:]
    assert len(parts) == len(SMALLEST), done.stdout
    return dict(zip(SMALLEST, parts))


@pytest.mark.parametrize("script", [x for x in SMALLEST if x.startswith("bench")])
def test_it_runs_from_anywhere_and_says_on_what(script, printed):
    out = printed[script]
    assert "exit code" not in out and f"torch {torch.__version__}" in out and "1 threads" in out
    assert "cpu" in out or "init" in script
    spreads = re.findall(SPREAD, out)
    assert len(spreads) == (2 if "step" in script else 1), out
    for middle, low, high in spreads:
        assert 0 < float(low) <= float(middle) <= float(high)
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_the_sweep_starts_from_anywhere(printed):
    out = printed["experiments/sweep.py"]
    assert "error: --table .: no sweep.json in it" in out and "exit code 2" in out


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
    times = bench.step_times(args, "any", torch.device("cpu"))
    assert [len(x) for x in times.values()] == [4, 4] and Slow.calls == 5
    assert all(0.03 <= x < 0.3 for x in times["timm"])
    assert min(times["residual"]) < 0.02
    assert not torch.equal(before, nets["residual"][1].weight)  # trained


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("step_speed", "--steps 1", "--steps must be at least 2"),
        ("step_speed", "--image-size 20", "--image-size a multiple of 16"),
        ("soap_speed", "--tens 1", "--tens must be at least 2"),
        ("init_speed", "--repeats 0", "must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, words, message, tmp_path, monkeypatch, capsys):
    done = run_here(load(name).main, words.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, message)


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
