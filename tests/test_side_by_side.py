"""The frame of the side-by-side measurements: processes, limits, lengths, and what is computed from
figures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "benchmarks"))
import memory
import sampling
import side_by_side
import training


def make(options):
    """A contender that adds, holds as many bytes as it is told to, or fails."""
    if options.get("broken"):
        raise ValueError("no such layer")
    return {"add": lambda a, b: a + b + options["more"], "hold": lambda size: len(b"x" * size)}


def test_a_contender_runs_in_its_own_process_and_tells_its_peak():
    contender = side_by_side.Contender("adder", make, {"more": 1}, side_by_side.GIB)
    answer, before = contender.run("add", 2, 3), contender.peak
    assert answer["result"] == 6 and answer["seconds"] >= 0 and before >= contender.ready > 0
    assert contender.run("hold", 200 << 20)["result"] == 200 << 20 and contender.peak > before + (150 << 20)
    contender.close()


def test_a_contender_above_its_limit_is_ended_and_named():
    contender = side_by_side.Contender("hungry", make, {"more": 1}, 300 << 20)
    with pytest.raises(side_by_side.Lost, match=r"hungry: holds more than 0\.3 GiB"):
        for _ in range(20):
            contender.run("hold", 1 << 30)


def test_what_cannot_be_made_is_left_out_and_said(capsys):
    makers = {"broken": (make, []), "missing": (make, ["no_such_module"])}
    assert side_by_side.start(["missing", "broken"], makers, {"broken": True}, side_by_side.GIB) == {}
    said = capsys.readouterr().out
    assert (
        "missing: left out, no_such_module is not installed" in said
        and "broken: ValueError: no such layer: left out" in said
    )
    with pytest.raises(side_by_side.Lost, match="no such layer"):
        side_by_side.start(["broken"], makers, {"broken": True}, side_by_side.GIB, strict=True)


@pytest.mark.parametrize("quartiles", [sampling.TINY_QUARTILES, sampling.GEMMA_QUARTILES, memory.EARLY])
def test_lengths_have_their_quartiles(quartiles):
    drawn = sampling.draw_lengths(20000, quartiles, seed=0)
    assert np.allclose(np.percentile(drawn, [25, 50, 75]), quartiles, rtol=0.05, atol=1)
    assert np.allclose([sampling.share_of_lengths(q, quartiles) for q in quartiles], [0.25, 0.5, 0.75])


def test_rule_of_ends_gives_these_lengths():
    """A text whose tokens are random ends where the rule says."""
    prompt, length = 8, 2000
    chances, rng, places = (
        sampling.chances_to_end(prompt, length, sampling.GEMMA_QUARTILES),
        np.random.default_rng(1),
        np.arange(prompt - 1, length),
    )
    ends = [
        int(
            np.argmax(
                np.append(sampling.case(places, rng.integers(0, 70000, len(places))) < chances[places], True)
            )
        )
        + 1
        for _ in range(4000)
    ]
    assert np.allclose(np.percentile(ends, [25, 50, 75]), sampling.GEMMA_QUARTILES, rtol=0.06)


def test_rule_of_ends_is_the_same_in_each_library():
    import jax.numpy as jnp

    tokens = np.arange(0, 262144, 999)
    expected = [sampling.case(300, int(token)) for token in tokens]
    assert (
        sampling.case(300, tokens).tolist() == expected
        and min(expected) < 2**28
        and max(expected) > 2**32 - 2**28
    )
    assert (
        sampling.case(jnp.uint32(300), jnp.asarray(tokens).astype(jnp.uint32), jnp.uint32).tolist()
        == expected
    )
    torch = pytest.importorskip("torch")
    assert sampling.case(300, torch.tensor(tokens)).tolist() == expected


def test_operations_of_blocks_are_those_of_a_count_by_hand():
    """Two blocks of width 2, one head of 3, feed-forward 5; 7 tokens, rank 1."""
    shape = {
        "num_layers": 2,
        "hidden_dim": 2,
        "intermediate_dim": 5,
        "num_query_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 3,
    }
    projections, output, feed_forward, attention, adapters = (
        3 * 2 * 3,
        3 * 2,
        3 * 2 * 5,
        2 * 3 * 7,
        2 * (2 + 3),
    )
    first = 7 * (projections + 2 * output + 2 * feed_forward + 3 * attention + 3 * adapters)
    second = first + 7 * projections
    assert training.block_operations(shape, 7, 1) == 2 * (first + second)


def test_rows_are_the_same_for_all_and_padded_with_zeros():
    options = {"rows": 50, "length": 256, "lengths": "imdb"}
    tokens, lengths = training.token_rows(options, 5000)
    again, _ = training.token_rows(options, 5000)
    assert (tokens == again).all() and lengths.max() == 256 and lengths.min() < 200
    assert ((tokens > 0).sum(1) == lengths).all()


def test_contenders_that_differ_before_the_first_update_are_refused():
    training.check_losses({"dpsynth": 10.0, "opacus": 10.005})
    with pytest.raises(SystemExit, match="not the same model"):
        training.check_losses({"dpsynth": 10.0, "opacus": 10.5})


def test_ratios_are_of_medians_and_need_ours():
    answers = [{"seconds": s, "cpu_seconds": 2 * s} for s in (1.0, 9.0, 2.0)]
    ours, peer = (
        training.figures_of(answers, 4, 2),
        training.figures_of([{"seconds": 6.0, "cpu_seconds": 6.0}], 4, 2),
    )
    assert (
        ours["core_seconds_per_row"] == 1.0
        and ours["rows_per_core_second"] == 1.0
        and ours["processor_seconds_per_row"] == 1.0
    )
    plain = {"dpsynth_plain": {"seconds": 1.9}, "dpsynth_plain_batched": {"seconds": 4.0}}
    assert training.ratios_of({"dpsynth": ours, "opacus": peer, **plain}) == {
        "ours_over_opacus": 3.0,
        "dp_over_non_dp": pytest.approx(2 / 1.9),
    }
    assert training.ratios_of({"opacus": peer}) == {}


def test_memory_counts_peers_over_ours_and_the_largest_batch_over_the_smallest():
    found = {
        name: {"peak_gib": gib}
        for name, gib in {
            "train_dpsynth": 4.0,
            "train_keras_api": 16.0,
            "sample_dpsynth": 2.0,
            "sample_keras_hub": 5.0,
            "batch_64": 3.0,
            "batch_1024": 3.06,
        }.items()
    }
    assert memory.ratios(found) == {
        "train_keras_api_over_ours": 4.0,
        "sample_keras_hub_over_ours": 2.5,
        "batch_1024_over_64": pytest.approx(1.02),
    }
    assert (
        memory.ratios({"train_dpsynth": {"peak_gib": 16.0, "ended": True}, "train_opacus": {"peak_gib": 8.0}})
        == {}
    )


def test_a_record_goes_on_only_with_the_same_arguments(tmp_path):
    path = tmp_path / "memory.json"
    side_by_side.write_record(
        path, {"arguments": {"length": 512}, "contenders": {"batch_64": {"peak_gib": 3.0}}}
    )
    assert (
        memory.earlier(path, {"length": 512}) == json.loads(path.read_text())["contenders"]
        and memory.earlier(path, {"length": 64}) == {}
    )
