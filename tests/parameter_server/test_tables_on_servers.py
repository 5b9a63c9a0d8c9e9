"""Tables that live on parameter servers alone: what a chief's model says of them, and backups."""

import functools
import tempfile

import numpy as np
import pytest

from tests.multi_process import run_workers, start_workers
from tests.parameter_server import table_runs
from tests.parameter_server.cluster import ServerProcesses

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(900)]


PATIENCE = 240  # seconds, of processes that import TensorFlow on a busy machine


@functools.cache
def found():
    with tempfile.TemporaryDirectory() as directory:
        arguments = {"directory": directory}
        (result,) = run_workers(table_runs.everything, workers=1, args=arguments, timeout=800)
    return result


def test_the_chief_has_neither_the_table_nor_its_slots():
    first, weights, slots = found()["like a plain model"]["elsewhere"]
    assert first == weights == [True, False, False]
    assert slots == [False, False, True, True, False, False, False, False]
    shapes = found()["like a plain model"]["slots"]
    assert shapes[2:4] == [(table_runs.ROWS, table_runs.WIDTH)] * 2


def test_the_chiefs_model_is_like_a_plain_one_with_the_servers_weights():
    pairs = found()["like a plain model"]["pairs"]
    assert len(pairs) > 20
    for name, (ours, plain) in pairs.items():
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6, err_msg=str(name))
    assert found()["like a plain model"]["moved"] > 0.01
    assert min(found()["like a plain model"]["moments"]) > 0


@pytest.mark.parametrize("way", ["unbuilt", "not lazy", "small", "bfloat16", "built before"])
def test_every_table_is_where_it_belongs_whenever_it_was_built(way):
    there, loss = found()["other ways"][way]
    assert there[0] == (way not in ("not lazy", "small"))
    assert not any(there[1:])
    assert loss[-1] < loss[0]


def test_a_table_that_is_frozen_before_fit_comes_back():
    before, after, moved = found()["frozen"]
    assert (before, after, moved) == ([True], [False], 0.0)


@pytest.mark.parametrize("what, words", [("fit", "train it"), ("export", "export the model")])
def test_what_needs_the_table_on_the_chief_is_refused(what, words):
    message = found()["refused"][what]
    assert message.startswith("The table items/embeddings is not in this process: it lives on")
    assert f"To {words} here, load a file that `trainer.model.save` has written" in message


def test_an_id_that_the_table_does_not_have_is_named_where_a_model_is_evaluated():
    message = found()["strange"]
    assert message.endswith("which has 29 rows, must be from -29 to 28. Received: id=29")


def test_a_model_may_have_another_trainer_with_other_servers():
    """It goes on with the table as the first one left it."""
    devices, equal = found()["another trainer"]
    assert [len(one) for one in devices] == [2, 3]
    assert equal


def test_an_export_has_the_model_with_its_tables_in_files():
    result = found()["exported"]
    for values in zip(*result["weights"], strict=True):
        np.testing.assert_array_equal(values[1], values[0])
        np.testing.assert_array_equal(values[2], values[0])
    trained, mapped, plain = result["predictions"]
    np.testing.assert_allclose(mapped, trained, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(plain, trained, rtol=1e-5, atol=1e-7)
    there, loaded, whole = (sum(where) for where in result["elsewhere"])
    assert (there, loaded, whole) == (1, 1, 0)
    assert result["files"] == ["model.json", "model.weights.h5", "table-0.npy", "tables.json"]
    np.testing.assert_array_equal(result["table"], result["weights"][0][0])
    assert "cannot be assigned" in result["errors"][0]
    assert "must be of a directory that is not there" in result["errors"][1]


@pytest.mark.parametrize("case", [("adam", 0), ("adam", 1), ("qadam by t", 0), ("qrda", 0)])
def test_a_run_goes_on_with_another_number_of_servers(case):
    result = found()["resumed"][case]
    whole, parts = result["whole"], result["parts"]
    assert whole.keys() == parts.keys()
    kinds = {"adam": 3, "qadam by t": 4, "qrda": 4}[case[0]]
    assert sum(key.startswith("0/") for key in whole) == kinds
    for key, value in whole.items():
        # Of a shard of another size the processor rounds other rows in its vectors.
        np.testing.assert_allclose(parts[key], value, rtol=1e-6, atol=1e-12, err_msg=key)
    assert np.abs(result["initial"] - whole["0/rows"]).max() > 0.01
    # That of a backup which broke off is there as well; the last one leaves nothing.
    broken = ["backup.partial", "tables-3"] if case[1] else []
    assert result["files"] == sorted(["backup.zip", "tables-2", *broken])
    assert result["left"] == []


def test_a_backup_of_whole_tables_goes_on_by_rows_and_says_what_it_drops():
    result = found()["from whole tables"]
    assert result["elsewhere"] == [True, False, False]
    assert len(result["rows"]) == 3 + 2 + 6
    for rows, whole in zip(result["rows"], result["whole"], strict=True):
        np.testing.assert_array_equal(rows, whole)
    (message,) = (text for text in result["warnings"] if "left out" in text)
    assert message.startswith("What compression has left out of items/embeddings is dropped: rows")


def test_a_backup_within_an_epoch_is_of_one_moment():
    result = found()["within"]
    assert result["iterations"] > 0
    assert max(result["same"]) == 0


def test_backups_of_others_are_refused():
    optimizer, process = found()["refused backups"]
    assert "A backup must be of the same tables and of the same optimizer" in optimizer
    assert "live on parameter servers" in process


def test_a_cluster_that_lost_a_server_goes_on_with_three(tmp_path):
    """Real processes: the files are those of servers that are gone."""

    def chief_of(cluster, servers, epochs):
        return start_workers(
            table_runs.on_a_real_cluster,
            workers=1,
            args={"directory": str(tmp_path), "servers": servers, "epochs": epochs},
            env=cluster.chief_environment,
        )

    with (
        ServerProcesses(workers=2, parameter_servers=2) as cluster,
        chief_of(cluster, 2, epochs=10_000) as chief,
    ):
        chief.wait_for_output(0, "epoch 3", timeout=PATIENCE)
        cluster.kill("ps", 1)
        (message,) = chief.wait(timeout=PATIENCE)
    assert message.startswith("Parameter server 1 ")
    with (
        ServerProcesses(workers=2, parameter_servers=3) as cluster,
        chief_of(cluster, 3, epochs=2) as chief,
    ):
        (result,) = chief.wait(timeout=PATIENCE)
    assert sorted(result["elsewhere"]) == [False, False, True, True]  # an embedding, a named table
    first, last = result["epochs"]
    assert first >= 3 and last == first + 1
    for parts, whole in zip(*result["values"], strict=True):
        np.testing.assert_array_equal(parts, whole)
