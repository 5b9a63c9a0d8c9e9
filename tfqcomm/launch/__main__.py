"""Starts a TensorFlow cluster on this machine, one process per task.

    python -m tfqcomm.launch --workers=4 train.py --learning_rate=0.1
    python -m tfqcomm.launch --workers=2 -m experiments.comp_ams --dataset=digits
    python -m tfqcomm.launch --workers=2 --parameter_servers=1 train_ps.py

Every task gets its own `TF_CONFIG`, and every line it prints is shown with its name in front. The
first task that fails ends all of them, and its exit code is the launcher's; Ctrl-C ends all of them
too. With `--max_restarts=N` all are then started again, up to N times; with
`tfqcomm.callbacks.BackupAndRestore` in the script the run goes on where it was. In each task
`TFQCOMM_RESTART_COUNT` says how often that has happened: 0 the first time.

With parameter servers the script runs once, as the chief; the workers and the parameter servers
run `python -m tfqcomm.launch --serve`, which also starts such a task on a real cluster, under the
`TF_CONFIG` it finds there. There a worker that is killed is done without, while others are left,
or started again alone, up to `--max_restarts` times in all.

With `--bandwidth=100mbit` or `--latency=5ms` every task has a network interface of its own, which
sends and receives no faster, as if each ran on its own machine (`namespaces.py`): Linux, iproute2,
and root or user namespaces. There is no way from there to other machines: data must be on this one.

What TensorFlow's C++ log says besides errors is not shown, unless `--verbose` is given or
`TF_CPP_MIN_LOG_LEVEL` is set to 0 or 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from tfqcomm.launch.environment import (
    ERRORS_ONLY,
    LOG_LEVEL,
    cluster_of,
    task_environment,
)
from tfqcomm.launch.local_cluster import LocalCluster, Task, say
from tfqcomm.launch.namespaces import MOST, NetworkError
from tfqcomm.launch.places import Loopback, Places, networks
from tfqcomm.launch.server import serve
from tfqcomm.launch.units import bits_per_second, microseconds

USAGE_ERROR = 2  # the exit code, as argparse has it
READERS = {"bandwidth": bits_per_second, "latency": microseconds}  # what is said of the network


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if mistake := _mistake_in(options):
        parser.error(mistake)
    if options.serve:
        serve()
        return 0
    try:
        return _run(options)
    except BrokenPipeError:  # Nobody reads our output any more, as after `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(options: argparse.Namespace) -> int:
    served = options.parameter_servers > 0  # then single workers are started again, not all
    attempts = 1 if served else 1 + options.max_restarts
    restarts = options.max_restarts if served else 0
    with LocalCluster(restarts, verbose=_is_verbose(options)) as running, ExitStack() as stack:
        for attempt in range(attempts):
            try:
                if attempt == 0:
                    places = _places(options, stack)
                else:
                    places.renew()
            except (OSError, NetworkError) as error:
                say(_why_no_places(options, error))
                return USAGE_ERROR
            code = running.run(_start(options, running, places, attempt))
            if code == 0 or running.interrupted or attempt == attempts - 1:
                break
            say(f"Starting all tasks again: restart {attempt + 1} of {attempts - 1}.")
    return code


def _places(options: argparse.Namespace, stack: ExitStack) -> Places:
    """Where the tasks are to run, until the end of `stack`."""
    if not _shaping(options):
        return Loopback(_num_tasks(options), options.port)
    rate = bits_per_second(options.bandwidth) if options.bandwidth else None
    delay = microseconds(options.latency) if options.latency else None
    return stack.enter_context(networks(_num_tasks(options), options.port, rate, delay))


def _shaping(options: argparse.Namespace) -> list[str]:
    """What has been said about the network, as it was given."""
    return [f"--{name}={getattr(options, name)}" for name in READERS if getattr(options, name)]


def _why_no_places(options: argparse.Namespace, error: Exception) -> str:
    if not _shaping(options):
        count = _num_tasks(options)
        return f"No free ports for {count} tasks, from --port={options.port}: {error}"
    return (
        "Arguments `--bandwidth` and `--latency` give each task a network namespace: this takes "
        "Linux, iproute2, and root or the right to make user namespaces (in a container: "
        f"CAP_SYS_ADMIN). {error} Received: {' '.join(_shaping(options))}"
    )


def _start(
    options: argparse.Namespace, running: LocalCluster, places: Places, attempt: int
) -> list[Task]:
    """Starts all tasks; returns those whose end is that of the run."""
    script = [sys.executable, *(["-m"] if options.module else []), *options.command]
    server = [sys.executable, "-m", "tfqcomm.launch", "--serve"]
    cluster = cluster_of(places.addresses, options.parameter_servers)
    script_job = "chief" if "chief" in cluster else "worker"
    common = _common_variables(options)
    tasks = [(job, index) for job, addresses in cluster.items() for index in range(len(addresses))]
    for place, (job, index) in enumerate(tasks):  # in the order of the addresses
        variables = {**task_environment(cluster, job, index, attempt), **common}
        serves = job != script_job
        running.start(
            f"{job} {index}",
            places.command(place, server if serves else script),
            variables,
            expendable=serves and job == "worker",
            serves=serves,
        )
    return [task for task in running.tasks if not task.serves]


def _common_variables(options: argparse.Namespace) -> dict[str, str]:
    variables = {}
    if options.threads_per_worker:
        names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
        variables = dict.fromkeys(names, str(options.threads_per_worker))
    if not options.verbose:
        variables[LOG_LEVEL] = os.environ.get(LOG_LEVEL) or ERRORS_ONLY
    return variables


def _is_verbose(options: argparse.Namespace) -> bool:
    """Whether the flag says so, or a log level that the user has set."""
    return options.verbose or os.environ.get(LOG_LEVEL, ERRORS_ONLY) < ERRORS_ONLY


def _num_tasks(options: argparse.Namespace) -> int:
    chief = 1 if options.parameter_servers else 0
    return chief + options.workers + options.parameter_servers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tfqcomm.launch",
        usage="%(prog)s --workers=N [options] (script.py | -m module) [its arguments ...]",
        description="Starts a TensorFlow cluster on this machine, one process per task.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workers", type=int, default=0, help="number of workers")
    add(
        "--parameter_servers",
        type=int,
        default=0,
        help="number of parameter servers; the script then runs once, as the chief",
    )
    add(
        "--max_restarts",
        type=int,
        default=0,
        help="how often all tasks are started again after a failure; with parameter servers: how "
        "often workers that were killed are, each alone",
    )
    add(
        "--bandwidth",
        help="the most each task sends and the most it receives, as in 100mbit or 1gbit; default: "
        "no limit",
    )
    add(
        "--latency",
        help="how long a message from task to task takes beside that, as in 5ms or 200us",
    )
    add("--port", type=int, default=0, help="first of the ports in a row; default: any free ones")
    add(
        "--threads_per_worker",
        type=int,
        help="threads each task computes with; default: TensorFlow's, all cores for each task",
    )
    add("--verbose", action="store_true", help="show TensorFlow's C++ log, not only its errors")
    add("--serve", action="store_true", help="be the server TF_CONFIG names; takes no script")
    add("-m", dest="module", action="store_true", help="run a module, as python -m does")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _mistake_in(options: argparse.Namespace) -> str | None:
    in_cluster = bool(os.environ.get("TF_CONFIG"))
    if options.serve:
        return None if in_cluster else "Argument `--serve` needs TF_CONFIG, which names the server."
    if in_cluster:
        return (
            "TF_CONFIG is set: this process is already a task of a cluster. Run the script itself "
            "there, without the launcher, or unset TF_CONFIG to start a cluster on this machine."
        )
    smallest = {"workers": 1, "parameter_servers": 0, "threads_per_worker": 1, "max_restarts": 0}
    for name, least in smallest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            return f"Argument `--{name}` must be at least {least}. Received: --{name}={value}"
    for name, read in READERS.items():
        if (text := getattr(options, name)) is not None:
            try:
                read(text)
            except ValueError as error:
                return f"Argument `--{name}` {error}. Received: --{name}={text}"
    if _shaping(options) and _num_tasks(options) > MOST:
        count = _num_tasks(options)
        return f"There can be {MOST} tasks with a network of their own. Received: {count} tasks"
    highest = 65536 - _num_tasks(options)
    if not 0 <= options.port <= highest:
        return f"Argument `--port` must be in [0, {highest}]. Received: --port={options.port}"
    return _mistake_in_command(options.command, options.module)


def _mistake_in_command(command: Sequence[str], is_module: bool) -> str | None:
    if not command:
        return "A script, or -m and a module, must follow the launcher's own arguments."
    name = command[0]
    if is_module and importlib.util.find_spec(name.partition(".")[0]) is None:
        return f"There is no module {name!r} in {os.getcwd()} or among those installed."
    if not is_module and not os.path.isfile(name):
        return f"There is no script {name!r} in {os.getcwd()}."
    return None


if __name__ == "__main__":
    sys.exit(main())
