"""Two real worker processes: everything Keras offers works, and both hold the same bits.

The yardstick is the same run in one process, under MirroredStrategy with as many devices: what
each replica sees is equal, so weights must be equal to the bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.distribute import multi_worker_functions as functions
from tests.multi_process import ROOT, run_workers
from tfqcomm.distribute import CompressedAllReduce

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(900)]  # much waits for one pair

FOUR_REPLICAS = [
    "train dense",
    "train two_phase",
    "train comp_ams",
    "validate",
    "batch_normalization",
    "ragged_embedding",
    "nan",
    "overflow top_k",
    "custom_loop",
]


SLOW = [  # jobs that the default run leaves out, and the tests of their results with them
    *(f"train {c}" for c in functions.CONFIGS if c not in ("dense", "top_k")),
    "ragged_embedding alone",
    "embedding_model",
    "batch_normalization",
    "overflow top_k",
    "overflow comp_ams",
    "save top_k",
    "save comp_ams",
    "several_steps",
    "single_steps",
    "other_names",
]


def marked(prefix, values):
    """Parameters of a test: slow where the job of that name is."""
    return [
        pytest.param(v, marks=[pytest.mark.slow] if f"{prefix}{v}" in SLOW else []) for v in values
    ]


class Found:
    """What each worker found, by name; asking for what failed fails."""

    def __init__(self, results):
        self._results = results

    def __getitem__(self, name):
        found = [result[name] for result in self._results]
        errors = {text for text in found if isinstance(text, str) and "Traceback" in text}
        if errors:
            pytest.fail(f"{name} failed on {len(errors)} worker(s):\n{errors.pop()}", pytrace=False)
        return found


class FoundWhenAsked:
    """Likewise of several groups of jobs, each done when the first of its results is asked for."""

    def __init__(self, do, *groups):
        self._do = do  # names -> `Found`
        self._groups = groups
        self._found = {}

    def __getitem__(self, name):
        (group,) = (number for number, names in enumerate(self._groups) if name in names)
        if group not in self._found:
            self._found[group] = self._do(self._groups[group])
        return self._found[group][name]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def two(directory):
    """Found by two workers of one device each; what is slow, by two others."""

    def do(names):
        args = {"names": names, "directory": str(directory)}
        return Found(run_workers(functions.on_two_workers, args=args, timeout=600))

    return FoundWhenAsked(do, [n for n in functions.ON_TWO_WORKERS if n not in SLOW], SLOW)


@pytest.fixture(scope="module")
def four():
    """Found by two workers of two devices each."""
    args = {"names": FOUR_REPLICAS}
    return Found(run_workers(functions.with_two_devices_each, args=args, devices=2, timeout=600))


@pytest.fixture(scope="module")
def results_in_one_process():
    return {}


@pytest.fixture
def in_one_process(mirrored_strategy, results_in_one_process):
    """Returns a function: the same job under MirroredStrategy with n devices, done once."""

    def run(name, n, **kwargs):
        if (name, n) not in results_in_one_process:
            strategy = mirrored_strategy(n, CompressedAllReduce("identity"))
            job, *args = functions.SAME_ANYWHERE[name]
            results_in_one_process[name, n] = job(strategy, *args, **kwargs)
        return results_in_one_process[name, n]

    return run


def all_replicas(found):
    """The values on all replicas of all workers, equal to the bit; returned once."""
    first, *others = [replica for worker in found for replica in worker]
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two, strict=True)
    return first


def weights(found):
    return all_replicas([worker["weights"] for worker in found])


def assert_same(found, expected):
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two, strict=True)


# ----------------------------------------------------------------------------- training, one to one


@pytest.mark.parametrize("config", marked("train ", functions.CONFIGS))
def test_weights_are_those_of_one_process_after_100_steps(two, in_one_process, config):
    found = two[f"train {config}"]
    assert [worker["iterations"] for worker in found] == [functions.STEPS] * 2
    expected = in_one_process(f"train {config}", 2)
    assert_same(weights(found), expected["weights"][0])
    assert found[0]["history"] == found[1]["history"] == expected["history"]
    assert found[0]["history"]["loss"][1] < 0.6 * found[0]["history"]["loss"][0]


def test_bytes_are_those_that_the_simulation_promises(two, in_one_process):
    found = two["train top_k"]
    expected = in_one_process("train top_k", 2)["traffic"]
    for worker in found:
        for record, simulated in zip(worker["traffic"], expected, strict=True):
            for name in ("steps", "bytes_sent", "dense_bytes", "ratio"):
                assert record[name] == simulated[name]


def test_dense_is_plain_keras(two, mirrored_strategy):
    """No part of this package takes part in the run in one process."""
    strategy = mirrored_strategy(2)
    model = functions.compiled(strategy)
    x, y = functions.classification(functions.STEPS * functions.BATCH // 2)
    functions.fit(model, x, y, 2)
    assert_same(weights(two["train dense"]), functions.replicas(strategy, model.weights)[0])


@pytest.mark.parametrize("data", ["arrays", "dataset"])
def test_fit_validate_evaluate_and_predict(two, in_one_process, data):
    first, second = (worker[data] for worker in two["validate"])
    expected = in_one_process("validate", 2)[data]
    weights([first, second])
    assert first["history"] == second["history"] == expected["history"]
    assert first["evaluate"] == second["evaluate"] == expected["evaluate"]
    assert first["history"]["val_loss"][-1] == first["evaluate"][0]
    assert first["predict"].shape == (81, functions.CLASSES)
    np.testing.assert_array_equal(first["predict"], second["predict"])
    np.testing.assert_array_equal(first["predict"], expected["predict"])


# ------------------------------------------------------------------------------------ special cases


@pytest.mark.slow
def test_batch_normalization_predicts_alike_everywhere(two, in_one_process):
    found = two["batch_normalization"]
    expected = in_one_process("batch_normalization", 2)
    assert_same(weights(found), expected["weights"][0])
    np.testing.assert_array_equal(found[0]["predict"], found[1]["predict"])
    np.testing.assert_array_equal(found[0]["predict"], expected["predict"])


def expected_embedding(world):
    table = np.zeros([50, 4], "float32")
    for rank in range(world):
        for row in functions.RAGGED_ROWS[: rank + 2]:
            table[row] -= 2 * (rank + 1) / world
    return table


@pytest.mark.parametrize("kind", marked("", ["ragged_embedding", "ragged_embedding alone"]))
def test_embedding_with_other_numbers_of_rows_on_each_worker(two, kind):
    np.testing.assert_allclose(all_replicas(two[kind])[0], expected_embedding(2), rtol=1e-6)


@pytest.mark.slow
def test_embedding_model_whose_last_batch_differs_between_workers(two):
    found = two["embedding_model"]
    weights(found)
    assert found[0]["traffic"][1]["bytes_sent"] > 0


def test_nan_on_one_worker_skips_the_step_on_both(two, in_one_process):
    found = two["nan"]
    for worker in found:
        assert worker["skipped_steps"] == [1, 1]
        assert worker["iterations"] == 14
    assert_same(
        weights(found), all_replicas([worker["weights without the batch"] for worker in found])
    )
    assert_same(weights(found), in_one_process("nan", 2)["weights"][0])


@pytest.mark.parametrize("config", marked("overflow ", ["top_k", "comp_ams"]))
def test_overflow_on_one_worker_skips_the_step_on_both(two, in_one_process, config):
    found = two[f"overflow {config}"]
    expected = in_one_process(f"overflow {config}", 2)
    for worker in found:
        assert worker["scales"] == [2.0**15, 2.0**14, 2.0**14, 2.0**14]
        assert worker["iterations"] == expected["iterations"] == 3
    assert all(np.isfinite(w).all() for w in weights(found))
    assert_same(weights(found), expected["weights"][0])


def test_custom_loop_and_a_users_own_all_reduce(two, in_one_process):
    found = two["custom_loop"]
    for worker in found:
        np.testing.assert_array_equal(worker["all_reduce"], 3 * np.arange(5000, dtype="float32"))
    assert_same(weights(found), in_one_process("custom_loop", 2)["weights"][0])


@pytest.mark.slow
def test_several_steps_per_execution_are_as_many_single_ones(two):
    assert_same(weights(two["several_steps"]), weights(two["single_steps"]))


@pytest.mark.slow
def test_workers_may_have_other_automatic_names(two):
    found = two["other_names"]
    assert found[0]["names"] != found[1]["names"]
    weights(found)


# ------------------------------------------------------------------------------------------- saving


def in_plain_keras(*paths, tfqcomm, compile):
    """Loads models in a process of their own, evaluates them and trains on."""
    program = f"""
        import json, sys
        import keras, numpy as np
        {"import tfqcomm" if tfqcomm else ""}
        x = np.load(sys.argv[1])
        results = []
        for path in sys.argv[2:]:
            model = keras.models.load_model(path, compile={compile})
            result = {{"predict": model.predict(x, verbose=0).tolist()}}
            if {compile}:
                result["iterations"] = int(model.optimizer.iterations)
                history = model.fit(x, np.zeros([len(x)]), batch_size=16, epochs=5, verbose=0)
                result["loss"] = history.history["loss"]
            results.append(result)
        assert {tfqcomm} or "tfqcomm" not in sys.modules
        print(json.dumps(results))
    """
    directory = paths[0].parent
    np.save(directory / "x.npy", functions.classification()[0][:64])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), directory / "x.npy", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_saved_by_the_chief_and_loaded_in_plain_keras(two, directory):
    predictions = two["save top_k"]
    np.testing.assert_array_equal(*predictions)
    paths = [directory / f"top_k-{i}.keras" for i in (1, 2)]
    middle, end = in_plain_keras(*paths, tfqcomm=False, compile=True)
    np.testing.assert_allclose(end["predict"], predictions[0], rtol=1e-4, atol=1e-5)
    assert (middle["iterations"], end["iterations"]) == (8, 16)
    assert end["loss"][-1] < end["loss"][0]


@pytest.mark.slow
def test_saved_by_the_chief_with_an_optimizer_of_this_package(two, directory):
    predictions = two["save comp_ams"]
    np.testing.assert_array_equal(*predictions)
    path = directory / "comp_ams-2.keras"
    (plain,) = in_plain_keras(path, tfqcomm=False, compile=False)
    np.testing.assert_allclose(plain["predict"], predictions[0], rtol=1e-4, atol=1e-5)
    (ours,) = in_plain_keras(path, tfqcomm=True, compile=True)
    assert ours["iterations"] == 16
    assert ours["loss"][-1] < ours["loss"][0]


# ------------------------------------------------------------------- two workers, two devices each


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FOUR_REPLICAS if "dense" not in n])
def test_four_replicas_on_two_workers(four, in_one_process, name):
    found = four[name]
    if name == "ragged_embedding":
        np.testing.assert_allclose(all_replicas(found)[0], expected_embedding(4), rtol=1e-6)
        return
    exact = name == "train two_phase"  # nothing travels dense
    # TensorFlow deals the parts of a batch in turn: worker 0 of two gets parts 0 and 2. To add up
    # in the same order, one process has to be given them so.
    expected = in_one_process(name, 4, **({"dealt": [0, 2, 1, 3]} if exact else {}))
    if name == "validate":
        found, expected = [worker["arrays"] for worker in found], expected["arrays"]
    if "predict" in expected:
        np.testing.assert_array_equal(found[0]["predict"], found[1]["predict"])
        np.testing.assert_allclose(found[0]["predict"], expected["predict"], atol=2e-5)
    if name == "custom_loop":
        np.testing.assert_array_equal(found[0]["all_reduce"], expected["all_reduce"])
    for one, two in zip(weights(found), expected["weights"][0], strict=True):
        # A worker adds up its own replicas first: (a + b) + (c + d), not ((a + b) + c) + d.
        np.testing.assert_allclose(one, two, rtol=0, atol=0 if exact else 1e-3)


@pytest.mark.slow
def test_four_replicas_with_dense_gradients(four, in_one_process):
    found = four["train dense"]
    for one, two in zip(
        weights(found), in_one_process("train dense", 4)["weights"][0], strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-3)
