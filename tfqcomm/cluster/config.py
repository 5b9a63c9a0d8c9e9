"""The cluster as people write it: in `TF_CONFIG`, in Keras' variables, in a resolver."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from tfqcomm.cluster.addresses import failure_to_listen, split_address

JOBS = ("chief", "worker", "ps", "evaluator")
KERAS_VARIABLES = (
    "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "KERAS_DISTRIBUTION_PROCESS_ID",
)
_EXAMPLE = (
    'An example: {"cluster": {"worker": ["host0:2222", "host1:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Tasks and their addresses, and which of them this process is.

    Attributes:
        source: where it was written, for messages.
        jobs: the addresses of each job.
        job: of this process.
        index: of this process within its job.
        rpc_layer: TensorFlow's protocol.

    Raises:
        ValueError: what is wrong, what was received, and what to do.
    """

    source: str
    jobs: dict[str, list[str]]
    job: str
    index: int
    rpc_layer: str = "grpc"

    def __post_init__(self):
        self._check_jobs()
        self._check_addresses()
        self._check_task()

    @classmethod
    def from_environment(cls) -> Cluster | None:
        """That of `TF_CONFIG`, else that of Keras' own variables; None if there is neither."""
        text = os.environ.get("TF_CONFIG", "")
        if text.strip():
            return cls._from_tf_config(text)
        if any(os.environ.get(name) for name in KERAS_VARIABLES):
            return cls._from_keras_variables()
        return None

    @classmethod
    def _from_tf_config(cls, text: str) -> Cluster | None:
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"TF_CONFIG must be JSON, and is not: {error}. {_EXAMPLE}. "
                f"Received: TF_CONFIG={text!r}"
            ) from None
        if not isinstance(config, dict):
            raise ValueError(f"TF_CONFIG must be an object. {_EXAMPLE}. Received: {text}")
        cluster, task = config.get("cluster") or {}, config.get("task") or {}
        if not cluster and not task:
            return None  # what a process alone may be given
        for name, value in {"cluster": cluster, "task": task}.items():
            if not isinstance(value, dict) or not value:
                raise ValueError(
                    f"TF_CONFIG must have {name!r}. {_EXAMPLE}. Received: TF_CONFIG={text}"
                )
        for name in ("type", "index"):
            if name not in task:
                raise ValueError(
                    f"TF_CONFIG must have {name!r} in 'task', which says which of the tasks this "
                    f"process is. {_EXAMPLE}. Received: task={task}"
                )
        layer = config.get("rpc_layer") or "grpc"
        return cls("TF_CONFIG", cluster, task["type"], _integer(task["index"]), layer)

    @classmethod
    def _from_keras_variables(cls) -> Cluster:
        received = {name: os.environ.get(name) for name in KERAS_VARIABLES}
        listed, count, index = received.values()
        addresses = [part.strip() for part in (listed or "").split(",") if part.strip()]
        if not addresses or not index:
            raise ValueError(
                f"{KERAS_VARIABLES[0]} and {KERAS_VARIABLES[2]} must both be set: the addresses of "
                "all processes, `host0:2222,host1:2222`, and which of them this one is, from 0. "
                f"Received: {received}"
            )
        if count and _integer(count) != len(addresses):
            raise ValueError(
                f"{KERAS_VARIABLES[0]} must have an address for each of the processes that "
                f"{KERAS_VARIABLES[1]} counts. Received: {received}"
            )
        return cls("KERAS_DISTRIBUTION_*", {"worker": addresses}, "worker", _integer(index))

    @property
    def tasks(self) -> dict[str, str]:
        """The address of each task, by its name for people."""
        return {
            f"{job} {index}": address
            for job, addresses in self.jobs.items()
            for index, address in enumerate(addresses)
        }

    @property
    def task(self) -> str:
        """This process' own name."""
        return f"{self.job} {self.index}"

    @property
    def address(self) -> str:
        """Where the others look for this process."""
        return self.tasks.get(self.task, "")

    def only(self, *jobs: str) -> Cluster:
        """The same without the other jobs."""
        kept = {job: addresses for job, addresses in self.jobs.items() if job in jobs and addresses}
        return dataclasses.replace(self, jobs=kept)

    def check_port(self) -> None:
        """Makes sure that this process can listen at its address.

        Raises:
            ValueError: it cannot; names the address and the task.
        """
        if reason := failure_to_listen(self.address):
            raise ValueError(
                f"{self.source}: this process is {self.task} and cannot listen on its port: "
                f"{reason}. Does another process run with the same type and index, or is one of an "
                f"earlier run left? Received: {self.task} at {self.address}"
            )

    def _check_jobs(self) -> None:
        for job, addresses in self.jobs.items():
            if job not in JOBS:
                raise ValueError(
                    f"{self.source}: a job must be one of {', '.join(JOBS)}. Received: {job!r} in "
                    f"cluster={self.jobs}"
                )
            if not isinstance(addresses, list):
                raise ValueError(
                    f"{self.source}: job {job!r} must be a list of addresses, one for each task. "
                    f"Received: {job}={addresses!r}"
                )
        if len(self.jobs.get("chief", [])) > 1:
            raise ValueError(
                f"{self.source}: there must be one chief; the others are workers. Received: "
                f"chief={self.jobs['chief']}"
            )

    def _check_addresses(self) -> None:
        places: dict[tuple[str, int], str] = {}
        for task, address in self.tasks.items():
            try:
                place = split_address(address)
            except ValueError as error:
                raise ValueError(
                    f"{self.source}: the address of {task} is wrong: {error}. Received: {address!r}"
                ) from None
            if place in places:
                raise ValueError(
                    f"{self.source}: {places[place]} and {task} have the same address; each task "
                    f"needs its own. Received: {address!r} twice in cluster={self.jobs}"
                )
            places[place] = task

    def _check_task(self) -> None:
        if self.job == "evaluator":  # need not be in the cluster, which does not talk to it
            return
        received = f"Received: task={{'type': {self.job!r}, 'index': {self.index!r}}}"
        if not self.jobs.get(self.job):
            raise ValueError(
                f"{self.source}: the type of this process' task must be one of the cluster's jobs, "
                f"{', '.join(map(repr, self.jobs))}. {received}"
            )
        count = len(self.jobs[self.job])
        if type(self.index) is not int or not 0 <= self.index < count:
            raise ValueError(
                f"{self.source}: the index of this process' task must be an integer from 0 to "
                f"{count - 1}, for there are {count} tasks of the job {self.job!r}: "
                f"{self.jobs[self.job]}. {received}"
            )


def _integer(value: Any) -> Any:
    """An integer that was written as text, as TensorFlow takes it; anything else as it is."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


def from_parts(
    source: str, jobs: Mapping[str, Any], job: str | None, index: int | None, rpc_layer: str | None
) -> Cluster:
    """A cluster that some resolver describes."""
    if not job or index is None:
        raise ValueError(
            f"{source} must say which task this process is: set its `task_type` and `task_id`. "
            f"Received: task_type={job!r}, task_id={index!r}, cluster={dict(jobs)}"
        )
    return Cluster(source, dict(jobs), job, _integer(index), rpc_layer or "grpc")
