"""The same under Ray Train, which starts the workers, and tells each of the others by TF_CONFIG.

    pip install 'ray[train]'
    python examples/ray/train.py

Here two workers on this machine; on a cluster of Ray's the same script, with more of them.
"""

import keras
import numpy as np
from ray import train
from ray.train import ScalingConfig
from ray.train.tensorflow import TensorflowTrainer

import tfqcomm

WORKERS = 2


def make_data():
    """Random points, and which of ten random directions each is closest to."""
    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    return x, (x @ random.randn(64, 10)).argmax(1)


def work() -> None:
    """One worker. Nothing in it knows of Ray but the last line."""
    # Before anything else of TensorFlow: it joins the workers.
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy("block_sign")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    # All workers hold the same arrays, and each takes its part of every batch of 64.
    history = model.fit(*make_data(), batch_size=64, epochs=5, callbacks=[traffic], verbose=0)
    accuracy, ratio = history.history["accuracy"][-1], traffic.history[-1]["ratio"]
    train.report({"accuracy": accuracy, "ratio": ratio})


def main() -> None:
    """Starts the workers, and says what the first of them reports."""
    # Half a CPU each: some versions of Ray want another for themselves.
    scaling = ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5})
    trainer = TensorflowTrainer(work, scaling_config=scaling)
    found = trainer.fit().metrics
    print(f"accuracy {found['accuracy']:.3f}, {found['ratio']:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
