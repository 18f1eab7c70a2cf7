"""How far all ranks are, and what their time goes into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from .store import Run

T = TypeVar("T")
_REFRESH = 2.0  # seconds between two looks at what the other ranks have written


@dataclass
class Times:
    """Seconds of one rank: in all, the first batch, waiting for samples, writing; and samples."""

    total: float = 0.0
    first: float = 0.0  # in which the model is captured
    waiting: float = 0.0
    writing: float = 0.0
    samples: int = 0

    def waited_for(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as waiting."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waiting += time.perf_counter() - start
            yield batch


class Progress:
    """One bar for all ranks, drawn by the first, which sees the others' shards in the folder.

    So no rank ever waits for another in order to be counted.
    """

    def __init__(self, out: Path, run: Run, done: int, shown: bool) -> None:
        self.sizes = {
            f"{start // run.shard_size:06d}.h5": stop - start for start, stop in run.shards()
        }
        self.folder = out / "shards"
        self.bar = tqdm(total=run.samples, initial=done, unit="sample", disable=not shown)
        self.written, self.open = done, 0
        self.looked = time.monotonic()

    def explained(self, count: int, times: Times, elapsed: float) -> None:
        """So many more samples of this rank's open shard are done."""
        self.open += count
        if self.bar.disable:
            return
        if time.monotonic() - self.looked > _REFRESH:
            self.looked = time.monotonic()
            names = {path.name for path in self.folder.iterdir()}
            self.written = sum(size for name, size in self.sizes.items() if name in names)
            if elapsed:
                self.bar.set_postfix_str(f"waits for data {times.waiting / elapsed:.0%}", False)
        self._move()

    def shard_written(self, size: int) -> None:
        """This rank's shard is complete."""
        self.written, self.open = self.written + size, 0
        self._move()

    def close(self) -> None:
        self.bar.close()

    def _move(self) -> None:
        self.bar.update(max(0, min(self.written + self.open, self.bar.total) - self.bar.n))
