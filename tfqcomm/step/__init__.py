"""One training step: messages, their exchange, the update."""

from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.step.options import ExchangeOptions

__all__ = ["ExchangeOptions", "GradientExchange", "Message"]
