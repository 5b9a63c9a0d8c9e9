"""What a worker owes to rows: which slot is whose, and when it changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.embeddings import RowFeedback, find_tables

ROWS, WIDTH = 10, 3


def tables_of(servers=2):
    model = keras.Sequential([keras.Input([3], dtype="int32"), keras.layers.Embedding(ROWS, WIDTH)])
    model.compile("sgd")
    return find_tables(model, 1, servers)


class Worker:
    """One that pushes rows, of which servers get whole numbers."""

    def __init__(self, slots, waiting=False):
        (self.table,) = self.tables = tables_of()
        self.feedback = RowFeedback(self.tables, slots)
        self.kept = self.feedback.make(waiting)
        several = [tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, WIDTH])]
        flags = [tf.TensorSpec([], tf.bool)] * 2
        step = tf.function(self._step, [*several, *flags], autograph=False)
        self.step = step.get_concrete_function()

    def push(self, rows, accepted=True, taken=True):
        """Rows by id, all entries of one alike, as a float each; returns what is sent likewise."""
        ids = tf.constant([*rows], tf.int64, [len(rows)])
        values = np.repeat(np.array([*rows.values()], np.float32).reshape(-1, 1), WIDTH, 1)
        ids, sent = self.step(ids, values, tf.constant(accepted), tf.constant(taken))
        return {int(i): float(row[0]) for i, row in zip(ids, sent, strict=True)}

    def _step(self, ids, values, accepted, taken):
        pushed = {}
        for part in self.table.parts:
            own = (ids >= part.start) & (ids < part.stop)
            places = tf.cast(tf.boolean_mask(ids, own) - part.start, tf.int32)
            pushed[part] = places, tf.boolean_mask(values, own)
        self.feedback.settle(self.kept, accepted)
        sums = self.feedback.add(self.kept, pushed)
        sent = {part: (places, tf.floor(rows)) for part, (places, rows) in sums.items()}
        self.feedback.remember(self.kept, self.feedback.left_out(sums, sent), taken)
        ids = [tf.cast(places, tf.int64) + part.start for part, (places, _) in sent.items()]
        return tf.concat(ids, 0), tf.concat([rows for _, rows in sent.values()], 0)

    @property
    def owed(self):
        owners, rows = self.kept[0][:2]
        assert (np.ptp(rows.numpy(), 1) == 0).all()
        pairs = zip(owners.numpy(), rows.numpy()[:, 0], strict=True)
        return {int(owner): float(row) for owner, row in pairs if owner >= 0}


def test_what_is_left_out_is_added_to_the_next_push_of_that_row_alone():
    worker = Worker("all")
    assert worker.push({3: 1.5, 8: 0.25}) == {3: 1.0, 8: 0.0}
    assert worker.owed == {3: 0.5, 8: 0.25}
    assert worker.push({8: 0.5, 4: 0.5}) == {8: 0.0, 4: 0.0}
    assert worker.push({8: 0.5, 3: 0.5}) == {8: 1.0, 3: 1.0}
    assert worker.owed == {3: 0.0, 8: 0.25, 4: 0.5}


def test_a_row_that_takes_a_slot_begins_with_nothing():
    worker = Worker(4)
    assert worker.push({1: 0.75, 2: 0.5}) == {1: 0.0, 2: 0.0}
    assert worker.push({5: 0.5}) == {5: 0.0}  # has the slot of 1, and is not paid for it
    assert worker.owed == {5: 0.5, 2: 0.5}
    assert worker.push({1: 0.5}) == {1: 0.0}
    assert worker.owed == {1: 0.5, 2: 0.5}


def test_of_rows_of_one_message_that_share_a_slot_the_smallest_id_stays():
    worker = Worker(4)
    worker.push({9: 0.75})
    # 9 is paid what it was owed, and then loses its slot to 1.
    assert worker.push({9: 0.5, 5: 0.25, 1: 0.5}) == {9: 1.0, 5: 0.0, 1: 0.0}
    assert worker.owed == {1: 0.5}


@pytest.mark.parametrize("slots", [4, "all"])
def test_a_message_that_no_server_takes_changes_nothing(slots):
    worker = Worker(slots)
    worker.push({3: 0.5, 8: 0.25})
    assert worker.push({3: np.nan, 4: 0.5}, taken=False)[4] == 0.0
    assert worker.owed == {3: 0.5, 8: 0.25}


def test_where_messages_wait_a_slot_changes_when_the_message_was_accepted():
    worker = Worker(4, waiting=True)
    worker.push({3: 0.5}, accepted=False, taken=False)
    assert worker.owed == {}
    worker.push({3: 0.75, 8: 0.25}, accepted=True, taken=False)
    assert worker.owed == {3: 0.5}
    assert worker.push({8: np.nan}, accepted=False, taken=False)
    assert worker.owed == {3: 0.5}  # and not what the second message left out
    assert worker.push({3: 0.5, 8: 0.0}, accepted=False, taken=False) == {3: 1.0, 8: 0.0}
    assert worker.owed == {3: 0.5}
    worker.push({}, accepted=True, taken=False)
    assert worker.owed == {3: 0.0, 8: 0.0}


@pytest.mark.parametrize("waiting", [False, True])
def test_forgets_also_what_is_pending(waiting):
    worker = Worker(4, waiting)
    for _ in range(2):
        worker.push({3: 0.25})
    assert worker.owed
    worker.feedback.forget(worker.kept)
    assert worker.owed == {}
    assert worker.push({3: 0.75, 7: 0.75}) == {3: 0.0, 7: 0.0}


def test_slots_are_no_more_than_rows_and_none_without_feedback():
    tables = tables_of()
    assert list(RowFeedback(tables, 4).slots.values()) == [4]
    assert list(RowFeedback(tables, 1000).slots.values()) == [ROWS]
    assert list(RowFeedback(tables, "all").slots.values()) == [ROWS]
    off = RowFeedback(tables, None)
    assert off.slots == {} and off.make(True) == off.make(False) == []
    pushed = {tables[0].parts[0]: (tf.constant([1]), tf.ones([1, WIDTH]))}
    assert off.add([], pushed) == pushed and off.left_out(pushed, pushed) == {}
