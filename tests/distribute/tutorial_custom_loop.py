"""TensorFlow's tutorial "Custom training loop with Keras and MultiWorkerMirroredStrategy".

    python -m tfqcomm.launch --workers=2 tests/distribute/tutorial_custom_loop.py DIRECTORY

The strategy is swapped and the data are made up. The optimizer is built where it first steps, which
is inside a `tf.function`; all workers save checkpoints, to places of their own.
"""

from __future__ import annotations

import json
import os
import sys

import keras
import tensorflow as tf

import tfqcomm
from tests.distribute.tutorial_fit import _is_chief, digits_dataset, write_filepath

NUM_EPOCHS, NUM_STEPS_PER_EPOCH, PER_WORKER_BATCH = 3, 8, 16


def dataset_fn(global_batch_size, input_context):
    batch_size = input_context.get_per_replica_batch_size(global_batch_size)
    dataset = digits_dataset(batch_size)
    dataset = dataset.shard(input_context.num_input_pipelines, input_context.input_pipeline_id)
    return dataset.prefetch(2)


def build_cnn_model():
    regularizer = keras.regularizers.L2(1e-4)
    return keras.Sequential(
        [
            keras.Input(shape=(28, 28)),
            keras.layers.Reshape(target_shape=(28, 28, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu", kernel_regularizer=regularizer),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu", kernel_regularizer=regularizer),
            keras.layers.Dense(10),
        ]
    )


def main(checkpoint_dir):
    tf_config = json.loads(os.environ["TF_CONFIG"])
    global_batch_size = PER_WORKER_BATCH * len(tf_config["cluster"]["worker"])
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()

    with strategy.scope():
        model = build_cnn_model()
        dataset = strategy.distribute_datasets_from_function(
            lambda input_context: dataset_fn(global_batch_size, input_context)
        )
        optimizer = keras.optimizers.RMSprop(learning_rate=0.001)
        train_accuracy = keras.metrics.SparseCategoricalAccuracy(name="train_accuracy")

    @tf.function
    def train_step(iterator):
        def step_fn(inputs):
            x, y = inputs
            with tf.GradientTape() as tape:
                predictions = model(x, training=True)
                per_example_loss = keras.losses.SparseCategoricalCrossentropy(
                    from_logits=True, reduction=None
                )(y, predictions)
                loss = tf.nn.compute_average_loss(per_example_loss)
                if model.losses:
                    loss += tf.nn.scale_regularization_loss(tf.add_n(model.losses))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            train_accuracy.update_state(y, predictions)
            return loss

        per_replica_losses = strategy.run(step_fn, args=(next(iterator),))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica_losses, axis=None)

    epoch = tf.Variable(initial_value=tf.constant(0, dtype=tf.dtypes.int64), name="epoch")
    step_in_epoch = tf.Variable(
        initial_value=tf.constant(0, dtype=tf.dtypes.int64), name="step_in_epoch"
    )
    task_type = strategy.cluster_resolver.task_type
    task_id = strategy.cluster_resolver.task_id
    checkpoint = tf.train.Checkpoint(model=model, epoch=epoch, step_in_epoch=step_in_epoch)
    write_checkpoint_dir = write_filepath(checkpoint_dir, task_type, task_id)
    manager = tf.train.CheckpointManager(checkpoint, directory=write_checkpoint_dir, max_to_keep=1)
    latest = tf.train.latest_checkpoint(checkpoint_dir)
    if latest:
        checkpoint.restore(latest)
    first_epoch = int(epoch.numpy())

    losses, accuracies = [], []
    while epoch.numpy() < NUM_EPOCHS:
        iterator = iter(dataset)
        total_loss, num_batches = 0.0, 0
        while step_in_epoch.numpy() < NUM_STEPS_PER_EPOCH:
            total_loss += train_step(iterator)
            num_batches += 1
            step_in_epoch.assign_add(1)
        losses.append(float(total_loss / num_batches))
        accuracies.append(float(train_accuracy.result()))
        train_accuracy.reset_state()
        epoch.assign_add(1)
        step_in_epoch.assign(0)
        manager.save()
        if not _is_chief(task_type, task_id):
            tf.io.gfile.rmtree(write_checkpoint_dir)
        if len(sys.argv) > 2 and epoch.numpy() == int(sys.argv[2]):
            break  # an interruption
    report = {
        "first epoch": first_epoch,
        "loss": losses,
        "accuracy": accuracies,
        "iterations": int(optimizer.iterations.numpy()),
        "weights": [float(tf.reduce_sum(w)) for w in model.trainable_variables],
    }
    print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
