"""The scripts' own code with --device cuda, on a machine without a GPU.

CPU tensors are real. "CUDA" tensors are torch's fake ones: they have a shape, a type and a device,
but no numbers. So these tests find tensors of two devices or types in one operation, and steps in
which the host waits for the GPU. Numbers that are read from the GPU are made up: 0 for whole
numbers, 1 for all others. One thing is otherwise than on a GPU: without a driver torch takes plain
attention, not the fused kernels.
"""

import importlib
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, passes_computed_twice, run_main
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import eval_dense
import jacobian_probe
import train_cls
import train_ssl
from beyond.variants import e_spa, u_spa
from minskip import ViT
from support import data, files, scenes
from support.run import Run

sys.path.insert(0, str(ROOT / "experiments"))
first_gpu = importlib.import_module("first_gpu")
aten = torch.ops.aten

# On CUDA these wait until the GPU has told whether they succeeded or how much they found.
WAITING = {
    aten._linalg_eigh, aten._linalg_svd, aten._linalg_check_errors, aten.nonzero, aten._unique2,
    aten.masked_select, aten.bincount, aten.repeat_interleave,
}  # fmt: skip

# Where the host may wait in a training step, and why: in the first step of a run ...
FIRST_STEP = {
    "data.py channel_statistics": "mean and standard deviation, kept from then on",
    "variants.py u_spa": "a block's D and B, kept from then on",
    "variants.py e_spa": "a block's D and B, kept from then on",
    "soap.py eigenbasis": "the exact eigenbases; later ones are refreshed by QR",
}
# ... and in those that read numbers: of an epoch the first, then one about every two seconds (here
# each second step), and the last.
READING_STEP = {
    "run.py add": "the sums, because a run that is not finite ends",
    "run.py steps": "the loss, for the progress bar",
}
STEPS = 4  # of each epoch
READING = {0, 2, 3}


def caller() -> str:
    """The file and function of the project that called torch, and the line."""
    frame = sys._getframe()
    while frame := frame.f_back:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        ours = ROOT in path.parents and "site-packages" not in path.parts  # it may lie in ROOT
        if ours and path.parent != ROOT / "tests" and name[0] != "<":
            return f"{path.name} {name}:{frame.f_lineno}"
    return "tests"


def is_cuda(x) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def faked(x: Tensor) -> Tensor:
    """Called in a fake mode, which makes the new tensor a fake one."""
    if isinstance(x, FakeTensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


class FakeCuda(TorchDispatchMode):
    """Gets every operation. Those on CUDA tensors give fake tensors, the others are carried out.

    waits: step -> each place where the host waited in it, and for what. The steps of all runs are
    counted from where each began.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()
        self.fake.__deepcopy__ = lambda _: self.fake  # a network's copy stays in this mode
        self.waits, self.step, self.whole_number = defaultdict(list), None, 0

    def made_up(self, x: Tensor) -> Tensor:
        whole = not (x.is_floating_point() or x.dtype == torch.bool)
        return torch.full(x.shape, self.whole_number if whole else 1, dtype=x.dtype)

    def note(self, what: str) -> None:
        if self.step is not None:
            self.waits[self.step].append(f"{caller()} {what}")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, operation.overloadpacket
        if kind is aten._pin_memory:
            pinned = args[0].clone()
            pinned.is_in_pinned_memory = True
            return pinned
        if kind is aten.is_pinned:
            return hasattr(args[0], "is_in_pinned_memory")
        if not any(isinstance(x, FakeTensor) or is_cuda(x) for x in tree_leaves((args, kwargs))):
            return operation(*args, **kwargs)

        if kind is aten._local_scalar_dense:
            self.note("reads a number")
            return self.made_up(args[0]).item()
        if kind in WAITING:
            self.note(f"calls {kind}")
        if kind is aten.copy_ or (kind is aten._to_copy and kwargs.get("device")):
            here = args[1] if kind is aten.copy_ else args[0]
            there = args[0].device if kind is aten.copy_ else kwargs["device"]
            asynchronous = kwargs.get("non_blocking", args[2:] == (True,))
            pinned = hasattr(here, "is_in_pinned_memory")
            if here.device.type != there.type and not (asynchronous and pinned):
                self.note(f"copies {tuple(here.shape)} to {there.type}")
            if kind is aten.copy_ and not is_cuda(there):
                return args[0].copy_(self.made_up(here))
        with self.fake:
            args, kwargs = tree_map_only(Tensor, faked, (args, kwargs))
            out = operation(*args, **kwargs)
        return tree_map_only(FakeTensor, lambda x: x if is_cuda(x.device) else self.made_up(x), out)


# --------------------------------------------------------------------------------------------------
# Backward passes, node by node: autograd's own engine asks the driver for a stream
# --------------------------------------------------------------------------------------------------


def grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, **_) -> tuple:
    """torch.autograd.grad; with no inputs, the gradients of all leaves are accumulated in them."""
    outputs, inputs = ((x,) if isinstance(x, Tensor) else x for x in (outputs, inputs))
    given = (grad_outputs,) if isinstance(grad_outputs, Tensor) else grad_outputs
    starts = [(x.grad_fn, x.output_nr) for x in outputs]
    order, seen, stack = [], set(), [(node, False) for node, _ in starts]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((x, False) for x, _ in node.next_functions if x)]

    found, leaves = defaultdict(dict), [x for x in order if hasattr(x, "variable")]

    def add(node, number: int, gradient: Tensor) -> None:
        of = node._input_metadata[number]
        assert gradient.device == of.device, f"{node} gets a gradient on {gradient.device}"
        gradient = gradient.sum_to_size(of.shape).to(of.dtype)
        before = found[node].get(number)
        found[node][number] = gradient if before is None else before + gradient

    with torch.set_grad_enabled(create_graph):
        for i, (node, number) in enumerate(starts):
            add(node, number, torch.ones_like(outputs[i]) if given is None else given[i])
        for node in reversed(order):
            if node not in found or (inputs and node in leaves):
                continue
            results = node(*(found[node].get(i) for i in range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (after, number), gradient in zip(node.next_functions, results):
                if after and gradient is not None:
                    add(after, number, gradient)
    of_leaf = {id(node.variable): node for node in leaves}
    nodes = [x.grad_fn or of_leaf.get(id(x)) for x in inputs]
    return tuple(found[node].get(x.output_nr) for node, x in zip(nodes, inputs))


def backward(loss: Tensor) -> None:
    grad(loss, ())


@pytest.fixture
def cuda(monkeypatch) -> Iterator[FakeCuda]:
    """One GPU of 80 GB that supports bf16, and no driver behind it."""
    answers = dict(
        is_available=True, device_count=1, current_device=0, set_device=None, _lazy_init=None,
        is_bf16_supported=True, mem_get_info=(70e9, 80e9), is_current_stream_capturing=False,
        manual_seed_all=None,
    )  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    current = lambda *_, **__: torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)  # of a checkpoint's pass
    # a fake tensor has no address, but a storage of its own
    monkeypatch.setattr(Tensor, "data_ptr", lambda x: x.untyped_storage()._cdata)
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda x: x._cdata)
    mode, real_steps, real_save = FakeCuda(), Run.steps, files.save_checkpoint

    def steps(run, loader):
        run.rarest = 2
        for mode.step, batch in enumerate(real_steps(run, loader)):
            yield batch
        mode.step = None

    def save(path, content):
        real_save(path, tree_map_only(FakeTensor, mode.made_up, content))

    monkeypatch.setattr(Run, "steps", steps)
    monkeypatch.setattr("support.run.LOOK_EVERY", 1e9)
    monkeypatch.setattr(files, "save_checkpoint", save)
    caches = data.channel_statistics, u_spa, e_spa
    for cache in caches:
        cache.cache_clear()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") copies to the GPU
    with mode:
        yield mode
    torch._C._set_only_lift_cpu_tensors(False)
    for cache in caches:
        cache.cache_clear()


RUN = [*SMALL, "--depth", 1, "--device", "cuda", "--epochs", 1, "--warmup-epochs", 0.5]
RUN += ["--refresh-every", 7]


def check_waits(cuda: FakeCuda) -> None:
    for step, waits in cuda.waits.items():
        allowed = FIRST_STEP if step == 0 else {}
        allowed = allowed | READING_STEP if step in READING else allowed
        others = [wait for wait in waits if wait.split(":")[0] not in allowed]
        assert not others, f"in step {step} the host waits for the GPU: {others}"
    for step in READING:  # they are noticed
        assert {"run.py add", "run.py steps"} <= {x.split(":")[0] for x in cuda.waits[step]}


@pytest.mark.parametrize(
    "script, words",
    [
        (train_cls, "--depth 2 --drop-path 0.2 --mixup 0.8 --cutmix 1 --checkpoint-activations"),
        (train_cls, "--opt adamw --ema 0.9 --skipless --init identity --grad-accum 2"),
        (train_cls, "--ema 0.9 --skipless --attention e-spa --norm none --checkpoint-activations"),
        (train_ssl, "--opt adamw --drop-path 0.2 --depth 2 --local-crops 0"),
        (train_ssl, "--skipless --init identity --grad-accum 2 --checkpoint-activations"),
        (train_ssl, "--skipless --attention u-spa --norm dyt --checkpoint-activations --opt adamw"),
    ],
)
def test_a_training_step_waits_for_the_gpu_only_to_read_numbers(
    script, words, cuda, tmp_path, monkeypatch, capsys
):
    """An epoch, and another one after --resume; then --eval, where there is one."""
    monkeypatch.setattr(script, "SHAPES_TRAIN", 12 * STEPS + 1)
    monkeypatch.setattr(script, "SHAPES_VAL", 13)
    twice, last = passes_computed_twice(monkeypatch), tmp_path / "last.pt"
    for more in ([*RUN, "--out", tmp_path, *words.split()], ["--resume", last, "--epochs", 2]):
        run_main(script.main, more, tmp_path, monkeypatch)
        assert "on cuda:0 x 1, bf16" in capsys.readouterr().out
        check_waits(cuda)
    assert bool(twice) == ("--checkpoint-activations" in words)
    group = files.load_checkpoint(str(last))["optimizer"]["param_groups"][0]
    how = group.get("stagger"), group.get("precondition_frequency")
    assert how == ((None, None) if "adamw" in words else (True, 7))  # no step bears all refreshes
    if script is train_cls:
        run_main(script.main, ["--eval", last], tmp_path, monkeypatch)


def test_the_backward_pass_here_is_autograds():
    torch.manual_seed(3)
    model, images = ViT(8, 4, 5, dim=16, depth=2, num_heads=2), torch.randn(3, 3, 8, 8)
    weights, loss = list(model.parameters()), model(images).square().mean()
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    torch.testing.assert_close(grad(loss, weights), expected)
    grad(loss, ())
    torch.testing.assert_close(tuple(p.grad for p in weights), expected)


@pytest.mark.parametrize("size", [16, 40])  # K is formed, and K is too large for that
def test_the_probe(size, cuda, tmp_path, monkeypatch):
    real = jacobian_probe.fresh_arm
    monkeypatch.setattr(jacobian_probe, "fresh_arm", lambda *a, **k: real(*a, **k).to(torch.double))
    monkeypatch.setattr(ViT, "double", lambda model: model)  # torch cannot convert fake weights
    words = f"--device cuda --image-size {size} --depths 1 --seeds 1 --images 2"
    words += " --variants residual skipless-identity"
    run_main(jacobian_probe.main, words.split(), tmp_path, monkeypatch)


@pytest.mark.parametrize("command", ["segment --epochs 1", "discover", "picture"])
def test_dense(command, cuda, tmp_path, monkeypatch):
    real = scenes.synthetic_scenes
    monkeypatch.setattr(scenes, "synthetic_scenes", lambda number, *rest: real(3, *rest))
    cuda.whole_number = 1  # BatchNorm divides by the number of its batches
    words = f"{command} --device cuda --random-init residual --image-size 16"
    run_main(eval_dense.main, words.split(), tmp_path, monkeypatch)


def test_the_comparison_of_the_first_gpu(cuda, monkeypatch):
    """After its first epoch, an epoch of an arm waits to read its loss and its accuracy alone."""
    monkeypatch.setattr(first_gpu, "BATCH", dict(cuda=4))
    shape = dict(image_size=64, patch_size=16, num_classes=5, dim=16, depth=1, num_heads=2)
    data = torch.zeros(9, 3, 64, 64, dtype=torch.uint8).cuda(), torch.zeros(9).long().cuda()
    for arm in first_gpu.ARMS:
        run = first_gpu.training(arm, shape, 1e-3, 3, data, data, math.inf)
        for _ in enumerate(run):
            cuda.step = arm  # from its second epoch on
        waits = [wait.split(":")[0] for wait in cuda.waits[arm]]
        assert waits == ["first_gpu.py training", "first_gpu.py top1"] * 2, cuda.waits[arm]
        cuda.step = None
