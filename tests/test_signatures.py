"""Signatures are promises: every argument keeps its name, its place and its default."""

import copy
import inspect
import json
import pathlib
import re

import keras
import pytest

from tfqcomm import distribute, optimizers
from tfqcomm.compressors import TopK

REQUIRED = inspect.Parameter.empty

SHARED = {  # what all that compress have in common
    "error_feedback": "auto",
    "residual_decay": 1.0,
    "scale_residual": False,
    "min_size": 1024,
    "schedule": "auto",
    "hierarchical": False,
    "granularity": "tensor",
    "embedding_rows": "float32",
    "warm_up": 0,
    "accumulate": 1,
    "seed": 0,
    "verify": True,
}
OF_GRADIENTS = ("scale_residual", "accumulate", "embedding_rows")
DEMO_DECIDES = optimizers.DeMo.decides
ADAM = {"learning_rate": 1e-3, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
ADAGRAD = {"learning_rate": 0.05, "l1": 0.0, "delta": 1e-2}
QUANTIZED = {
    "compressor": "threshold_quantizer",
    **SHARED,
    "error_feedback": False,
    "l1_on_vectors": False,
}
SGD = {"learning_rate": 0.01, "momentum": 0.0}

GOLDENS = {  # by position, and by name alone: argument -> default, as of the first release
    "AdaptiveTopKSGD": (
        {**SGD, "nesterov": False},
        {
            "budget": 0.01,
            "rule": "norm",
            "total_steps": None,
            "contraction": 1.0,
            "norm_decay": 1.0,
            "warm_up_steps": 0,
            "error_feedback": "auto",
            "momentum_correction": False,
            "min_size": 1024,
            "verify": True,
            "name": "adaptive_top_k_sgd",
        },
    ),
    "CompAMS": (
        ADAM,
        {"compressor": "top_k", **SHARED, "epsilon_inside": True, "name": "comp_ams"},
    ),
    "DeMo": (
        {"learning_rate": 1e-3, "decay": 0.999, "top": 32, "chunk": 64},
        {
            **{n: SHARED[n] for n in SHARED if n not in DEMO_DECIDES},
            "value_dtype": "float32",
            "name": "demo",
        },
    ),
    "DiLoCo": (
        {
            "inner": REQUIRED,
            "every": REQUIRED,
            "outer_learning_rate": 0.7,
            "outer_momentum": 0.9,
            "compressor": None,
            "fragments": 1,
            "overlap": 0,
            "merge": 1.0,
        },
        {**SHARED, **dict.fromkeys(OF_GRADIENTS, "missing"), "name": "diloco"},
    ),
    "SparseLoCo": (
        {
            "inner": REQUIRED,
            "every": 30,
            "compressor": TopK(64 / 4096, value_dtype="table2", chunk=4096),
            "residual_decay": 0.95,
            "fragments": 1,
            "overlap": 0,
            "merge": 1.0,
            "outer_learning_rate": 1.0,
        },
        {
            **{n: SHARED[n] for n in SHARED if n not in ("residual_decay", "schedule")},
            **dict.fromkeys(OF_GRADIENTS, "missing"),
            "name": "sparse_loco",
        },
    ),
    "ElasticAveragingSGD": (
        SGD,
        {
            "alpha": None,
            "beta": 0.9,
            "period": 64,
            "nesterov": False,
            "name": "elastic_averaging_sgd",
        },
    ),
    "LeaderSGD": (
        SGD,
        {
            "local_pull": 0.1,
            "global_pull": 0.1,
            "local_period": 64,
            "global_period": 128,
            "groups": 1,
            "loss_window": 10,
            "nesterov": False,
            "leader_compressor": None,
            "seed": 0,
            "name": "leader_sgd",
        },
    ),
    "OneBitAdam": (
        ADAM,
        {"compressor": "block_sign", **SHARED, "warm_up": "auto", "name": "one_bit_adam"},
    ),
    "PeriodicAveragingSGD": (
        SGD,
        {"period": 64, "nesterov": False, "name": "periodic_averaging_sgd"},
    ),
    "QAdam": (
        ADAM,
        {"compressor": "log_grid", "weight_compressor": None, **SHARED, "name": "qadam"},
    ),
    "QCMDAdagrad": (ADAGRAD, {**QUANTIZED, "name": "qcmd_adagrad"}),
    "QRDAAdagrad": (ADAGRAD, {**QUANTIZED, "center": "zero", "name": "qrda_adagrad"}),
    "CompressedAllReduce": ({"compressor": REQUIRED}, SHARED),
    "MultiWorkerMirroredStrategy": (
        {"compressor": None},
        {
            **SHARED,
            "timeout_seconds": 300.0,
            "devices_per_worker": None,
            "cluster_resolver": None,
            "communication_options": None,
        },
    ),
}


def public(name):
    return getattr(optimizers, name, None) or getattr(distribute, name)


def defaults(signature, kind) -> dict:
    return {p.name: p.default for p in signature.parameters.values() if p.kind == kind}


def test_every_optimizer_has_a_golden():
    assert set(optimizers.__all__) - {"CompressedOptimizer"} <= set(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_arguments_keep_their_names_places_and_defaults(name):
    by_position, by_name = GOLDENS[name]
    signature = inspect.signature(public(name))
    assert list(defaults(signature, inspect.Parameter.POSITIONAL_OR_KEYWORD).items()) == list(
        by_position.items()
    )
    found = defaults(signature, inspect.Parameter.KEYWORD_ONLY)
    assert by_name == {name: found.get(name, "missing") for name in by_name}


@pytest.mark.parametrize("name", [*GOLDENS, "CompressedOptimizer"])
def test_signature_and_docstring_show_every_argument(name):
    owner = public(name)
    parameters = inspect.signature(owner).parameters
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    if name in set(optimizers.__all__) - {
        "DiLoCo",
        "SparseLoCo",
    }:  # whose inner optimizer takes them
        assert {"weight_decay", "clipnorm", "use_ema", "name"} <= set(parameters)
    section = re.search(r"^Args:\n((?: {4}.*\n)+)", inspect.getdoc(owner), re.MULTILINE)[1]
    described = re.findall(r"^ {4}(\w+(?:,\s+\w+)*):", section, re.MULTILINE)
    described = re.findall(r"\w+", " ".join(described))
    assert sorted(described) == sorted(set(parameters) - {"name"})


def test_the_same_text_stands_wherever_an_argument_is_shared():
    texts = [
        re.search(r"^ {4}granularity: .*(?:\n {8}.*)*", inspect.getdoc(public(name)), re.M)[0]
        for name, (_, by_name) in GOLDENS.items()
        if "granularity" in by_name
    ]
    assert len(texts) == 9 and len(set(texts)) == 1


def test_a_subclass_has_a_signature_of_its_own():
    class Mine(optimizers.CompAMS):
        def __init__(self, learning_rate=0.5, **options):
            super().__init__(learning_rate, **options)

    assert list(inspect.signature(Mine).parameters) == ["learning_rate", "options"]
    assert Mine(beta_1=0.5, min_size=3, clipnorm=1.0).options.min_size == 3


CONFIGS = json.loads((pathlib.Path(__file__).parent / "optimizers/data/configs.json").read_text())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["class_name"])
def test_configs_of_before_load_and_are_written_alike(config):
    """They were written when every constructor named all of its arguments."""
    optimizer = keras.optimizers.deserialize(copy.deepcopy(config))
    again = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    # What has been added since then has its default.
    assert {name: again["config"][name] for name in config["config"]} == config["config"]
    assert again["registered_name"] == config["registered_name"]


def test_there_is_a_config_of_every_optimizer():
    assert {config["class_name"] for config in CONFIGS} >= set(GOLDENS) & set(optimizers.__all__)
