"""The recommender's data where it is not made up: pairs of MovieLens, of a stand-in for it."""

import runpy
import sys

import numpy as np
import tensorflow_datasets as tfds

from tests.multi_process import ROOT


def ratings() -> dict[str, np.ndarray]:
    """Of 6 users: user u has rated 4 + u of 12 films, in an order of its own."""
    random = np.random.default_rng(0)
    rows = [
        (b"user %d" % user, b"film %d" % film, 100 * user + when, 3.0 + (film % 4 > 0))
        for user in range(6)
        for when, film in enumerate(random.permutation(12)[: 4 + user])
    ]
    users, films, times, stars = (np.array(column) for column in zip(*rows, strict=True))
    order = random.permutation(len(rows))
    keys = ("user_id", "movie_id", "timestamp", "user_rating")
    return {k: v[order] for k, v in zip(keys, (users, films, times, stars), strict=True)}


def test_the_last_films_that_a_user_liked_are_hidden(monkeypatch):
    found = ratings()
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return found

    monkeypatch.setattr(tfds, "load", load)
    monkeypatch.setattr(tfds, "as_numpy", lambda data: data)
    monkeypatch.setattr(sys, "argv", ["recommender.py", "--movielens"])
    example = runpy.run_path(str(ROOT / "examples" / "recommender.py"))
    assert asked == [(("movielens/100k-ratings",), {"split": "train", "batch_size": -1})]
    films = sorted(set(found["movie_id"]))
    seen, hidden = [], []
    for number, user in enumerate(sorted(set(found["user_id"]))):
        own = (found["user_id"] == user) & (found["user_rating"] >= 4)
        liked = found["movie_id"][own][np.argsort(found["timestamp"][own])]
        pairs = [(number, films.index(film)) for film in liked]
        seen += pairs[:-3]
        hidden += pairs[-3:]
    assert len(seen) > 5 and len(hidden) > 12
    np.testing.assert_array_equal(example["SEEN"], seen)
    np.testing.assert_array_equal(example["HIDDEN"], hidden)
    model = example["build_model"]()
    assert [w.shape for w in model.get_weights()] == [(6, 32), (12, 32)]
