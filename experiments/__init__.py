"""Training runs of the papers, and the main job: `python -m experiments.NAME --help`."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow: progress stays readable
