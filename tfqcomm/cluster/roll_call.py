"""Who has come? Asked in the background while TensorFlow waits for all, and names nobody."""

from __future__ import annotations

import threading

from absl import logging

from tfqcomm.cluster.addresses import failure_to_connect, is_of_this_machine, split_address
from tfqcomm.cluster.config import Cluster

PERIOD = 0.5  # seconds between two questions to a task
PATIENCE = 20.0  # seconds until somebody is told for whom this process waits
MOST_NAMED = 8


class RollCall:
    """Asks the port of each of the other tasks until it has answered once.

    with RollCall(cluster) as call:
        wait()
    call.report()

    Args:
        cluster: the tasks.
    """

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        others = {task: where for task, where in cluster.tasks.items() if task != cluster.task}
        self._absent = dict.fromkeys(others, "not asked yet")  # task -> why
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=item, daemon=True) for item in others.items()
        ]
        self._threads.append(threading.Thread(target=self._tell, daemon=True))

    def __enter__(self) -> RollCall:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def _ask(self, task: str, address: str) -> None:
        while not self._ended.is_set():
            reason = failure_to_connect(address)
            if reason is None:
                del self._absent[task]
                return
            self._absent[task] = reason
            self._ended.wait(PERIOD)

    def _tell(self) -> None:
        if not self._ended.wait(PATIENCE) and self._absent:
            logging.warning("Waiting for %s", "; ".join(self._lines()))

    def _lines(self) -> list[str]:
        absent = list(self._absent.items())
        lines = [
            f"{task} ({self._cluster.tasks[task]}): {reason}"
            for task, reason in absent[:MOST_NAMED]
        ]
        if len(absent) > MOST_NAMED:
            lines.append(f"and {len(absent) - MOST_NAMED} more")
        return lines

    def report(self) -> str:
        """Says who has never answered, and what to do."""
        cluster = self._cluster
        text = f"This process is {cluster.task} ({cluster.address}). "
        if lines := self._lines():
            text += "It waited for\n  " + "\n  ".join(lines)
            text += "\nStart these tasks, or correct their addresses. "
        else:
            text += "At the addresses of all others somebody answered. "
        text += (
            f"In {cluster.source} `cluster` must be the same for all tasks, and each needs the "
            "type and the index of its own."
        )
        if is_of_this_machine(split_address(cluster.address)[0]) is False:
            text += (
                f" No interface of this machine has the address {cluster.address}: "
                "is this another task's index?"
            )
        return text
