"""Who waits, and for whom: without TensorFlow, among sockets of this process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import tensorflow as tf

from tfqcomm.parameter_server import ServerLost, watch
from tfqcomm.parameter_server.cluster import Cluster, greet
from tfqcomm.parameter_server.watch import Watch, check_timeout

SERVER, WORKER = "/job:ps/replica:0/task:0", "/job:worker/replica:0/task:0"
TIMEOUT_SECONDS = 0.5


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(watch, "ASK_SECONDS", 0.1)
    yield
    watch.threads.left_behind = False


@pytest.fixture
def release():
    """What a call waits for that would last for ever."""
    event = threading.Event()
    yield event
    event.set()


@contextlib.contextmanager
def answering() -> Iterator[socket.socket]:
    """Greets whoever comes, as a task does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet_back():
            with contextlib.suppress(OSError):
                while True:
                    with listening.accept()[0] as connection:
                        connection.recv(100)
                        connection.sendall(b"\0\0\0\4\0\0\0\0\0")

        thread = threading.Thread(target=greet_back)
        thread.start()
        try:
            yield listening
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def silent() -> socket.socket:
    """The kernel accepts connections, as for a process that is stopped."""
    return socket.create_server(("127.0.0.1", 0))


def closed() -> socket.socket:
    """Nobody listens."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


@contextlib.contextmanager
def watched(worker, server, timeout_seconds=TIMEOUT_SECONDS):
    with worker() as of_worker, server() as of_server:
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (of_worker, of_server)]
        spec = tf.train.ClusterSpec({"worker": addresses[:1], "ps": addresses[1:]})
        yield Watch(Cluster(spec, embedded=False), timeout_seconds, trainer=watched)


def test_greet_tells_who_answers_who_is_silent_and_who_is_gone():
    with answering() as there, silent() as stopped, closed() as gone:
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (there, stopped, gone)]
        assert greet(addresses[0], 5.0)
        assert not greet(addresses[1], 0.1)
        with pytest.raises(ConnectionRefusedError):
            greet(addresses[2], 5.0)


@pytest.mark.parametrize("server", [silent, closed])
def test_names_a_server_that_does_not_answer(server, release):
    with watched(answering, server) as watch_:
        began = time.monotonic()
        with pytest.raises(ServerLost, match=r"Parameter server 0 \(127.0.0.1:\d+\) has not answ"):
            watch_.run(release.wait)
        assert TIMEOUT_SECONDS <= time.monotonic() - began < 10 * TIMEOUT_SECONDS
        began = time.monotonic()
        with pytest.raises(ServerLost):  # nobody waits for it again
            watch_.run(release.wait)
        assert time.monotonic() - began < TIMEOUT_SECONDS


def test_names_a_worker_that_does_not_answer(release):
    with (
        watched(silent, answering) as watch_,
        pytest.raises(RuntimeError, match=r"Worker 0 \(127.0.0.1:\d+\) has not answered") as caught,
    ):
        watch_.run_all([release.wait, release.wait])
    assert caught.type is RuntimeError


@pytest.mark.parametrize(("worker", "lost"), [(answering, []), (closed, []), (silent, [WORKER])])
def test_waits_while_those_that_are_waited_for_answer(worker, lost):
    """A worker that is gone is TensorFlow's to tell."""
    with watched(worker, answering) as watch_:
        watch_.lost.update(lost)
        assert watch_.run(time.sleep, 4 * TIMEOUT_SECONDS) is None


def test_waits_for_ever_without_a_limit():
    with watched(silent, silent, timeout_seconds=None) as watch_:
        assert watch_.run(time.sleep, 4 * TIMEOUT_SECONDS) is None
        assert watch_.run_all([lambda: 1, lambda: 2]) == [1, 2]


def test_asks_nobody_when_nobody_waits_for_long():
    with watched(silent, silent) as watch_:
        for number in range(100):
            assert watch_.run(lambda n=number: n) == number
        time.sleep(2 * TIMEOUT_SECONDS)
        assert watch_.run(lambda: 1) == 1
        assert watch_.asker is None


@pytest.mark.parametrize("error", [KeyError("no such file"), TimeoutError("of its own")])
def test_an_error_of_the_call_is_the_callers(error):
    def fail():
        raise error

    with watched(answering, answering) as watch_, pytest.raises(type(error)) as caught:
        watch_.run(fail)
    assert caught.value is error


def test_a_call_within_a_call_stays_in_its_thread():
    """It may need a lock that the outer one holds."""
    with watched(answering, answering) as watch_:
        inner, outer = watch_.run(lambda: (watch_.run(threading.get_ident), threading.get_ident()))
    assert inner == outer != threading.get_ident()


@pytest.mark.parametrize("timeout_seconds", [0, -1.0, "60", True, float("nan")])
def test_refuses_what_is_no_time(timeout_seconds):
    with pytest.raises(ValueError, match=r"`timeout_seconds` must be None or a positive number"):
        check_timeout(timeout_seconds)
