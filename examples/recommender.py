"""Two towers on parameter servers, whose embeddings travel whole, by rows, and by rows in 8 bits.

    python -m tfqcomm.launch --workers=2 --parameter_servers=2 examples/recommender.py

Each of 5,000 users likes 10 of 1,000 items. Of 7 items that a user was seen with 4 in 10 are
chance; recall@10 asks for 3 others. The wrong answers are the items of others in a batch.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm

USERS, ITEMS, BATCH = 5_000, 1_000, 256
random = np.random.default_rng(0)
TASTES = random.permutation(ITEMS).reshape(-1, 10)
LIKED = random.permuted(TASTES[random.integers(len(TASTES), size=USERS)], axis=1)
CHANCE = random.integers(ITEMS, size=[USERS, 7])
SEEN = np.where(random.random([USERS, 7]) < 0.4, CHANCE, LIKED[:, :7])


def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Batches of one worker's users and items; a user's answer is the item in the same place."""
    users = np.arange(context.input_pipeline_id, USERS, context.num_input_pipelines)
    pairs = np.repeat(users, SEEN.shape[1]), SEEN[users].ravel()
    dataset = tf.data.Dataset.from_tensor_slices(pairs).shuffle(len(pairs[0]), seed=0)
    return dataset.batch(BATCH, drop_remainder=True).map(lambda *pair: (pair, tf.range(BATCH)))


def build_model() -> keras.Model:
    """Scores of all pairs of a batch."""
    inputs = user, item = keras.Input([], dtype="int64"), keras.Input([], dtype="int64")
    user = keras.layers.Embedding(USERS, 32, name="users")(user)
    item = keras.layers.Embedding(ITEMS, 32, name="items")(item)
    return keras.Model(inputs, keras.ops.matmul(user, keras.ops.transpose(item)))


def recall(model: keras.Model) -> float:
    """The share of hidden items among the ten unseen ones with the highest scores."""
    users, items = (model.get_layer(name).get_weights()[0] for name in ("users", "items"))
    scores = users @ items.T
    np.put_along_axis(scores, SEEN, -np.inf, axis=1)
    return (LIKED[:, 7:, None] == np.argpartition(-scores, 10)[:, None, :10]).any(-1).mean()


def main() -> None:
    """Trains the same model three times."""
    for rows_from, codec in ((None, "float32"), (1, "float32"), (1, "int8")):
        adagrad = keras.optimizers.Adagrad(0.1, initial_accumulator_value=1e-8)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        how = {"loss": loss, "embedding_rows_from": rows_from, "row_codec": codec}
        trainer = tfqcomm.parameter_server.Trainer(build_model, optimizer=adagrad, **how)
        trainer.fit(dataset_fn, epochs=3, verbose=0)
        moved = sum(w["bytes_pushed"] + w["bytes_pulled"] for w in trainer.workers) / 1e6
        print(f"{rows_from}, {codec}: recall {recall(trainer.model):.3f}, {moved:.0f} MB")


if __name__ == "__main__":
    main()
