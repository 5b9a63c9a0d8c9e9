"""Messages to parameter servers, in rounds or as they arrive."""

from tfqcomm.parameter_server.messages.trainer import Trainer

__all__ = ["Trainer"]
