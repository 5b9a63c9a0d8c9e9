"""`report` and the command line, with a link that is given; on real workers in the slow test."""

import pathlib
import re

import keras
import pytest

from tests import processes
from tfqcomm import advise
from tfqcomm.advise import __main__ as command
from tfqcomm.advise import plot, run
from tfqcomm.costs.prediction import Link

FAST = {"seconds": 1e-3, "compressors": ["float16", "block_sign"]}
NAME = "tests.advise.test_run:perceptron"


def perceptron():
    return keras.Sequential([keras.Input([40]), keras.layers.Dense(50), keras.layers.Dense(30)])


@pytest.fixture(autouse=True)
def software(monkeypatch):
    """No processes are started to measure TensorFlow's part of a link."""
    link = Link.of_network(1e10, 1e-4)
    monkeypatch.setattr(run, "of_this_machine", lambda: link)
    return link


def test_report(software):
    found = advise.report(perceptron(), workers=8, bandwidth="100Mbps", latency="2ms", **FAST)
    assert found.parameters == 41 * 50 + 51 * 30
    assert found.link == software.behind(1e8, 2e-3)
    assert found.origin.startswith("100 Mbit/s, 2 ms; ")
    ways = [(str(m), m.schedule) for m in found.methods]
    assert ways == [
        ("no compressor", None),
        ("Float16()", "auto"),
        ("BlockSign(block=None)", "all_gather"),
        ("BlockSign(block=None)", "two_phase"),
    ]
    assert found.dense().prediction.bytes_sent == pytest.approx(2 * 7 / 8 * 4 * found.parameters)
    assert isinstance(found, advise.Advice)
    assert all(isinstance(row, advise.Row) for row in found.rows(1024))


def test_what_is_assumed_is_told():
    none = {"seconds": 1e-3, "compressors": []}
    found = advise.report(perceptron(), workers=2, **none)
    assert "1000 Mbit/s, 0.2 ms (assumed: bandwidth and latency" in found.origin
    found = advise.report(perceptron(), workers=2, bandwidth="2gbit", **none)
    assert "2000 Mbit/s, 0.2 ms (assumed: latency; " in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 1}, "`workers` must be an integer from 2 .*Received: workers=1"),
        ({"bandwidth": "100"}, "`bandwidth` must be a number and a unit.*: bandwidth='100'"),
        ({"latency": "5"}, "`latency` must be a number and a unit.*: latency='5'"),
        ({"seconds": 0}, "`seconds` must be a positive float"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"compressors": ["adaptive_top_k"]}, "`compressors` must name compressors whose payload"),
        ({"compressors": ["none"]}, "Received: compressor='none'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        advise.report(perceptron(), **{"workers": 2, **arguments})


def test_command(capsys, tmp_path):
    flags = [f"--model={NAME}", "--workers=4", "--seconds=0.001", "--compressors=block_sign"]
    assert command.main([*flags, "--bandwidth=1gbit", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr()
    assert "| 4 workers | schedule |" in printed.out
    assert "| 1024 | " in printed.out
    assert "Measuring the step" in printed.err
    assert pathlib.Path(tmp_path, "advice.md").read_text() == printed.out
    assert pathlib.Path(tmp_path, "step.png").exists()
    assert pathlib.Path(tmp_path, "map.png").exists()
    assert "| models, dense, H = 128 |" in pathlib.Path(tmp_path, "advice.md").read_text()


def test_without_matplotlib_the_command_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "available", lambda: False)
    flags = [f"--model={NAME}", "--seconds=0.001", "--compressors=float16", f"--out={tmp_path}"]
    assert command.main(flags) == 0
    assert "matplotlib is missing, which the extra `experiments`" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["advice.md"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tests.advise.test_run", "must be module:function"),
        ("no_such_module:build", "No module named 'no_such_module'"),
        ("tests.advise.test_run:no_such", "has no attribute 'no_such'"),
        ("builtins:dict", "must name a function that returns a Keras model.*Received: dict"),
    ],
)
def test_models_that_are_none(capsys, model, message):
    assert command.main([f"--model={model}"]) == command.USAGE_ERROR
    assert re.search(f"Argument `--model` .*{message}", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.multi_process
def test_workers_measure_their_link():
    launcher = ["tfqcomm.launch", "--workers=2", "-m", "tfqcomm.advise"]
    flags = [f"--model={NAME}", "--seconds=0.01", "--compressors=block_sign"]
    done = processes.run(*launcher, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[worker 0] Link: measured between 2 workers: " in done.stdout
    assert "| 2 workers | schedule |" in done.stdout
    assert "[worker 1]" not in done.stdout


@pytest.mark.slow
@pytest.mark.multi_process
def test_one_machine_measures_its_software():
    from tfqcomm.advise import software

    link = software.of_this_machine()
    assert all(0 < line.byte_seconds < 1e-6 for line in link.lines)
    assert all(0 < line.round_seconds < 1 for line in link.lines)
    assert software.from_json(software.to_json(link)) == link
