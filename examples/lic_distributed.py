"""Several processes that train one model, as torchrun starts them: who this one is, and what they have to agree on.

Every process holds the whole model and steps it with the same, averaged gradients, so that all stay equal to the bit. Of each
batch of --batch-size crops every process takes its part. The first one alone writes and speaks.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from lic_files import InputError
from torch import Tensor, nn


class World:
    """The processes of this run; one, where torchrun did not start it.

    Attributes:
        size, rank: how many there are, and which this is.
        local_rank: which it is on its machine, and so which GPU is its own.
    """

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._host_group = None

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """This process's device, where --device is `name`."""
        return f"cuda:{self.local_rank}" if self.size > 1 and name == "cuda" else name

    def join(self, device: str) -> None:
        """Meet the others."""
        if self.size == 1:
            return
        if device.startswith("cuda"):
            if device != "cuda":
                raise InputError(f"--device {device}: under torchrun each process takes a GPU of its own; give --device cuda")
            torch.cuda.set_device(self.device(device))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        # Small decisions (has a signal come?) are taken on the hosts: asking the GPUs would make them wait at every step.
        self._host_group = dist.new_group(backend="gloo") if device.startswith("cuda") else dist.group.WORLD

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def largest(self, values: list[int]) -> list[int]:
        """Of each value the largest of all processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor([int(value) for value in values])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._host_group)
        return tensor.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, of float tensors of one shape on their devices."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def average_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Every .grad becomes its mean over all processes: one message for each dtype, however many parameters."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in params:
            if p.grad is None:  # a parameter that this part of the batch did not use may have one elsewhere
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for grads in by_dtype.values():
            flat = self.mean(torch.cat([g.flatten() for g in grads]))
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])

    def same_on_all(self, tensors: list[Tensor]) -> None:
        """Take the first process's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: object) -> list:
        """Every process's value, in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(group=self._host_group)
