"""A training loop of your own: nothing but the strategy is this package's.

    python -m tfqcomm.launch --workers=2 examples/custom_loop.py

What an optimizer of Keras applies in `strategy.run` is exchanged, and compressed, as in `fit`.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm

GLOBAL_BATCH = 64


def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """The batches of one worker."""
    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    y = (x @ random.randn(64, 10)).argmax(1)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shard(context.num_input_pipelines, context.input_pipeline_id)
    return dataset.batch(context.get_per_replica_batch_size(GLOBAL_BATCH)).repeat()


def main() -> None:
    """Trains for 200 steps."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy("top_k")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        optimizer = keras.optimizers.Adam(3e-3)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            losses = loss_of(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(losses, global_batch_size=GLOBAL_BATCH)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train_step(batch):
        losses = strategy.run(step, args=(batch,))
        return strategy.reduce("SUM", losses, axis=None)

    batches = iter(strategy.distribute_datasets_from_function(make_dataset))
    for number in range(1, 201):
        loss = train_step(next(batches))
        if number % 40 == 0:
            print(f"step {number}: loss {float(loss):.4f}", flush=True)


if __name__ == "__main__":
    main()
