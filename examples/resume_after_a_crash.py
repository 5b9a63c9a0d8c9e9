"""A script that may be killed at any time and started again: locally, on Kubernetes, under Slurm.

    python -m tfqcomm.launch --workers=2 --max_restarts=3 examples/resume_after_a_crash.py \
        --backup_dir=/tmp/backup

kubernetes/train.yaml and slurm/train.sbatch start it on a cluster.
"""

import argparse
import os

import keras
import numpy as np
import tensorflow as tf

import tfqcomm


def slurm_resolver() -> tf.distribute.cluster_resolver.ClusterResolver:
    """The cluster that `srun` started, from Slurm's variables.

    TensorFlow counts GPUs with nvidia-smi. Where there are none it must be told a number that is
    not 0, one for each task; tfqcomm then looks which GPUs the process really has.
    """
    tasks = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    no_gpus = {"auto_set_gpu": False, "gpus_per_node": tasks, "gpus_per_task": 1}
    gpus = {} if tf.config.list_physical_devices("GPU") else no_gpus
    return tf.distribute.cluster_resolver.SlurmClusterResolver(port_base=8888, **gpus)


def main() -> None:
    """Trains a small network on data that it makes up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backup_dir", required=True, help="on storage that all workers share")
    parser.add_argument("--slurm", action="store_true", help="started by srun, without TF_CONFIG")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    resolver = slurm_resolver() if options.slurm else None
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
        "block_sign", cluster_resolver=resolver
    )
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])

    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    y = (x @ random.randn(64, 10)).argmax(1)
    print("start number", os.environ.get("TFQCOMM_RESTART_COUNT", "0"), flush=True)
    backup = tfqcomm.callbacks.BackupAndRestore(options.backup_dir)  # on every worker
    model.fit(x, y, batch_size=64, epochs=options.epochs, callbacks=[backup], verbose=2)


if __name__ == "__main__":
    main()
