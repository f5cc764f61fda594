"""Weighted k-nearest-neighbour classification: what frozen features tell about an image's class."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minskip import ViT
from support.data import normalise
from support.processes import autocast, mean_over_processes, on_device


@torch.no_grad()
def knn_classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class of each query, by a vote of its k nearest neighbours with weights exp(cosine / tau).

    From Wu et al. 2018 (arXiv 1805.01978), as in DINO's evaluation. tau is the temperature. The
    bank (n, dim) and the queries (m, dim) have unit length. If the bank has fewer than k images,
    all of them vote. Returns (m,).
    """
    classes = int(bank_labels.max()) + 1
    votes = []
    for part in queries.split(256):  # the similarities of all would not fit into memory
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)))
        weights = (similarity / temperature).exp()
        score = weights.new_zeros(len(part), classes)
        votes.append(score.scatter_add_(1, bank_labels[nearest], weights).argmax(1))
    return torch.cat(votes)


@torch.no_grad()
def features_of(model: ViT, batches, device: torch.device, amp: str) -> tuple[Tensor, Tensor]:
    """The pooled features of a data set, (image, dim), of unit length, and its labels, (image,)."""
    model.eval()
    features, labels = [], []
    for images, classes in batches:
        images, classes = on_device([images, classes], device)
        with autocast(device, amp):
            features.append(model(normalise(images)).float())
        labels.append(classes)
    return F.normalize(torch.cat(features), dim=-1), torch.cat(labels)


def gathered(x: Tensor) -> Tensor:
    """The tensors of all processes, concatenated along axis 0; their lengths may differ."""
    if not dist.is_initialized():
        return x
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, int(max(lengths)) - len(x)])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths)])


def knn_accuracy(model: ViT, train_batches, val_batches, device: torch.device, amp: str) -> float:
    """Top-1 accuracy on the validation images in percent, with the training images as the bank."""
    bank, bank_labels = (gathered(x) for x in features_of(model, train_batches, device, amp))
    queries, labels = features_of(model, val_batches, device, amp)
    hits = (knn_classify(bank, bank_labels, queries) == labels).sum()
    counts = mean_over_processes(torch.stack([hits, torch.full_like(hits, len(labels))]).double())
    return (100 * counts[0] / counts[1]).item()
