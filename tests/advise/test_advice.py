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


def test_utilisation_is_the_step_alone_over_the_step():
    links = {"slow": Link.of_network(1e8, 1e-4), "fast": Link.of_network(1e12, 0.0)}
    lines = advice().utilisation(links, [10]).splitlines()
    assert lines[0] == "| 2 workers | slow | fast |"
    shares = {line.split(" | ")[0][2:]: line.rstrip(" |").split(" | ")[1:] for line in lines[2:]}
    dense, best = (advice(1e8).rows()[i].prediction.seconds for i in (-1, 0))
    assert float(shares["dense, every step"][0]) == pytest.approx(100 * 0.035 / dense, rel=0.01)
    assert float(shares["the best, every step"][0]) == pytest.approx(100 * 0.035 / best, rel=0.01)
    found = predict(COMPUTE, METHODS[0].buckets, links["slow"], 2)
    step = 0.035 + (found.link_seconds + found.codec_seconds) / 10
    assert float(shares["models, dense, H = 10"][0]) == pytest.approx(3.5 / step, rel=0.01)
    assert float(shares["models, the best, H = 10"][0]) > 3.5 / step
    assert len(lines) == 2 + 4


def test_a_step_of_another_length_has_the_same_shares():
    assert COMPUTE.scaled_to(0.07).forward == pytest.approx(0.020)
    assert COMPUTE.scaled_to(0.07).seconds == pytest.approx(0.07)


def test_map(tmp_path):
    path = pathlib.Path(tmp_path, "map.png")
    plot.draw_map(advice(), Link.of_network(1e15, 0.0), 1e-4, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot(tmp_path):
    path = pathlib.Path(tmp_path, "step.png")
    plot.draw(advice(), Link.of_network(1e15, 0.0), 1e-4, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rates_of_the_plot():
    assert plot.RATES[0] == pytest.approx(1e7) and plot.RATES[-1] == pytest.approx(1e11)
