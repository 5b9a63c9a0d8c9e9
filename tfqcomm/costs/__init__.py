"""What an exchange costs: measured on this machine, and predicted for others."""

from tfqcomm.costs.predict import Bucket, Compute, Line, Link, Prediction, predict

__all__ = ["Bucket", "Compute", "Line", "Link", "Prediction", "predict"]
