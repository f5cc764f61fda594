"""SOAP against an independent implementation, and what a torch optimizer owes its users."""

import copy
import io

import pytest
import torch
from conftest import TWO_PROCESSES, run_script
from torch import nn

import soap
from soap import SOAP, as_matrix_shape, eigenbasis, refreshed_basis

# Rows and columns differ by at most one: then the null space of the first G^T G is at most one
# line, its eigenbasis is unique up to signs, and two implementations must agree to rounding.
SHAPES = [(7, 7), (7, 7), (6, 7), (8, 3, 3, 1), (5,), ()]


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in SHAPES
    ]


def gradients(step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p, grad in zip(params, gradients(step)):
            p.grad = grad.reshape(p.shape).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("alone", [0, 2**15])
def test_same_trajectory_as_an_independent_soap(alone, monkeypatch):
    """Sixty steps in float64, six refreshes of the eigenbasis; each matrix by itself or stacked."""
    monkeypatch.setattr(soap, "ALONE_ON_CPU", alone)
    theirs = pytest.importorskip("pytorch_optimizer").SOAP
    options = dict(lr=1e-2, weight_decay=0.1, precondition_frequency=10)
    ours_p, theirs_p = parameters(), parameters()
    theirs_p[3] = nn.Parameter(theirs_p[3].detach().reshape(8, 9))  # theirs without merging axes
    theirs_p[5] = nn.Parameter(theirs_p[5].detach().reshape(1))
    run(SOAP(ours_p, **options), ours_p, 60)
    run(theirs(theirs_p, **options), theirs_p, 60)
    for a, b, start in zip(ours_p, theirs_p, parameters()):
        assert torch.allclose(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-9)
        assert not torch.allclose(a, start, rtol=1e-2)


def failing(times: int):
    """torch.linalg.eigh, but for as many calls that fail as on a GPU; and what it is called on."""
    calls, real = [], torch.linalg.eigh

    def eigh(A):
        calls.append(A)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("ill-conditioned or too many repeated eigenvalues")
        return real(A)

    return eigh, calls


@pytest.mark.parametrize("times", [0, 1, 2])
def test_an_eigenbasis_is_found_where_the_float32_solver_fails(times, monkeypatch):
    """Of a factor of rank 3 in 40 dimensions, as those of the first steps are."""
    torch.manual_seed(0)
    X = torch.randn(2, 40, 3)
    eigh, calls = failing(times)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    if times:
        with pytest.warns(UserWarning, match="eigh failed in torch.float"):
            Q = eigenbasis(X @ X.mT)
    else:
        Q = eigenbasis(X @ X.mT)
    assert [A.dtype for A in calls] == [torch.float32, torch.float64, torch.float64][: times + 1]
    assert Q.dtype == torch.float32
    torch.testing.assert_close(Q.mT @ Q, torch.eye(40).expand(2, 40, 40), atol=1e-5, rtol=0)
    values = (Q.mT @ X @ X.mT @ Q).diagonal(dim1=-2, dim2=-1)
    expected = torch.linalg.svdvals(X).square()
    torch.testing.assert_close(values[:, :3], expected, atol=1e-4, rtol=1e-5)
    assert values[:, 3:].abs().max() < 1e-4


def test_a_factor_that_no_solver_takes_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", failing(3)[0])
    with pytest.raises(torch.linalg.LinAlgError, match="ill-cond"), pytest.warns(UserWarning):
        eigenbasis(torch.eye(3)[None])


def test_one_side_too_long_leaves_the_other():
    theirs = pytest.importorskip("pytorch_optimizer").SOAP
    a, b = (nn.Parameter(torch.ones(4, 30, dtype=torch.float64)) for _ in range(2))
    ours_o = SOAP([a], lr=1e-2, max_precondition_dim=10)
    theirs_o = theirs([b], lr=1e-2, max_precondition_dim=10, weight_decay=0.01)
    g = torch.Generator().manual_seed(0)
    for _ in range(25):
        a.grad = b.grad = torch.randn(4, 30, generator=g, dtype=torch.float64)
        ours_o.step()
        theirs_o.step()
    assert torch.allclose(a, b, rtol=1e-5)
    assert "factor_R" not in ours_o.state[a]


def test_first_step_only_builds_the_factors():
    params = parameters()
    run(SOAP(params, lr=1.0), params, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, parameters()))


def test_stacking_does_not_mix_parameters():
    """Two parameters of one shape, updated in one call, move as each does alone."""
    together, alone = parameters(), parameters()
    run(SOAP(together, lr=1e-2), together, 15)
    optimizers = [SOAP([p], lr=1e-2) for p in alone]
    for step in range(15):
        for p, grad, optimizer in zip(alone, gradients(step), optimizers):
            p.grad = grad
            optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(together, alone))


@pytest.mark.parametrize(
    "shape, matrix",
    [((3,), None), ((), None), ((1, 1, 8), None), ((8, 3, 4, 4), (8, 48)), ((1, 5, 8), (5, 8))],
)
def test_shapes_as_matrices(shape, matrix):
    assert as_matrix_shape(torch.Size(shape)) == matrix


def test_refreshed_basis_converges_to_the_eigenvectors():
    g = torch.Generator().manual_seed(0)
    true = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    factor = (true * torch.tensor([32.0, 16, 8, 4, 2, 1])) @ true.T
    basis = torch.linalg.qr(torch.randn(1, 6, 6, generator=g, dtype=torch.float64)).Q
    for _ in range(60):
        basis, _ = refreshed_basis(factor[None], basis)
    assert torch.allclose((basis[0].T @ true).abs(), torch.eye(6).double(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact_through_a_weights_only_file(dtype):
    straight = parameters(dtype)
    run(SOAP(straight, lr=1e-2), straight, 25)

    params = parameters(dtype)
    optimizer = SOAP(params, lr=1e-2)
    run(optimizer, params, 12)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = SOAP(resumed, lr=1e-2)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.state[resumed[0]]["factor_L"].dtype == torch.float32
    run(optimizer, resumed, 13, first=12)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_groups_closures_and_missing_gradients():
    a, b, unused = (nn.Parameter(torch.ones(3, 4)) for _ in range(3))
    optimizer = SOAP([dict(params=[a], lr=0.0), dict(params=[b, unused])], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (a * b).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[1] == losses[0]
    assert torch.equal(a, torch.ones(3, 4)) and torch.equal(unused, torch.ones(3, 4))
    copy.deepcopy(optimizer.state_dict())


def test_it_beats_adam_on_a_rotated_quadratic():
    """What the eigenbasis is for: ill-conditioned along directions that are not the axes."""
    g = torch.Generator().manual_seed(0)
    Q1, Q2 = (torch.linalg.qr(torch.randn(8, 8, generator=g)).Q for _ in range(2))
    H1, H2 = ((Q * torch.logspace(0, -2, 8)) @ Q.T for Q in (Q1, Q2))
    target = torch.randn(8, 8, generator=g)
    optimizers = dict(
        soap=lambda p, lr: SOAP(p, lr=lr, weight_decay=0),
        adam=lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.95, 0.95)),
    )
    best = {}
    for name, make in optimizers.items():
        for lr in (0.01, 0.03, 0.1):
            W = nn.Parameter(torch.zeros(8, 8))
            optimizer = make([W], lr)
            for _ in range(400):
                optimizer.zero_grad()
                loss = (H1 @ (W - target) @ H2).square().sum()
                loss.backward()
                optimizer.step()
            best[name] = min(best.get(name, loss.item()), loss.item())
    assert best["soap"] < 0.1 * best["adam"]


@pytest.mark.parametrize(
    "bad",
    [
        dict(lr=-1.0),
        dict(betas=(1.0, 0.9)),
        dict(shampoo_beta=1.0),
        dict(eps=-1.0),
        dict(precondition_frequency=0),
    ],
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        SOAP(parameters(), **bad)


def test_complex_parameters_are_refused():
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="real"):
        SOAP([p]).step()


# ---- shared out among processes ------------------------------------------------------------------

SHARED = """
import torch, torch.distributed as dist
import engine
from identity_init import NEEDS, hold_pairs
from minskip import ViT

def trained(steps):
    def optimizer_of(vit):
        optimizer = engine.build_optimizer(vit, "soap", 1e-2, 0.01)
        hold_pairs(optimizer, vit)
        return optimizer

    torch.manual_seed(0)
    vit = ViT(image_size=16, patch_size=8, dim=32, depth=2, num_heads=2, num_classes=5, **NEEDS)
    optimizer = optimizer_of(vit)
    for step in range(steps):
        if step == 12 and dist.is_initialized():  # resumed from a checkpoint
            states = [engine.whole_state(optimizer)]
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
    return list(vit.parameters()), optimizer

def main():
    alone, one = trained(25)
    dist.init_process_group("gloo")
    together, shared = trained(25)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    one, shared = engine.whole_state(one), engine.whole_state(shared)
    if engine.main_process():
        assert one["param_groups"] == shared["param_groups"]
        assert list(one["state"]) == list(shared["state"])
        for i, state in one["state"].items():
            for name, value in state.items():
                assert torch.equal(*map(torch.as_tensor, (value, shared["state"][i][name])))
        print("the same")

main()  # and free the optimizer before the processes part
dist.destroy_process_group()
"""


def test_two_processes_that_share_the_work_take_the_steps_of_one(tmp_path):
    """To the last bit, a refresh and a resume between; each keeps a part of the state."""
    (tmp_path / "shared.py").write_text(SHARED)
    done = run_script(tmp_path / "shared.py", cwd=tmp_path, launcher=TWO_PROCESSES)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr
