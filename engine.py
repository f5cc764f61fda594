"""What both trainers need and neither explains: devices, processes, the optimizer, its rate."""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cli import fail, mute
from minskip import ViT
from soap import SOAP, kept_of

# --------------------------------------------------------------------------------------------------
# Devices and processes
# --------------------------------------------------------------------------------------------------


def launched() -> bool:
    """By torchrun, or as it does it."""
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys()


def chosen_device(device_name: str) -> torch.device:
    """device_name: "auto" (CUDA if there is any, else the CPU), "cpu", "cuda" or "cuda:1".

    Ends the program when CUDA is asked for and absent; takes nothing of the device yet.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device_name):
        fail(f"--device {device_name!r} is not known here; use auto, cpu, cuda or cuda:N")
    device = torch.device("cpu" if device_name == "auto" else device_name)
    if device_name == "auto" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type == "cpu":
        return device
    found = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", 0)) if launched() else device.index or 0
    if number >= found:
        asked = "--nproc-per-node" if launched() and found else f"--device {device_name}"
        fail(f"{asked}: {found or 'no'} CUDA devices found here; use --device cpu or auto")
    return torch.device("cuda", number)


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world size). Joins a process group only when launched by torchrun."""
    device = chosen_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # but for SOAP's factors
    if not launched():
        return device, 0, 1
    # The others wait while the first process looks through the images: minutes, of a large set.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device, dist.get_rank(), dist.get_world_size()


def uses_bf16(device: torch.device, amp: str) -> bool:
    """amp: "auto" is bf16 on CUDA cards that support it, "bf16" is bf16 wherever, "off" nowhere.

    Never fp16: it gives NaN on small images, where bf16, with float32's range, does not.
    """
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return amp == "bf16" or (amp == "auto" and auto)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, amp))


def on_device(batch, device: torch.device):
    """A batch of tensors, however nested in lists, on the device."""
    if isinstance(batch, list | tuple):
        return [on_device(part, device) for part in batch]
    return batch.to(device, non_blocking=True)


def main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print, once however many processes there are; a reader that has left does not stop a run."""
    if main_process():
        try:
            print(text, flush=True)
        except OSError:  # piped into head, or the terminal is gone; from now on into nothing
            mute()


def progress(items, title: str, **more) -> tqdm:
    """A bar over items: on terminals only, and of the first process alone."""
    return tqdm(items, title, leave=False, disable=None if main_process() else True, **more)


def mean_over_processes(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def in_processes(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over the processes, where there are several.

    It takes the first process's weights to all: machines of two kinds may round one draw
    differently. So copies of the weights are made after it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, ids, gradient_as_bucket_view=True)  # no copy of them


def computed_twice(forward: Callable, grid: dict, x: Tensor) -> Tensor:
    """forward(x), whose insides the backward pass computes again, for images of the same grid."""
    at = dict(grid)

    def compute(x: Tensor) -> Tensor:
        grid.update(at)
        return forward(x)

    return checkpoint(compute, x, use_reentrant=False)


def checkpoint_activations_(model: ViT) -> None:
    """Keep each block's input alone for the backward pass: much less memory, a third more time."""
    for block in model.blocks:
        block.forward = functools.partial(computed_twice, block.forward, model.grid)


def micro_batches(network: nn.Module, parts: int, *tensors: Tensor) -> Iterator[tuple]:
    """A batch in equal parts; processes exchange gradients after the last one alone."""
    for number, part in enumerate(zip(*(x.chunk(parts) for x in tensors)), start=1):
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = number == parts  # what no_sync() sets
        yield part


def check_batch_size(batch_size: int, parts: int, images: int, data_name: str) -> None:
    if batch_size % parts:
        fail(f"--batch-size {batch_size} must be a multiple of processes x --grad-accum = {parts}")
    if batch_size > images:
        fail(
            f"--batch-size {batch_size} exceeds the {images} training images of {data_name}; make "
            "it smaller"
        )


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], object]) -> int:
    """What autograd keeps of a forward pass for its backward pass, parameters among it."""
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

    shapes: of one image in each of the network's inputs. images: that go through it at once. Left
    out: the loss, kernels' workspaces, averaged weights or a teacher, DDP's copy of the gradients
    with --grad-accum, and that several processes share SOAP's state by the number of parameters,
    not quite evenly.
    """

    def forward(count: int):
        with autocast(device, amp):
            return network(*(torch.zeros(count, *shape, device=device) for shape in shapes))

    an_image = saved_bytes(lambda: forward(2)) - saved_bytes(lambda: forward(1))
    sizes = [p.shape for p in network.parameters()]
    weights = 4 * sum(size.numel() for size in sizes)
    state = 2 * weights
    if opt == "soap":
        state = 4 * sum(math.prod(x) for size in sizes for x in kept_of(size).values())
        state /= dist.get_world_size() if dist.is_initialized() else 1
    total = 2 * weights + state + images * an_image
    say(
        f"memory  at least {total / 1e9:.2f} GB: {an_image / 1e6:.1f} MB for each of {images} "
        f"images, {(2 * weights + state) / 1e9:.2f} GB for weights, gradients and optimizer"
    )
    if device.type == "cuda" and total - weights > torch.cuda.mem_get_info(device)[0]:
        say("note    this GPU has less free: raise --grad-accum or add --checkpoint-activations")


# --------------------------------------------------------------------------------------------------
# Optimizer and learning rate
# --------------------------------------------------------------------------------------------------


def build_optimizer(
    model: nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
) -> Optimizer:
    """SOAP or AdamW. Biases, norms and embeddings, the second group, are not decayed.

    SOAP's work and memory are shared out: each process keeps the state of some parameters, updates
    those and sends them to the others. AdamW's are too little to be worth it.
    """
    decayed, plain = [], []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or name.endswith(("cls_token", "pos_embed")) else decayed).append(p)
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    if opt == "soap" and dist.is_initialized() and dist.get_world_size() > 1:
        optimizer = ZeroRedundancyOptimizer(groups, SOAP, lr=lr)
        # else it keeps a second copy of what the optimizer inside it takes from a checkpoint
        optimizer.register_load_state_dict_post_hook(lambda optimizer: optimizer.state.clear())
        return optimizer
    if opt == "soap":
        return SOAP(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=adamw_betas, fused=True)


def whole_state(x: Tensor | nn.Module | Optimizer) -> Tensor | dict:
    """What a checkpoint keeps of it. Of a shared-out optimizer the first process gets all parts,
    in the form in which one process would have kept them.

    (ZeRO's own consolidate_state_dict makes a Python object of every byte: minutes, of gigabytes.)
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, ZeroRedundancyOptimizer):
        return x.state_dict()
    params = [p for group in x.param_groups for p in group["params"]]
    parts = {}
    for i, p in enumerate(params):
        if state := x.optim.state.get(p):
            parts[i] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
    for rank in range(1, dist.get_world_size()):
        if dist.get_rank() == rank:
            dist.send_object_list([parts], 0)
        elif main_process():
            received = [None]
            dist.recv_object_list(received, rank)
            parts |= received[0]
    groups = Optimizer.state_dict(x)["param_groups"]
    return dict(state=dict(sorted(parts.items())), param_groups=groups)


def cosine(first: float, last: float, progress: float) -> float:
    """Half a cosine from first to last while progress goes from 0 to 1."""
    return last + (first - last) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def lr_at(step: int, steps: int, warmup: int, peak: float, last: float = 0.0) -> float:
    """A line up to `peak` over `warmup` steps, then half a cosine down to `last` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, min(last, peak), (step - warmup) / max(steps - warmup, 1))
