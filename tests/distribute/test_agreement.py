"""Workers that were given different programs all fail, and say what differs."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute import fault_functions as functions
from tests.multi_process import run_workers
from tfqcomm.transport.agreement import check_agreement

# ------------------------------------------------------------------------------- without processes


def agree(*programs):
    """The error of each worker that asks with (topic, facts, notes), None for none."""
    names = [f"host{i}:1" for i in range(len(programs))]
    sent = [[] for _ in programs]
    while True:  # each pass gets one collective further
        errors, waiting = [], False
        for rank, program in enumerate(programs):
            calls = iter(range(100))

            def all_gather(words, rank=rank, calls=calls):
                call = next(calls)
                if call == len(sent[rank]):
                    sent[rank].append(words.numpy())
                if any(len(others) <= call for others in sent):
                    raise InterruptedError
                return tf.constant(np.concatenate([others[call] for others in sent]))

            try:
                check_agreement(all_gather, names, *program)
                errors.append(None)
            except InterruptedError:
                waiting = True
            except ValueError as error:
                errors.append(str(error))
        if not waiting:
            return errors


def test_equal_programs_agree():
    assert agree(*[("train", {"a": "1"}, {"place": str(i)}) for i in range(3)]) == [None] * 3


def test_every_worker_hears_what_differs_and_between_whom():
    errors = agree(
        ("train", {"a": "1", "b": "é"}, {}),
        ("train", {"a": "2", "b": "é"}, {}),
        ("train", {"a": "1", "b": "é"}, {}),
    )
    assert len(set(errors)) == 1
    assert errors[0] == (
        "The workers of this cluster were given different programs:\n"
        "  a:\n"
        "    worker 0 (host0:1): 1\n"
        "    worker 1 (host1:1): 2\n"
        "    worker 2 (host2:1): 1\n"
        "Start all workers with the same model, optimizer and compressor."
    )


def test_the_last_of_many_facts_is_found():
    facts = {f"variable {i}": "kernel [1024, 1024] float32" for i in range(1000)}
    errors = agree(("train", facts, {}), ("train", {**facts, "variable 999": "bias"}, {}))
    for error in errors:
        assert "variable 999:\n    worker 0 (host0:1): kernel [1024, 1024] float32" in error
        assert "variable 998" not in error


def test_a_worker_that_does_something_else():
    errors = agree(("create a variable", {"shape": "[3]"}, {"variable": "bias"}), ("train", {}, {}))
    for error in errors:
        assert "step:\n    worker 0 (host0:1): create a variable\n" in error
        assert "worker 1 (host1:1): (nothing)" in error


def test_notes_may_differ():
    assert agree(("train", {}, {"name": "adam"}), ("train", {}, {"name": "adam_1"})) == [None] * 2


def test_addresses_do_not_tell_equal_programs_apart():
    """A learning rate that is a function stands in the configuration as itself."""
    facts = [{"learning_rate": f"<function decay at 0x7f{i}30a2c4c20>"} for i in range(2)]
    assert agree(*[("train", one, {}) for one in facts]) == [None] * 2
    different = {"learning_rate": "<function growth at 0x7f030a2c4c20>"}
    for error in agree(("train", facts[0], {}), ("train", different, {})):
        assert "worker 1 (host1:1): <function growth>" in error


# ----------------------------------------------------------------------------------- two processes

EXPECTED = {
    "compressor": ["compressor:", "TopK(ratio=0.01", "BlockSign(block=None)"],
    "ratio": ["compressor:", "TopK(ratio=0.01", "TopK(ratio=0.02"],
    "error_feedback": ["error_feedback:", "True", "False"],
    "min_size": ["min_size:", "1024"],
    "schedule": ["schedule:", "auto", "two_phase"],
    "seed": ["seed:", ": 0\n", ": 1\n"],
    "width": ["shape:", "[64, 32]", "[64, 33]"],
    "depth": ["shape:", "[32, 10]", "[32, 32]"],
    "depth of the other": ["shape:", "[32, 10]", "[32, 32]"],
    "optimizer": ["optimizer:", "adam", "sgd"],
    "hyperparameter": ["beta_1:", "0.9", "0.8"],
    "trainable": ["shape:", "[64, 32]", "[32, 10]"],  # of the optimizer's first variable
}


@pytest.fixture(scope="module")
def errors():
    return run_workers(functions.disagree, timeout=300)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("difference", EXPECTED)
def test_all_workers_fail_and_say_what_differs(errors, difference):
    for error in (worker[difference] for worker in errors):
        assert "The workers of this cluster were given different programs" in error
        for text in (*EXPECTED[difference], "worker 0 (127.0.0.1:", "worker 1 (127.0.0.1:"):
            assert text in error


@pytest.mark.slow
@pytest.mark.multi_process
def test_all_differences_were_tried():
    assert set(EXPECTED) == {*functions.OPTIONS, *functions.MODELS}


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_cluster_survives_a_disagreement(errors):
    assert [worker["nothing"] for worker in errors] == [None, None]


@pytest.mark.slow
@pytest.mark.multi_process
def test_weights_that_differ_are_found_after_the_first_step(errors):
    for worker in errors:
        error = worker["weights in the first step, verify=True"]
        assert error.startswith("InvalidArgumentError")
        assert "weights differ after the first step" in error


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("when", ["before fit", "in the first epoch"])
def test_weights_that_differ_are_found_where_an_epoch_begins(errors, when):
    for worker in errors:
        error = worker[f"weights {when}, verify=True"]
        assert error.startswith("ValueError")
        assert "fingerprint of the weights:\n    worker 0 (127.0.0.1:" in error
        assert "A callback that changes the learning rate, the optimizer or the weights" in error


@pytest.mark.slow
@pytest.mark.multi_process
def test_without_verify_nobody_looks_at_the_weights(errors):
    for worker in errors:
        assert {worker[name] for name in worker if name.endswith("verify=False")} == {None}
