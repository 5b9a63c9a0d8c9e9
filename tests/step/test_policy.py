"""Compressors by path: who gets which, what is refused, and that each tensor fares as if alone."""

import json

import keras
import numpy as np
import pytest

from tests.replicas import apply_gradients, build, compressing, random_gradients
from tests.step.error_feedback_reference import means_of_messages, sgd
from tests.step.test_exchange import (
    dense,
    exchange_of_replicas,
    mean_of,
    message,
    mixed_messages,
    routes,
)
from tfqcomm.compressors import (
    QSGD,
    AdaptiveTopK,
    BFloat16,
    BlockSign,
    Identity,
    PowerSGD,
    TopK,
)
from tfqcomm.optimizers import CompAMS, DiLoCo
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions

SHAPES = [(40, 30), (30, 50), (7,), (20, 30)]
POLICY = {"variable0": "bfloat16", "variable[13]": TopK(0.1), "variable2": None, "*": "block_sign"}


def test_the_first_match_counts_and_a_pattern_matches_the_whole_path():
    options = ExchangeOptions({"a.*": "top_k", ".*kernel": "bfloat16"}, min_size=0)
    found = {p: options.for_path(p).compressor for p in ("a/kernel", "b/kernel", "b/kernel2")}
    assert found == {"a/kernel": TopK(), "b/kernel": BFloat16(), "b/kernel2": Identity()}
    rest = ExchangeOptions({"a": None, "*": "top_k"})
    assert rest.for_path("a").compressor == Identity()
    assert rest.for_path("a/kernel").compressor == TopK()


def test_each_variable_travels_as_its_rule_says():
    policy = {"kernel": TopK(0.1), "small": "float16", "*": "block_sign"}
    exchange = exchange_of_replicas(3, policy, min_size=0, schedule="all_gather")
    reduction = exchange.reduce(mixed_messages(3), 0)
    assert reduction.healthy
    signs = ("all_gather", "BlockSign(block=None)")
    assert routes(exchange) == {
        "kernel": ("all_gather", str(TopK(0.1))),
        "small": ("all_gather", "Float16()"),
        "bias": signs,
        "scalar": signs,
        "embedding": ("all_gather", "rows as they are"),
        "statistics": ("dense", "float32"),
    }
    assert exchange.transport.calls.count("gather") == 3 + 2 * 2  # rows: twice, with their lengths


@pytest.mark.parametrize(
    ("policy", "others", "expected"),
    [
        ({"embedding": "bfloat16"}, "float32", "rows in bfloat16, each once"),
        ({"emb.*": "block_int8", "*": "top_k"}, "float32", "rows in int8, each once"),
        ({"embedding": "block_int8"}, "bfloat16", "rows in int8, each once"),
        ({"embedding": "top_k"}, "bfloat16", "rows in bfloat16, each once"),
        ({"kernel": "block_int8", "*": None}, "float32", "rows as they are"),
    ],
)
def test_rows_travel_as_the_rule_of_their_table_says(policy, others, expected):
    exchange = exchange_of_replicas(2, policy, min_size=0, embedding_rows=others)
    sent = mixed_messages(2)
    means = exchange.reduce(sent, 0).means
    assert routes(exchange)["embedding"] == ("all_gather", expected)
    (place,) = [i for i, m in enumerate(sent) if m.name == "embedding"]
    largest = max(np.abs(dense(v)).max() for v in sent[place].values)
    np.testing.assert_allclose(dense(means[place]), mean_of(sent[place]), atol=largest / 250)


def test_a_schedule_is_chosen_for_each_codec():
    policy = {"a": TopK(0.01), "b": "block_sign", "c": "bfloat16", "d": PowerSGD(2)}
    exchange = exchange_of_replicas(4, policy)
    exchange.reduce([message(key, (40, 30), 4) for key in "abcde"], 0)
    schedules = {path: schedule for path, (schedule, _) in routes(exchange).items()}
    assert schedules == {
        "a": "all_gather", "b": "two_phase", "c": "dense", "d": "low_rank", "e": "dense"
    }  # fmt: skip


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_a_codec_does_what_it_does_alone(granularity):
    """Also one that chooses among all of its tensors, and one that plans from step to step."""
    codecs = {"a": TopK(0.1), "b": AdaptiveTopK(0.1), "c": BlockSign()}
    options = {"min_size": 0, "granularity": granularity}
    together = exchange_of_replicas(2, {f"{k}.": c for k, c in codecs.items()}, **options)
    alone = {key: exchange_of_replicas(2, codec, **options) for key, codec in codecs.items()}
    for step in range(4):
        messages = [message(f"{k}{i}", (40, 30), 2, seed=step) for i in range(2) for k in codecs]
        reduction = together.reduce(messages, step)
        reduction.commit()
        found = {m.key: mean for m, mean in zip(messages, reduction.means, strict=True)}
        for key, exchange in alone.items():
            own = [m for m in messages if m.key.startswith(key)]
            expected = exchange.reduce(own, step)
            expected.commit()
            for m, mean in zip(own, expected.means, strict=True):
                np.testing.assert_array_equal(found[m.key], mean)
    owed = together.ledger.residuals.total()
    for exchange in alone.values():
        for key, value in exchange.ledger.residuals.total().items():
            np.testing.assert_array_equal(owed[key], value)


def test_training_equals_a_reference_of_each_variable_alone():
    strategy = compressing(2, POLICY, schedule="all_gather")
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(0.1), SHAPES)
    start = [v.numpy() for v in variables]
    gradients = random_gradients(30, 2, SHAPES)
    found = apply_gradients(strategy, optimizer, variables, gradients)
    means = means_of_messages([BFloat16(), TopK(0.1), None, TopK(0.1)], gradients)
    for before, values, mean in zip(start, found, means, strict=True):
        np.testing.assert_allclose(values, sgd(before, mean, [0.1] * 30), atol=2e-5)
    described = [str(route) for route in ledger_of(optimizer).routes]
    assert described[0] == "variable0 [40, 30]: BFloat16(), all_gather"
    assert described[2] == "variable2 [7]: float32, dense"


def test_stochastic_codecs_draw_apart():
    exchange = exchange_of_replicas(1, {"a": QSGD(2), "b": QSGD(2, bucket=256)}, min_size=0)
    same = message("a", (40, 30), 1).values
    a, b = exchange.reduce([message("a", (40, 30), 1), message("b", (40, 30), 1)], 0).means
    assert not np.array_equal(np.sign(a), np.sign(b)), same


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, r"`compressor`, as a policy, must have patterns. Received: compressor=\{\}"),
        ({"(": "top_k"}, r"must map regular expressions.* with the pattern '\('"),
        ({3: "top_k"}, "must map regular expressions.* with the pattern 3"),
        ({"*": None, "a": "top_k"}, r"'\*' at its end.* the patterns \['\*', 'a'\]"),
        ({"a": "nothing"}, "`compressor` must be None, a .*compressor='nothing'"),
        ({"a": AdaptiveTopK(0.1), "b": AdaptiveTopK(0.2)}, "not mix different adaptive.*Received"),
        ({"a": PowerSGD(1), "b": PowerSGD(2)}, r"low rank.*Received: compressor=\{'a': PowerSGD"),
    ],
)
def test_what_is_no_policy_is_refused(policy, expected):
    with pytest.raises(ValueError, match=expected):
        ExchangeOptions(policy)


def test_each_compressor_must_fit_the_other_options():
    with pytest.raises(ValueError, match="`schedule` must be 'auto'.*compressor=PowerSGD"):
        ExchangeOptions({"a": "top_k", "b": "power_sgd", "*": None}, schedule="all_gather")
    assert ExchangeOptions({"a": "top_k", "*": None}, schedule="all_gather")


@pytest.mark.parametrize("policy", [{"variable9": "top_k"}, {".*": "top_k", "variable0": None}])
def test_a_pattern_that_takes_no_variable_is_an_error_that_lists_the_paths(policy):
    strategy = compressing(2, policy)
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(0.1), SHAPES[:2])
    expected = r"variable[90]'\].* paths are \['variable0', 'variable1'\]. Received: compressor="
    with pytest.raises(ValueError, match=expected):
        apply_gradients(strategy, optimizer, variables, random_gradients(1, 2, SHAPES[:2]))


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras 3.10 has none")
def test_optimizers_of_one_model_share_a_policy():
    """`MultiOptimizer` has parts, of which none knows all variables."""
    policy = {".*first/kernel": TopK(0.1), ".*second/kernel": "bfloat16"}
    strategy = compressing(2, policy)
    with strategy.scope():
        parts = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)
        dense = keras.layers.Dense
        model = keras.Sequential(
            [keras.Input([16]), dense(16, name="first"), dense(4, name="second")]
        )
        model.compile(
            keras.optimizers.MultiOptimizer(lambda v: parts["second" in v.path]), loss="mse"
        )
    x = np.random.default_rng(0).normal(size=[8, 16])
    model.fit(x, x[:, :4], batch_size=8, verbose=0)
    codecs = {r.path.split("/", 1)[1]: r.codec for o in parts for r in ledger_of(o).routes}
    assert codecs["first/kernel"].startswith("TopK(ratio=0.1")
    assert codecs["second/kernel"] == "BFloat16()"


def test_a_policy_is_part_of_the_config():
    optimizer = CompAMS(compressor={"a.*": "bfloat16", ".*b": TopK(0.3), "*": None}, min_size=0)
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    again = keras.optimizers.deserialize(config)
    assert again.options == optimizer.options
    assert list(again.options.get_config()["compressor"]) == ["a.*", ".*b", "*"]
    assert str(again.options.compressor).startswith("{'a.*': BFloat16(), '.*b': TopK(ratio=0.3")


def test_optimizers_of_this_package_take_policies(tmp_path):
    policy = {".*kernel": "block_sign", "*": None}
    for optimizer in (
        lambda: CompAMS(compressor=policy, min_size=0),
        lambda: DiLoCo(keras.optimizers.SGD(0.1), every=1, compressor=policy, min_size=0),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        model.compile(optimizer(), loss="mse")
        x = np.random.default_rng(0).normal(size=[8, 8])
        model.fit(x, x[:, :4], verbose=0)
        kernel, bias = ledger_of(model.optimizer).routes
        assert kernel.codec.startswith("BlockSign") and bias.codec.startswith("float32")
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.optimizer.get_config() == model.optimizer.get_config()
        loaded.fit(x, x[:, :4], verbose=0)
    wrong = DiLoCo(keras.optimizers.SGD(0.1), every=1, compressor={"nothing": "top_k"})
    model.compile(wrong, loss="mse")
    with pytest.raises(ValueError, match=r"match no variable.*\['nothing'\]"):
        model.fit(x, x[:, :4], verbose=0)


def test_parameter_servers_refuse_policies():
    for optimizer, arguments in [
        (CompAMS(compressor={"*": "top_k"}), {}),
        (keras.optimizers.SGD(), {"compressor": {"*": "top_k"}}),
    ]:
        with pytest.raises(ValueError, match="one compressor with parameter servers.*Received"):
            options_of(optimizer, 1, **arguments)
