"""What is kept beside an optimizer, for as long as it trains."""

from tfqcomm.state.residuals import Residuals, Slot
from tfqcomm.state.traffic import Meter, Route, Traffic
from tfqcomm.state.worker_state import WorkerState

__all__ = [
    "Meter",
    "Residuals",
    "Route",
    "Slot",
    "Traffic",
    "WorkerState",
]
