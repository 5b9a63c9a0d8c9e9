"""Signatures are promises: every argument keeps its name, its place and its default."""

import inspect

import pytest

from tfqcomm import distribute, optimizers

REQUIRED = inspect.Parameter.empty

SHARED = {  # what all that compress have in common
    "error_feedback": "auto",
    "min_size": 1024,
    "schedule": "auto",
    "granularity": "tensor",
    "seed": 0,
    "verify": True,
}
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
        {"warm_up": "auto", "compressor": "block_sign", **SHARED, "name": "one_bit_adam"},
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
