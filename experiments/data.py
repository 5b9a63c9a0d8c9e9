"""Data sets as NumPy arrays, and the stream of batches the workers train on."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

_TFDS_MEAN_STD = {  # per channel, of the training images scaled to [0, 1]
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
NAMES = ("digits", *_TFDS_MEAN_STD)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images float32[n, height, width, channels] and labels int32[n]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: `"digits"`, scikit-learn's bundled 8x8 digits, which need no network; `"mnist"` or
            `"cifar10"`, through TensorFlow Datasets.
        data_dir: directory with the data set, prepared by TensorFlow Datasets; it is only read.
            `None`: tfds' own directory, where a missing data set is downloaded.

    Raises:
        ValueError: If `name` is unknown.
        FileNotFoundError: If `data_dir` doesn't hold the data set.
    """
    if name == "digits":
        return _load_digits()
    if name in _TFDS_MEAN_STD:
        return _load_tfds(name, data_dir)
    raise ValueError(f"Argument `name` must be one of {NAMES}. Received: name={name!r}")


def _load_digits() -> Dataset:
    from sklearn import datasets, model_selection

    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)  # 17 grey levels
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        x, y.astype(np.int32), test_size=360, stratify=y, random_state=0
    )
    return Dataset(x_train, y_train, x_test, y_test, num_classes=10)


def _load_tfds(name: str, data_dir: str | None) -> Dataset:
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
    (x_train, y_train), (x_test, y_test) = tfds.as_numpy(splits)
    mean, std = (np.array(value, np.float32) for value in _TFDS_MEAN_STD[name])

    def normalise(x):
        return (x.astype(np.float32) / 255 - mean) / std

    return Dataset(
        normalise(x_train),
        y_train.astype(np.int32),
        normalise(x_test),
        y_test.astype(np.int32),
        num_classes=builder.info.features["label"].num_classes,
    )


def training_stream(
    x: np.ndarray, y: np.ndarray, strategy: tf.distribute.Strategy, replica_batch: int, seed: int
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
