"""Explanations that were recorded, to be done again without asking the rules."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

from .task import Outcome, Task

T = TypeVar("T")
# What Task.run returns, for a task with the same key; None where it has to run as ever.
Replay = Callable[[Task], Outcome | None]


class Recorder(Protocol):
    """Records what a task has the device do.

    Attributes:
        capacity: How many recordings are to be kept.
    """

    capacity: int

    def key(self, task: Task) -> Hashable:
        """The same for tasks that one recording serves."""

    def record(self, task: Task) -> tuple[Outcome, Replay | None]:
        """Runs the task. Its outcome and its recording, if it can be recorded."""


class Recordings:
    """The latest recordings, of which each is made when a task comes for the second time.

    No lock is held while a task runs.

    Args:
        recorder: Makes them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._kept: OrderedDict[Hashable, Replay] = OrderedDict()
        self._met: OrderedDict[Hashable, bool] = OrderedDict()  # whether to record it next time
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, task: Task) -> Outcome:
        """As :meth:`Task.run`."""
        key = self._recorder.key(task)
        with self._lock:
            replay = self._kept.get(key)
            makes = replay is None and self._met.get(key, False)
            if replay is not None:
                self._kept.move_to_end(key)
            else:  # while one thread makes it, or where it cannot be made, others do not try
                self._note(key, not makes and self._met.get(key, True))
        if makes:
            return self._run_and_record(task, key)
        outcome = replay(task) if replay is not None else None
        return task.run() if outcome is None else outcome

    def _run_and_record(self, task: Task, key: Hashable) -> Outcome:
        may_record = True  # next time, if this one fails for reasons of its own
        try:
            outcome, replay = self._recorder.record(task)
            may_record = replay is not None
            if replay is not None:
                with self._lock:
                    _refresh(self._kept, key, replay, self._recorder.capacity)
            return outcome
        finally:
            with self._lock:
                self._note(key, may_record)

    def _note(self, key: Hashable, may_record: bool) -> None:
        _refresh(self._met, key, may_record, 8 * self._recorder.capacity)


def _refresh(kept: OrderedDict[Hashable, T], key: Hashable, value: T, capacity: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > capacity:
        kept.popitem(last=False)
