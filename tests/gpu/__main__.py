"""What `make test-gpu` runs: the tests on GPUs, then the speed of every codec there.

Without a GPU it says so, and succeeds.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
NONE = """No GPU was found, so nothing was tested and nothing was timed.
If this machine has one, TensorFlow may lack its libraries: pip install 'tensorflow[and-cuda]'."""


def main() -> int:
    """Returns the exit code."""
    import tensorflow as tf

    gpus = [device.name for device in tf.config.list_physical_devices("GPU")]
    if not gpus:
        print(NONE)
        return 0
    print(f"TensorFlow {tf.__version__}, {len(gpus)} GPUs.", flush=True)
    # The tests' conftest hides GPUs unless they are named.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(len(gpus))))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", *sys.argv[1:]]
    speed = [sys.executable, "-m", "benchmarks.codecs", "--noreferences"]
    codes = [subprocess.call(command, cwd=ROOT, env=env) for command in (tests, speed)]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
