"""Networks of the papers and of the examples, in plain Keras."""

from models.character_cnn import character_cnn
from models.comp_ams_cifar_cnn import comp_ams_cifar_cnn
from models.comp_ams_imdb_lstm import comp_ams_imdb_lstm
from models.comp_ams_mnist_cnn import comp_ams_mnist_cnn
from models.digits_cnn import digits_cnn
from models.leader_sgd_cnn import leader_sgd_cnn
from models.leader_sgd_cnn7 import leader_sgd_cnn7
from models.logistic_regression import logistic_regression
from models.mlp import mlp
from models.resnet20 import resnet20
from models.softmax_regression import softmax_regression
from models.vgg16_bn import vgg16_bn

__all__ = [
    "character_cnn",
    "comp_ams_cifar_cnn",
    "comp_ams_imdb_lstm",
    "comp_ams_mnist_cnn",
    "digits_cnn",
    "leader_sgd_cnn",
    "leader_sgd_cnn7",
    "logistic_regression",
    "mlp",
    "resnet20",
    "softmax_regression",
    "vgg16_bn",
]
