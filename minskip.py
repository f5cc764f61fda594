"""Vision Transformers without skip connections: the model and the init, one file.

Read it top to bottom:

1. `ViT`, the standard pre-LN Vision Transformer. `Block.forward` is where the skip is, or is not:
   `residual=True` is the usual network, `residual=False` the skipless one.
2. Three functions that draw well-conditioned weights. Copy them into any project.
3. `conditioned_init_`, which puts those weights into a `ViT`.

Why a skipless network needs them: let K be the derivative of a sub-block's output by its input. A
residual network multiplies factors (K + I), a skipless one bare K. Softmax attention makes K nearly
rank-deficient, "+ I" lifts its small singular values; without the skip the weights have to.

Source: Ji et al., "Cutting the Skip: Training Residual-Free Transformers", ICLR 2026
(arXiv 2510.00345).

Notation, as in the paper: tokens are rows, a projection is y = x W, so `nn.Linear.weight` is W^T.
d = dim, h = num_heads, d_h = d / h, n = tokens, L = depth.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Widths, depths and heads as published (Dosovitskiy et al. 2021; Touvron et al. 2021 for tiny and
# small). nano is ours: narrow enough for two CPU cores, twelve blocks deep so that depth bites.
PRESETS = {
    "nano": dict(dim=64, depth=12, num_heads=8),
    "tiny": dict(dim=192, depth=12, num_heads=3),
    "small": dict(dim=384, depth=12, num_heads=6),
    "base": dict(dim=768, depth=12, num_heads=12),
    "large": dict(dim=1024, depth=24, num_heads=16),
}


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with its four projections apart, so they read like the equations.

    diagonal_bias: a learnable number a head, added to each token's logit with itself
    (`identity_init.py` uses it). Shapes: (batch, token, dim) -> (batch, token, dim).
    """

    def __init__(self, dim: int, num_heads: int, diagonal_bias: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim: dim {dim}, num_heads {num_heads}")
        self.num_heads = num_heads
        self.W_Q = nn.Linear(dim, dim)
        self.W_K = nn.Linear(dim, dim)
        self.W_V = nn.Linear(dim, dim)
        self.W_O = nn.Linear(dim, dim)
        self.diagonal_bias = nn.Parameter(torch.zeros(num_heads)) if diagonal_bias else None

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """(batch, token, dim) -> q, k, v stacked, (3, batch, head, token, d_h)."""
        # Three projections as one product: x is read once, and under autocast also cast once.
        projections = (self.W_Q, self.W_K, self.W_V)
        W = torch.cat([projection.weight for projection in projections])
        b = torch.cat([projection.bias for projection in projections])
        qkv = "batch token (three head dim) -> three batch head token dim"
        return rearrange(F.linear(x, W, b), qkv, three=3, head=self.num_heads)

    def logit_bias(self, q: Tensor) -> Tensor | None:
        """b I for each head, (1, head, token, token), for q of (batch, head, token, d_h)."""
        if self.diagonal_bias is not None:  # without the leading axis the fused kernel refuses it
            identity = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
            return self.diagonal_bias.to(q.dtype)[None, :, None, None] * identity

    def weights(self, x: Tensor) -> Tensor:
        """The attention matrices softmax(q k^T / sqrt(d_h) + bias), (batch, head, token, token)."""
        q, k, _ = self.queries_keys_values(x)
        logits, bias = q @ k.mT / math.sqrt(q.shape[-1]), self.logit_bias(q)
        return (logits if bias is None else logits + bias).softmax(dim=-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """weights(x) @ v, without forming weights(x); (batch, head, token, d_h) all."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.logit_bias(q))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(*self.queries_keys_values(x))
        return self.W_O(rearrange(y, "batch head token dim -> batch token (head dim)"))


class MLP(nn.Module):
    """Two linear maps with a GELU between them. Shapes: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """A pre-LN transformer block, with its two skip connections or without them.

    Shapes: (batch, token, dim) -> (batch, token, dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        residual: bool,
        drop_path: float = 0.0,
        diagonal_bias: bool = False,
        norm_affine: bool = True,
    ):
        super().__init__()
        self.residual = residual
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=norm_affine)
        self.attention = Attention(dim, num_heads, diagonal_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=norm_affine)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        # Dropping a sub-block leaves the skip; without a skip nothing would be left of the image.
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # These lines are what the project is about:  x + f(x)  with the skip,  f(x)  without it.
        if self.residual:
            x = x + self.drop_path(self.attention(self.norm1(x)))
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        else:
            x = self.attention(self.norm1(x))
            x = self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021), pre-LN, with or without skip connections.

    Args:
        image_size: side of the square images it is built for, pixels.
        patch_size: side of a patch, pixels; must divide `image_size`.
        num_classes: width of the output; 0 leaves the head out and returns the pooled feature.
        dim, depth, num_heads, mlp_ratio: d, L, h and the MLP's hidden width over d.
        residual: True the standard network, False the skipless one.
        pool: "cls" reads a learned class token, "mean" averages the patch tokens (no class token).
        pos_embed_std: standard deviation of the position embedding at initialisation. 0.02 is
            customary; patch embeddings start near 1, and a network without skips, which sees
            positions once and never again, learns faster from a larger value.
        drop_path: stochastic depth rate of the last block, growing linearly from 0 at the first;
            only with skips.
        diagonal_bias: see `Attention`. The standard ViT has none; `identity_init.py` wants it.
        norm_affine: whether the blocks' LayerNorms have a gain and a shift to learn, as usual;
            `identity_init.py` wants neither.

    Input (batch, channel, height, width), output (batch, num_classes).

    Raises:
        ValueError: sizes that do not fit together, or an option that does not exist.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        *,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        residual: bool = True,
        pool: str = "cls",
        pos_embed_std: float = 0.02,
        drop_path: float = 0.0,
        diagonal_bias: bool = False,
        norm_affine: bool = True,
        in_channels: int = 3,
    ):
        super().__init__()
        # Everything needed to build this network again; checkpoints store it beside the weights.
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if image_size % patch_size:
            raise ValueError(
                f"patch size must divide image size: image {image_size}, patch {patch_size}"
            )
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", not {pool!r}')
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), not {drop_path}")
        if drop_path and not residual:
            raise ValueError("drop_path needs a skip connection; with residual=False leave it at 0")
        n = (image_size // patch_size) ** 2 + (pool == "cls")
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n, dim))
        self.grid = {}  # rows and columns of the images at hand, for attentions of `variants.py`
        self.embed_norm = nn.Identity()  # networks of `variants.py` without norms have one here
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, residual, rate, diagonal_bias, norm_affine)
            for rate in torch.linspace(0, drop_path, depth, device="cpu").tolist()
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.default_init_()

    @torch.no_grad()
    def default_init_(self) -> None:
        """The customary ViT init: truncated normals of std 0.02, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # LeCun's variance 1 / fan_in: a patch of unit-variance pixels becomes unit-variance tokens.
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.normal_(self.patch_embed.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.pos_embed, std=self.config["pos_embed_std"])
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def interpolate_pos_embed(self, rows: int, columns: int) -> Tensor:
        """Position embedding for a grid of patches, resized bicubically if it is another grid."""
        side = self.config["image_size"] // self.config["patch_size"]
        if (rows, columns) == (side, side):
            return self.pos_embed
        cls, grid = self.pos_embed[:, : -(side**2)], self.pos_embed[:, -(side**2) :]
        grid = rearrange(grid, "1 (row column) dim -> 1 dim row column", row=side)
        # Without antialiasing, as DINO does; in float32, as bf16 has no bicubic kernel everywhere.
        grid = F.interpolate(grid.float(), (rows, columns), mode="bicubic").to(cls.dtype)
        return torch.cat([cls, rearrange(grid, "1 dim row column -> 1 (row column) dim")], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """(batch, channel, height, width) -> (batch, token, dim), the class token first."""
        patch = self.config["patch_size"]
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(
                f"patch size must divide image size: images are {images.shape[-2]} x "
                f"{images.shape[-1]}, patch {patch}"
            )
        x = self.patch_embed(images)
        rows, columns = x.shape[-2:]
        self.grid.update(rows=rows, columns=columns)
        x = rearrange(x, "batch dim row column -> batch (row column) dim")
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.embed_norm(x + self.interpolate_pos_embed(rows, columns))

    def forward_features(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        """Tokens right after the blocks asked for, (batch, token, dim) each, in the order asked.

        0 is the embedding, `depth` the last block. The final LayerNorm is not applied.
        """
        if bad := [b for b in blocks if not 0 <= b <= len(self.blocks)]:
            raise ValueError(f"blocks must lie in 0..{len(self.blocks)}, not {bad}")
        x, kept = self.embed(images), {}
        for number in range(max(blocks) + 1):
            x = self.blocks[number - 1](x) if number else x
            if number in blocks:
                kept[number] = x
        return [kept[b] for b in blocks]

    def classify(self, x: Tensor) -> Tensor:
        """Logits from the last block's tokens, (batch, token, dim) -> (batch, num_classes)."""
        pooled = self.norm(x).mean(dim=1) if self.cls_token is None else self.norm(x[:, 0])
        return self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


# --------------------------------------------------------------------------------------------------
# The init: three functions. Copy any of them; `import math, torch` is all they need.
# They return W for y = x W in float32; into an nn.Linear goes W.T.
# --------------------------------------------------------------------------------------------------


def value_output_projections(
    dim: int, c: float = 3.0, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_V and W_O, each (dim, dim). Cutting the Skip, section 4.

        W_V = c U,  W_O = c V^T,  with U S V^T the SVD of a Gaussian matrix

    so every singular value of W_V W_O is c^2 and its condition number kappa is 1. One d x d
    construction for all heads together: redrawn per head, the joint map is ill-conditioned.
    """
    U, _, V_T = torch.linalg.svd(torch.randn(dim, dim, generator=generator))
    return c * U, c * V_T


def query_key_projections(
    dim: int,
    num_heads: int,
    alpha: float = 2.0,
    beta: float = 0.6,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_Q and W_K, each (dim, dim), heads side by side along the columns. Cutting the Skip, sec. 4.

        alpha Z + beta I = U S V^T,   W_Q = U[:, :d_h] sqrt(S_h),   W_K = V[:, :d_h] sqrt(S_h)

    for each head, Z_ij ~ N(0, 1/d). So W_Q W_K^T is the best rank-d_h approximation of
    alpha Z + beta I: beta lifts the diagonal of the attention logits, hence a token's attention
    to itself.

    One SVD serves all heads, each seen under a rotation of its own (`rotated`): an SVD a head takes
    100 s for ViT-L on two cores, this 15 s. Z and R Z R^T have the same law for every orthogonal R,
    and R (alpha Z + beta I) R^T = alpha R Z R^T + beta I has the singular vectors R U and R V: so
    each head's pair, taken alone, has exactly the law of a fresh one. What the heads of a layer
    share is what no rotation changes: S and the trace of W_Q W_K^T.
    """
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim: dim {dim}, num_heads {num_heads}")
    d_h = dim // num_heads

    def rotated(X: torch.Tensor) -> torch.Tensor:
        """R X, R Haar orthogonal. With X = Q C only R Q matters, a Haar frame: no d x d QR."""
        C = torch.linalg.qr(X).R
        frame = torch.empty(len(X), len(C))
        return torch.nn.init.orthogonal_(frame, generator=generator) @ C

    Z = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
    U, S, V_T = torch.linalg.svd(alpha * Z + beta * torch.eye(dim))
    W_Q, W_K = U[:, :d_h] * S[:d_h].sqrt(), V_T.T[:, :d_h] * S[:d_h].sqrt()
    pairs = [rotated(torch.cat([W_Q, W_K], dim=1)).split(d_h, dim=1) for _ in range(num_heads)]
    return tuple(torch.cat(heads, dim=1) for heads in zip(*pairs))


def orthogonal_mlp_weight(
    in_features: int, out_features: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Scale-corrected uniform orthogonal (SUO) weight, (in_features, out_features).

        W = max(sqrt(out / in), 1) * (semi-orthogonal)

    Martens et al. 2021, "Rapid training of deep neural networks without skip connections or
    normalization layers using Deep Kernel Shaping". At MLP ratio 4, fc1 gets a factor 2 and fc2
    a factor 1: every coordinate keeps the mean square of its input, in both.
    """
    W = torch.empty(in_features, out_features)
    scale = max(math.sqrt(out_features / in_features), 1.0)
    return torch.nn.init.orthogonal_(W, gain=scale, generator=generator)


# --------------------------------------------------------------------------------------------------
# ... put into a ViT
# --------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, or a TypeError that says what to do with another kind of model."""
    blocks = list(getattr(model, "blocks", []))
    if not blocks or not all(hasattr(getattr(b, "attention", None), "W_Q") for b in blocks):
        raise TypeError(
            "this fills minskip.ViT; into another model put the weights of "
            "value_output_projections, query_key_projections and orthogonal_mlp_weight"
        )
    return blocks


def set_(linear: nn.Linear, W: Tensor) -> None:
    """y = x W from now on."""
    linear.weight.copy_(W.T)
    linear.bias.zero_()


@torch.no_grad()
def conditioned_init_(
    model: nn.Module,
    alpha: float = 2.0,
    beta: float = 0.6,
    c: float = 3.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Re-initialise every block of a `ViT` so that it trains without skip connections. In place.

    Cutting the Skip, section 4. The source's constants (alpha, beta, c) are (2, 0.6, 3) for ViT-B
    trained with labels and (1.8, 1, 3) for ViT-S trained by DINO. Embeddings, norms and head keep
    their init; biases in the blocks become zero.

    Args:
        model: a `ViT`, or any module with `.blocks` whose members have `attention.W_Q ... W_O`,
            `attention.num_heads`, `mlp.fc1` and `mlp.fc2`.
        alpha: weight of the random part of W_Q W_K^T.
        beta: weight of the identity in W_Q W_K^T; more of it, more attention of a token to itself.
        c: scale of W_V and W_O. LayerNorm cancels it in the forward pass; it scales gradients.
        generator: the random numbers, on the CPU [torch's global one]. Weights are drawn in float32
            and cast to each parameter's own dtype and device.

    Returns the model.

    Raises:
        ValueError: negative or non-finite constants, c = 0, alpha = beta = 0.
        TypeError: a model whose blocks do not look like ours.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("c", c)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, not {value}")
    if c == 0 or alpha == beta == 0:
        raise ValueError("c and at least one of alpha and beta must be positive")
    for block in blocks_of(model):
        attention, fc1, fc2 = block.attention, block.mlp.fc1, block.mlp.fc2
        d, hidden = fc1.in_features, fc1.out_features
        W_Q, W_K = query_key_projections(d, attention.num_heads, alpha, beta, generator)
        W_V, W_O = value_output_projections(d, c, generator)
        set_(attention.W_Q, W_Q)
        set_(attention.W_K, W_K)
        set_(attention.W_V, W_V)
        set_(attention.W_O, W_O)
        set_(fc1, orthogonal_mlp_weight(d, hidden, generator))
        set_(fc2, orthogonal_mlp_weight(hidden, d, generator))
    return model
