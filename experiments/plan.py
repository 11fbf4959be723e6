"""Say what a training would take, from the LLM's configuration alone: nothing is loaded, nothing is decoded.

``python -m experiments.plan LEARNER ...`` with the arguments of ``experiments.train``. Work is counted in products of
matrices, memory by the tensors that are held at once; both are checked against runs in tests/test_plan.py. Time is
work over what the device reaches, which you say.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agents.base import Policy
from agents.episodes import CALIBRATED_ON, CALIBRATED_PAIRS
from agents.scorer import Scorer
from experiments.cli import run
from experiments.learners import GRPO, Imitation, LearnerArgs, SharedArgs
from experiments.tables import wide_console
from experiments.train import parse
from kvenv.attention import use_kvenv_attention
from kvenv.cache import SlotCache
from kvenv.decode import LOGITS_AT_ONCE
from kvenv.features import feature_set
from kvenv.layerwise import TOKENS_AT_ONCE
from kvenv.models import DTYPES, TINY, refuse_unsupported
from kvenv.state import LayerState, Protection

REACHED = 300.0
"""TFLOP/s that a device is taken to reach where nobody says: a bit under a third of what an H100 could in bfloat16."""


@dataclass(frozen=True)
class Stage:
    """What one stage of a training takes.

    Attributes
    ----------
    name : str
        The learner.
    updates : int
        How many.
    flops : float
        Of an update, in multiplications and additions.
    tokens : int
        Decoded in an update, in all passes.
    memory : dict of str to int
        Bytes that are held at once, by what.
    """

    name: str
    updates: int
    flops: float
    tokens: int
    memory: dict[str, int]

    def hours(self, tflops: float) -> float:
        """Return how long it takes at that speed."""
        return self.updates * self.flops / tflops / 3.6e15


class _Sees(Policy):
    """Needs what features need."""

    name = "sees"

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs

    def __call__(self, state: LayerState) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError


class Shapes:
    """The sizes of an LLM and of what is decoded with it.

    Parameters
    ----------
    args : LearnerArgs
        Of imitation or grpo.

    Raises
    ------
    ValueError
        If there is no such configuration, or the architecture isn't supported.
    """

    def __init__(self, args: Any) -> None:
        name = str(TINY) if args.env.model == "tiny" else args.env.model
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {args.env.model!r} can't be planned for: {' '.join(str(error).split())}"
            ) from error
        refuse_unsupported(args.env.model, config)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.env.dtype])
        use_kvenv_attention(model)
        self.args, self.model, self.features = args, model, feature_set(args.env.features)
        self.length, self.interval, self.budget = args.env.trace_length, args.env.interval, max(args.budgets())
        self.capacity = self.budget + self.interval
        cache = self.cache(1)
        self.layers, self.heads, self.groups, self.dim = cache.num_layers, cache.kv_heads, cache.groups, cache.head_dim
        self.width = self.features.width(self.dim, self.groups)
        scorer = Scorer(self.layers, self.heads, self.width, args.learner.hidden, args.learner.depth)
        self.scored = sum(weight[0, 0].numel() for weight in scorer.parameters() if weight.ndim == 4)

    def cache(self, rows: int) -> SlotCache:
        """Return the cache of so many rollouts, without memory."""
        return SlotCache(
            self.model,
            rows=rows,
            capacity=self.capacity,
            interval=self.interval,
            budget=self.budget,
            policy=_Sees(self.features.needs),
            protection=Protection(self.args.env.sinks, self.args.env.recent),
        )

    def forward(self, context: float, looked_at: float = 0.0) -> float:
        """Return the work of a token whose query sees so many pairs, to some of which its attention is looked at."""
        model: Any = self.model
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        body = sum(parameter.numel() for parameter in self.model.parameters()) - embedding.numel()
        body += 0 if head is not embedding else head.numel()
        return 2 * body + self.layers * self.heads * self.groups * self.dim * (4 * context + 2 * looked_at)

    def full(self) -> float:
        """Return the work of a trace with the full cache."""
        return self.length * self.forward(self.length / 2)

    def evicting(self, scorings: float) -> float:
        """Return the work of a trace under eviction, pairs being scored so many times at every decision."""
        looked_at = self.capacity if "stats" in self.features.needs else 0
        decisions = max(0, self.length - self.capacity) / self.interval
        scoring = 2 * self.layers * self.heads * self.capacity * self.scored
        return self.length * self.forward(self.capacity, looked_at) + decisions * scorings * scoring

    def activations(self, rows: int) -> int:
        """Return the bytes of what a call of the model holds besides the cache."""
        kind = "cpu" if self.args.env.device == "cpu" else "cuda"
        tokens = min(rows * self.length, max(TOKENS_AT_ONCE[kind], rows * self.interval))
        config = self.model.config.get_text_config()
        held = 3 * config.intermediate_size + 4 * config.hidden_size
        return tokens * held * self.model.dtype.itemsize + 3 * 4 * min(LOGITS_AT_ONCE, tokens * config.vocab_size)

    def common(self, rows: int) -> dict[str, int]:
        """Return the bytes of what every stage holds for so many rollouts at once."""
        cache = self.cache(rows)
        decision = rows * self.heads * self.capacity * 4
        return {
            "weights": sum(parameter.nbytes for parameter in self.model.parameters()),
            "cache": sum(x.nbytes for x in cache_tensors(cache)),
            "activations": self.activations(rows),
            # Features with their gradients, and what autograd holds of a scorer's hidden units.
            "a decision": decision * (3 * self.width + 6 * self.args.learner.hidden),
        }

    def calibration(self) -> dict[str, int]:
        """Return the bytes of the features that a new scorer's input constants are taken from, and of that work."""
        pairs = min(CALIBRATED_PAIRS, self.args.learner.num_traces * CALIBRATED_ON * self.capacity)
        # Of every layer the features, of one at a time half a dozen more while they are squashed.
        return {"calibration": pairs * self.heads * self.width * 4 * (self.layers + 6)}


def cache_tensors(cache: SlotCache) -> Iterator[torch.Tensor]:
    """Yield the tensors of a cache that grow with its rows."""
    held = [cache, *(part for part in (cache.statistics, cache.moments) if part is not None)]
    for part in held:
        for value in vars(part).values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, torch.Tensor):
                    yield one


def plan(args: LearnerArgs) -> list[Stage]:
    """Return the stages of a training.

    Raises
    ------
    ValueError
        If it is neither imitation nor grpo, or the LLM's configuration can't be read.
    """
    if not isinstance(args, (Imitation, GRPO)):
        raise ValueError(f"plan knows imitation and grpo, not {args.name!r}")
    first = args.first_stage(args.run.out)
    shapes = Shapes(args)
    return [
        *(plan(first) if first is not None else []),
        _grpo(shapes) if isinstance(args, GRPO) else _imitation(shapes),
    ]


def _imitation(shapes: Shapes) -> Stage:
    """Return what imitation takes: the future of every trace, its full-cache losses, and an episode that teaches."""
    config, length = shapes.args.learner, shapes.length
    rows = config.num_traces
    # Two passes with the full cache; pairs are scored forward and backward.
    flops = rows * (2 * shapes.full() + shapes.evicting(scorings=3))
    utilities = shapes.layers * rows * shapes.heads * (length // shapes.interval + 1) * length * 4
    memory = shapes.common(rows) | {"utilities": utilities} | shapes.calibration()
    return Stage("imitation", config.updates, flops, 3 * rows * length, memory)


def _grpo(shapes: Shapes) -> Stage:
    """Return what GRPO takes: rollouts, their replay, and the full-cache losses of every trace."""
    config, length = shapes.args.learner, shapes.length
    rollouts = config.num_traces * config.group
    at_once = config.at_once or config.num_traces
    full = 2 if config.credit == "attention" else 1
    # Sampled once; replayed forward and backward, beside the reference.
    flops = (
        rollouts * (shapes.evicting(scorings=1) + shapes.evicting(scorings=4))
        + config.num_traces * full * shapes.full()
    )
    # Of every evicted pair its position and the log-probability of its going.
    evicted = rollouts * shapes.layers * shapes.heads * max(0, length - shapes.capacity) * 8
    tokens = (2 * rollouts + full * config.num_traces) * length
    update = shapes.common(at_once * config.group) | {"evictions": evicted}
    building = shapes.common(at_once) | shapes.calibration()
    return Stage("grpo", config.updates, flops, tokens, max(update, building, key=lambda held: sum(held.values())))


def make_table(stages: Sequence[Stage], tflops: float) -> Table:
    """Return the stages as a table."""
    table = Table(
        box=box.SIMPLE, caption=f"GB are 10^9 bytes, tensors only; hours at {tflops:g} TFLOP/s, evaluations left out"
    )
    for heading in ("", *(stage.name for stage in stages)):
        table.add_column(heading, justify="left" if not heading else "right")
    lines = {
        "updates": [f"{stage.updates:,}" for stage in stages],
        "tokens of an update": [f"{stage.tokens:,}" for stage in stages],
        "TFLOP of an update": [f"{stage.flops / 1e12:,.1f}" for stage in stages],
        "hours": [f"{stage.hours(tflops):,.1f}" for stage in stages],
    }
    for name in dict.fromkeys(name for stage in stages for name in stage.memory):
        lines[f"GB of {name}"] = [f"{stage.memory.get(name, 0) / 1e9:,.2f}" for stage in stages]
    lines["GB in all"] = [f"{sum(stage.memory.values()) / 1e9:,.1f}" for stage in stages]
    for name, values in lines.items():
        table.add_row(name, *values)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Plan the training that ``experiments.train`` would start with the same arguments."""
    own = argparse.ArgumentParser(
        prog="kvenv plan", usage="kvenv plan {imitation,grpo} [--tflops X] [options of train]"
    )
    own.add_argument("learner", choices=[Imitation.name, GRPO.name], help="what would be trained")
    own.add_argument("--tflops", type=float, default=REACHED, help=f"what the device reaches (default {REACHED:g})")
    known, rest = own.parse_known_args(argv)
    if not known.tflops > 0:
        raise ValueError(f"--tflops {known.tflops} is impossible: it must be positive")
    args = parse([known.learner, *rest])
    if isinstance(args, SharedArgs) and args.crew.ray is not None:
        args = args.divided()  # as the training would
    wide_console().print(make_table(plan(args), known.tflops))


if __name__ == "__main__":
    run(main)
