"""Data sets as NumPy arrays, and the stream of batches the workers train on."""

from __future__ import annotations

import dataclasses
import os

import keras
import numpy as np
import tensorflow as tf

_TFDS_MEAN_STD = {  # per channel, of the training images scaled to [0, 1]
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
NAMES = ("digits", *_TFDS_MEAN_STD, "a9a", "imdb_reviews")

A9A_FEATURES = 123  # the largest index in a9a; a9a.t ends at 122
IMDB_VOCABULARY = 2000  # with 0 for padding and 1 for all other words
IMDB_LENGTH = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples and their labels, int32[n].

    Images are float32[n, height, width, channels], rows of features float32[n, features], texts
    int32[n, words].
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int

    def first(self, examples: int) -> Dataset:
        """The first `examples` of both splits."""
        arrays = (self.x_train, self.y_train, self.x_test, self.y_test)
        return Dataset(*(array[:examples] for array in arrays), self.num_classes)


def load(name: str, data_dir: str | None = None, *, normalise: bool = True) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: `"digits"`, scikit-learn's bundled 8x8 digits, which need no network; `"mnist"`,
            `"cifar10"` or `"imdb_reviews"`, through TensorFlow Datasets; `"a9a"`, from LIBSVM's
            files `a9a` and `a9a.t`.
        data_dir: directory with the data set, prepared by TensorFlow Datasets, or with LIBSVM's
            files; it is only read. `None`: tfds' own directory, where a missing data set is
            downloaded.
        normalise: MNIST and CIFAR-10 with mean 0 and variance 1 in each channel; False: pixels in
            [0, 1]. The others are always what they are.

    Raises:
        ValueError: If `name` is unknown, or `data_dir` missing for `"a9a"`.
        FileNotFoundError: If `data_dir` doesn't hold the data set.
    """
    if name == "digits":
        return _load_digits()
    if name in _TFDS_MEAN_STD:
        return _load_images(name, data_dir, normalise)
    if name == "a9a":
        return _load_a9a(data_dir)
    if name == "imdb_reviews":
        return imdb_reviews(data_dir)
    raise ValueError(f"Argument `name` must be one of {NAMES}. Received: name={name!r}")


def _load_digits() -> Dataset:
    from sklearn import datasets, model_selection

    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)  # 17 grey levels
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        x, y.astype(np.int32), test_size=360, stratify=y, random_state=0
    )
    return Dataset(x_train, y_train, x_test, y_test, num_classes=10)


def _load_a9a(data_dir: str | None) -> Dataset:
    from sklearn import datasets

    if data_dir is None:
        raise ValueError(
            "Argument `data_dir` must name the directory of the files a9a and a9a.t, from "
            "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html. "
            "Received: data_dir=None"
        )

    def read(file):
        path = os.path.join(data_dir, file)
        x, y = datasets.load_svmlight_file(path, n_features=A9A_FEATURES, dtype=np.float32)
        return x.toarray(), (y > 0).astype(np.int32)  # labels -1 and 1

    return Dataset(*read("a9a"), *read("a9a.t"), num_classes=2)


def _load_images(name: str, data_dir: str | None, normalise: bool) -> Dataset:
    (x_train, y_train), (x_test, y_test), num_classes = _load_tfds(name, data_dir)
    mean, std = (np.array(value, np.float32) for value in _TFDS_MEAN_STD[name])

    def pixels(x):
        x = x.astype(np.float32) / 255
        return (x - mean) / std if normalise else x

    return Dataset(
        pixels(x_train),
        y_train.astype(np.int32),
        pixels(x_test),
        y_test.astype(np.int32),
        num_classes,
    )


def imdb_reviews(
    data_dir: str | None, vocabulary: int = IMDB_VOCABULARY, length: int = IMDB_LENGTH
) -> Dataset:
    """The first words of each review, as their ranks by frequency in the training set.

    Args:
        data_dir: see `load`.
        vocabulary: how many words there are, with 0 for padding and 1 for all others.
        length: how many words of a review are read.
    """
    (x_train, y_train), (x_test, y_test), num_classes = _load_tfds("imdb_reviews", data_dir)
    x_train, x_test = (
        np.array([text.replace(b"<br />", b" ") for text in texts], object)
        for texts in (x_train, x_test)
    )
    words = keras.layers.TextVectorization(max_tokens=vocabulary, output_sequence_length=length)
    words.adapt(x_train, batch_size=1000)

    def numbers(texts):
        batches = np.array_split(texts, 1 + len(texts) // 1000)
        return np.concatenate([words(batch) for batch in batches]).astype(np.int32)

    return Dataset(
        numbers(x_train),
        y_train.astype(np.int32),
        numbers(x_test),
        y_test.astype(np.int32),
        num_classes,
    )


def _load_tfds(name: str, data_dir: str | None):
    """Returns (examples, labels) for training, the same for testing, and the number of classes."""
    import tensorflow_datasets as tfds

    download = data_dir is None
    if not (download or tf.io.gfile.isdir(data_dir)):
        raise FileNotFoundError(
            f"There is no directory data_dir={data_dir!r} to read {name!r} from."
        )
    builder = tfds.builder(name, data_dir=data_dir)
    if download:
        builder.download_and_prepare()
    elif not builder.is_prepared():
        raise FileNotFoundError(
            f"The data set {name!r} is not in data_dir={data_dir!r}: "
            f"{builder.data_dir} is missing. To prepare it there: "
            f"tfds build {name} --data_dir={data_dir}. Without data_dir it is downloaded."
        )
    splits = builder.as_dataset(split=["train", "test"], batch_size=-1, as_supervised=True)
    train, test = tfds.as_numpy(splits)
    return train, test, builder.info.features["label"].num_classes


def training_stream(
    x: np.ndarray,
    y: np.ndarray,
    strategy: tf.distribute.Strategy,
    replica_batch: int,
    seed: int,
) -> tf.distribute.DistributedDataset:
    """Returns an endless stream of shuffled batches of `replica_batch` examples for each replica.

    Every process derives the same order of examples from `seed` alone; replica `r` takes rows
    `r * replica_batch` onwards of each global batch. So the data differ neither between compressors
    nor between one process and several.
    """
    shuffled = tf.data.Dataset.counter(dtype=tf.int64).flat_map(
        lambda epoch: tf.data.Dataset.from_tensor_slices(
            tf.random.experimental.stateless_shuffle(tf.range(len(x)), tf.stack([seed, epoch]))
        )
    )
    global_batch = replica_batch * strategy.num_replicas_in_sync

    images, labels = tf.constant(x), tf.constant(y)  # once, not for every pipeline

    def input_pipeline(context):
        rows_here = global_batch // context.num_input_pipelines
        start = rows_here * context.input_pipeline_id
        rows = shuffled.batch(global_batch, drop_remainder=True)
        rows = rows.map(lambda batch: batch[start : start + rows_here])
        if rows_here > replica_batch:
            rows = rows.rebatch(replica_batch, drop_remainder=True)
        batches = rows.map(lambda batch: (tf.gather(images, batch), tf.gather(labels, batch)))
        return batches.prefetch(2 * rows_here // replica_batch).with_options(_no_autotune())

    return strategy.distribute_datasets_from_function(input_pipeline, _input_options(strategy))


def worker_batches(
    dataset: Dataset,
    context: tf.distribute.InputContext,
    batch: int,
    seed: int,
    *,
    sharded: bool = True,
) -> tf.data.Dataset:
    """Returns an endless stream of batches for one worker of a parameter-server cluster.

    Every W-th example is its own, or if not `sharded` all are; in an order of its own.
    """
    step = context.num_input_pipelines if sharded else 1
    mine = slice(context.input_pipeline_id % step, None, step)
    x, y = dataset.x_train[mine], dataset.y_train[mine]
    stream = tf.data.Dataset.from_tensor_slices((x, y))
    return stream.shuffle(len(x), seed + context.input_pipeline_id).repeat().batch(batch)


def paced(stream: tf.data.Dataset, seconds: float) -> tf.data.Dataset:
    """Returns a stream that takes at least `seconds` for each batch, as a slow machine would."""
    spec = stream.element_spec
    slowed = tf.raw_ops.SleepDataset(
        input_dataset=tf.data.experimental.to_variant(stream),
        sleep_microseconds=int(seconds * 1e6),
        output_types=[part.dtype for part in tf.nest.flatten(spec)],
        output_shapes=[part.shape for part in tf.nest.flatten(spec)],
    )
    return tf.data.experimental.from_variant(slowed, spec)


def _no_autotune() -> tf.data.Options:
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def _input_options(strategy: tf.distribute.Strategy) -> tf.distribute.InputOptions | None:
    """One pipeline per replica where TensorFlow allows it, in a single process.

    With one pipeline for all devices TensorFlow adds an iterator for each, whose end waits for its
    autotuning thread (seen in 2.21): with 16 logical devices that took minutes.
    """
    if not isinstance(strategy, tf.distribute.MirroredStrategy):
        return None
    return tf.distribute.InputOptions(
        experimental_fetch_to_device=False,
        experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
    )
