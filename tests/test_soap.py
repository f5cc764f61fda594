"""SOAP against an independent implementation, and what users expect of a torch optimizer."""

import io

import pytest
import torch
from conftest import TWO_PROCESSES, run_script
from torch import nn

import soap
from soap import SOAP, eigenbasis, kept_of

# Rows and columns differ by at most one: then the null space of the first G^T G is at most one
# line, its eigenbasis is unique up to signs, and two implementations must agree to rounding.
SHAPES = [(7, 7), (7, 7), (6, 7), (8, 3, 3, 1), (5,), ()]

# All different, so that no beta can stand in for another.
ODD = dict(lr=1e-2, betas=(0.91, 0.87), weight_decay=0.1, eps=1e-3, precondition_frequency=7)


def drawn(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(x.to(dtype)) for x in drawn(0)]


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p, grad in zip(params, drawn(1000 + step)):
            p.grad = grad.reshape(p.shape).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    "alone, options",
    [(0, {}), (2**15, dict(shampoo_beta=0.6)), (2**15, dict(max_precondition_dim=6))],
)
def test_same_trajectory_as_an_independent_soap(alone, options, monkeypatch):
    """Sixty steps in float64, eight refreshes of the eigenbasis; matrices one by one or stacked. A
    side that is too long leaves the other its factor."""
    monkeypatch.setattr(soap, "ALONE_ON_CPU", alone)
    theirs = pytest.importorskip("pytorch_optimizer").SOAP
    ours_p, theirs_p = parameters(), parameters()
    theirs_p[3] = nn.Parameter(theirs_p[3].detach().reshape(8, 9))  # theirs without merging axes
    theirs_p[5] = nn.Parameter(theirs_p[5].detach().reshape(1))
    run(SOAP(ours_p, **ODD | options), ours_p, 60)
    run(theirs(theirs_p, **ODD | options), theirs_p, 60)
    for a, b, start in zip(ours_p, theirs_p, parameters()):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-9)
        assert not torch.allclose(a, start, rtol=1e-2)


def test_each_beta_has_its_own_place():
    """By hand: a vector takes Adam's steps, of which the first moves nothing; Shampoo's factors are
    averaged by b2, unless they have a beta of their own."""
    gradients = [torch.tensor(x, dtype=torch.float64) for x in (7.0, 2.0, 6.0)]
    for shampoo_beta, b in ((None, 0.87), (0.6, 0.6)):
        vector, matrix = (nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in (3, (2, 2)))
        options = dict(lr=0.1, betas=(0.91, 0.87), eps=1e-12, weight_decay=0)
        optimizer = SOAP([vector, matrix], **options, shampoo_beta=shampoo_beta)
        for g in gradients:
            vector.grad, matrix.grad = g.expand(3), g * torch.eye(2, dtype=torch.float64)
            optimizer.step()
        m, v = 0.09 * (0.91 * 2 + 6), 0.13 * (0.87 * 2**2 + 6**2)
        second = (m / (1 - 0.91**2)) / (v / (1 - 0.87**2)) ** 0.5
        assert vector.tolist() == pytest.approx([-0.1 * (1 + second)] * 3)
        factor = (1 - b) * (b**2 * 7**2 + b * 2**2 + 6**2) * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[matrix]["factor_L"], factor)


def test_each_parameter_moves_as_it_would_alone():
    """Stacked with others of its shape; the first one has no gradient in the first three steps."""
    together, alone = parameters(), parameters()
    optimizer, optimizers = SOAP(together, **ODD), [SOAP([p], **ODD) for p in alone]
    for step in range(15):
        for i, (p, q, grad) in enumerate(zip(together, alone, drawn(1000 + step))):
            p.grad = q.grad = grad if step >= 3 or i > 0 else None
            optimizers[i].step()
        optimizer.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)
    assert [optimizer.state[p]["step"] for p in together[:2]] == [12, 15]


def test_shapes_as_matrices():
    """A class token is a vector, a kernel (out, rest); a side of more than 40 gets no factor."""
    expected = {(3,): "", (): "", (1, 1, 8): "", (8, 3, 4, 4): "L", (1, 5, 8): "LR", (50, 8): "R"}
    for shape, sides in expected.items():
        kept = kept_of(torch.Size(shape), longest=40)
        assert "".join(name[-1] for name in kept if name.startswith("basis")) == sides
    assert kept["basis_R"] == (8, 8) and kept_of(torch.Size((8, 3, 4, 4)))["exp_avg"] == (8, 48)


@pytest.mark.parametrize("failures", [0, 1, 2, 3, 4])
def test_an_eigenbasis_is_found_where_the_float32_solver_fails(failures, monkeypatch):
    """For factors of rank 3 in 40 dimensions, like those of the first steps; the solver fails on
    the second one, and the first keeps its own precision."""
    calls, real = [], torch.linalg.eigh
    torch.manual_seed(0)
    X = torch.randn(2, 40, 3)
    factors = X @ X.mT

    def eigh(A):
        bad = torch.allclose(A[-1].float(), factors[1], rtol=1e-3)
        calls.append((len(A), bad, A.dtype))
        if sum(bad for _, bad, _ in calls) <= failures and bad:
            raise RuntimeError("cusolver error")
        return real(A)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    if failures == 4:
        with pytest.raises(RuntimeError, match="cusolver"):
            eigenbasis(factors)
        return
    Q = eigenbasis(factors)
    alone = [(1, False, torch.float32), (1, True, torch.float32)]
    alone += [(1, True, torch.float64)] * 2
    assert calls == [(2, True, torch.float32), *alone][: 1 + failures + (failures > 0)]
    assert Q.dtype == torch.float32
    torch.testing.assert_close(Q.mT @ Q, torch.eye(40).expand(2, 40, 40), atol=1e-5, rtol=0)
    values = (Q.mT @ X @ X.mT @ Q).diagonal(dim1=-2, dim2=-1)
    expected = nn.functional.pad(torch.linalg.svdvals(X).square(), (0, 37))
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-5)


def test_memory_that_runs_out_is_no_failure_of_the_solver(monkeypatch):
    def eigh(A):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(torch.OutOfMemoryError):
        eigenbasis(torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("alone", [0, 2**15])
def test_staggered_refreshes_take_turns(alone, monkeypatch):
    """Parameter i at every step s with s + i a multiple of 7, and then as the authors' do: it moves
    as by itself in a SOAP whose counter is i steps ahead. Stacked, or one by one."""
    monkeypatch.setattr(soap, "ALONE_ON_CPU", alone)
    sizes, real = [], soap.refreshed_basis

    def counted(factor, basis):
        sizes.append(len(factor))
        return real(factor, basis)

    monkeypatch.setattr(soap, "refreshed_basis", counted)
    params = [nn.Parameter(torch.randn(6, 6, dtype=torch.float64)) for _ in range(8)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    odd = ODD | dict(stagger=True)
    together, each = SOAP(params, **odd), [SOAP([twin], **ODD) for twin in twins]
    found = []
    for step in range(16):
        for p, twin in zip(params, twins):
            p.grad = torch.randn(6, 6, dtype=torch.float64)
            twin.grad = p.grad.clone()
        sizes.clear()
        together.step()
        found.append(sum(sizes) // 2)  # of both sides
        for number, optimizer in enumerate(each):  # each refreshes when the step says so
            due = step > 0 and (step + number) % 7 == 0
            optimizer.param_groups[0]["precondition_frequency"] = step if due else 10**9
            optimizer.step()
    expected = [sum((s + i) % 7 == 0 for i in range(8)) if s else 0 for s in range(16)]
    assert found == expected and max(found) == 2
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-9, atol=1e-12)


def test_products_are_in_full_float32_and_the_user_s_setting_comes_back(monkeypatch):
    matmul, seen, params = torch.backends.cuda.matmul, [], parameters()
    monkeypatch.setattr(soap, "eigenbasis", lambda A: seen.append(matmul.fp32_precision) or A)
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    run(SOAP(params), params, 1)
    after, matmul.fp32_precision = matmul.fp32_precision, before
    assert set(seen) == {"ieee"} and after == "tf32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact_and_leaves_what_it_loads_alone(dtype):
    """Through a file. The base class would cast the state of bf16 parameters to bf16."""
    straight, params = parameters(dtype), parameters(dtype)
    run(SOAP(straight, **ODD), straight, 25)
    optimizer = SOAP(params, **ODD)
    run(optimizer, params, 12)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for _ in range(2):  # twice from one dict: the first run must not have changed it
        resumed = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = SOAP(resumed, lr=1.0)  # options are loaded too
        optimizer.load_state_dict(loaded)
        for name, value in optimizer.state[resumed[0]].items():
            assert name == "step" or value.dtype == torch.float32, name
        run(optimizer, resumed, 13, first=12)
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_groups_closures_and_parameters_without_a_gradient_or_entries():
    a, b, unused = (nn.Parameter(torch.ones(3, 4)) for _ in range(3))
    empty = nn.Parameter(torch.ones(0, 4))
    optimizer = SOAP([dict(params=[a], lr=0.0), dict(params=[b, unused, empty])], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (a * b).square().sum() + empty.sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[1] == losses[0]  # the first step only builds the factors
    assert torch.equal(a, torch.ones(3, 4)) and torch.equal(unused, torch.ones(3, 4))


def test_options_out_of_range_and_complex_gradients_are_refused():
    for bad in (
        dict(lr=-1.0), dict(betas=(1.0, 0.9)), dict(shampoo_beta=1.0), dict(eps=-1.0),
        dict(weight_decay=-1.0), dict(precondition_frequency=0), dict(max_precondition_dim=0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            SOAP(parameters(), **bad)
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="real"):
        SOAP([p]).step()


SHARED = """
import torch, torch.distributed as dist
from beyond.identity_init import NEEDS, hold_pairs
from minskip import ViT
from soap import SOAP
from support.processes import main_process, sharing_state, whole_state

def only_shapes(objects, to):
    assert not any(torch.is_tensor(x) and x.device.type == "cpu"
                   for state in objects[0].values() for x in state.values())
    send_object_list(objects, to)

send_object_list, dist.send_object_list = dist.send_object_list, only_shapes

def trained(steps):
    def optimizer_of(vit):
        decayed = [p for p in vit.parameters() if p.ndim > 1]
        plain = dict(params=[p for p in vit.parameters() if p.ndim < 2], weight_decay=0.0)
        optimizer = sharing_state([dict(params=decayed), plain], SOAP, lr=1e-2)
        hold_pairs(optimizer, vit)
        return optimizer

    torch.manual_seed(0)
    vit = ViT(image_size=16, patch_size=8, dim=32, depth=2, num_heads=2, num_classes=5, **NEEDS)
    optimizer = optimizer_of(vit)
    for step in range(steps):
        if step == 12 and dist.is_initialized():  # resumed from a checkpoint
            states = [whole_state(optimizer)]
            dist.broadcast_object_list(states)
            held = len(optimizer.optim.state)
            optimizer = optimizer_of(vit)
            optimizer.load_state_dict(states[0])
            assert 0 < held < len(list(vit.parameters())) and len(optimizer.optim.state) == held
            assert not optimizer.state  # no second copy
        generator = torch.Generator().manual_seed(step)
        for p in vit.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return list(vit.parameters()), whole_state(optimizer)

def main():
    alone, one = trained(25)
    dist.init_process_group("gloo")
    together, shared = trained(25)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    if main_process():
        assert one["param_groups"] == shared["param_groups"]
        assert list(one["state"]) == list(shared["state"])
        for i, state in one["state"].items():
            for name, value in state.items():
                ours, theirs = map(torch.as_tensor, (value, shared["state"][i][name]))
                assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        print("the same")

main()  # and free the optimizer before the processes part
dist.destroy_process_group()
"""


def test_two_processes_that_share_the_work_take_the_steps_of_one(tmp_path):
    """To the last bit, with a refresh and a resume in between. Each keeps a part of the state; its
    tensors are sent as they are, not pickled."""
    (tmp_path / "shared.py").write_text(SHARED)
    done = run_script(tmp_path / "shared.py", cwd=tmp_path, launcher=TWO_PROCESSES)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr
