"""An estimate of the memory of a training step, printed before the first one."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soap import kept_of
from support.processes import autocast, say


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a forward pass for its backward pass, parameters included."""
    kept = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # x itself would hold its graph, and that would hold x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = forward()  # held, or freed addresses would be counted once for several
    del out
    return sum(kept.values())


def say_memory(
    network: nn.Module, shapes: Sequence[tuple[int, ...]], images: int, opt: str,
    device: torch.device, amp: str,
) -> None:  # fmt: skip
    """Print what a training step will hold: an estimate, from forward passes of one image and two.

    shapes: of one image in each of the network's inputs. images: how many pass through it at once.
    Not counted: the loss, the kernels' workspaces, averaged weights or a teacher, DDP's copy of the
    gradients with --grad-accum; and processes share SOAP's state not quite evenly.
    """

    def forward(count: int):
        with autocast(device, amp):
            return network(*(torch.zeros(count, *shape, device=device) for shape in shapes))

    per_image = saved_bytes(lambda: forward(2)) - saved_bytes(lambda: forward(1))
    sizes = [p.shape for p in network.parameters()]
    weights = 4 * sum(size.numel() for size in sizes)
    state = 2 * weights
    if opt == "soap":
        state = 4 * sum(math.prod(x) for size in sizes for x in kept_of(size).values())
        state /= dist.get_world_size() if dist.is_initialized() else 1
    total = 2 * weights + state + images * per_image
    say(
        f"memory  at least {total / 1e9:.2f} GB: {per_image / 1e6:.1f} MB for each of {images} "
        f"images, {(2 * weights + state) / 1e9:.2f} GB for weights, gradients and optimizer"
    )
    if device.type == "cuda" and total - weights > torch.cuda.mem_get_info(device)[0]:
        say("note    this GPU has less free: raise --grad-accum or add --checkpoint-activations")
