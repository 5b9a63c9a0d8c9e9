"""What an exchange costs: measured on this machine, and predicted for others."""

from tfqcomm.costs.prediction import Bucket, Compute, Line, Link, Prediction, predict

__all__ = ["Bucket", "Compute", "Line", "Link", "Prediction", "predict"]
