"""Input constants come from a bounded number of pairs, whatever is rolled out at once; impossible traces show first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvenv
from agents import episodes
from agents.episodes import CALIBRATED_ON, Episodes
from agents.grpo import GRPOConfig, GRPOLearner
from agents.imitation import ImitationConfig, ImitationLearner
from agents.scorer import Scorer, ScorerPolicy
from kvenv.features import feature_set
from kvenv.layerwise import rollout
from kvenv.traces import Trace, TraceSource
from kvenv.traces.user import ListSource
from tests.environments import BUDGET, INTERVAL, LENGTH, MODEL, PROTECTION, RAGGED, trace
from tests.models import random_tokens

LEAST = BUDGET + INTERVAL + 2
FEATURES = "foresight"  # the norms of "stats" are all alike in a model that normalises keys
CONSTANTS = ("centre", "scale", "mean", "deviation")


def made(source: TraceSource | None = None) -> Episodes:
    """Return episodes of the small random model."""
    source = source or kvenv.load_traces(RAGGED, tokenizer=None, trace_length=LENGTH)
    return Episodes(kvenv.load_model(MODEL).model, source, INTERVAL, PROTECTION)


def calibrated(of: Episodes, traces: list[Trace], at_once: int = 0) -> Scorer:
    """Return a scorer of random weights whose input constants are taken from its own episodes."""
    seen = feature_set(FEATURES)
    scorer = of.scorer(seen, hidden=4, depth=1, seed=0)
    of.calibrate([(scorer, seen, "squashed")], ScorerPolicy(scorer, FEATURES), traces, BUDGET, at_once)
    return scorer


def plain(of: Episodes, traces: list[Trace]) -> dict[str, torch.Tensor]:
    """Return the constants by all pairs of the decisions that they are taken from, each trace being alone."""
    seen = feature_set(FEATURES)
    policy = ScorerPolicy(of.scorer(seen, hidden=4, depth=1, seed=0), FEATURES)
    layers, heads = policy.scorer.shape[:2]
    found: list[list[list[np.ndarray]]] = [[[] for _ in range(heads)] for _ in range(layers)]
    for one in traces:
        states: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]

        def keep(state: Any, order: torch.Tensor, count: torch.Tensor, states: Any = states) -> None:
            states[state.layer].append((seen.compute(state)[0], state.filled[0].clone()))

        rollout(
            policy, [one], model=of.model, budget=BUDGET, interval=INTERVAL, protection=PROTECTION, on_eviction=keep
        )
        for layer, decisions in enumerate(states):
            for number in sorted(set(np.linspace(0, len(decisions) - 1, CALIBRATED_ON).astype(int))):
                features, filled = decisions[number]
                for head in range(heads):
                    found[layer][head].append(features[head][filled[head]].numpy())
    constants: dict[str, list[np.ndarray]] = {name: [] for name in CONSTANTS}
    for layer in found:
        for parts in layer:
            x = np.sort(np.concatenate(parts), axis=0)
            middle = (len(x) - 1) // 2  # torch's median is the lower one
            centre = x[middle]
            distance = np.sort(abs(x - centre), axis=0)[middle]
            scale = np.maximum(distance, 0.01 * np.maximum(x.std(axis=0, ddof=1), 1e-6))
            squashed = np.arcsinh((x - centre) / scale)
            deviation = np.maximum(squashed.std(axis=0, ddof=1), 1e-3)
            for name, value in zip(CONSTANTS, (centre, scale, squashed.mean(axis=0), deviation)):
                constants[name].append(value)
    return {name: torch.as_tensor(np.stack(values)).view(layers, heads, 1, -1) for name, values in constants.items()}


@pytest.mark.parametrize("at_once", [0, 1, 2])
def test_constants_are_those_of_all_pairs_of_some_decisions_of_each_trace(at_once: int) -> None:
    traces = [trace(number) for number in range(5)]
    scorer = calibrated(made(), traces, at_once)
    for name, expected in plain(made(), traces).items():
        torch.testing.assert_close(getattr(scorer, name), expected.float(), rtol=1e-3, atol=1e-4)


def test_constants_are_taken_from_no_more_pairs_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, seen, calibrate = [trace(number) for number in range(6)], [], Scorer.calibrate
    whole = calibrated(made(), traces)

    def watched(scorer: Scorer, features: torch.Tensor, filled: torch.Tensor, inputs: Any) -> None:
        seen.append(features)
        calibrate(scorer, features, filled, inputs)

    monkeypatch.setattr(Scorer, "calibrate", watched)
    monkeypatch.setattr(episodes, "CALIBRATED_PAIRS", 300)
    scorers = [calibrated(made(), traces, at_once) for at_once in (0, 2)]
    for features in seen:
        assert 200 < features.shape[0] * features.shape[3] <= 300 < 6 * CALIBRATED_ON * (BUDGET + INTERVAL)
    torch.testing.assert_close(*seen)
    for scorer in scorers:
        assert ((scorer.centre - whole.centre).abs() < whole.scale).all()
        assert (scorer.deviation / whole.deviation - 1).abs().mean() < 0.2


def test_no_more_traces_are_rolled_out_at_once_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, play = [], Episodes.play

    def watched(of: Episodes, policy: Any, traces: Any, *others: Any, **options: Any) -> Any:
        rows.append(len(traces))
        return play(of, policy, traces, *others, **options)

    monkeypatch.setattr(Episodes, "play", watched)
    source = kvenv.load_traces(RAGGED, tokenizer=None, trace_length=LENGTH)
    config = GRPOConfig(num_traces=5, group=2, at_once=2, budgets=(BUDGET,), hidden=4)
    GRPOLearner(kvenv.load_model(MODEL).model, source, config, interval=INTERVAL, protection=PROTECTION)
    assert rows == [2, 2, 1]


def learner(kind: Any, config: Any, lengths: list[int], **changes: Any) -> Any:
    """Return a learner from as many random traces as there are lengths."""
    tokens = random_tokens(1, LENGTH)[0].numpy()
    traces = [Trace(tokens[:length], 0, (), f"mine:{number}") for number, length in enumerate(lengths, start=1)]
    terms = {"interval": INTERVAL, "protection": PROTECTION, "features": FEATURES}
    settings = config(num_traces=1, hidden=4, **{"budgets": (BUDGET,), **changes})
    return kind(kvenv.load_model(MODEL).model, ListSource("mine", "train", traces), settings, **terms)


LEARNERS = [(ImitationLearner, ImitationConfig), (GRPOLearner, GRPOConfig)]


@pytest.mark.parametrize(("kind", "config"), LEARNERS)
def test_short_traces_are_refused_before_any_is_drawn(kind: Any, config: Any) -> None:
    learner(kind, config, [LEAST, LENGTH] * 20)
    with pytest.raises(
        ValueError,
        match=rf"'mine:3' has {LEAST - 1} tokens: with budget {BUDGET} and interval {INTERVAL} it needs at least "
        rf"{LEAST}, and 2 of 41 traces have fewer; choose smaller budgets, or leave out traces shorter than {LEAST} ",
    ):
        learner(kind, config, [LENGTH, LEAST, LEAST - 1, 1, *[LENGTH] * 37])
    with pytest.raises(ValueError, match="and 1 of 40 traces have fewer"):
        learner(kind, config, [LEAST, *[LENGTH] * 39], budgets=(BUDGET - 1, BUDGET + 1))
    with pytest.raises(ValueError, match="budget 5 is less than the protected pairs"):
        learner(kind, config, [LENGTH] * 40, budgets=(5, *[BUDGET] * 9))


def test_an_endless_source_is_checked_as_it_is_drawn_from() -> None:
    made().check((BUDGET,))
    with pytest.raises(ValueError, match=f"with budget {LENGTH} and interval {INTERVAL} it needs"):
        made().draw(np.random.default_rng(0), 2, LENGTH)
