"""What the ablations compare: variants of a learner, and how they are trained beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agents.grpo import GRPOConfig, GRPOLearner
from agents.imitation import ImitationConfig, ImitationLearner, Student
from agents.learner import Learner
from agents.ranking_losses import LOSSES
from agents.scorer import ScorerPolicy
from experiments.progress import track
from kvenv.features import FeatureSet, feature_set
from kvenv.layerwise import Policy
from kvenv.models import load_model
from kvenv.traces import TraceSource, load_traces

FAMILIES = ("recall", "tracking", "dialogue", "reasoning")


@dataclass(frozen=True)
class Terms:
    """What all variants share.

    Attributes
    ----------
    updates : int
        Updates of each.
    budget : int
        Pairs that every (layer, KV head) keeps, in training and measuring.
    batch : int
        Training traces of an update.
    seed : int
        Of the training.
    init : str
        Policy that grpo starts from.
    """

    updates: int
    budget: int
    batch: int
    seed: int
    init: str


@dataclass(frozen=True)
class Variant:
    """A setting of what is compared.

    Attributes
    ----------
    changes : dict
        Hyper-parameters that differ from the defaults.
    features : str
        What imitation's scorer sees.
    """

    changes: dict[str, Any]
    features: str = ""

    @property
    def name(self) -> str:
        """What the table calls it."""
        changes = [f"{name} {value}" for name, value in self.changes.items()]
        return ", ".join([*([self.features] if self.features else []), *changes]) or "defaults"

    def imitation(self, terms: Terms) -> ImitationConfig:
        """Return its hyper-parameters as one of imitation."""
        shared: dict[str, Any] = {"num_traces": terms.batch, "budgets": (terms.budget,), "seed": terms.seed}
        return replace(ImitationConfig(updates=terms.updates, **shared), **self.changes)

    def grpo(self, terms: Terms) -> GRPOConfig:
        """Return its hyper-parameters as one of grpo."""
        shared: dict[str, Any] = {"num_traces": terms.batch, "budgets": (terms.budget,), "seed": terms.seed}
        return replace(GRPOConfig(updates=terms.updates, init=terms.init, **shared), **self.changes)


VARIANTS = {
    "imitation": [
        *(Variant({}, features) for features in ("pre-rope", "foresight", "kv")),
        *(Variant({"inputs": "raw"}, features) for features in ("pre-rope", "foresight", "kv")),
        *(Variant(changes, "pre-rope") for changes in ({"depth": 2}, {"ema": 0.0})),
        *(Variant({"loss": loss}, "pre-rope") for loss in LOSSES if loss != ImitationConfig.loss),
        *(Variant({"loss": loss, "power": 1.0}, "pre-rope") for loss in ("pairwise", "regression", "listwise")),
        *(Variant({"power": power}, "pre-rope") for power in (1.0, 2.0, 5.0)),
        *(Variant({"dagger": dagger}, "pre-rope") for dagger in (0.0, 1.0)),
    ],
    "grpo": [
        Variant({}),
        Variant({"reward": "foresight"}),
        *(Variant({"credit": credit, "kl": 0.05}) for credit in ("window", "trajectory")),
        Variant({"credit": "trajectory", "reward": "foresight", "kl": 0.05}),
    ],
}
"""By learner. Those of imitation with the same share of DAgger learn from the same caches, in which the first of them
has that share. Credits other than by attention come with the weight of the KL divergence that suits their scale."""


class Classroom(ImitationLearner):
    """Imitation from whose episodes several students learn, led by golden or by the first student.

    Parameters
    ----------
    variants : sequence of Variant
        The students, with the same leader.
    terms : Terms
        What they share.
    """

    def __init__(self, variants: Sequence[Variant], terms: Terms) -> None:
        self.variants = variants
        self.configs = [variant.imitation(terms) for variant in variants]
        super().__init__(*_world(), self.configs[0])

    def policies(self) -> list[Policy]:
        """Return what the students became."""
        return [
            ScorerPolicy(student.mean, variant.features, variant.name)
            for student, variant in zip(self.students, self.variants, strict=True)
        ]

    def _enrol(self, features: FeatureSet) -> list[Student]:
        return [
            Student(self.episodes.scorer(seen, config.hidden, config.depth, config.seed), seen, config)
            for config, seen in zip(self.configs, (feature_set(x.features) for x in self.variants), strict=True)
        ]


def imitation(variants: Mapping[str, Variant], terms: Terms) -> Iterator[dict[str, Policy]]:
    """Train variants of imitation, those with the same leader at once, and yield what they became by name."""
    for share in dict.fromkeys(variant.imitation(terms).dagger for variant in variants.values()):
        group = {name: variant for name, variant in variants.items() if variant.imitation(terms).dagger == share}
        classroom = Classroom(list(group.values()), terms)
        _train(classroom, terms, f"{len(group)} with dagger {share}")
        yield dict(zip(group, classroom.policies(), strict=True))


def grpo(variants: Mapping[str, Variant], terms: Terms) -> Iterator[dict[str, Policy]]:
    """Train variants of grpo, one after the other, and yield what they became by name."""
    for name, variant in variants.items():
        learner = GRPOLearner(*_world(), variant.grpo(terms))
        _train(learner, terms, name)
        yield {name: learner.policy}


TRAINED = {"imitation": imitation, "grpo": grpo}
"""How the variants of a learner are trained."""


def _world() -> tuple[Any, TraceSource]:
    """Return the bundled LLM and the training traces of all families."""
    loaded = load_model("tiny")
    return loaded.model, load_traces("+".join(FAMILIES), split="train", tokenizer=loaded.tokenizer)


def _train(learner: Learner, terms: Terms, what: str) -> None:
    for _ in track(range(terms.updates), what):
        learner.update()
