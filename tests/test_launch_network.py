"""The launcher's networks: what is asked for, what the tasks get, and that nothing is left."""

import json
import os
import pathlib
import shutil
import signal

import pytest

from tests.network import network
from tests.test_launch import TASK, launch, lines_of, script, start, wait_until_gone
from tfqcomm.launch import namespaces
from tfqcomm.launch.units import bits_per_second, microseconds

__all__ = ["script"]  # the fixture

# Each prints the namespace it is in, then does what is appended.
IN_NETWORK = f"""{TASK}
import pathlib, signal, socket
config = json.loads(os.environ["TF_CONFIG"])
print("namespace", os.stat("/proc/self/ns/net").st_ino, flush=True)
"""
MEET = """
host, _, port = config["cluster"]["worker"][0].rpartition(":")
if task == 0:
    connection, _ = socket.create_server(("", int(port))).accept()
else:
    while True:
        try:
            connection = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
"""
TRANSFER = """
begin, received = time.monotonic(), 0
if task == 1:
    connection.sendall(bytes(2_000_000))
else:
    while part := connection.recv(1 << 16):
        received += len(part)
    print("result", json.dumps([received, time.monotonic() - begin]))
"""
PING = """
begin = time.monotonic()
for _ in range(10):
    if task == 1:
        connection.sendall(b"x")
    connection.recv(1)
    if task == 0:
        connection.sendall(b"x")
print("result", (time.monotonic() - begin) / 10)
"""


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100mbit", 100_000_000),
        ("100Mbit", 100_000_000),
        ("100Mbps", 100_000_000),
        ("100 Mbit/s", 100_000_000),
        ("100Mb/s", 100_000_000),
        ("1gbit", 10**9),
        ("1.5Gbps", 1_500_000_000),
        ("10kbit", 10_000),
        ("64000bit", 64_000),
        ("100gbit", 10**11),
    ],
)
def test_rates_as_people_write_them(text, rate):
    assert bits_per_second(text) == rate


@pytest.mark.parametrize(
    ("text", "time"), [("5ms", 5000), ("200us", 200), ("0.5 ms", 500), ("0.1s", 100_000)]
)
def test_times_as_people_write_them(text, time):
    assert microseconds(text) == time


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--bandwidth=100", "must be a number and a unit, as in 100mbit, 1gbit or 2.5Mbps"),
        ("--bandwidth=fast", "must be a number and a unit, as in 100mbit, 1gbit or 2.5Mbps"),
        ("--bandwidth=-1mbit", "must be a number and a unit, as in 100mbit, 1gbit or 2.5Mbps"),
        ("--bandwidth=1mbit100", "must be a number and a unit, as in 100mbit, 1gbit or 2.5Mbps"),
        ("--bandwidth=", "must be a number and a unit, as in 100mbit, 1gbit or 2.5Mbps"),
        ("--bandwidth=100MB", "must be in bits per second, not bytes, as in 100mbit or 1gbit"),
        ("--bandwidth=100MBps", "must be in bits per second, not bytes, as in 100mbit or 1gbit"),
        ("--bandwidth=100MB/s", "must be in bits per second, not bytes, as in 100mbit or 1gbit"),
        ("--bandwidth=0mbit", "must be from 10kbit to 100gbit"),
        ("--bandwidth=9kbit", "must be from 10kbit to 100gbit"),
        ("--bandwidth=1000gbit", "must be from 10kbit to 100gbit"),
        ("--latency=5", "must be a number and a unit, as in 5ms, 200us or 0.1s"),
        ("--latency=5min", "must be a number and a unit, as in 5ms, 200us or 0.1s"),
        ("--latency=0ms", "must be from 1us to 10s"),
        ("--latency=11s", "must be from 1us to 10s"),
    ],
)
def test_mistakes(argument, message, script):
    name = argument.partition("=")[0]
    done = launch("--workers=1", argument, script(""))
    assert done.returncode == 2
    assert f"Argument `{name}` {message}. Received: {argument}\n" in done.stderr


def test_too_many_tasks(script):
    done = launch("--workers=255", "--bandwidth=1gbit", script(""))
    assert done.returncode == 2
    assert "There can be 254 tasks with a network of their own. Received: 255 tasks" in done.stderr


def tools(directory: pathlib.Path, *names: str) -> dict[str, str]:
    """A PATH on which only these commands are."""
    for name in names:
        (directory / name).symlink_to(shutil.which(name))
    return {"PATH": str(directory)}


def test_who_may_not_make_namespaces_is_told(script, tmp_path):
    forbidden = tmp_path / "unshare"
    forbidden.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2; exit 1\n")
    forbidden.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("--workers=2", "--bandwidth=1gbit", script(""), variables={"PATH": path})
    assert done.returncode == 2
    (line,) = lines_of(done.stderr, "launch")
    assert line.startswith("Arguments `--bandwidth` and `--latency` give each task a network names")
    assert "root or the right to make user namespaces" in line
    assert line.endswith("Received: --bandwidth=1gbit")


@pytest.mark.network
def test_missing_commands_are_named(script, tmp_path):
    path, bare, bin_ = script(""), tmp_path / "bare", tmp_path / "bin"
    bare.mkdir(), bin_.mkdir()
    done = launch("--workers=1", "--bandwidth=1gbit", path, variables=tools(bare))
    assert done.returncode == 2
    assert "The command `unshare` of util-linux is missing. Received: --bandwidth" in done.stderr
    some = tools(bin_, "unshare", "nsenter", "sh", "cat")
    done = launch("--workers=1", "--bandwidth=1gbit", path, variables=some)
    assert done.returncode == 2
    assert "The command `ip` of iproute2 is missing. Received: --bandwidth=1gbit" in done.stderr


@pytest.mark.parametrize(
    ("rate", "delay", "expected"),
    [
        (None, None, []),
        (10**9, None, ["root handle 1: tbf rate 1000000000bit burst 131072 latency 50ms"]),
        (10**6, None, ["root handle 1: tbf rate 1000000bit burst 16384 latency 50ms"]),
        (None, 200, ["root handle 10: netem delay 200us limit 100000"]),
        (
            10**8,
            5000,
            [
                "root handle 1: tbf rate 100000000bit burst 125000 latency 50ms",
                "parent 1:1 handle 10: netem delay 5000us limit 100000",
            ],
        ),
    ],
)
def test_disciplines(monkeypatch, rate, delay, expected):
    """The exact commands: not every kernel has netem, on which they could be tried."""
    said = []
    monkeypatch.setattr(namespaces, "_in", lambda namespace, command: said.append(command))
    namespaces._shape("namespace", "eth0", rate, delay)
    assert said == [f"tc qdisc add dev eth0 {how}" for how in expected]


def namespaces_in_use(mark: str = "") -> set[int]:
    """The network namespaces that a process is in or holds.

    Args:
        mark: only of processes that have this text in their environment.
    """
    found = set()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        if mark and not _has_in_environment(process, mark):
            continue
        for place in ("ns/net", "fd/*"):
            for path in process.glob(place):
                try:
                    target = os.readlink(path)
                except OSError:  # It has ended.
                    continue
                if target.startswith("net:["):
                    found.add(int(target[5:-1]))
    return found


def _has_in_environment(process: pathlib.Path, mark: str) -> bool:
    try:
        return mark.encode() in (process / "environ").read_bytes()
    except OSError:  # It has ended, or is another user's.
        return False


def read_namespaces(launcher, count: int) -> list[int]:
    """Waits for `count` lines "[worker i] namespace n"."""
    lines = [launcher.stdout.readline().split() for _ in range(count)]
    assert all(words[2] == "namespace" for words in lines)
    return [int(words[3]) for words in lines]


def check_transfer(done) -> None:
    """That 2 MB have taken the time of 20 Mbit/s."""
    received, seconds = json.loads(lines_of(done.stdout, "worker 0")[1].removeprefix("result "))
    assert received == 2_000_000
    assert 0.85 < seconds / (received * 8 / 20e6) < 2


@pytest.mark.network
def test_each_task_has_a_network_of_its_own_at_the_speed_that_was_asked_for(script):
    done = launch("--workers=2", "--bandwidth=20mbit", script(IN_NETWORK, MEET, TRANSFER))
    assert done.returncode == 0, done.stderr
    namespaces = {lines_of(done.stdout, f"worker {i}")[0] for i in range(2)}
    assert len(namespaces) == 2
    assert f"namespace {os.stat('/proc/self/ns/net').st_ino}" not in namespaces
    check_transfer(done)


@pytest.mark.network
def test_user_namespaces_do_where_root_has_no_rights(script):
    """A process of root's without its capabilities, as in a container, but for that to map root."""
    without = ["setpriv", "--bounding-set=-all,+setfcap"]
    path = script(IN_NETWORK, MEET, TRANSFER)
    done = launch("--workers=2", "--bandwidth=20mbit", path, prefix=without)
    if done.returncode == 2:  # some systems let nobody else make user namespaces
        assert "or the right to make user namespaces" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        check_transfer(done)
    without = ["setpriv", "--bounding-set=-all"]
    done = launch("--workers=2", "--bandwidth=20mbit", path, prefix=without)
    assert done.returncode == 2
    assert "or the right to make user namespaces" in done.stderr


@pytest.mark.network
def test_latency_or_what_is_missing_for_it(script):
    done = launch("--workers=2", "--latency=20ms", script(IN_NETWORK, MEET, PING))
    if done.returncode == 2:
        assert "A latency needs the queueing discipline netem (module sch_netem)" in done.stderr
        assert done.stderr.endswith("Received: --latency=20ms\n")
    else:
        assert done.returncode == 0, done.stderr
        seconds = float(lines_of(done.stdout, "worker 1")[1].removeprefix("result "))
        assert 0.04 < seconds < 0.06


@pytest.mark.network
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_launcher_that_is_ended(script, number):
    path = script(IN_NETWORK, "time.sleep(60)")
    with start("--workers=2", "--bandwidth=1gbit", path) as launcher:
        namespaces = read_namespaces(launcher, 2)
        assert namespaces_in_use() >= set(namespaces)
        held = namespaces_of(launcher.pid)
        assert len(held) == 3  # and that of the bridge
        launcher.send_signal(number)
        launcher.wait(20)
        assert wait_until_gone(processes_in(namespaces))
    assert not namespaces_in_use() & held


def namespaces_of(pid: int) -> set[int]:
    """The network namespaces that a process holds by file descriptors."""
    targets = [os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").glob("*")]
    return {int(target[5:-1]) for target in targets if target.startswith("net:[")}


def processes_in(namespaces: list[int]) -> list[int]:
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if int(os.readlink(process / "ns/net")[5:-1]) in namespaces:
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.network
def test_nothing_is_left_of_a_worker_that_is_killed(script):
    path = script(IN_NETWORK, "os.kill(os.getpid(), 9) if task else time.sleep(60)")
    done = launch("--workers=2", "--bandwidth=1gbit", path)
    assert done.returncode == 128 + signal.SIGKILL
    namespaces = {int(lines_of(done.stdout, f"worker {i}")[0].split()[1]) for i in range(2)}
    assert len(namespaces) == 2
    assert not namespaces_in_use() & namespaces


@pytest.mark.network
def test_a_restart_takes_another_port_unless_it_was_named(script):
    path = script(IN_NETWORK, "print(config['cluster']['worker'][task]); sys.exit(1)")
    done = launch("--workers=1", "--max_restarts=1", "--bandwidth=1gbit", path)
    assert lines_of(done.stdout, "worker 0")[1::2] == ["10.0.0.1:2222", "10.0.0.1:2223"]
    done = launch("--workers=1", "--max_restarts=1", "--bandwidth=1gbit", "--port=77", path)
    assert lines_of(done.stdout, "worker 0")[1::2] == ["10.0.0.1:77"] * 2


@pytest.mark.network
@pytest.mark.multi_process
@pytest.mark.slow
def test_parameter_servers_have_networks_too(tmp_path):
    out = tmp_path / "cluster.json"
    path = tmp_path / "chief.py"
    path.write_text(f"""
import json, os, tensorflow as tf
strategy = tf.distribute.ParameterServerStrategy(
    tf.distribute.cluster_resolver.TFConfigClusterResolver()
)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
with strategy.scope():
    total = tf.Variable(1.0)
value = coordinator.schedule(tf.function(lambda: total + 1))
coordinator.join()
with open({str(out)!r}, "w") as file:
    json.dump([float(value.fetch()), json.loads(os.environ["TF_CONFIG"])["cluster"]], file)
""")
    done = launch("--workers=1", "--parameter_servers=1", "--bandwidth=100mbit", str(path))
    assert done.returncode == 0, done.stderr
    value, cluster = json.loads(out.read_text())
    assert value == 2
    assert cluster == {
        "chief": ["10.0.0.1:2222"],
        "worker": ["10.0.0.2:2222"],
        "ps": ["10.0.0.3:2222"],
    }


@pytest.mark.network
def test_a_network_is_gone_after_an_error():
    with pytest.raises(RuntimeError, match="of ours"), network(2) as net:
        held = {os.stat(path).st_ino for path in net.namespaces}
        assert namespaces_in_use() >= held
        raise RuntimeError("of ours")
    assert not namespaces_in_use() & held
