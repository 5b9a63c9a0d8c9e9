"""What TensorFlow's collectives take where the network takes nothing: on one machine."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from tfqcomm.costs.prediction import Line, Link

TIMEOUT = 120  # seconds


def of_this_machine() -> Link:
    """Starts two processes here, which measure the link between them; takes some ten seconds.

    Raises:
        RuntimeError: with what they printed, where they fail.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory, "link.json")
        command = [sys.executable, "-m", "tfqcomm.launch", "--workers=2"]
        command += ["-m", "tfqcomm.advise.software_worker", str(out)]
        done = subprocess.run(
            command,
            env=environment,
            timeout=TIMEOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(
                "The two processes that measure TensorFlow's collectives on this machine failed. "
                f"They printed last:\n{done.stdout[-2000:]}"
            )
        return from_json(out.read_text())


def to_json(link: Link) -> str:
    """A link as text."""
    return json.dumps(dataclasses.asdict(link))


def from_json(text: str) -> Link:
    """Inverse of `to_json`."""
    found = json.loads(text)
    processor = found.pop("processor_seconds")
    return Link(**{k: Line(**line) for k, line in found.items()}, processor_seconds=processor)
