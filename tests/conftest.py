"""Every test runs with 4 logical CPU devices, no GPU, a fixed seed and a fresh Keras session."""

import gc
import os

# Before TensorFlow is imported, and inherited by the processes that tests start. The machine's own
# cluster and Keras configuration must not reach the tests; set CUDA_VISIBLE_DEVICES to try a GPU.
os.environ.pop("TF_CONFIG", None)
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from collections.abc import Callable

import keras
import pytest
import tensorflow as tf

from tests import network, rungs

NUM_DEVICES = 4

# Logical devices can only be made before the first operation runs: at import, not in a fixture.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * NUM_DEVICES,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """A part of the slow rung, for CI."""
    parser.addoption("--part", help="of the files with slow tests, such as 2/4 (tests/rungs.py)")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By default a quarter of the parameters of most tests; of the slow rung a part, if asked.

    Of what is left files with several processes come first.
    """
    rungs.sample(items)
    if part := config.getoption("part"):
        outside = rungs.outside_of(part, items)
        config.hook.pytest_deselected(items=list(outside))
        items[:] = [item for item in items if item not in outside]
    items[:] = rungs.processes_first(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the network rung, saying why, where namespaces cannot be made."""
    if item.get_closest_marker("network") is not None and not network.available():
        pytest.skip("network namespaces need Linux, root and iproute2")


@pytest.fixture(scope="session", autouse=True)
def imported():
    """What was imported lives as long as the process, and no collection has to look at it."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Frees the graphs of a file at its end: thousands at once took a later test two minutes.

    What is left over is of no interest to later collections.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_session():
    """Same seeds and same generated names (`adam`, `dense_1`) for every test, in whatever order."""
    keras.backend.clear_session(free_memory=False)  # the collection alone would take 0.3 s
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def strategy_devices() -> Callable[[int], list[str]]:
    """Returns a function: the names of the first n logical devices."""

    def first_devices(n: int) -> list[str]:
        return [f"CPU:{i}" for i in range(n)]

    return first_devices


@pytest.fixture
def mirrored_strategy(strategy_devices) -> Callable[..., tf.distribute.MirroredStrategy]:
    """Returns a function: a MirroredStrategy over n logical devices.

    Without `cross_device_ops` it reduces to one device, which on logical CPUs is about ten times
    faster than the default collectives.
    """

    def make(
        n: int, cross_device_ops: tf.distribute.CrossDeviceOps | None = None
    ) -> tf.distribute.MirroredStrategy:
        return tf.distribute.MirroredStrategy(
            strategy_devices(n),
            cross_device_ops=cross_device_ops or tf.distribute.ReductionToOneDevice(),
        )

    return make
