"""Mimetic init: a residual network's attention starts as trained networks have it.

In trained ViTs W_Q W_K^T has a positive diagonal, so a token attends to tokens like itself, and
W_V W_O a negative one. Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", ICML
2023 (arXiv 2305.09828), start there:

    W_Q W_K^T = alpha_1 Z + beta_1 I      in each head, as far as rank d_h allows
    W_V W_O   = alpha_2 Z - beta_2 I      for all heads together

with Z_ij ~ N(0, 1/d), alpha_1 = beta_1 = 0.7 and alpha_2 = beta_2 = 0.4. The first line is the
construction of "Cutting the Skip" with other constants. It is here as a rival: how much of what an
init for skipless networks gains does a better init give to a network with skips? We leave out their
sinusoidal position embedding, so that all arms of a comparison have the same.
"""

import torch
from torch import nn

from minskip import blocks_of, query_key_projections, set_linear_

ALPHA_1 = BETA_1 = 0.7
ALPHA_2 = BETA_2 = 0.4


def negative_value_output_projections(
    dim: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_V = U sqrt(S) and W_O = sqrt(S) V^T, each (dim, dim); alpha_2 Z - beta_2 I = U S V^T."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    Z = torch.randn(dim, dim, generator=generator, dtype=dtype) / dim**0.5
    U, S, V_T = torch.linalg.svd(ALPHA_2 * Z - BETA_2 * torch.eye(dim, dtype=dtype))
    return U * S.sqrt(), S.sqrt()[:, None] * V_T


@torch.no_grad()
def mimetic_init_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Re-initialise the attention of all blocks of a `ViT`, in place; its MLPs keep their weights.

    generator: source of the random numbers, on the CPU [torch's global one].
    """
    for block in blocks_of(model):
        attention, d = block.attention, model.config["dim"]
        W_Q, W_K = query_key_projections(d, attention.num_heads, ALPHA_1, BETA_1, generator)
        W_V, W_O = negative_value_output_projections(d, generator)
        set_linear_(attention.W_Q, W_Q)
        set_linear_(attention.W_K, W_K)
        set_linear_(attention.W_V, W_V)
        set_linear_(attention.W_O, W_O)
    return model
