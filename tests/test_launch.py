"""The launcher, mostly on scripts without TensorFlow, which start at once."""

import ast
import contextlib
import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.multi_process import ROOT, WITHOUT_TENSORFLOW
from tfqcomm.cluster.addresses import failure_to_connect
from tfqcomm.launch import cluster_of, environment, output, reserve_ports, task_environment

LAUNCH = f"""{WITHOUT_TENSORFLOW}
import runpy
from tfqcomm.launch import local_cluster
local_cluster.GRACE_SECONDS = 0.5
runpy.run_module("tfqcomm.launch", run_name="__main__", alter_sys=True)
"""
TIMEOUT = 120  # seconds, for what should take one, or with TensorFlow ten

# Beginnings of scripts.
TASK = "import json, os, sys, time; task = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
ASLEEP = f"{TASK}print('pid', os.getpid(), flush=True)\n"


@pytest.fixture
def script(tmp_path):
    """Returns a function that writes a script and returns its path."""

    def write(*parts: str) -> str:
        path = tmp_path / "script.py"
        path.write_text("".join(textwrap.dedent(part) for part in parts))
        return str(path)

    return write


def start(*arguments: str, variables=None, prefix=(), **options) -> subprocess.Popen:
    """Starts the launcher; `prefix` is a command that runs it."""
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}  # the tests' own
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", LAUNCH, *arguments],
        **{"env": {**env, **(variables or {})}, **defaults, **options},
    )


def launch(*arguments: str, **options) -> subprocess.CompletedProcess:
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def read_pids(launcher: subprocess.Popen, count: int) -> list[int]:
    """Waits for `count` lines "[worker i] pid n"."""
    return [int(launcher.stdout.readline().split()[-1]) for _ in range(count)]


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(map(is_alive, pids)):
            return True
        time.sleep(0.02)
    return False


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def lines_of(text: str, name: str) -> list[str]:
    prefix = f"[{name}] "
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


def test_every_line_has_its_task_in_front_and_arguments_pass_untouched(script):
    path = script(
        "import os, sys\n"
        "print(sys.argv[1:]); print(os.environ['TF_CONFIG']); print()\n"
        "print('to stderr', file=sys.stderr); print(sys.stdin.read(), file=sys.stderr)\n"
        "print('no newline', end='')"
    )
    arguments = ["--workers=7", "--port", "x", "-m", "--", "--", "-h", "a b", ""]
    done = launch("--workers=2", path, *arguments, stdin=subprocess.PIPE)
    assert done.returncode == 0
    for i in range(2):
        passed, config, *rest = lines_of(done.stdout, f"worker {i}")
        assert ast.literal_eval(passed) == arguments
        assert json.loads(config)["task"] == {"type": "worker", "index": i}
        assert len(set(json.loads(config)["cluster"]["worker"])) == 2
        assert rest == ["", "no newline"]
        assert lines_of(done.stderr, f"worker {i}") == ["to stderr", ""]
    assert all(line.startswith("[worker ") for line in (done.stdout + done.stderr).splitlines())


def test_module_form(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    done = launch("--workers", "1", "-m", "package.module", "--workers=3", cwd=tmp_path)
    assert done.stdout == "[worker 0] __main__ ['--workers=3']\n"


def test_output_is_live(script):
    path = script("import time; print('now'); time.sleep(60)")
    with start("--workers=1", path) as launcher:
        assert launcher.stdout.readline() == "[worker 0] now\n"  # else waits for the test's timeout
        launcher.terminate()


def test_names_are_coloured_on_a_terminal_only(script):
    path = script("print('text')")
    ours, terminal = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    assert launch("--workers=1", path, stdout=terminal, env=plain).returncode == 0
    os.close(terminal)
    assert os.read(ours, 1000) == b"\x1b[36m[worker 0] \x1b[0mtext\r\n"
    os.close(ours)


def test_exit_code_of_the_first_failure_ends_all_quickly(script):
    path = script(TASK, "sys.exit('the reason') if task == 1 else time.sleep(60)")
    begin = time.monotonic()
    done = launch("--workers=3", path)
    assert time.monotonic() - begin < 10
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "[worker 1] the reason",
        "[launch] worker 1 failed: exit code 1. Ending all tasks.",
    ]
    path = script(TASK, "sys.exit(37) if task == 0 else time.sleep(60)")
    assert launch("--workers=2", path).returncode == 37


def test_a_task_killed_by_a_signal_is_named(script):
    done = launch(
        "--workers=2", script(TASK, "os.kill(os.getpid(), 9) if task else time.sleep(60)")
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert "[launch] worker 1 failed: SIGKILL. Ending all tasks." in done.stderr


def test_who_ignores_sigterm_is_killed(script):
    path = script(
        TASK,
        """
        import pathlib, signal
        ready = pathlib.Path(__file__).with_name("ready")
        if task == 0:
            signal.signal(signal.SIGTERM, lambda *_: print("no"))
            ready.touch()
            while True:
                time.sleep(1)
        while not ready.exists():
            time.sleep(0.01)
        sys.exit(5)
        """,
    )
    done = launch("--workers=2", path)
    assert done.returncode == 5
    assert lines_of(done.stdout, "worker 0") == ["no"]
    assert done.stderr.splitlines()[1:] == ["[launch] worker 0 did not end; killed."]


def test_success_of_one_waits_for_the_others(script):
    done = launch("--workers=2", script(TASK, "time.sleep(0.5 * task); print('done')"))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[worker 0] done", "[worker 1] done"]


@pytest.fixture
def no_nohup():
    """Whoever runs the tests under `nohup` hands down that a hang-up is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_are_passed_on(script, number, code):
    path = script(
        TASK,
        """
        try:
            print("pid", os.getpid(), flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted")
        """,
    )
    with start("--workers=2", path) as launcher:
        pids = read_pids(launcher, 2)
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == code
    assert f"[launch] received {number.name}. Ending all tasks." in err
    assert out.count("interrupted") == (2 if number == signal.SIGINT else 0)
    assert not any(map(is_alive, pids))


def test_a_second_ctrl_c_does_not_wait(script):
    path = script(ASLEEP, "import signal; signal.signal(2, signal.SIG_IGN); print('pid 0')")
    with open(path, "a") as file:
        file.write("\ntime.sleep(60)")
    with start("--workers=1", path) as launcher:
        pids = read_pids(launcher, 2)[:1]
        launcher.send_signal(signal.SIGINT)
        assert "received SIGINT" in launcher.stderr.readline()
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 130
    assert not any(map(is_alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_tasks_die_with_a_killed_launcher(script):
    with start("--workers=2", script(ASLEEP, "time.sleep(60)")) as launcher:
        pids = read_pids(launcher, 2)
        launcher.kill()
        assert wait_until_gone(pids)


def test_what_a_task_started_ends_with_it(script):
    path = script(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('pid', child.pid)"
    )
    with start("--workers=1", path) as launcher:
        pids = read_pids(launcher, 1)
        launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 0
    assert wait_until_gone(pids)


def test_a_closed_pipe_ends_all(script):
    with start("--workers=2", script(ASLEEP, "while True: print('y')")) as launcher:
        pids = read_pids(launcher, 1)
        launcher.stdout.close()
        assert launcher.wait(TIMEOUT) == 128 + signal.SIGPIPE
        assert "Traceback" not in launcher.stderr.read()
    assert wait_until_gone(pids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x.py", "Argument `--workers` must be at least 1. Received: --workers=0"),
        ("--workers=-1 x.py", "Argument `--workers` must be at least 1. Received: --workers=-1"),
        ("--workers=two x.py", "argument --workers: invalid int value: 'two'"),
        (
            "--workers=1 --parameter_servers=-1 x.py",
            "Argument `--parameter_servers` must be at least 0. Received: --parameter_servers=-1",
        ),
        (
            "--workers=1 --threads_per_worker=0 x.py",
            "Argument `--threads_per_worker` must be at least 1. Received: --threads_per_worker=0",
        ),
        (
            "--workers=2 --port=65535 x.py",
            "Argument `--port` must be in [0, 65534]. Received: --port=65535",
        ),
        ("--workers=1", "A script, or -m and a module, must follow the launcher's own arguments."),
        ("--workers=1 no_such.py", "There is no script 'no_such.py' in "),
        ("--workers=1 -m no_such.module", "There is no module 'no_such.module' in "),
        (
            "--workers=1 --max_restarts=-1 x.py",
            "Argument `--max_restarts` must be at least 0. Received: --max_restarts=-1",
        ),
        ("--workers=1 --port_s=1 x.py", "unrecognized arguments: --port_s=1"),
        ("--serve", "Argument `--serve` needs TF_CONFIG, which names the server."),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    (tmp_path / "x.py").touch()
    done = launch(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_inside_a_cluster(script):
    done = launch("--workers=1", script(""), env={**os.environ, "TF_CONFIG": "{}"})
    assert done.returncode == 2
    assert "TF_CONFIG is set: this process is already a task of a cluster. Run the script" in (
        done.stderr
    )


def test_ports_in_a_row(script):
    ports = reserve_ports(1)
    first = ports[0].getsockname()[1]
    path = script("import os; print(os.environ['TF_CONFIG'])")
    taken = launch("--workers=1", f"--port={first}", path)
    assert taken.returncode == 2
    assert f"[launch] No free ports for 1 tasks, from --port={first}: " in taken.stderr
    ports[0].close()
    done = launch("--workers=2", f"--port={first}", path)
    assert f'["127.0.0.1:{first}", "127.0.0.1:{first + 1}"]' in done.stdout


def test_threads_per_worker(script):
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
    path = script(f"import os; print([os.environ.get(name) for name in {names}])")
    env = {k: v for k, v in os.environ.items() if k not in names}
    done = launch("--workers=1", "--threads_per_worker=3", path, env=env)
    assert done.stdout == "[worker 0] ['3', '3', '3']\n"
    assert launch("--workers=1", path, env=env).stdout == "[worker 0] [None, None, None]\n"


def test_reserved_ports_are_distinct_and_held():
    ports = reserve_ports(8)
    numbers = [port.getsockname()[1] for port in ports]
    assert len(set(numbers)) == 8
    for number in numbers:
        with pytest.raises(OSError, match="in use"):
            reserve_ports(1, first=number)
    for port in ports:
        port.close()


def test_cluster_of():
    assert cluster_of(["a", "b"]) == {"worker": ["a", "b"]}
    assert cluster_of(["a", "b", "c", "d"], parameter_servers=1) == {
        "chief": ["a"],
        "worker": ["b", "c"],
        "ps": ["d"],
    }


def test_no_proxy_stands_between_the_tasks(monkeypatch):
    cluster = {"worker": ["127.0.0.1:1", "10.0.0.2:1"]}
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert task_environment(cluster, "worker", 0)["no_proxy"] == "10.0.0.2,127.0.0.1"
    monkeypatch.setenv("NO_PROXY", "intranet")
    assert task_environment(cluster, "worker", 0)["no_proxy"] == "intranet,10.0.0.2,127.0.0.1"


def test_lost_servers_are_errors_to_the_coordinator():
    cluster = cluster_of(["a:1", "b:1", "c:1"], parameter_servers=1)
    assert task_environment(cluster, "chief", 0)["GRPC_FAIL_FAST"] == "use_caller"


def test_orphan_does_not_run_on(monkeypatch):
    exits = []
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(environment.os, "_exit", exits.append)
    environment.die_with_parent(os.getppid())
    environment.die_with_parent(os.getppid() + 1)
    assert exits == [137]


RESTARTED = "import os; attempt = int(os.environ['TFQCOMM_RESTART_COUNT'])\n"


def test_when_one_fails_all_are_started_again(script):
    path = script(
        TASK,
        RESTARTED,
        """
        print("attempt", attempt, flush=True)
        if attempt < 2 and task == attempt:
            time.sleep(0.5)
            sys.exit(f"failed {attempt}")
        time.sleep(60 if attempt < 2 else 0)
        """,
    )
    done = launch("--workers=3", "--max_restarts=3", path)
    assert done.returncode == 0
    assert all(
        lines_of(done.stdout, f"worker {i}") == [f"attempt {a}" for a in range(3)] for i in range(3)
    )
    assert done.stderr.splitlines() == [
        "[worker 0] failed 0",
        "[launch] worker 0 failed: exit code 1. Ending all tasks.",
        "[launch] Starting all tasks again: restart 1 of 3.",
        "[worker 1] failed 1",
        "[launch] worker 1 failed: exit code 1. Ending all tasks.",
        "[launch] Starting all tasks again: restart 2 of 3.",
    ]


def test_restarts_end_with_the_last_one(script):
    path = script(RESTARTED, "raise SystemExit(attempt + 10)")
    done = launch("--workers=1", "--max_restarts=2", path)
    assert done.returncode == 12
    assert done.stderr.count("Starting all tasks again") == 2


def test_a_restart_takes_ports_on_which_nothing_of_the_last_attempt_can_listen(script):
    path = script(RESTARTED, "print(os.environ['TF_CONFIG']); raise SystemExit(1)")
    done = launch("--workers=2", "--max_restarts=2", path)
    clusters = {
        tuple(json.loads(line)["cluster"]["worker"]) for line in lines_of(done.stdout, "worker 0")
    }
    addresses = [address for cluster in clusters for address in cluster]
    assert len(clusters) > 1 and len(set(addresses)) == len(addresses)


def test_ports_that_the_user_named_stay_through_a_restart(script):
    (reserved,) = reserve_ports(1)
    first = reserved.getsockname()[1]
    reserved.close()
    path = script(RESTARTED, "print(os.environ['TF_CONFIG']); raise SystemExit(1 - attempt)")
    done = launch("--workers=1", "--max_restarts=1", f"--port={first}", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f'["127.0.0.1:{first}"]') == 2


def test_ctrl_c_is_not_a_failure_that_asks_for_a_restart(script):
    with start("--workers=1", "--max_restarts=5", script(ASLEEP, "time.sleep(60)")) as launcher:
        read_pids(launcher, 1)
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 130
    assert "again" not in err


CHATTER = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795695352.388069    5805 port.cc:153] oneDNN custom operations are on.
I0000 00:00:1795695352.388495    5805 cudart_stub.cc:31] Could not find cuda drivers.
"""
FINDINGS = """\
W0000 00:00:1795695352.388495    5805 allocator.cc:31] Allocation exceeds 10% of free memory.
E0000 00:00:1795695352.388495    5805 collective.cc:31] Check alive failed.
F0000 00:00:1795695352.388495    5805 check.cc:31] Check failed.
I1126 12:16:18.785770 140461050448768 script.py:123] logged by Python
WARNING: mine
"""


def test_what_tensorflow_says_of_itself_is_left_out_and_nothing_else(script):
    path = script(f"import sys; text = {CHATTER + FINDINGS!r}; sys.stderr.write(text); print(text)")
    quiet = launch("--workers=1", path)
    assert lines_of(quiet.stderr, "worker 0") == FINDINGS.splitlines()
    assert lines_of(quiet.stdout, "worker 0")[:-1] == (CHATTER + FINDINGS).splitlines()
    for loud in (
        launch("--workers=1", "--verbose", path),
        launch("--workers=1", path, variables={"TF_CPP_MIN_LOG_LEVEL": "1"}),
    ):
        assert lines_of(loud.stderr, "worker 0") == (CHATTER + FINDINGS).splitlines()


def test_the_log_level_that_the_user_set_wins(script):
    path = script("import os; print(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))")
    assert launch("--workers=1", path).stdout == "[worker 0] 2\n"
    assert launch("--workers=1", "--verbose", path).stdout == "[worker 0] None\n"
    mine = launch("--workers=1", path, variables={"TF_CPP_MIN_LOG_LEVEL": "0"})
    assert mine.stdout == "[worker 0] 0\n"


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    "line",
    [
        b"E0000 00:00:1795695355.585637    5805 cuda_platform.cc:52] failed call to cuInit: X",
        b"2026-11-26 13:35:28.559088: E external/xla/cuda/cuda_platform.cc:51] failed call to "
        b"cuInit: X",  # TensorFlow 2.20
    ],
)
def test_that_cuda_cannot_start_is_an_error_where_there_is_a_gpu(monkeypatch, gpu, line):
    monkeypatch.setattr(output, "_has_gpu", lambda: gpu)
    assert output.is_chatter(line) is not gpu


def test_output_without_an_end_of_line_costs_as_much_as_with_them():
    """A cutter that looks at the line begun again for each piece would take a minute."""
    cutter, piece = output.LineCutter(), b"x" * 1024
    begin = time.process_time()
    for _ in range(16 * 1024):
        assert cutter.cut(piece) == []
    assert cutter.finish() == [b"x" * (16 << 20)]
    assert time.process_time() - begin < 5


def test_ctrl_c_ends_tasks_that_only_serve_at_once_and_quietly(script):
    """They sit in TensorFlow's code, which sees no signal: nobody has to wait for them."""
    path = script(KILLER, "find('ps', 0); print('pid', os.getpid(), flush=True); time.sleep(60)")
    with start("--workers=2", "--parameter_servers=1", path) as launcher:
        read_pids(launcher, 1)
        begin = time.monotonic()
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=TIMEOUT)
    assert time.monotonic() - begin < 3
    said = [line for line in err.splitlines() if line.startswith("[launch]")]
    assert said == ["[launch] received SIGINT. Ending all tasks."]
    assert launcher.returncode == 130
    assert "KeyboardInterrupt" in err  # the chief's, who is told
    assert not lines_of(err, "ps 0") + lines_of(err, "worker 0") + lines_of(err, "worker 1")


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"a\nb\n\nc"], [b"a", b"b", b"", b"c"]),
        ([b"a", b"b\nc\n"], [b"ab", b"c"]),
        ([b"a\r\nb\r", b"\n\r\n"], [b"a", b"b"]),  # the ends of Windows; an empty one is no loss
        ([b"1/3\r2/3\r3/3\r\ndone\n"], [b"1/3", b"3/3", b"done"]),  # \r at the end, as ninja
        ([b"\r1/3", b"\r2/3", b"\r3/3", b"\ndone\n"], [b"1/3", b"3/3", b"done"]),  # before, as tqdm
        ([b"1/3\b\b\b\r2/3\b\b\b\r3/3\n"], [b"1/3", b"3/3"]),  # as Keras
        ([b"1/3\r2/3\r"], [b"1/3", b"2/3"]),  # ends in the middle
        ([b"1/3\r2/3\rdone\n"], [b"1/3", b"done"]),  # overwritten
        ([b"\xff\xc3\n"], [b"\xff\xc3"]),
        ([], []),
    ],
)
def test_line_cutter(chunks, lines):
    cutter = output.LineCutter()
    assert [line for chunk in chunks for line in cutter.cut(chunk)] + cutter.finish() == lines


def test_a_bar_shows_a_line_per_period(monkeypatch):
    cutter = output.LineCutter()
    now = iter([10.0, 10.0, 10.5, 11.1, 11.1, 11.2])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(now))
    assert cutter.cut(b"1\r2\r3\r4\r") == [b"1", b"3"]
    assert cutter.finish() == [b"4"]


@pytest.mark.multi_process
def test_all_reduce_of_two_workers(script):
    path = script(
        """
        import tensorflow as tf
        strategy = tf.distribute.MultiWorkerMirroredStrategy()

        @tf.function
        def total():
            context = tf.distribute.get_replica_context()
            return context.all_reduce("sum", tf.constant([1.0, 2.0]))

        print("total", strategy.run(total).numpy())
        """
    )
    done = launch("--workers=2", "--threads_per_worker=1", path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[worker {i}] total [2. 4.]" for i in range(2)]


KILLER = r"""
    import json, os, pathlib, signal, time

    def find(job, index):  # waits for a task of this cluster, and returns its pid
        while True:
            for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
                try:
                    parent = path.with_name("stat").read_text().rpartition(")")[2].split()[1]
                    variables = dict(v.split("=", 1) for v in path.read_text().split("\0") if v)
                except OSError:
                    continue
                if int(parent) == os.getppid():
                    task = json.loads(variables.get("TF_CONFIG", "{}")).get("task")
                    if task == {"type": job, "index": index}:
                        return int(path.parent.name)
            time.sleep(0.01)

    def kill(job, index):
        pid = find(job, index)
        os.kill(pid, signal.SIGKILL)
        return pid

    """


def launcher_said(done: subprocess.CompletedProcess) -> list[str]:
    """Its own lines: tasks that come to load TensorFlow print others."""
    return [line for line in done.stderr.splitlines() if line.startswith("[launch]")]


def test_a_killed_worker_is_done_without_where_a_chief_drives_it(script):
    path = script(KILLER, "kill('worker', 1); time.sleep(1); print('done')")
    done = launch("--workers=2", "--parameter_servers=1", path)
    assert launcher_said(done) == [
        "[launch] worker 1 failed: SIGKILL. The others go on without it."
    ]
    assert (done.returncode, done.stdout) == (0, "[chief 0] done\n")


def test_a_killed_worker_is_started_again_as_often_as_allowed(script):
    path = script(
        KILLER,
        """
        first = second = kill('worker', 0)
        while second == first:
            second = find('worker', 0)
        kill('worker', 0)
        time.sleep(60)
        """,
    )
    done = launch("--workers=1", "--parameter_servers=1", "--max_restarts=1", path)
    assert done.returncode == 128 + signal.SIGKILL  # the last one
    assert launcher_said(done) == [
        "[launch] worker 0 failed: SIGKILL. Starting it again; restarts left: 0.",
        "[launch] worker 0 failed: SIGKILL. Ending all tasks.",
    ]


@pytest.mark.parametrize("job", ["ps", "chief"])
def test_without_a_parameter_server_or_the_chief_all_end(script, job):
    path = script(KILLER, f"kill({job!r}, 0); time.sleep(60)")
    done = launch("--workers=2", "--parameter_servers=1", "--max_restarts=5", path)
    assert done.returncode == 128 + signal.SIGKILL
    assert launcher_said(done) == [f"[launch] {job} 0 failed: SIGKILL. Ending all tasks."]


@pytest.mark.multi_process
@pytest.mark.slow
def test_ctrl_c_ends_a_server_that_was_started_by_hand():
    (reserved,) = reserve_ports(1)
    address = f"127.0.0.1:{reserved.getsockname()[1]}"
    reserved.close()
    environment = {**os.environ, **task_environment({"worker": [address]}, "worker", 0)}
    command = [sys.executable, "-m", "tfqcomm.launch", "--serve"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as server:
        deadline = time.monotonic() + TIMEOUT
        while failure_to_connect(address):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        second = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(timeout=10)
    assert server.returncode == -signal.SIGINT
    assert "Traceback" not in out
    assert "this process is worker 0 and cannot listen on its port: Address already in use" in (
        second.stderr
    )


@pytest.mark.multi_process
@pytest.mark.slow
def test_parameter_server_tasks_need_no_code(script):
    path = script(
        """
        import tensorflow as tf
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        strategy = tf.distribute.ParameterServerStrategy(resolver)
        coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
        with strategy.scope():
            variable = tf.Variable(1.0)
        add = tf.function(lambda: variable.assign_add(2.0))
        for _ in range(4):
            coordinator.schedule(add)
        coordinator.join()
        print(resolver.task_type, variable.device, variable.numpy())
        """
    )
    options = ["--workers=1", "--parameter_servers=1", "--threads_per_worker=1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = launch(*options, path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[chief 0] chief /job:ps/replica:0/task:0/device:CPU:0 9.0\n"


@pytest.mark.multi_process
@pytest.mark.slow
def test_a_run_whose_worker_dies_goes_on_where_it_was(script, tmp_path):
    path = script(
        """
        import os, signal
        import keras, numpy as np, tfqcomm

        strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy("block_sign")
        rank = strategy.cluster_resolver.task_id
        attempt = int(os.environ["TFQCOMM_RESTART_COUNT"])

        class Fault(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if rank == 0:
                    print("attempt", attempt, "epoch", epoch)
                if (rank, attempt, epoch) == (1, 0, 2):
                    os.kill(os.getpid(), signal.SIGKILL)

        with strategy.scope():
            model = keras.Sequential([keras.Input([64]), keras.layers.Dense(32)])
            model.compile("adam", "mse")
        x = np.random.RandomState(0).randn(64, 64).astype("float32")
        """,
        f"backup = tfqcomm.callbacks.BackupAndRestore({str(tmp_path / 'backup')!r})\n"
        "callbacks = [backup, Fault()]\n"
        "model.fit(x, x[:, :32], batch_size=16, epochs=4, verbose=0, callbacks=callbacks)\n",
    )
    environment = {"PYTHONPATH": str(ROOT)}
    done = launch("--workers=2", "--max_restarts=1", path, variables=environment)
    assert done.returncode == 0, done.stderr
    epochs = [line for line in lines_of(done.stdout, "worker 0") if line.startswith("attempt")]
    first, second = (
        [int(line.split()[-1]) for line in epochs if line.startswith(f"attempt {attempt} ")]
        for attempt in range(2)
    )
    assert first in ([0, 1], [0, 1, 2])  # worker 0 may have begun the epoch, too
    assert second == [2, 3]
    assert "[launch] worker 1 failed: SIGKILL. Ending all tasks." in done.stderr
