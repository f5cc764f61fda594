"""torch.compile: each network is one graph, without breaks, and trains as it does without."""

import functools
from collections.abc import Iterator

import pytest
import torch
from conftest import SMALL, run_main
from test_processes import assert_both_ended, run_two
from torch._dynamo.backends.debugging import aot_eager

import train_cls
import train_ssl

RUN = [*SMALL, "--epochs", 1, "--warmup-epochs", 0.5]


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list]:
    """The graphs that torch.compile makes. It refuses a network that needs several, and leaves out
    its last step, machine code."""
    made, real = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend, fullgraph=True))
    yield made
    torch.compiler.reset()


def trained(script, words, out, monkeypatch) -> dict:
    monkeypatch.setattr(script, "SHAPES_TRAIN", 25)  # two steps
    monkeypatch.setattr(script, "SHAPES_VAL", 13)
    run_main(script.main, [*RUN, *words, "--out", out], out.parent, monkeypatch)
    return torch.load(out / "last.pt")["model"]


TWICE = "--checkpoint-activations"


@pytest.mark.parametrize(
    "script, words, number",
    [
        (train_cls, "--drop-path 0.3", 1),
        (train_cls, f"--skipless --init paper --depth 1 --grad-accum 2 {TWICE}", 1),
        (train_cls, f"--skipless --init identity --depth 1 {TWICE}", 1),
        (train_cls, "--skipless --attention value-skipinit --norm rmsnorm --depth 1", 1),
        (train_cls, "--skipless --attention shaped --norm dyt --activation tat --depth 1", 1),
        (train_cls, f"--skipless --attention u-spa --norm derf {TWICE}", 1),
        (train_cls, "--skipless --attention e-spa --norm none --activation tat", 1),
        # two for the colours of large and small crops, one for the student, one for the teacher, in
        # which nothing is saved
        (train_ssl, f"--skipless --init identity --depth 1 {TWICE}", 4),
        # and the student's again, once the grid of the small crops is known
        (train_ssl, f"--skipless --attention e-spa --depth 1 --image-size 32 {TWICE}", 5),
    ],
)
def test_a_compiled_run(script, words, number, graphs, float64_sgd, tmp_path, monkeypatch):
    eager = words.replace(TWICE, "").split()
    expected = trained(script, eager, tmp_path / "eager", monkeypatch)
    assert not graphs
    compiled = trained(script, [*words.split(), "--compile"], tmp_path / "compiled", monkeypatch)
    for name, weight in expected.items():
        torch.testing.assert_close(compiled[name], weight)
    assert len(graphs) == number


COMPILED = """
import torch
import train_cls
from torch._dynamo.backends.debugging import aot_eager
train_cls.SHAPES_TRAIN = train_cls.SHAPES_VAL = 13
made, real = [], torch.compile

def backend(graph, inputs):
    made.append(graph)
    return aot_eager(graph, inputs)

torch.compile = lambda network: real(network, backend=backend, fullgraph=True)
train_cls.main()
print(f"graphs {len(made)}")
"""


def test_two_compiled_processes_compute_the_gradient_of_one(tmp_path, monkeypatch):
    """AdamW's first moment after one step is a tenth of it. torch cuts the graph in two, because it
    sends the gradients of one part while it computes the other's."""
    words = [*RUN, "--model", "tiny", "--depth", 1, "--skipless", "--opt", "adamw"]
    words += ["--warmup-epochs", 0, "--clip-grad", 0, "--checkpoint-activations", "--out"]
    monkeypatch.setattr(train_cls, "SHAPES_TRAIN", 13)
    monkeypatch.setattr(train_cls, "SHAPES_VAL", 13)
    run_main(train_cls.main, [*words, "one"], tmp_path, monkeypatch)
    two = run_two(COMPILED, [*words, "two", "--compile"], tmp_path)
    assert_both_ended(two)
    assert all(x.stdout.endswith("graphs 2\n") for x in two), two[0].stdout
    states = [torch.load(tmp_path / x / "last.pt")["optimizer"]["state"] for x in ("one", "two")]
    for i, state in states[0].items():
        g, h = state["exp_avg"], states[1][i]["exp_avg"]
        torch.testing.assert_close(h, g, rtol=1e-3, atol=1e-6 * g.abs().max().item() + 1e-9)
