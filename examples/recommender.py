"""Two towers on parameter servers, whose embeddings travel whole, by rows, and by rows in 8 bits.

    python -m tfqcomm.launch --workers=2 --parameter_servers=2 examples/recommender.py

Each of 5,000 users likes 10 of 1,000 items, and has been seen with 7 of them: recall@10 asks for
the other 3. A batch has 256 users and their items; the items of others are the wrong answers.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm

USERS, ITEMS, SEEN, BATCH = 5_000, 1_000, 7, 256
random = np.random.default_rng(0)
TASTES = random.permutation(ITEMS).reshape(-1, 10).astype("int32")  # ten items each
LIKED = random.permuted(TASTES[random.integers(len(TASTES), size=USERS)], axis=1)


def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Batches of one worker's users and their items; a user's answer is the item at its place."""
    users = np.arange(USERS, dtype="int32")[
        context.input_pipeline_id :: context.num_input_pipelines
    ]
    pairs = np.repeat(users, SEEN), LIKED[users, :SEEN].ravel()
    dataset = tf.data.Dataset.from_tensor_slices(pairs).shuffle(len(pairs[0]), seed=0)
    return dataset.batch(BATCH, drop_remainder=True).map(lambda *pair: (pair, tf.range(BATCH)))


def build_model() -> keras.Model:
    """Scores of all pairs of a batch."""
    inputs, sides = [], []
    for name, count in (("users", USERS), ("items", ITEMS)):
        inputs.append(keras.Input([], dtype="int32"))
        sides.append(keras.layers.Embedding(count, 32, name=name)(inputs[-1]))
    return keras.Model(inputs, keras.ops.matmul(sides[0], keras.ops.transpose(sides[1])))


def recall(model: keras.Model, users=2000) -> float:
    """The share of unseen liked items among the ten unseen ones with the highest scores."""
    user, item = (layer.get_weights()[0] for layer in map(model.get_layer, ("users", "items")))
    scores = user[:users] @ item.T
    np.put_along_axis(scores, LIKED[:users, :SEEN], -np.inf, axis=1)
    best = np.argpartition(-scores, 10)[:, :10]
    return (LIKED[:users, SEEN:, None] == best[:, None]).any(-1).mean()


def main() -> None:
    """Trains the same model three times."""
    ways = {"whole tables": (None, "float32"), "rows": (1, "float32"), "rows in int8": (1, "int8")}
    for way, (rows_from, row_codec) in ways.items():
        keras.utils.set_random_seed(0)
        trainer = tfqcomm.parameter_server.Trainer(
            build_model,
            optimizer=keras.optimizers.Adagrad(0.3, initial_accumulator_value=1e-8),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            embedding_rows_from=rows_from,
            row_codec=row_codec,
        )
        trainer.fit(dataset_fn, epochs=1, verbose=0)
        sent = sum(w["bytes_pushed"] + w["bytes_pulled"] for w in trainer.workers)
        print(f"{way}: recall {recall(trainer.model):.3f}, {sent / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
