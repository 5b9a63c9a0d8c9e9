"""Networks of the papers and of the examples, in plain Keras."""

from models.comp_ams_cifar_cnn import comp_ams_cifar_cnn
from models.comp_ams_mnist_cnn import comp_ams_mnist_cnn
from models.digits_cnn import digits_cnn
from models.leader_sgd_cnn import leader_sgd_cnn
from models.leader_sgd_cnn7 import leader_sgd_cnn7
from models.mlp import mlp

__all__ = [
    "comp_ams_cifar_cnn",
    "comp_ams_mnist_cnn",
    "digits_cnn",
    "leader_sgd_cnn",
    "leader_sgd_cnn7",
    "mlp",
]
