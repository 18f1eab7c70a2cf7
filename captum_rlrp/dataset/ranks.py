"""The processes of a run: torch.distributed's where torchrun started them, else one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

T = TypeVar("T")
# Ranks meet at the start and at the end only; the fastest waits for the slowest in between.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process's number among how many."""

    rank: int = 0
    world: int = 1

    def from_first(self, value: T) -> T:
        """The value that rank 0 holds."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order; also a barrier."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the process group that is there, or that torchrun describes, or none.

    What ranks tell each other is a few bytes, so the group made here is gloo's, on GPUs too.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
    elif dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[attr-defined]
        store = _unused(store, rank, world)
        dist.init_process_group("gloo", None, _PATIENCE, world, rank, store)
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()


def _unused(store: Any, rank: int, world: int) -> Any:
    """A part of the store in which only these processes have been.

    torchrun keeps one store over all its restarts (as of PyTorch 2.14), in which gloo would find
    the addresses of processes that are dead. So the first rank names a new part: it answers each
    process under that one's own name, for what a dead one asked is in the store, too.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.add(f"joined/{name}", 1)
    else:
        while store.add(f"joined/{name}", 0) < world - 1:
            for other in range(1, world):
                if store.check([f"asks/{other}"]):
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
            time.sleep(0.01)
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def local_rank() -> int:
    """Which of its machine's processes this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share_of_cores() -> int | None:
    """Threads for this rank, so that a machine's ranks do not fight; None to leave them as set.

    torchrun gives each of several ranks one thread, and a user another number by OMP_NUM_THREADS.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    is_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    return max(1, cores // ranks)
