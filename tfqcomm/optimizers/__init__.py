"""The papers' algorithms as Keras optimizers."""

from tfqcomm.optimizers.comp_ams import CompAMS
from tfqcomm.optimizers.qadam import QAdam
from tfqcomm.optimizers.qcmd_adagrad import QCMDAdagrad
from tfqcomm.optimizers.qrda_adagrad import QRDAAdagrad

__all__ = ["CompAMS", "QAdam", "QCMDAdagrad", "QRDAAdagrad"]
