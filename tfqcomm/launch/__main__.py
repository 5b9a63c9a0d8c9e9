"""Starts a TensorFlow cluster on this machine, one process per task.

    python -m tfqcomm.launch --workers=4 train.py --learning_rate=0.1
    python -m tfqcomm.launch --workers=2 -m experiments.comp_ams --dataset=digits
    python -m tfqcomm.launch --workers=2 --parameter_servers=1 train_ps.py

Every task gets its own `TF_CONFIG`, and every line it prints is shown with its name in front. The
first task that fails ends all of them, and its exit code is the launcher's; Ctrl-C ends all of them
too. With parameter servers the script runs once, as the chief; the workers and the parameter
servers run `python -m tfqcomm.launch --serve`, which also starts such a task on a real cluster,
under the `TF_CONFIG` it finds there. There a worker that is killed is done without, while others
are left, or started again, up to `--max_restarts` times in all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence

from tfqcomm.launch.environment import cluster_of, reserve_ports, task_environment
from tfqcomm.launch.local_cluster import LocalCluster, say
from tfqcomm.launch.server import serve

USAGE_ERROR = 2  # the exit code, as argparse has it


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
    count = _num_tasks(options)
    try:
        ports = reserve_ports(count, options.port)
    except OSError as error:
        say(f"No free ports for {count} tasks, from --port={options.port}: {error}")
        return USAGE_ERROR
    addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
    try:
        return _run(options, cluster_of(addresses, options.parameter_servers))
    except BrokenPipeError:  # Nobody reads our output any more, as after `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(options: argparse.Namespace, cluster: dict[str, list[str]]) -> int:
    script = [sys.executable, *(["-m"] if options.module else []), *options.command]
    server = [sys.executable, "-m", "tfqcomm.launch", "--serve"]
    script_job = "chief" if "chief" in cluster else "worker"
    threads = {}
    if options.threads_per_worker:
        names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
        threads = dict.fromkeys(names, str(options.threads_per_worker))
    with LocalCluster(options.max_restarts) as running:
        for job, addresses in cluster.items():
            for index in range(len(addresses)):
                variables = {**task_environment(cluster, job, index), **threads}
                command = script if job == script_job else server
                expendable = job == "worker" and job != script_job
                running.start(f"{job} {index}", command, variables, expendable=expendable)
        return running.run([t for t in running.tasks if t.name.startswith(script_job)])


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
        help="how often workers that were killed are started again; with parameter servers only",
    )
    add("--port", type=int, default=0, help="first of the ports in a row; default: any free ones")
    add(
        "--threads_per_worker",
        type=int,
        help="threads each task computes with; default: TensorFlow's, all cores for each task",
    )
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
    if options.max_restarts and not options.parameter_servers:
        return (
            "Argument `--max_restarts` needs `--parameter_servers`: without them a worker's "
            f"failure ends all. Received: --max_restarts={options.max_restarts}"
        )
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
