"""A text classifier whose embedding travels whole, by rows, and by rows in 8 bits.

    python -m experiments.embedding_text --out=runs/embedding_text
    python -m experiments.embedding_text --dataset=imdb_reviews --data_dir=DIR --out=DIR \
        --words=256 --batch=32 --epochs=3 --learning_rate=1e-3 --seeds=0,1,2

Two workers and two parameter servers in one process; an embedding of 20,000 words, their mean, and
a perceptron. By rows the step is lazy: it leaves words alone that a batch does not have. All runs
of a seed begin with the same weights and see the same texts. Asked for: rows and 8 bits within 0.3
points of whole tables. By Adagrad the lazy step is the dense one; by Adam it is not: with
--beta_1=0 nearly so. Of --runs, "feedback" and "slots" are 8 bits with error feedback of the rows
that are pushed: a residual on each worker for each row, and for 4096.

"sentences" are made here: words by Zipf's law, each of which speaks for or against the label, and
one label in twenty is wrong. "imdb_reviews" are the first words of each review. About half a minute
a run on 2 shared cores.
"""

from __future__ import annotations

import os

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfqcomm
from experiments import data, plots, report

RUNS = {
    "dense": {"embedding_rows_from": None},
    "rows": {"embedding_rows_from": 1},
    "int8": {"embedding_rows_from": 1, "row_codec": "int8"},
    "feedback": {"embedding_rows_from": 1, "row_codec": "int8", "row_feedback": "all"},
    "slots": {"embedding_rows_from": 1, "row_codec": "int8", "row_feedback": 4096},
}

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "sentences", ["sentences", "imdb_reviews"], "Data set."),
    flags.DEFINE_list("runs", ["dense", "rows", "int8"], f"Of {', '.join(RUNS)}."),
    flags.DEFINE_enum("optimizer", "adam", ["adam", "adagrad"], "Of all weights."),
    flags.DEFINE_float("learning_rate", 3e-3, "Its step size.", 0.0),
    flags.DEFINE_float("beta_1", 0.9, "Decay of Adam's first moment.", 0.0, 1.0),
    flags.DEFINE_integer("epochs", 2, "Passes over the training set.", 1),
    flags.DEFINE_integer("batch", 64, "Texts per step and worker.", 1),
    flags.DEFINE_integer("vocabulary", 20_000, "Words, with 0 for padding and 1 for others.", 3),
    flags.DEFINE_integer("words", 20, "Of a text, at most.", 1),
    flags.DEFINE_integer("width", 16, "Entries of a row.", 1),
    flags.DEFINE_integer("limit_examples", None, "Only the first of both splits.", 1),
    flags.DEFINE_list("seeds", "0", "Of the weights and the data's order: a run for each."),
]
flags.DEFINE_string("data_dir", None, "Directory of the prepared data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


def sentences(examples: int = 20_000) -> data.Dataset:
    """Texts for training and as many for testing."""
    random = np.random.default_rng(0)
    count = FLAGS.vocabulary - 2
    frequencies = 1 / np.arange(3, count + 3)
    shape = [2, examples, FLAGS.words]
    ranks = random.choice(count, size=shape, p=frequencies / frequencies.sum())
    lengths = random.integers(FLAGS.words // 2, FLAGS.words + 1, size=[2, examples, 1])
    there = np.arange(FLAGS.words) < lengths
    says = random.normal(size=count)
    labels = np.sum(says[ranks] * there, -1) > 0
    labels ^= random.random(labels.shape) < 0.05
    x, y = np.where(there, ranks + 2, 0).astype(np.int32), labels.astype(np.int32)
    return data.Dataset(x[0], y[0], x[1], y[1], num_classes=2)


def build_model(seed: int) -> keras.Model:
    """Logits of two classes."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input([FLAGS.words], dtype="int32"),
            keras.layers.Embedding(FLAGS.vocabulary, FLAGS.width, mask_zero=True, name="words"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(16, "relu"),
            keras.layers.Dense(2),
        ]
    )


def optimizer() -> keras.optimizers.Optimizer:
    """As the flags say."""
    if FLAGS.optimizer == "adagrad":
        return keras.optimizers.Adagrad(FLAGS.learning_rate, initial_accumulator_value=1e-8)
    return keras.optimizers.Adam(FLAGS.learning_rate, beta_1=FLAGS.beta_1)


def run(name: str, seed: int, dataset: data.Dataset) -> list[dict[str, float]]:
    """Trains once; returns what results.json says of each epoch."""
    trainer = tfqcomm.parameter_server.Trainer(
        lambda: build_model(seed),
        optimizer=optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        workers=2,
        parameter_servers=2,
        **RUNS[name],
    )
    # On servers a table begins with other values than here.
    trainer.model.set_weights(build_model(seed).get_weights())
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    history = trainer.fit(
        lambda context: data.worker_batches(dataset, context, FLAGS.batch, seed),
        epochs=FLAGS.epochs,
        steps_per_epoch=len(dataset.x_train) // (2 * FLAGS.batch),
        validation_data=(dataset.x_test, dataset.y_test),
        callbacks=[traffic],
        verbose=0,
    ).history
    epochs = report.served_epochs(traffic.history, history)
    print(name, seed, *(f"{epoch['test_accuracy']:.2%}" for epoch in epochs), flush=True)
    return epochs


def table(runs: dict[str, dict]) -> str:
    """One line for each run, in Markdown: accuracies are means over the seeds.

    The range is that of the last epoch; bytes are those of one worker.
    """
    epochs = [f"epoch {number}" for number in range(1, FLAGS.epochs + 1)]
    rows = [["run", *epochs, "range", "bytes up and down / step", "ratio"]]
    for name, result in runs.items():
        accuracies = [[e["test_accuracy"] for e in own] for own in result["seeds"].values()]
        last = [own[-1] for own in accuracies]
        epochs = result["epochs"]
        steps, dense = (sum(epoch[key] for epoch in epochs) for key in ("steps", "dense_bytes"))
        moved = sum(epoch["bytes_sent"] + epoch["bytes_pulled"] for epoch in epochs)
        rows.append(
            [
                name,
                *(f"{accuracy:.2%}" for accuracy in np.mean(accuracies, 0)),
                f"{min(last):.2%} to {max(last):.2%}",
                f"{moved / steps:,.0f}",
                f"{dense / moved:.1f}x",
            ]
        )
    return report.markdown(rows)


def main(_):
    """Trains each of `--runs` with each of `--seeds`, then prints the table."""
    tf.get_logger().setLevel("WARNING")
    if not set(FLAGS.runs) <= set(RUNS):
        raise app.UsageError(f"--runs must be among {','.join(RUNS)}. Received: {FLAGS.runs}")
    if FLAGS.dataset == "sentences":
        dataset = sentences()
    else:
        dataset = data.imdb_reviews(FLAGS.data_dir, FLAGS.vocabulary, FLAGS.words)
    if FLAGS.limit_examples:
        dataset = dataset.first(FLAGS.limit_examples)
    runs: dict[str, dict] = {}
    for seed in FLAGS.seeds:
        for name in FLAGS.runs:
            result = runs.setdefault(name, {"seeds": {}})
            result["seeds"][seed] = result["epochs"] = run(name, int(seed), dataset)
    report.write_results(FLAGS.out, SETTINGS, runs)
    plots.plot_accuracy(
        os.path.join(FLAGS.out, "accuracy.png"),
        report.up_and_down(runs),
        f"Embeddings by rows, {FLAGS.dataset}: up and down",
    )
    print(f"\n{table(runs)}\n\nWrote {FLAGS.out}/results.json and accuracy.png")


if __name__ == "__main__":
    app.run(main)
