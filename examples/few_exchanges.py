"""DiLoCo: workers train alone, and exchange what they have learned every 16 steps, in 8 bits.

    python -m tfqcomm.launch --workers=2 examples/few_exchanges.py

Any Keras optimizer may be inside. With `--bandwidth=100mbit` the launcher gives each worker a
network interface of that speed (Linux, as root or with user namespaces), and it shows in time.
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
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = tfqcomm.optimizers.DiLoCo(
            keras.optimizers.Adam(3e-3), every=16, compressor="block_int8"
        )
        model.compile(optimizer, loss, metrics=["accuracy"])

    traffic = tfqcomm.callbacks.TrafficLogger()
    # Between epochs the model has the weights that all have agreed on: these are what to save.
    global_weights = tfqcomm.callbacks.AverageReplicas()
    model.fit(*make_data(), batch_size=64, epochs=8, callbacks=[global_weights, traffic], verbose=2)

    accuracy = model.evaluate(*make_data(1001, seed=2), verbose=0)[1]  # on all workers
    print(f"test accuracy {accuracy:.3f}, {traffic.history[-1]['ratio']:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
