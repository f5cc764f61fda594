"""Devices, processes, number formats, and what is printed while a run goes on."""

import functools
import os
import re
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from support.errors import UserError, stop_printing

# --------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------


def launched_by_torchrun() -> bool:
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys()


def chosen_device(device_name: str) -> torch.device:
    """device_name: "auto" (CUDA if there is any, else the CPU), "cpu", "cuda", "cuda:1" or "mps".

    Raises UserError where CUDA or mps is asked for and absent. Takes no memory of the device yet.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device_name):
        raise UserError(
            f"--device {device_name!r} is not known here; use auto, cpu, cuda, cuda:N or mps"
        )
    if device_name == "mps":  # Apple's GPUs
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no Apple GPU here; use --device cpu or auto")
        if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") != "1":  # torch reads it when imported
            raise UserError(
                "--device mps: set PYTORCH_ENABLE_MPS_FALLBACK=1, so that torch does on the CPU "
                "what an Apple GPU cannot"
            )
    device = torch.device("cpu" if device_name == "auto" else device_name)
    if device_name == "auto" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda":
        return device
    found = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", 0)) if launched_by_torchrun() else device.index or 0
    if number >= found:
        asked = f"--device {device_name}"
        if launched_by_torchrun() and found:
            asked = "--nproc-per-node"
        raise UserError(
            f"{asked}: {found or 'no'} CUDA devices found here; use --device cpu or auto"
        )
    return torch.device("cuda", number)


def uses_bf16(device: torch.device, amp: str) -> bool:
    """amp: "auto" is bf16 on CUDA cards that support it, "bf16" is bf16 everywhere, "off" nowhere.

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


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world size). Joins a process group only when launched by torchrun.

    Raises UserError where it cannot.
    """
    device = chosen_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # SOAP sets it back for its products
    if not launched_by_torchrun():
        return device, 0, 1
    # The others wait while the first process checks the images, which may take minutes.
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=own)
    except (ValueError, RuntimeError) as error:  # a variable that torchrun would have set
        raise UserError(
            f"RANK and MASTER_ADDR are set, but these processes cannot meet ({error}); start them "
            "with torchrun, or unset RANK"
        ) from error
    return device, dist.get_rank(), dist.get_world_size()


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print, once however many processes there are."""
    if main_process():
        try:
            print(text, flush=True)
        except OSError:  # `| head` has read enough, or the terminal is gone: train on
            stop_printing()


def progress(items, title: str, **more) -> tqdm:
    """A bar over items, on terminals only, and only in the first process."""
    return tqdm(items, title, leave=False, disable=None if main_process() else True, **more)


def mean_over_processes(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def max_over_processes(number: float, device: torch.device) -> float:
    if not dist.is_initialized():
        return number
    x = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def averaging_gradients(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, with gradients averaged over the processes where there are several.

    It copies the first process's weights to all, because two kinds of machine may round one draw
    differently. So copies of the weights must be made after it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, ids, gradient_as_bucket_view=True)  # no copy of them


def sharing_state(groups: list[dict], optimizer: type[Optimizer], **settings) -> Optimizer:
    """An optimizer whose work and memory the processes share, where there are several.

    Each process keeps the state of some parameters, updates them and sends them to the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return optimizer(groups, **settings)
    # In buckets, or each of 150 parameters would be a message of its own in every step.
    shared = ZeroRedundancyOptimizer(groups, optimizer, parameters_as_bucket_view=True, **settings)
    # Otherwise it keeps a second copy of the state that the optimizer inside it has loaded.
    shared.register_load_state_dict_post_hook(lambda shared: shared.state.clear())
    return shared


def moved(state: dict, device: torch.device | str) -> dict:
    """One parameter's state, its tensors on the device; "meta" leaves only what they are like."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()}


def whole_state(x: Tensor | nn.Module | Optimizer) -> Tensor | dict:
    """What a checkpoint keeps of x. Of an optimizer with shared state the first process gets all
    parts, as one process would have kept them; the others get only their own.

    (ZeRO's own consolidate_state_dict makes a Python object of every byte: minutes, for gigabytes.)
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, ZeroRedundancyOptimizer):
        return x.state_dict()
    params = [p for group in x.param_groups for p in group["params"]]
    device, mine = params[0].device, [i for i, p in enumerate(params) if x.optim.state.get(p)]
    there = "cpu" if main_process() else device
    parts = {i: moved(x.optim.state[params[i]], there) for i in mine}
    for rank in range(1, dist.get_world_size()):
        if dist.get_rank() == rank:
            # Shapes first, then the tensors as they are: to pickle gigabytes would take too long.
            dist.send_object_list([{i: moved(state, "meta") for i, state in parts.items()}], 0)
            for state in parts.values():
                for v in state.values():
                    if isinstance(v, Tensor):
                        dist.send(v.contiguous(), 0)
        elif main_process():
            received = [None]
            dist.recv_object_list(received, rank)
            for state in received[0].values():
                for name, v in state.items():
                    if isinstance(v, Tensor):
                        buffer = torch.empty(v.shape, dtype=v.dtype, device=device)
                        dist.recv(buffer, rank)
                        state[name] = torch.empty_like(v, device="cpu").copy_(buffer)  # v's strides
            parts |= received[0]
    groups = Optimizer.state_dict(x)["param_groups"]
    return dict(state=dict(sorted(parts.items())), param_groups=groups)


# --------------------------------------------------------------------------------------------------
# Less memory: a batch in parts, activations computed twice
# --------------------------------------------------------------------------------------------------


def micro_batches(network: nn.Module, parts: int, *tensors: Tensor) -> Iterator[tuple]:
    """A batch in equal parts; the processes exchange gradients only after the last part."""
    for number, part in enumerate(zip(*(x.chunk(parts) for x in tensors)), start=1):
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = number == parts  # what no_sync() sets
        yield part


def check_batch_size(batch_size: int, parts: int, images: int, data_name: str) -> None:
    """Raises UserError where a batch cannot be cut into equal parts, or exceeds the images."""
    if batch_size % parts:
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of processes x --grad-accum = {parts}"
        )
    if batch_size > images:
        raise UserError(
            f"--batch-size {batch_size} exceeds the {images} training images of {data_name}; make "
            "it smaller, and see README, Your images, for other settings of small folders"
        )


def checkpoint_activations_(model: nn.Module) -> None:
    """From now on keep only each block's input for the backward pass.

    model: a `minskip.ViT`. Much less memory, a third more time.
    """
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
