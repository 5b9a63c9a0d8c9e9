"""Advice: rows, table and sentence of methods whose times are given."""

import pathlib

import pytest

from tfqcomm import compressors
from tfqcomm.advise import plot
from tfqcomm.advise.advice import Advice, Method
from tfqcomm.costs.prediction import Bucket, Compute, Link, predict

COMPUTE = Compute(0.010, 0.020, 0.005)
SIGN, TOP = compressors.BlockSign(), compressors.TopK(0.01)
METHODS = (
    Method(None, None, (Bucket("dense", 4e7, before=0.001, after=0.001),)),
    Method(SIGN, "all_gather", (Bucket("all_gather", 1.25e6, before=0.02, after_each=0.01),)),
    Method(SIGN, "two_phase", (Bucket("two_phase", 1.25e6, before=0.03, after=0.03),)),
    Method(TOP, "all_gather", (Bucket("all_gather", 5e5, before=0.2, after_each=0.001),)),
)


def advice(bandwidth=1e9, workers=2, methods=METHODS):
    link = Link.of_network(bandwidth, 1e-4)
    return Advice("model", 10**7, workers, COMPUTE, link, "a link", methods)


def test_rows_are_predictions_the_fastest_first():
    for workers in (2, 16):
        rows = advice().rows(workers)
        assert len(rows) == len(METHODS)
        assert {row.method for row in rows} == set(METHODS)
        seconds = [row.prediction.seconds for row in rows]
        assert seconds == sorted(seconds)
        for row in rows:
            assert row.prediction == predict(COMPUTE, row.method.buckets, advice().link, workers)


def test_many_workers_take_two_phases():
    assert advice().best(2).method is METHODS[1]
    assert advice().best(64).method is METHODS[2]


def test_another_link_gives_other_rows():
    fast = Link.of_network(1e12, 0.0)
    assert advice().best().method is METHODS[1]
    assert advice().best(link=fast).method is METHODS[0]


def test_sentence_names_what_to_take():
    text = advice().sentence()
    assert text.startswith(f"Take {SIGN}, schedule='all_gather': ")
    assert "docs/choosing.md" in text


def test_sentence_says_when_dense_is_faster():
    assert advice(bandwidth=1e12).sentence().startswith("Dense is faster here: ")


@pytest.mark.parametrize(("ratio", "worth_it"), [(1.03, False), (1.07, True)])
def test_what_gains_less_than_five_percent_is_not_worth_it(ratio, worth_it):
    dense = METHODS[0]
    seconds = advice().dense().prediction.seconds - COMPUTE.seconds
    buckets = (Bucket("all_gather", 0.0, before=(seconds + COMPUTE.seconds) / ratio - 0.035),)
    other = Method(SIGN, "all_gather", buckets)
    found = advice(methods=(dense, other))
    assert found.rows()[0].method is other
    assert found.best().method is (other if worth_it else dense)


def test_table_and_scaling():
    lines = advice().table().splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(f"| `{SIGN}` | all_gather | 1.25 | ")
    assert "| no compressor | dense | 40.00 | " in advice().table()
    lines = advice().scaling([2, 64]).splitlines()
    assert lines[2].startswith(f"| 2 | {SIGN} | all_gather | 1.25 |")
    assert lines[3].startswith(f"| 64 | {SIGN} | two_phase |")
    assert str(advice()).endswith(advice().sentence())


def test_plot(tmp_path):
    path = pathlib.Path(tmp_path, "step.png")
    plot.draw(advice(), Link.of_network(1e15, 0.0), 1e-4, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rates_of_the_plot():
    assert plot.RATES[0] == pytest.approx(1e7) and plot.RATES[-1] == pytest.approx(1e11)
