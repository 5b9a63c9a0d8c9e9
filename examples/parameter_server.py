"""Weights on parameter servers: quantized weights down, quantized updates up.

    python -m tfqcomm.launch --workers=2 --parameter_servers=1 examples/parameter_server.py

The script runs once, as the chief. Without the launcher it embeds a small cluster in its process.
On other machines workers and servers run `python -m tfqcomm.launch --serve`, under a TF_CONFIG.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm


def make_data(examples=4096, seed=0):
    """Random points, and which of ten random directions each is closest to."""
    random = np.random.RandomState(seed)
    x = random.randn(examples, 64).astype("float32")
    return x, (x @ np.random.RandomState(1).randn(64, 10)).argmax(1)


def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """The batches of one worker: its share of the arrays, in an order of its own."""
    x, y = make_data()
    share = slice(context.input_pipeline_id, None, context.num_input_pipelines)
    dataset = tf.data.Dataset.from_tensor_slices((x[share], y[share]))
    return dataset.shuffle(2048, seed=context.input_pipeline_id).batch(32)


def build_model() -> keras.Model:
    """Called once, when the process has joined the cluster."""
    return keras.Sequential(
        [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
    )


def main() -> None:
    """Trains, and saves a plain Keras model."""
    keras.utils.set_random_seed(0)
    trainer = tfqcomm.parameter_server.Trainer(
        build_model,
        optimizer=tfqcomm.optimizers.QAdam(3e-3, compressor="log_grid"),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weight_compressor="uniform_grid",
    )
    test = make_data(1001, seed=2)
    trainer.fit(dataset_fn, epochs=3, steps_per_epoch=60, validation_data=test, verbose=2)
    for worker in trainer.workers:
        print(f"{worker['bytes_pushed']:,} bytes sent, {worker['bytes_pulled']:,} received")
    trainer.model.save("model.keras")


if __name__ == "__main__":
    main()
