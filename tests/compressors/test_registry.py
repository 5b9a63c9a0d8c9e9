"""Names, configurations and their errors."""

import dataclasses
import inspect
import json

import keras
import pytest

from tests.catalogue import COMPRESSORS, over_compressors
from tfqcomm import compressors
from tfqcomm.compressors import registry

EXPORTED = {
    value
    for value in vars(compressors).values()
    if inspect.isclass(value) and not inspect.isabstract(value)
}


def test_everything_exported_is_registered_and_in_the_catalogue():
    registered = {type(compressors.get(name)) for name in registry.names()}
    assert registered == EXPORTED
    assert {type(case.compressor) for case in COMPRESSORS} == EXPORTED
    defaults = {compressors.get(name) for name in registry.names()}
    assert defaults <= {case.compressor for case in COMPRESSORS}


def test_names():
    assert sorted(registry.names()) == [
        "adaptive_top_k",
        "bfloat16",
        "block_int8",
        "block_sign",
        "float16",
        "float8",
        "identity",
        "log_grid",
        "natural_compression",
        "power_sgd",
        "qsgd",
        "random_k",
        "ternary",
        "threshold_quantizer",
        "top_k",
        "two_means",
        "uniform_grid",
    ]
    assert compressors.get("top_k") == compressors.TopK(ratio=0.01)
    assert compressors.get("random_k") == compressors.RandomK(ratio=0.01)
    assert compressors.get("block_sign") == compressors.BlockSign(block=None)
    assert compressors.get("ternary") == compressors.Ternary(clip=2.5)
    assert compressors.get("qsgd") == compressors.QSGD(bits=4, bucket=512)
    assert compressors.get("log_grid") == compressors.LogGrid(k=0)
    assert compressors.get("uniform_grid") == compressors.UniformGrid(bits=8, range="absmax")
    assert compressors.get("block_int8") == compressors.BlockInt8(block=256)
    assert compressors.get("float8") == compressors.Float8(format="e4m3", block=256)
    assert compressors.get("power_sgd") == compressors.PowerSGD(rank=4)
    assert compressors.get("two_means") == compressors.TwoMeans(block=None)
    scaled = compressors.ThresholdQuantizer(threshold="scaled")
    assert compressors.get("threshold_quantizer") == scaled
    assert compressors.get(None) == compressors.Identity()


@over_compressors()
def test_configuration_round_trips(case):
    codec = case.compressor
    assert type(codec).from_config(codec.get_config()) == codec
    config = json.loads(json.dumps(compressors.serialize(codec)))
    assert compressors.deserialize(config) == codec
    assert compressors.get(config) == codec
    assert keras.saving.deserialize_keras_object(config) == codec
    short = {"class_name": type(codec).__name__, "config": codec.get_config()}
    assert compressors.get(short) == codec
    assert compressors.get(codec) is codec


@over_compressors()
def test_frozen_hashable_and_keyword_only(case):
    codec = case.compressor
    fields = dataclasses.fields(codec)
    assert hash(codec) == hash(dataclasses.replace(codec))
    assert eval(repr(codec), vars(compressors)) == codec
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(codec, field.name, None)
    assert all(field.kw_only for field in fields[1:])


def test_capabilities_are_consistent():
    for case in COMPRESSORS:
        codec = case.compressor
        assert codec.linear == (codec.sum_dtype is not None)
        assert not (codec.linear and codec.sparse)
        assert codec.linear + codec.adaptive + codec.integer + codec.low_rank <= 1


@pytest.mark.parametrize(
    "unknown",
    ["gzip", 3, compressors.TopK, {"no": "class"}, {"class_name": "Gzip", "config": {}}],
    ids=str,
)
def test_unknown_identifiers_name_what_is_supported(unknown):
    with pytest.raises(ValueError, match=r"must .*(top_k|TopK).* Received: "):
        compressors.get(unknown)


def test_other_keras_objects_are_no_compressors():
    config = keras.saving.serialize_keras_object(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="must describe one of the compressors"):
        compressors.get(config)


@keras.saving.register_keras_serializable(package="test")
@dataclasses.dataclass(frozen=True)
class Custom(compressors.Identity):
    level: int = 1


def test_a_user_defined_compressor_needs_no_registration_with_us():
    codec = Custom(level=3)
    assert compressors.get(compressors.serialize(codec)) == codec


@pytest.mark.parametrize("sparsifier", [compressors.TopK, compressors.RandomK])
@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.1", None])
def test_ratio_errors(sparsifier, ratio):
    with pytest.raises(ValueError, match=r"Argument `ratio` must be a number in \(0, 1\]. Rec"):
        sparsifier(ratio)


@pytest.mark.parametrize("block", [0, -1, 2.0, True, "8"])
def test_block_errors(block):
    with pytest.raises(ValueError, match="Argument `block` must be None or a positive integer"):
        compressors.BlockSign(block=block)


@pytest.mark.parametrize("value_dtype", ["float16", None, 32])
def test_value_dtype_errors(value_dtype):
    names = r"\['float32', 'bfloat16', 'int8', 'int4', 'table2'\]"
    expected = rf"Argument `value_dtype` must be one of {names}. Received: "
    with pytest.raises(ValueError, match=expected):
        compressors.TopK(0.1, value_dtype=value_dtype)
    with pytest.raises(TypeError):
        compressors.TopK(0.1, "bfloat16")
