"""Two towers on parameter servers, whose embeddings travel whole, by rows, and by rows in 8 bits.

    python -m tfqcomm.launch --workers=2 --parameter_servers=2 examples/recommender.py

Each of 5,000 users likes 10 of 1,000 items. Of 7 items that a user was seen with 4 in 10 are
chance; recall@10 asks for 3 others; with --movielens, for each user's last 3 films of 4 stars.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import tfqcomm

if "--movielens" in sys.argv:
    import tensorflow_datasets as tfds

    data = tfds.as_numpy(tfds.load("movielens/100k-ratings", split="train", batch_size=-1))
    ids = [np.unique(data[k], return_inverse=True)[1] for k in ("user_id", "timestamp", "movie_id")]
    pairs = np.unique(np.stack(ids, 1)[data["user_rating"] >= 4], axis=0)[:, ::2]
    left = np.searchsorted(pairs[:, 0], pairs[:, 0], "right") - np.arange(len(pairs))
    SEEN, HIDDEN = pairs[left > 3], pairs[left <= 3]
else:
    random = np.random.default_rng(0)
    liked = random.permuted(10 * random.integers(100, size=[5_000, 1]) + np.arange(10), axis=1)
    chance = random.integers(2_500, size=[5_000, 7])  # an item, or none
    items = np.where(chance < 1_000, chance, liked[:, :7]), liked[:, 7:]
    SEEN, HIDDEN = (np.stack([np.indices(a.shape)[0], a], -1).reshape(-1, 2) for a in items)


def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Batches of one worker's users and items; a user's answer is the item in the same place."""
    own = SEEN[context.input_pipeline_id :: context.num_input_pipelines].T
    dataset = tf.data.Dataset.from_tensor_slices(tuple(own)).shuffle(len(SEEN), seed=0)
    return dataset.batch(256, drop_remainder=True).map(lambda *pair: (pair, tf.range(256)))


def build_model() -> keras.Model:
    """Probabilities of all items of a batch for each user: the wrong ones are those of others."""
    inputs = [keras.Input([], dtype="int64") for _ in range(2)]
    sizes = zip(np.vstack([SEEN, HIDDEN]).max(0) + 1, inputs, strict=True)
    user, item = (keras.layers.Embedding(int(size), 32)(ids) for size, ids in sizes)
    return keras.Model(inputs, keras.ops.softmax(keras.ops.einsum("ud,id->ui", user, item)))


if __name__ == "__main__":
    for rows_from, codec in ((None, "float32"), (1, "float32"), (1, "int8")):
        how = {"embedding_rows_from": rows_from, "row_codec": codec}
        how["optimizer"] = keras.optimizers.Adagrad(0.1, initial_accumulator_value=1e-8)
        how["loss"] = "sparse_categorical_crossentropy"
        trainer = tfqcomm.parameter_server.Trainer(build_model, **how)
        trainer.fit(dataset_fn, epochs=3, verbose=0)
        moved = sum(w["bytes_pushed"] + w["bytes_pulled"] for w in trainer.workers) / 1e6
        users, items = trainer.model.get_weights()
        scores = users @ items.T
        scores[tuple(SEEN.T)] = -np.inf
        hits = np.argpartition(-scores, 10)[HIDDEN[:, 0], :10] == HIDDEN[:, 1:]
        print(f"{rows_from}, {codec}: recall {hits.any(1).mean():.3f}, {moved:.0f} MB")
