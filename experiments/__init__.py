"""Training runs of the papers, and the main job: `python -m experiments.NAME --help`."""

import os

from experiments import quiet

if int(os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")) > 1:  # progress stays readable
    quiet.import_tensorflow()
