"""SOAP: Adam run in the eigenbasis of Shampoo's preconditioner. One class, one file.

Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025
(arXiv 2409.11321).
"""

import math
import warnings
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

LONGEST_SIDE = 10_000  # that is preconditioned, unless another is asked for
# Entries of a matrix that a CPU updates by itself: to stack it with others would cost a copy of its
# state, which is several times its size, and win nothing. A GPU gains by fewer, larger calls.
ALONE_ON_CPU = 2**15


def as_matrix_shape(shape: torch.Size) -> tuple[int, int] | None:
    """(rows, columns) a parameter is preconditioned as; None for vectors and scalars.

    Axes of size 1 go first, so that a class token of shape (1, 1, d) stays a vector and does not
    get a d x d factor; what is left beyond two axes is flattened, a conv kernel to (out, rest).
    """
    sizes = [size for size in shape if size != 1]
    if len(sizes) < 2:
        return None
    return sizes[0], math.prod(sizes[1:])


def kept_of(shape: torch.Size, longest: int = LONGEST_SIDE) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what SOAP keeps of a parameter: moments, and of each side that is not longer
    than `longest` Shampoo's factor and its eigenbasis."""
    sides = as_matrix_shape(shape)
    kept = dict.fromkeys(["exp_avg", "exp_avg_sq"], sides or (shape.numel(),))
    for side, size in zip("LR", sides or ()):
        if size <= longest:
            kept |= dict.fromkeys([f"factor_{side}", f"basis_{side}"], (size, size))
    return kept


def eigenbasis(factor: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices, (batch, size, size), columns by falling eigenvalue.

    A factor of low rank has many equal eigenvalues, on which float32 solvers of GPUs may fail: then
    in float64, then on the CPU with a little added to the diagonal, which turns no eigenvector.
    """
    here, last = factor.device, None
    ways = [(factor.dtype, here, 0.0), (torch.float64, here, 0.0), (torch.float64, "cpu", 1e-9)]
    for dtype, device, added in ways:
        A = factor.to(device, dtype)
        if added:
            mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            A = A + added * mean * torch.eye(A.shape[-1], dtype=dtype, device=device)
        try:
            return torch.linalg.eigh(A).eigenvectors.flip(-1).to(factor)
        except torch.linalg.LinAlgError as error:
            last = error
            told = f"SOAP: eigh failed in {dtype} on {device}; trying another way"
            warnings.warn(told, stacklevel=1)
    raise last


def refreshed_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration and a QR: the eigenbasis follows its slowly moving factor.

    factor, basis: (batch, size, size). Returns the new basis, columns by falling eigenvalue, and
    the order, (batch, size), in which the old columns were taken: Adam's second moment is kept
    per eigenvector and must be permuted alike.
    """
    product = factor @ basis
    eigenvalues = (basis * product).sum(dim=-2)  # Rayleigh quotients
    order = eigenvalues.argsort(dim=-1, descending=True)
    product = product.gather(-1, order.unsqueeze(-2).expand_as(product))
    return torch.linalg.qr(product).Q, order


class SOAP(Optimizer):
    """SOAP as published, with parameters of one shape stacked and updated in one batched call.

    For a gradient G, (rows, columns), and every matrix-shaped parameter:

        L <- b L + (1 - b) G G^T,   R <- b R + (1 - b) G^T G        Shampoo's factors
        L = Q_L diag Q_L^T,         R = Q_R diag Q_R^T              refreshed every few steps
        M <- b1 M + (1 - b1) Q_L^T G Q_R                            first moment, second moment,
        V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2                        both in the eigenbasis
        W <- W - lr Q_L [ M / (sqrt(V) + eps) ] Q_R^T               with Adam's bias correction

    A refresh takes M out of the old basis and into the new. (One can keep M out of it and project
    it at every step: the same update, by eight products instead of six.) Vectors get plain Adam.
    Weight decay is decoupled (W <- W - lr wd W).

    **The first step** of a parameter only builds L, R and their eigenbases from its gradient
    (exact eigendecomposition) and leaves the parameter alone, as the published code does.

    Moments, factors and bases are float32 whatever the parameter's dtype (float64 for float64),
    and the products are taken in full float32, never TF32.

    Args:
        lr: step size; Adam's range (1e-4 .. 3e-3).
        betas: decay of the first and second moment.
        shampoo_beta: decay b of the factors; None takes betas[1].
        eps: added to sqrt(V).
        weight_decay: decoupled weight decay.
        precondition_frequency: steps between two refreshes of the eigenbases. More often costs
            time and follows the gradients better; published: 10.
        max_precondition_dim: a side longer than this is not preconditioned (the other still is).

    Raises:
        ValueError: an option out of range.
        RuntimeError: a sparse or complex gradient.
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
        max_precondition_dim: int = LONGEST_SIDE,
    ):
        if not lr >= 0:
            raise ValueError(f"lr must be >= 0, not {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), not {betas}")
        if shampoo_beta is not None and not 0 <= shampoo_beta < 1:
            raise ValueError(f"shampoo_beta must lie in [0, 1), not {shampoo_beta}")
        if not (eps >= 0 and weight_decay >= 0):
            raise ValueError(f"eps and weight_decay must be >= 0, not {eps} and {weight_decay}")
        if precondition_frequency < 1 or max_precondition_dim < 1:
            raise ValueError("precondition_frequency and max_precondition_dim must be >= 1")
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                shampoo_beta=shampoo_beta,
                eps=eps,
                weight_decay=weight_decay,
                precondition_frequency=precondition_frequency,
                max_precondition_dim=max_precondition_dim,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matmul = torch.backends.cuda.matmul
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"  # TF32 spoils the factors
        try:
            for group in self.param_groups:
                alike = defaultdict(list)
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    if p.grad.is_sparse or p.is_complex():
                        raise RuntimeError("SOAP takes dense real gradients only")
                    alone = p.device.type == "cpu" and p.numel() > ALONE_ON_CPU
                    kind = id(p) if alone else (p.shape, p.dtype, p.device)
                    alike[kind, self.state[p].get("step", 0)].append(p)
                for (_, step), params in alike.items():
                    self._step_alike(params, step, group)
        finally:
            matmul.fp32_precision = precision
        return loss

    def _step_alike(self, params: list[Tensor], step: int, group: dict) -> None:
        """One update of parameters of one shape, stacked along a first axis."""

        def stacked(tensors: list[Tensor]) -> Tensor:
            return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)  # [None]: a view

        states = [self.state[p] for p in params]
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        kept = kept_of(params[0].shape, group["max_precondition_dim"])
        sides = [side for side in "LR" if f"basis_{side}" in kept]
        # (batch, rows, columns) for matrices, (batch, size) for vectors
        G = stacked([p.grad.to(dtype) for p in params]).reshape(-1, *kept["exp_avg"])
        if step == 0:
            S = {name: G.new_zeros(len(G), *shape) for name, shape in kept.items()}
        else:
            S = {name: stacked([state[name] for state in states]) for name in kept}

        def project(X: Tensor, back: bool = False) -> Tensor:
            """Into the eigenbasis, Q_L^T X Q_R, or back out of it, Q_L X Q_R^T."""
            if "L" in sides:
                X = (S["basis_L"] if back else S["basis_L"].mT) @ X
            if "R" in sides:
                X = X @ (S["basis_R"].mT if back else S["basis_R"])
            return X

        if step > 0:
            beta1, beta2 = group["betas"]
            projected = project(G)
            S["exp_avg"].lerp_(projected, 1 - beta1)
            S["exp_avg_sq"].lerp_(projected.square(), 1 - beta2)
            update = S["exp_avg"] / S["exp_avg_sq"].sqrt().add_(group["eps"])
            update = project(update, back=True)
            lr = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            updates = [u.view_as(p).to(p.dtype) for u, p in zip(update, params)]
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        refreshed = step % group["precondition_frequency"] == 0
        if refreshed and step > 0:
            S["exp_avg"] = project(S["exp_avg"], back=True)
        for side in sides:
            gram = G @ G.mT if side == "L" else G.mT @ G
            factor = S[f"factor_{side}"].lerp_(gram, 1 - beta)
            if step == 0:
                S[f"basis_{side}"] = eigenbasis(factor)
            elif refreshed:
                S[f"basis_{side}"], order = refreshed_basis(factor, S[f"basis_{side}"])
                axis = -2 if side == "L" else -1
                order = order.unsqueeze(-1 if side == "L" else -2).expand_as(G)
                S["exp_avg_sq"] = S["exp_avg_sq"].gather(axis, order)

        if refreshed and step > 0:
            S["exp_avg"] = project(S["exp_avg"])

        for state in states:
            state["step"] = step + 1
        for name in kept:
            if name.startswith("basis") and not refreshed:
                continue
            values = S[name].unbind()
            if step == 0:
                for state, value in zip(states, values):
                    state[name] = value.clone()  # its own memory, not a view of the whole stack
            elif values[0].data_ptr() != states[0][name].data_ptr():  # else changed in place
                torch._foreach_copy_([state[name] for state in states], list(values))

    def load_state_dict(self, state_dict: dict) -> None:
        """As every optimizer's, except that float32 state of bf16 parameters stays float32.

        The base class casts state to the parameter's dtype, which would spoil an exact resume.
        Raises ValueError where a parameter's is not of its shape or type.
        """
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        groups = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in zip(saved_ids, groups):
            state = state_dict["state"].get(i, {})
            found = {name: x for name, x in state.items() if isinstance(x, Tensor)}
            expected = kept_of(p.shape, group["max_precondition_dim"]) if state else {}
            kept_in = torch.promote_types(p.dtype, torch.float32)
            alike = {name: tuple(x.shape) for name, x in found.items()} == expected
            alike &= all(x.dtype == kept_in for x in found.values())
            if not alike or type(state.get("step", 0)) is not int:
                raise ValueError(
                    f"the state of parameter {i} is not that of {tuple(p.shape)}, {kept_in}"
                )
            self.state[p] |= {name: x.to(p.device, copy=True) for name, x in found.items()}
