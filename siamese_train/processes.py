"""The processes that train one network together (`torchrun`), or the only one there is.

Every process loads and embeds its share of a batch and then computes the loss of the whole batch from all embeddings;
see `Learner`. The first process alone writes files and validates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from siamese_train.torch_verifier import choose_device

# The others wait for the first one's validation, which can take long.
_TIMEOUT = timedelta(hours=6)


class Processes:
    """Rank and number of the processes; exchanges that cost nothing where there is one."""

    def __init__(self, device: torch.device, rank: int = 0, count: int = 1) -> None:
        self.device, self.rank, self.count = device, rank, count

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def counts(self, mine: int) -> list[int]:
        """The number that each process gives, in the order of ranks."""
        if self.count == 1:
            return [mine]
        gathered = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        dist.all_gather(gathered, torch.tensor([mine], device=self.device))
        return [int(number) for number in torch.cat(gathered).tolist()]

    def rows(self, mine: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """(sum(counts), ...) the rows of all processes, in rank order; gradients flow to this one's rows only."""
        if self.count == 1:
            return mine
        padded = torch.zeros((max(counts), *mine.shape[1:]), dtype=mine.dtype, device=self.device)
        padded[: len(mine)] = mine.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        parts[self.rank] = mine
        return torch.cat(parts)

    def texts(self, mine: str) -> list[str]:
        """The text that each process gives, in the order of ranks."""
        data = torch.tensor(list(mine.encode()), dtype=torch.uint8, device=self.device)
        counts = self.counts(len(data))
        parts = torch.split(self.rows(data, counts), counts)
        return [bytes(part.tolist()).decode() for part in parts]

    def any(self, mine: bool) -> bool:
        """Whether it is so in any of the processes."""
        return any(self.counts(int(mine)))

    def wait(self) -> None:
        """For all processes to come here."""
        self.counts(0)


@contextmanager
def joined_processes(asked_device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, each with a GPU of its own where there are GPUs.

    Raises:
        UsageError, EnvironmentFault: as `choose_device`.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(choose_device(asked_device))
        return
    if asked_device in ("auto", "cuda") and torch.cuda.is_available():
        asked_device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(asked_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(device, dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
