"""Arguments: what is accepted, in which forms, and how the rest is refused."""

import pytest

from tfqcomm import compressors
from tfqcomm.distribute import CompressedAllReduce
from tfqcomm.optimizers import AdaptiveTopKSGD, CompAMS
from tfqcomm.step import ExchangeOptions

EXCHANGE_ERRORS = [  # of everything that compresses
    ({"compressor": "zip"}, "Argument `compressor` must be None, a .*'top_k'.*compressor='zip'"),
    ({"compressor": 3}, "Argument `compressor` must be .*Received: compressor=3"),
    ({"schedule": "ring"}, "Argument `schedule` must be one of .*Received: schedule='ring'"),
    ({"schedule": "dense"}, "Argument `schedule` must be 'auto', 'all_gather' or 'two_phase'"),
    (
        {"granularity": "layer"},
        r"Argument `granularity` must be one of \('tensor', 'model'\). .*granularity='layer'",
    ),
    ({"min_size": -1}, "Argument `min_size` must be a non-negative integer. .*min_size=-1"),
    ({"min_size": 1.5}, "Argument `min_size` must be a non-negative integer. .*min_size=1.5"),
    ({"min_size": True}, "Argument `min_size` must be a non-negative integer. .*min_size=True"),
    ({"seed": "a"}, "Argument `seed` must be a non-negative integer. Received: seed='a'"),
    ({"verify": 1}, "Argument `verify` must be a bool. Received: verify=1"),
    (
        {"error_feedback": None},
        "Argument `error_feedback` must be a bool or 'auto'. .*error_feedback=None",
    ),
    ({"error_feedback": "on"}, "Argument `error_feedback` must be a bool or 'auto'. .*'on'"),
]
COMP_AMS_ERRORS = [
    ({"beta_1": 1.0}, r"Argument `beta_1` must be a float in \[0, 1\). Received: beta_1=1.0"),
    ({"beta_2": -0.1}, r"Argument `beta_2` must be a float in \[0, 1\). Received: beta_2=-0.1"),
    ({"beta_2": "a"}, r"Argument `beta_2` must be a float in \[0, 1\). Received: beta_2='a'"),
    ({"beta_1": float("nan")}, r"Argument `beta_1` must be a float in \[0, 1\). .*beta_1=nan"),
    ({"epsilon": 0.0}, "Argument `epsilon` must be a positive float. Received: epsilon=0.0"),
    ({"epsilon": None}, "Argument `epsilon` must be a positive float. Received: epsilon=None"),
    ({"learning_rate": "fast"}, "Argument `learning_rate` should be float.*learning_rate=fast"),
    ({"momentum": 0.9}, r"Argument\(s\) not recognized: {'momentum': 0.9}"),
    (
        {"min_sise": 9},
        "Those of CompAMS are learning_rate, .*min_size.* clipnorm,.*min_sise=9",
    ),
    ({"clipnorm": 1.0, "clipvalue": 1.0}, "Only one of `clipnorm`, `clipvalue` and"),
]


@pytest.mark.parametrize("make", [ExchangeOptions, CompressedAllReduce, CompAMS])
@pytest.mark.parametrize(("arguments", "text"), EXCHANGE_ERRORS, ids=str)
def test_exchange_arguments_are_checked_at_construction(make, arguments, text):
    if make is CompAMS:
        arguments = {"learning_rate": 1e-3, **arguments}
    with pytest.raises(ValueError, match=text):
        make(**{"compressor": "top_k", **arguments})


@pytest.mark.parametrize(("arguments", "text"), COMP_AMS_ERRORS, ids=str)
def test_comp_ams_arguments_are_checked_at_construction(arguments, text):
    with pytest.raises(ValueError, match=text):
        CompAMS(**arguments)


@pytest.mark.parametrize(
    "compressor",
    [
        "top_k",
        compressors.TopK(0.01),
        compressors.serialize(compressors.TopK()),
        {"class_name": "TopK", "config": {"ratio": 0.01}},
    ],
    ids=["name", "object", "serialized", "config"],
)
@pytest.mark.parametrize("make", [ExchangeOptions, CompressedAllReduce, CompAMS])
def test_a_compressor_in_any_form(make, compressor):
    made = make(compressor=compressor)
    options = made if make is ExchangeOptions else made.options
    assert options.compressor == compressors.TopK(0.01)


@pytest.mark.parametrize("name", ["compressor", "schedule", "granularity", "seed"])
def test_what_an_algorithm_decides_is_no_argument(name):
    with pytest.raises(
        ValueError, match=rf"not recognized: {{'{name}': 'auto'.* budget,.* verify,"
    ):
        AdaptiveTopKSGD(0.1, **{name: "auto"})


def test_an_unknown_argument_of_a_strategy():
    with pytest.raises(TypeError, match="not recognized: {'budget': 3}.* compressor, .* verify."):
        CompressedAllReduce("top_k", budget=3)


def test_everything_but_the_compressor_is_keyword_only():
    with pytest.raises(TypeError):
        CompressedAllReduce("top_k", False)
    with pytest.raises(TypeError):
        CompAMS(1e-3, 0.9, 0.999, 1e-8, "top_k")
