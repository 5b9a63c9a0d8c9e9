"""`fit` on several workers, with compressed gradients: any Keras optimizer, one argument.

    python -m tfqcomm.launch --workers=2 examples/multi_worker.py

On several machines set TF_CONFIG on each and start the script there, without the launcher.
"""

import keras
import numpy as np

import tfqcomm


def make_data(examples=4096, seed=0):
    """Random points, and which of ten random directions each is closest to."""
    random = np.random.RandomState(seed)
    x = random.randn(examples, 64).astype("float32")
    return x, (x @ np.random.RandomState(1).randn(64, 10)).argmax(1)


def main() -> None:
    """Trains, evaluates, and says what was sent."""
    # Before anything else of TensorFlow: it joins the workers.
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy("block_sign")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])

    traffic = tfqcomm.callbacks.TrafficLogger()
    # All workers hold the same arrays, and each takes its part of every batch of 64.
    model.fit(*make_data(), batch_size=64, epochs=5, callbacks=[traffic], verbose=2)

    accuracy = model.evaluate(*make_data(1001, seed=2), verbose=0)[1]  # on all workers
    print(f"test accuracy {accuracy:.3f}, {traffic.history[-1]['ratio']:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
