"""One of the two processes that `software.of_this_machine` starts."""

from __future__ import annotations

import pathlib
import sys

from tfqcomm.advise.software import to_json
from tfqcomm.costs import link as links
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.transport.of_strategy import transport_for


def main(out: str) -> None:
    """Measures, and writes what it found to a file if it is the first."""
    transport = transport_for(MultiWorkerMirroredStrategy())
    link = links.measure(transport)
    if transport.process == 0:
        pathlib.Path(out).write_text(to_json(link))


if __name__ == "__main__":
    main(sys.argv[1])
