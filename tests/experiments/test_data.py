"""The data sets, and the order in which replicas see them."""

import numpy as np
import pytest
from sklearn import datasets

import models
from experiments import data
from experiments.accounting import paper_bits
from tfqcomm import compressors


def test_digits():
    digits = data.load("digits")
    assert digits.x_train.shape == (1437, 8, 8, 1) and digits.x_test.shape == (360, 8, 8, 1)
    assert digits.x_train.dtype == digits.x_test.dtype == np.float32
    assert digits.x_train.min() == 0 and digits.x_train.max() == 1
    assert set(np.bincount(digits.y_test)) <= {35, 36, 37}  # stratified
    assert digits.num_classes == 10


def test_digits_are_always_split_alike():
    first, second = data.load("digits"), data.load("digits")
    np.testing.assert_array_equal(first.x_train, second.x_train)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"Argument `name` must be one of .*Received: name='mnits'"
    ):
        data.load("mnits")


def test_missing_directory(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=f"no directory data_dir='{missing}'"):
        data.load("mnist", missing)


def test_directory_without_the_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build mnist --data_dir="):
        data.load("mnist", str(tmp_path))


def write_libsvm(path, examples, features, seed):
    """Writes binary features and labels of -1 and 1 as LIBSVM does; returns them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2, [examples, features])
    y = np.where(rng.random(examples) < 0.5, -1, 1)
    datasets.dump_svmlight_file(x, y, str(path), zero_based=False)
    return x, y


def test_a9a(tmp_path):
    x_train, y_train = write_libsvm(tmp_path / "a9a", 20, 123, seed=0)
    x_test, y_test = write_libsvm(tmp_path / "a9a.t", 7, 122, seed=1)  # as in the real file
    a9a = data.load("a9a", str(tmp_path))
    np.testing.assert_array_equal(a9a.x_train, x_train)
    np.testing.assert_array_equal(a9a.x_test[:, :122], x_test)
    assert a9a.x_test.shape == (7, 123) and not a9a.x_test[:, 122].any()
    np.testing.assert_array_equal(a9a.y_train, (y_train + 1) // 2)
    np.testing.assert_array_equal(a9a.y_test, (y_test + 1) // 2)
    assert a9a.x_train.dtype == np.float32 and a9a.y_train.dtype == np.int32
    assert a9a.num_classes == 2


def test_a9a_needs_its_files(tmp_path):
    with pytest.raises(ValueError, match=r"`data_dir` must name .* a9a.t.*Received: data_dir=None"):
        data.load("a9a")
    with pytest.raises(FileNotFoundError, match="a9a"):
        data.load("a9a", str(tmp_path))


def test_imdb_reviews(monkeypatch):
    texts = np.array([b"Good, good!<br />GOOD film.", b"bad film " * 300, b"good"], object)
    unseen = np.array([b"A bad, bad sequel to a good film"], object)
    splits = ((texts, np.array([1, 0, 1])), (unseen, np.array([0])), 2)
    monkeypatch.setattr(data, "_load_tfds", lambda name, data_dir: splits)
    reviews = data.load("imdb_reviews")
    film, bad, good, other, padding = 2, 3, 4, 1, 0  # 301, 300 and 4 times in the training set
    np.testing.assert_array_equal(reviews.x_train[0, :5], [good, good, good, film, padding])
    assert reviews.x_train.shape == (3, 500) and reviews.x_train.dtype == np.int32
    np.testing.assert_array_equal(reviews.x_train[1], [bad, film] * 250)
    np.testing.assert_array_equal(reviews.x_train[2], [good] + [padding] * 499)
    np.testing.assert_array_equal(
        reviews.x_test[0, :9], [other, bad, bad, other, other, other, good, film, padding]
    )
    np.testing.assert_array_equal(reviews.y_train, [1, 0, 1])


def test_images_as_raw_pixels(monkeypatch):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28, 1)
    splits = ((images, np.array([3, 4])), (images[:1], np.array([3])), 10)
    monkeypatch.setattr(data, "_load_tfds", lambda name, data_dir: splits)
    raw, normal = (data.load("mnist", normalise=value) for value in (False, True))
    np.testing.assert_array_equal(raw.x_train, images.astype(np.float32) / 255)
    np.testing.assert_allclose(normal.x_test, (raw.x_test - 0.1307) / 0.3081, rtol=1e-5)


def test_first_examples_of_both_splits():
    digits, few = data.load("digits"), data.load("digits").first(400)
    np.testing.assert_array_equal(few.x_train, digits.x_train[:400])
    np.testing.assert_array_equal(few.y_test, digits.y_test)  # there are 360


def rows_seen(strategy, seed, steps, replica_batch=4, examples=37):
    """What each replica is given: int[steps, replica, example]."""
    x = np.arange(examples, dtype=np.float32)
    stream = iter(data.training_stream(x, x.astype(np.int32), strategy, replica_batch, seed))
    batches = [strategy.experimental_local_results(next(stream)[1]) for _ in range(steps)]
    return np.array([[replica.numpy() for replica in batch] for batch in batches])


def test_stream_does_not_depend_on_the_number_of_replicas(mirrored_strategy):
    two = rows_seen(mirrored_strategy(2), seed=0, steps=9, replica_batch=4)
    four = rows_seen(mirrored_strategy(4), seed=0, steps=9, replica_batch=2)
    np.testing.assert_array_equal(two.reshape(9, 8), four.reshape(9, 8))


def test_stream_shuffles_each_epoch_anew(mirrored_strategy):
    epochs = rows_seen(mirrored_strategy(1), seed=0, steps=4, replica_batch=1, examples=4).ravel()
    more = rows_seen(mirrored_strategy(1), seed=1, steps=40, replica_batch=1, examples=4).ravel()
    assert sorted(epochs) == [0, 1, 2, 3]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in more.reshape(10, 4))
    assert len(np.unique(more.reshape(10, 4), axis=0)) > 3


def test_stream_follows_the_seed(mirrored_strategy):
    first, again, other = (rows_seen(mirrored_strategy(2), seed, steps=4) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_bits_as_the_paper_counts_them():
    model = models.comp_ams_mnist_cnn()
    sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
    assert 120 * paper_bits(compressors.Identity(), sizes) == 83_865_600  # worker and epoch
    assert paper_bits(compressors.BlockSign(), sizes) == 21_840
    kept = 2 + 1 + 50 + 1 + 160 + 1 + 5 + 1  # 1% of each tensor, at least one
    assert paper_bits(compressors.TopK(0.01), sizes) == 32 * kept
    assert paper_bits(compressors.Float16(), [10]) == 160
    assert paper_bits(compressors.ThresholdQuantizer(), [7840, 10]) == 2 * 7850 + 2 * 32
    assert paper_bits(compressors.Ternary(), [7840]) == 2 * 7840 + 32
