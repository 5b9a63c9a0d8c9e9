"""Workers that are lost and come back, without a cluster."""

import threading
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server import fleet as fleets
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.messages.memory import Memories, WorkerState
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.watch import Watch


class FakeWorker:
    """Lost until it has been started anew."""

    def __init__(self, error=None):
        self.alive, self.lives, self.index, self.device = True, 1, 0, "worker"
        self.busy = threading.RLock()
        self.used_scale = None
        self.there = True
        self._error = error

    def is_there(self):
        return self.there

    def start(self):
        time.sleep(0.05)
        if self._error is not None:
            raise self._error
        self.lives += 1
        self.there = True


def lost():
    raise tf.errors.UnavailableError(None, None, "lost")


@pytest.fixture
def make_fleet(monkeypatch):
    monkeypatch.setattr(_tf_private, "reconnect", lambda: None)
    monkeypatch.setattr(fleets, "RETRY_SECONDS", 0.01)

    def make(*workers):
        cluster = types.SimpleNamespace(describe=lambda device: "Worker 0", servers=[], workers=[])
        loss_scale = LossScale(keras.optimizers.SGD())
        return fleets.Fleet(cluster, [], workers, loss_scale, Watch(cluster, 60.0, trainer=make))

    return make


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lost_worker_is_started_once_however_many_threads_meet_it(make_fleet):
    worker = FakeWorker()
    worker.there = False
    fleet, together = make_fleet(worker), threading.Barrier(4)

    def call():
        together.wait()
        lost()

    threads = [threading.Thread(target=fleet.attempt, args=(worker, call)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: worker.alive)
    time.sleep(0.2)
    assert worker.lives == 2


def test_an_error_of_a_former_life_does_not_lose_the_worker_again(make_fleet):
    worker = FakeWorker()
    fleet = make_fleet(worker)

    def call():  # began before the worker was lost, and hears of it when it is back
        worker.lives += 1
        lost()

    assert fleet.attempt(worker, call) is None
    assert worker.alive


def test_an_error_of_dataset_fn_when_a_worker_comes_back_is_not_swallowed(make_fleet):
    worker = FakeWorker(error=KeyError("no such file"))
    worker.there = False
    fleet = make_fleet(worker)
    fleet.attempt(worker, lost)
    with pytest.raises(KeyError, match="no such file"):
        fleet.alive()


def test_what_workers_remember_is_that_of_new_ones_when_all_are_gone(make_fleet):
    worker = FakeWorker()
    worker.alive = False
    fleet = make_fleet(worker)
    piece = Piece(0, 0, 2, (2,), server=0)
    program = FakeProgram({(piece, "m"): slice(0, 2)}, np.full([2], 0.5, np.float32))
    state = WorkerState(Memories(fleet, program))
    np.testing.assert_array_equal(state.mean()["m/0"], [0.5, 0.5])


class FakeProgram:
    def __init__(self, slots, memory):
        self.layout, self.servers = types.SimpleNamespace(slots=slots, initial=memory), ()


def test_of_workers_that_met_the_same_overflow_one_halves_the_scale():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=64.0)
    optimizer.build([keras.Variable(0.0)])
    scale = LossScale(optimizer)
    for _ in range(3):
        scale.note(False, 64.0)
    assert scale.value == 32.0
    scale.note(False, 32.0)
    scale.store()
    assert float(optimizer.dynamic_scale.numpy()) == 16.0
