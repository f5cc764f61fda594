"""SOAP: Adam run in the eigenbasis of Shampoo's preconditioner. One class, one file.

Source: Vyas et al. 2025, "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321).
"""

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

LONGEST_SIDE = 10_000  # default of max_precondition_dim
# Larger matrices are updated one by one on a CPU: stacking them would copy their state, which is
# several times their size, and save nothing. A GPU is faster with fewer, larger calls.
ALONE_ON_CPU = 2**15


def kept_of(shape: torch.Size, longest: int = LONGEST_SIDE) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that SOAP keeps for a parameter of this shape: two moments,
    and for each side of a matrix no longer than `longest` Shampoo's factor and its eigenbasis.

    Axes of size 1 are dropped, so that a class token of shape (1, 1, d) stays a vector and gets no
    d x d factor. Axes after the first are flattened: a conv kernel becomes (out, rest).
    """
    sizes = [size for size in shape if size != 1]
    sides = (sizes[0], math.prod(sizes[1:])) if len(sizes) > 1 else ()
    kept = dict.fromkeys(["exp_avg", "exp_avg_sq"], sides or (shape.numel(),))
    for side, size in zip("LR", sides):
        if size <= longest:
            kept |= dict.fromkeys([f"factor_{side}", f"basis_{side}"], (size, size))
    return kept


def eigenbasis(factor: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices (batch, size, size), as columns, largest eigenvalue first.

    A factor of low rank has many equal eigenvalues, and float32 solvers of GPUs may fail on them.
    Then we take each matrix by itself, first in its own precision, then in float64, and last in
    float64 on the CPU with a small multiple of the identity added, which leaves the eigenvectors
    as they are.
    """
    here, ways = factor.device, [(factor.dtype, factor.device, 0.0)]
    if len(factor) == 1:
        ways += [(torch.float64, here, 0.0), (torch.float64, "cpu", 1e-9)]
    for dtype, device, added in ways:
        A = factor.to(device, dtype, copy=True)
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        diagonal += added * diagonal.mean(dim=-1, keepdim=True)
        try:
            return torch.linalg.eigh(A).eigenvectors.flip(-1).to(factor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # LinAlgError is one; a GPU's library may raise others
            if added:
                raise
    return torch.cat([eigenbasis(matrix) for matrix in factor.split(1)])


def refreshed_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration and a QR. It is enough, because the factor changes slowly.

    factor, basis: (batch, size, size). Returns the new basis, largest eigenvalue first, and the
    order (batch, size) in which it took the old columns.
    """
    product = factor @ basis
    eigenvalues = (basis * product).sum(dim=-2)  # Rayleigh quotients
    order = eigenvalues.argsort(dim=-1, descending=True)
    return torch.linalg.qr(product.take_along_dim(order[:, None, :], dim=-1)).Q, order


class SOAP(Optimizer):
    """SOAP; parameters of the same shape are stacked and updated in one batched call.

    For a gradient G, (rows, columns), and every matrix-shaped parameter:

        L <- b L + (1 - b) G G^T,   R <- b R + (1 - b) G^T G        Shampoo's factors
        L = Q_L diag Q_L^T,         R = Q_R diag Q_R^T              refreshed every few steps
        M <- b1 M + (1 - b1) Q_L^T G Q_R                            first moment, second moment,
        V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2                        both in the eigenbasis
        W <- W - lr Q_L [ M / (sqrt(V) + eps) ] Q_R^T               with Adam's bias correction

    Vectors get plain Adam, empty parameters nothing. Weight decay is decoupled (W <- W - lr wd W).
    State and products are float32, never TF32, even for bf16 parameters (float64 for float64).

    It differs from the authors' code in one respect: a conv kernel gets two factors, theirs by
    default one for each of its four axes. (They also project M at every step: the same update, by
    eight matrix products instead of six.) As there, the first step of a parameter does not move it:
    it only builds L, R and their exact eigenbases.

    Args:
        lr, eps, weight_decay: as above. lr is about as large as Adam's (1e-4 .. 3e-3).
        betas: decay b1 and b2 of the first and second moment.
        shampoo_beta: decay b of the factors; None takes betas[1].
        precondition_frequency: steps between two refreshes of the eigenbases [the authors': 10].
        stagger: refresh parameter i at every step s with s + i a multiple of that, so that no step
            bears all refreshes. [False, as the authors: all in one step]
        max_precondition_dim: a side longer than this gets no factor; the other side still does.

    Raises ValueError for options out of range, RuntimeError for sparse or complex gradients.
    """

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        stagger: bool = False,
        max_precondition_dim: int = LONGEST_SIDE,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
            raise ValueError("lr, eps and weight_decay must be >= 0")
        if not all(0 <= beta < 1 for beta in (*betas, shampoo_beta or 0)):
            raise ValueError("betas and shampoo_beta must lie in [0, 1)")
        if precondition_frequency < 1 or max_precondition_dim < 1:
            raise ValueError("precondition_frequency and max_precondition_dim must be >= 1")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if any."""
        with torch.enable_grad():
            loss = closure() if closure else None
        matmul = torch.backends.cuda.matmul
        # TF32 keeps 10 bits of each entry: too few for the factors' small eigenvalues.
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            for group in self.param_groups:
                alike = defaultdict(list)
                for number, p in enumerate(group["params"]):
                    if p.grad is None or p.numel() == 0:
                        continue
                    if p.grad.is_sparse or p.is_complex():
                        raise RuntimeError("SOAP takes dense real gradients only")
                    alone = p.device.type == "cpu" and p.numel() > ALONE_ON_CPU
                    kind = id(p) if alone else (p.shape, p.dtype, p.device)
                    # A parameter that had no gradient in some step has taken fewer steps.
                    alike[kind, self.state[p].get("step", 0)].append((p, number))
                for (_, step), numbered in alike.items():
                    params, numbers = zip(*numbered)
                    due = [step + number * group["stagger"] for number in numbers]
                    due = [i for i, x in enumerate(due) if x % group["precondition_frequency"] == 0]
                    self._step_alike(params, step, group, due if step > 0 else [])
        finally:
            matmul.fp32_precision = precision
        return loss

    def _step_alike(
        self, params: tuple[Tensor, ...], step: int, group: dict, due: list[int]
    ) -> None:
        """One update of parameters of one shape, stacked along a first axis.

        due: numbers of those among them whose eigenbases are refreshed in this step.
        """

        def stacked(tensors: list[Tensor]) -> Tensor:
            return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)  # [None]: a view

        def project(X: Tensor, S: dict[str, Tensor], back: bool = False) -> Tensor:
            """Into the eigenbasis, Q_L^T X Q_R, or back out of it, Q_L X Q_R^T."""
            if "L" in sides:
                X = (S["basis_L"] if back else S["basis_L"].mT) @ X
            if "R" in sides:
                X = X @ (S["basis_R"].mT if back else S["basis_R"])
            return X

        states = [self.state[p] for p in params]
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        kept = kept_of(params[0].shape, group["max_precondition_dim"])
        sides = [side for side in "LR" if f"basis_{side}" in kept]
        # (batch, rows, columns) for matrices, (batch, size) for vectors
        G = stacked([p.grad.to(dtype) for p in params]).reshape(-1, *kept["exp_avg"])
        if step == 0:
            S = {name: G.new_zeros(len(G), *shape) for name, shape in kept.items()}
        else:
            S = {name: stacked([state[name] for state in states]) for name in kept}

        # A gradient is never projected on a basis made from itself: the first step, which has no
        # other basis, moves nothing, and in every later step the factors are updated last.
        if step > 0:
            beta1, beta2 = group["betas"]
            projected = project(G, S)
            S["exp_avg"].lerp_(projected, 1 - beta1)
            S["exp_avg_sq"].lerp_(projected.square(), 1 - beta2)
            update = S["exp_avg"] / S["exp_avg_sq"].sqrt().add_(group["eps"])
            update = project(update, S, back=True)
            # Both moments started at zero `step` updates ago; the first step updated neither.
            lr = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            updates = [u.view_as(p).to(p.dtype) for u, p in zip(update, params)]
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        for side in sides:
            factor = S[f"factor_{side}"].lerp_(G @ G.mT if side == "L" else G.mT @ G, 1 - beta)
            if step == 0:
                S[f"basis_{side}"] = eigenbasis(factor)
        if due:
            D = S  # the stack of those that are due
            if len(due) < len(params):
                D = {name: stacked([x[i] for i in due]) for name, x in S.items()}
            # M is linear in G: rotate it out of the old basis and into the new one. V holds
            # squares, which cannot be rotated: each only follows its eigenvector.
            M = project(D["exp_avg"], D, back=True)
            for side in sides:
                D[f"basis_{side}"], order = refreshed_basis(D[f"factor_{side}"], D[f"basis_{side}"])
                order, axis = (order[:, :, None], 1) if side == "L" else (order[:, None, :], 2)
                D["exp_avg_sq"] = D["exp_avg_sq"].take_along_dim(order, axis)
            D["exp_avg"] = project(M, D)
            if D is not S:
                for name in kept:
                    torch._foreach_copy_([S[name][i] for i in due], list(D[name]))

        for i, state in enumerate(states):
            state["step"] = step + 1
            if step == 0:  # cloned, because a view would keep the whole stack in memory
                state |= {name: S[name][i].clone() for name in kept}
        for name in kept:
            changed = due or not name.startswith("basis")
            if changed and S[name].data_ptr() != states[0][name].data_ptr():  # not in place
                torch._foreach_copy_([state[name] for state in states], list(S[name]))

    def load_state_dict(self, state_dict: dict) -> None:
        """As for every optimizer, except that float32 state of bf16 parameters stays float32: the
        base class casts it to the parameter's dtype, and a resumed run would not be exact."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params):
            for name, x in state_dict["state"].get(i, {}).items():
                if isinstance(x, Tensor):
                    self.state[p][name] = x.to(p.device, copy=True)
