"""Vision Transformers without skip connections: the model and the init in one file.

Read it from top to bottom:

1. `ViT`, the standard pre-LN Vision Transformer. `Block.forward` shows the one difference:
   `residual=True` is the usual network, `residual=False` has no skip connections, and with
   "attention" or "mlp" that half of each block alone keeps its skip.
2. Three functions that draw well-conditioned weights. Copy them into any project.
3. `conditioned_init_`, which puts those weights into a `ViT`.

Why a network without skips needs them: let K be the derivative of a sub-block's output with
respect to its input. Backpropagation multiplies factors K + I in a residual network, and bare K in
one without skips. Softmax attention averages tokens, which makes its K nearly rank-deficient. In a
residual network "+ I" lifts the small singular values; without it the weights have to.

Source: Ji et al., "Cutting the Skip: Training Residual-Free Transformers", ICLR 2026
(arXiv 2510.00345).

Notation, as in the paper: tokens are rows and a projection is y = x W, so `nn.Linear.weight` is
W^T. d = dim, h = num_heads, d_h = d / h, n = tokens, L = depth.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Published sizes (Dosovitskiy et al. 2021; tiny and small: Touvron et al. 2021). nano is ours:
# narrow enough for two CPU cores, and deep enough for the usual init to fail without skips.
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
    """Multi-head self-attention. The four projections are separate, to match the equations.

    bias_at: 0, or the number n_0 of tokens in training, to add one learnable number b per head to
    each token's logit with itself, which `beyond/identity_init.py` uses. Against n - 1 other tokens
    e^b weighs less the more there are, so all heads but the last quarter, which are to keep their
    own token, add log((n - 1) / (n_0 - 1)) to b for images of n tokens.
    Shapes: (batch, token, dim) -> (batch, token, dim).
    """

    def __init__(self, dim: int, num_heads: int, bias_at: int = 0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim: dim {dim}, num_heads {num_heads}")
        self.num_heads = num_heads
        self.W_Q = nn.Linear(dim, dim)
        self.W_K = nn.Linear(dim, dim)
        self.W_V = nn.Linear(dim, dim)
        self.W_O = nn.Linear(dim, dim)
        self.bias_at, self.keepers = bias_at, num_heads - max(1, num_heads // 4)
        self.diagonal_bias = nn.Parameter(torch.zeros(num_heads)) if bias_at else None

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """(batch, token, dim) -> q, k, v stacked, (3, batch, head, token, d_h)."""
        # One product instead of three: faster, because x is read (and under autocast cast) once.
        W = torch.cat([self.W_Q.weight, self.W_K.weight, self.W_V.weight])
        b = torch.cat([self.W_Q.bias, self.W_K.bias, self.W_V.bias])
        qkv = "batch token (three head dim) -> three batch head token dim"
        return rearrange(F.linear(x, W, b), qkv, three=3, head=self.num_heads)

    def bias_for(self, n: int) -> Tensor:
        """b of each head for images of n tokens, (head,)."""
        follow = math.log(max(n - 1, 1) / max(self.bias_at - 1, 1))  # 0 at n_0
        keepers, fetchers = self.diagonal_bias.tensor_split([self.keepers])
        return torch.cat([keepers + follow, fetchers])

    def logit_bias(self, q: Tensor) -> Tensor | None:
        """b I for each head, (1, head, token, token), for q of (batch, head, token, d_h)."""
        if self.diagonal_bias is not None:  # the fused kernel needs the leading axis
            b = self.bias_for(q.shape[-2]).to(q.dtype)[None, :, None, None]
            return b * torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)

    def weights(self, x: Tensor) -> Tensor:
        """The attention matrices softmax(q k^T / sqrt(d_h) + bias), (batch, head, token, token)."""
        q, k, _ = self.queries_keys_values(x)
        logits, bias = q @ k.mT / math.sqrt(q.shape[-1]), self.logit_bias(q)
        return (logits if bias is None else logits + bias).softmax(dim=-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """weights(x) @ v without forming weights(x). All shapes (batch, head, token, d_h)."""
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
    """A pre-LN block with two skips, one or none: (batch, token, dim) -> (batch, token, dim).

    residual: True or False; or "attention" or "mlp", the half that alone keeps its skip. That half
    is then the standard one, with gain and shift in its norm and no bias on its logits.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        residual: bool | str,
        drop_path: float = 0.0,
        bias_at: int = 0,
        norm_affine: bool = True,
    ):
        super().__init__()
        self.skips = {True: ("attention", "mlp"), False: ()}.get(residual, (residual,))
        attention_affine, mlp_affine = (norm_affine or residual == x for x in ("attention", "mlp"))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=attention_affine)
        self.attention = Attention(dim, num_heads, bias_at * (residual != "attention"))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=mlp_affine)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        # Only for blocks with both skips: without one a dropped sub-block would erase the image.
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # This is what the project is about:  x + f(x)  with the skip,  f(x)  without.
        y = self.attention(self.norm1(x))
        x = x + self.drop_path(y) if "attention" in self.skips else y
        y = self.mlp(self.norm2(x))
        x = x + self.drop_path(y) if "mlp" in self.skips else y
        return x


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021), pre-LN, with or without skip connections.

    Args:
        image_size, patch_size: side of the (square) training images and of a patch, in pixels.
        num_classes: width of the output; 0 means no head: the output is the pooled feature.
        dim, depth, num_heads, mlp_ratio: d, L, h, and the MLP's hidden width divided by d.
        residual: True for the standard network, False for the one without skips; "attention" or
            "mlp" for the one in which that half of each block alone keeps its skip.
        pool: classify a learned class token, "cls", or the mean of the patch tokens, "mean".
        pos_embed_std: standard deviation of the initial position embedding, usually 0.02. Patch
            embeddings start near 1, and a network without skips sees the positions only at its
            input, so it learns faster from a larger value.
        drop_path: stochastic depth's rate in the last block; it grows linearly from 0 at the first.
        diagonal_bias, norm_affine: see `Attention`; and whether the blocks' LayerNorms have a
            learnable gain and shift. `beyond/identity_init.py` needs True and False.

    Input (batch, channel, height, width), output (batch, num_classes).
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
        residual: bool | str = True,
        pool: str = "cls",
        pos_embed_std: float = 0.02,
        drop_path: float = 0.0,
        diagonal_bias: bool = False,
        norm_affine: bool = True,
        in_channels: int = 3,
    ):
        super().__init__()
        # All that is needed to build this network again; checkpoints store it with the weights.
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if image_size % patch_size:
            raise ValueError(
                f"patch size must divide image size: image {image_size}, patch {patch_size}"
            )
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", not {pool!r}')
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), not {drop_path}")
        if residual not in (True, False, "attention", "mlp"):
            raise ValueError(f'residual is True, False, "attention" or "mlp", not {residual!r}')
        if drop_path and residual is not True:
            raise ValueError(f"drop_path needs all skips; with residual={residual!r} leave it at 0")
        n = (image_size // patch_size) ** 2 + (pool == "cls")
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n, dim))
        self.grid = None  # beyond/variants.py puts a dict here, for attentions that ask for it
        self.embed_norm = nn.Identity()  # ... and a norm here, if there is none in the blocks
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, residual, rate, n * diagonal_bias, norm_affine)
            for rate in torch.linspace(0, drop_path, depth, device="cpu").tolist()
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.default_init_()

    @torch.no_grad()
    def default_init_(self) -> None:
        """The usual ViT init: normal weights of std 0.02 and zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Variance 1 / fan_in (LeCun): pixels of unit variance become tokens of unit variance.
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.normal_(self.patch_embed.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.pos_embed, std=self.config["pos_embed_std"])
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def interpolate_pos_embed(self, rows: int, columns: int) -> Tensor:
        """The position embedding, resized (bicubic) where the grid of patches is another."""
        side = self.config["image_size"] // self.config["patch_size"]
        if (rows, columns) == (side, side):
            return self.pos_embed
        cls, grid = self.pos_embed[:, : -(side**2)], self.pos_embed[:, -(side**2) :]
        grid = rearrange(grid, "1 (row column) dim -> 1 dim row column", row=side)
        # Without antialiasing, as in DINO; in float32, because not every device resizes bf16.
        grid = F.interpolate(grid.float(), (rows, columns), mode="bicubic").to(cls.dtype)
        return torch.cat([cls, rearrange(grid, "1 dim row column -> 1 (row column) dim")], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """(batch, channel, height, width) -> (batch, token, dim), the class token first."""
        patch = self.config["patch_size"]
        if images.shape[-2] % patch or images.shape[-1] % patch:
            size = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"patch size must divide image size: images are {size}, patch {patch}")
        x = self.patch_embed(images)
        rows, columns = x.shape[-2:]
        if self.grid is not None:
            self.grid[rows * columns] = rows, columns
        x = rearrange(x, "batch dim row column -> batch (row column) dim")
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.embed_norm(x + self.interpolate_pos_embed(rows, columns))

    def forward_features(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        """Tokens after each of `blocks`, in that order, (batch, token, dim) each.

        0 is the embedding, `depth` the last block. The final LayerNorm is not applied.
        """
        if bad := [b for b in blocks if not 0 <= b <= len(self.blocks)]:
            raise ValueError(f"blocks must lie in 0..{len(self.blocks)}, not {bad}")
        tokens = [self.embed(images)]
        for block in self.blocks[: max(blocks)]:
            tokens.append(block(tokens[-1]))
        return [tokens[b] for b in blocks]

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
# The init: three functions. Copy any of them; `import math, torch` is all they need. They return W
# for y = x W (nn.Linear takes W.T), in float32 if the default dtype is a half, which has no SVD.
# --------------------------------------------------------------------------------------------------


def value_output_projections(
    dim: int, c: float = 3.0, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_V and W_O, each (dim, dim). Cutting the Skip, section 4.

        W_V = c U,  W_O = c V^T,  with U S V^T the SVD of a Gaussian matrix

    so every singular value of W_V W_O is c^2 and its condition number kappa is 1. The heads share
    one d x d construction: with one per head, the map of all heads together is ill-conditioned.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    U, _, V_T = torch.linalg.svd(torch.randn(dim, dim, generator=generator, dtype=dtype))
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
    alpha Z + beta I. beta raises the diagonal of the attention logits, and with it each token's
    attention to itself.

    We compute one SVD and give each head a random rotation R of it: for ViT-L on two cores this
    takes 15 s, an SVD per head 100 s. It changes no head's distribution: R Z R^T has the same law
    as Z for every orthogonal R, and R (alpha Z + beta I) R^T = alpha R Z R^T + beta I has the
    singular vectors R U and R V. Only what no rotation changes is common to a layer's heads: S and
    the trace of W_Q W_K^T.
    """
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim: dim {dim}, num_heads {num_heads}")
    d_h, dtype = dim // num_heads, torch.promote_types(torch.get_default_dtype(), torch.float32)

    def rotated(X: torch.Tensor) -> torch.Tensor:
        """R X for a uniformly random orthogonal R. Writing X = Q C, it is enough to draw R Q."""
        C = torch.linalg.qr(X).R
        return torch.nn.init.orthogonal_(X.new_empty(len(X), len(C)), generator=generator) @ C

    Z = torch.randn(dim, dim, generator=generator, dtype=dtype) / math.sqrt(dim)
    U, S, V_T = torch.linalg.svd(alpha * Z + beta * torch.eye(dim, dtype=dtype))
    W_Q, W_K = U[:, :d_h] * S[:d_h].sqrt(), V_T.T[:, :d_h] * S[:d_h].sqrt()
    pairs = [rotated(torch.cat([W_Q, W_K], dim=1)).split(d_h, dim=1) for _ in range(num_heads)]
    return tuple(torch.cat(heads, dim=1) for heads in zip(*pairs))


def orthogonal_mlp_weight(
    in_features: int, out_features: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Scale-corrected uniform orthogonal (SUO) weight, (in_features, out_features).

        W = max(sqrt(out / in), 1) * (semi-orthogonal)

    Martens et al. 2021, "Rapid training of deep neural networks without skip connections or
    normalization layers using Deep Kernel Shaping". At MLP ratio 4 the factor is 2 for fc1 and 1
    for fc2. Either map then keeps the mean square of a coordinate.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    W = torch.empty(in_features, out_features, dtype=dtype)
    scale = max(math.sqrt(out_features / in_features), 1.0)
    return torch.nn.init.orthogonal_(W, gain=scale, generator=generator)


# --------------------------------------------------------------------------------------------------
# The same weights, put into a ViT
# --------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks. Raises TypeError for another kind of model."""
    blocks = list(getattr(model, "blocks", []))
    if not blocks or not all(hasattr(getattr(b, "attention", None), "W_Q") for b in blocks):
        raise TypeError("this initialises minskip.ViT; for others see docs/copy_the_init.md")
    return blocks


def set_linear_(linear: nn.Linear, W: Tensor) -> None:
    """Make the layer compute y = x W."""
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
    """Re-initialise all blocks of a `ViT`, in place, so that it trains without skip connections.

    Cutting the Skip, section 4. Embeddings, norms and head keep their init, and so does a half that
    alone keeps its skip; the biases of what is initialised become zero. The paper's (alpha, beta,
    c) are (2, 0.6, 3) for ViT-B trained with labels and (1.8, 1, 3) for ViT-S trained with DINO.

    Args:
        alpha, beta: weights of the random part and of the identity in W_Q W_K^T.
        c: scale of W_V and W_O. The LayerNorm cancels it in the forward pass, but gradients, and
            so the relative size of a step, depend on it.
        generator: source of the random numbers, on the CPU [torch's global one]. The weights are
            drawn there and then cast to each parameter's dtype and device.

    Returns the model. Raises ValueError for constants without meaning.
    """
    if not (min(alpha, beta) >= 0 and 0 < alpha + beta < math.inf and 0 < c < math.inf):
        raise ValueError(
            "c must be positive, alpha and beta not negative and not both 0; "
            f"they are {c}, {alpha} and {beta}"
        )
    for block in blocks_of(model):
        attention, fc1, fc2 = block.attention, block.mlp.fc1, block.mlp.fc2
        d, hidden = fc1.in_features, fc1.out_features
        if block.skips != ("attention",):
            W_Q, W_K = query_key_projections(d, attention.num_heads, alpha, beta, generator)
            W_V, W_O = value_output_projections(d, c, generator)
            set_linear_(attention.W_Q, W_Q)
            set_linear_(attention.W_K, W_K)
            set_linear_(attention.W_V, W_V)
            set_linear_(attention.W_O, W_O)
        if block.skips != ("mlp",):
            set_linear_(fc1, orthogonal_mlp_weight(d, hidden, generator))
            set_linear_(fc2, orthogonal_mlp_weight(hidden, d, generator))
    return model
