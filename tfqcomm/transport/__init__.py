"""Moves words between replicas."""

from tfqcomm.transport.base import Transport
from tfqcomm.transport.collective import CollectiveTransport
from tfqcomm.transport.in_flight import Flights
from tfqcomm.transport.local import LocalTransport
from tfqcomm.transport.of_strategy import transport_for

__all__ = ["CollectiveTransport", "Flights", "LocalTransport", "Transport", "transport_for"]
