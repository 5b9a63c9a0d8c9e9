"""Which compressor, and does it pay at all: `python -m tfqcomm.advise`, see `__main__.py`."""

from tfqcomm.advise.advice import Advice, Method, Row
from tfqcomm.advise.run import report

__all__ = ["Advice", "Method", "Row", "report"]
