"""Which embedding tables travel by rows."""

import keras
import pytest

from tfqcomm.parameter_server import Trainer, rows


@pytest.mark.parametrize(
    ("optimizer", "by_rows"), [("adam", {1 << 18}), ("nadam", set())], ids=["lazy", "not lazy"]
)
def test_by_default_large_tables_travel_by_rows_where_that_is_possible(optimizer, by_rows):
    layers = [keras.layers.Embedding(1 << n, 1) for n in (17, 18)]
    model = keras.Sequential([keras.Input([3]), layers[1]])
    model.compile(optimizer, "mse")
    assert {t.rows for t in rows.find_tables(model, "auto", 2)} == by_rows
    small = keras.Sequential([keras.Input([3]), layers[0]])
    small.compile(optimizer, "mse")
    assert rows.find_tables(small, "auto", 2) == []


@pytest.mark.parametrize("value", [0, True, 2.5, "automatic"])
def test_embedding_rows_from_is_checked(value):
    words = "`embedding_rows_from` must be 'auto', None or a positive integer. Received: .*"
    with pytest.raises(ValueError, match=words + repr(value)):
        Trainer(lambda: None, embedding_rows_from=value)
