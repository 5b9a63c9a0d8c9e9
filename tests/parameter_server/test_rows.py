"""Embeddings whose rows alone travel: the lazy step, what a model may look up, bytes and errors."""

import functools
import tempfile

import numpy as np
import pytest

from tests.multi_process import run_workers
from tests.parameter_server import row_reference, row_runs

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(900)]

CASES = ("two lookups", "high rank", "mixed", "non negative", "negative ids", "ragged")
CASES = (*(f"{name}, sgd" for name in (*CASES, "different ids")), "different ids, clipped")
CASES = (*CASES, "two lookups, one by one", "mixed, one by one")


@functools.cache
def found():
    with tempfile.TemporaryDirectory() as directory:
        arguments = {"directory": directory}
        (result,) = run_workers(row_runs.everything, workers=1, args=arguments, timeout=800)
    return result


@pytest.mark.parametrize("name", row_reference.STEPS_OF)
def test_steps_are_those_of_the_lazy_reference(name):
    initial, *tables = found()["steps"][name]
    expected = row_reference.table_after_each_step(name, initial, *row_runs.make_data())
    assert len(tables) == len(expected) == 50
    for step, (table, reference) in enumerate(zip(tables, expected, strict=True), 1):
        np.testing.assert_allclose(
            table, reference, rtol=1e-4, atol=1e-5, err_msg=f"{name} diverged in step {step}"
        )
    assert np.abs(tables[-1] - initial).max() > 0.01


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_a_step_leaves_the_rows_alone_that_no_batch_has_touched(name):
    tables = found()["steps"][name]
    ids, _ = row_runs.make_data()
    for step, (before, after) in enumerate(zip(tables, tables[1:], strict=False)):
        resting = np.setdiff1d(np.arange(row_runs.ROWS), ids[step])
        assert len(resting)
        np.testing.assert_array_equal(after[resting], before[resting])


@pytest.mark.parametrize("case", CASES)
def test_rows_are_as_good_as_whole_tables(case):
    """Of SGD without momentum the lazy step is the dense one."""
    result = found()["whole tables"][case]
    for rows, dense, initial in zip(
        result["rows"], result["dense"], result["initial"], strict=True
    ):
        np.testing.assert_allclose(rows, dense, rtol=1e-5, atol=1e-6)
        assert np.abs(rows - initial).max() > 1e-3


@pytest.mark.parametrize(
    "codec, most", [("float32", 200_000), ("bfloat16", 120_000), ("int8", 80_000)]
)
def test_bytes_of_a_step_are_those_of_its_rows(codec, most):
    result = found()["bytes"][codec]
    per_row = {"float32": 128, "bfloat16": 64, "int8": 36}[codec]
    dense = 4 * 33
    headers = 2 * 3 * 4
    for record in result["traffic"]:
        sent, pulled = (record[k] / record["steps"] for k in ("bytes_sent", "bytes_pulled"))
        assert sent + pulled <= most
        # Asking takes the place of each row, and so does pushing; a header for each server.
        assert sent == pytest.approx(256 * (per_row + 8) + dense + 8, abs=headers)
        assert pulled == pytest.approx(256 * per_row + dense, abs=headers)
        assert record["ratio"] > 100
    for worker in result["workers"]:
        records = result["traffic"]
        assert worker["bytes_pushed"] == sum(record["bytes_sent"] for record in records)
        assert worker["bytes_pulled"] == sum(record["bytes_pulled"] for record in records)
    table = next(route for route in result["routes"] if "embeddings" in route["path"])
    assert table["codec"] == f"rows of each batch, {codec}"
    assert result["loss"][1] < 0.9 * result["loss"][0]


def test_losses_of_encoded_rows_are_close():
    losses = {codec: result["loss"] for codec, result in found()["bytes"].items()}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=1e-3)
    np.testing.assert_allclose(losses["int8"], losses["float32"], rtol=1e-2)


def test_every_message_counts_once_and_a_share():
    table, expected = found()["one by one"]
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "qadam by t"])
def test_a_message_that_is_sent_again_changes_no_row(name):
    result = found()["replayed"][name]
    for before, after in zip(result["before"], result["after"], strict=True):
        np.testing.assert_array_equal(after, before)
    changed = [(a != b).any() for a, b in zip(result["after"], result["next"], strict=True)]
    assert sum(changed) >= 3


def test_no_worker_ever_has_a_table():
    shapes = found()["tensors"]
    assert [None, row_runs.WIDTH] in shapes
    assert row_runs.ROWS not in [shape[0] for shape in shapes]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("strange, dtype", [(23, "int32"), (-24, "int64"), (255, "uint8")])
def test_an_id_that_the_table_does_not_have_is_named(mode, strange, dtype):
    message = found()["strange"][mode, strange, dtype]
    assert "embeddings, which has 23 rows, must be from -23 to 22." in message
    assert message.endswith(f"Received: id={strange}")


@pytest.mark.parametrize(
    "name, words",
    [
        ("optimizer", ["Nadam", "embedding_rows_from=None"]),
        ("weight_compressor", ["weight_compressor", "UniformGrid", "row_codec"]),
        ("regularizer", ["embeddings_regularizer", "L2", "embedding_rows_from=None"]),
        ("constraint", ["embeddings_constraint", "UnitNorm", "embedding_rows_from=None"]),
        (
            "shared",
            ["items/embeddings", "`tf.gather`", "read the whole", "embedding_rows_from="],
        ),
        ("loop", ["t/embeddings", "within a loop", "embedding_rows_from=None"]),
    ],
)
def test_what_cannot_travel_by_rows_is_refused_with_the_reason(name, words):
    message = found()["refusals"][name]
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["adam", "qadam by t", "qrda"])
def test_backups_keep_tables_their_slots_and_moments(name):
    result = found()["backups"][name]
    for whole, parts in zip(result["whole"], result["parts"], strict=True):
        np.testing.assert_array_equal(parts, whole)
    assert result["keys"][0] == result["keys"][1]
    assert bool(result["keys"][0]) == name.startswith("qadam")
    for whole, parts in zip(*result["memory"], strict=True):
        np.testing.assert_array_equal(parts, whole)


def test_named_tables_are_trained_as_whole_ones():
    """Where layers see bfloat16, too."""
    named, whole = found()["named"]["named"], found()["named"]["whole"]
    assert named["made there"] == [True] * 4 + [False] * 2
    assert not any(whole["made there"])
    results = named["trained"], whole["trained"], whole["initial"]
    for rows, dense, initial in zip(*results, strict=True):
        np.testing.assert_allclose(rows, dense, rtol=1e-5, atol=1e-6)
        assert np.abs(rows - initial).max() > 1e-2


def test_a_model_with_named_tables_is_saved_as_any_other():
    named, whole = found()["named"]["named"], found()["named"]["whole"]
    assert named["config"] == whole["config"]
    assert named["files"] == 4
    for again, weights in zip(named["again"], named["trained"], strict=True):
        np.testing.assert_array_equal(again, weights)
    trained, *others = named["predictions"]
    for other in others:
        np.testing.assert_allclose(other, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tied", "sum"])
def test_what_reads_the_whole_of_a_named_table_is_refused_with_the_way_out(name):
    message = found()["named"]["refusals"][name]
    words = "items/table", "read the whole of it", "Do not give its layer to `tfqcomm.parameter_"
    assert all(word in message for word in words), message
