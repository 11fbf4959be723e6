"""Replicas of a learner on a cluster: they make the parts of its updates, and validate it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from agents.learner import Share, SharedLearner, State
from experiments.crew import Crew
from experiments.learners import SharedArgs
from experiments.runs import changed
from experiments.validation import Validation
from kvenv.determinism import set_deterministic
from kvenv.evaluation import Row

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Broadcast:
    """What every replica is told before a gradient step.

    Attributes
    ----------
    done : int
        Updates that the learner has made.
    epoch : int
        Gradient steps of the next one that it has made.
    first, weights : dict of str to Tensor
        Its weights before the first of these steps, and now.
    """

    done: int
    epoch: int
    first: Weights
    weights: Weights


class Replica:
    """A learner's double in a worker's process.

    Parameters
    ----------
    args : SharedArgs
        What the learner was built from.
    state : State
        Where it was when the replica was made.
    made_from : mapping
        Digests of the LLM and the data that it learns from.

    Raises
    ------
    ValueError
        If those that the worker's node has are others.
    """

    def __init__(self, args: SharedArgs, state: State, made_from: Mapping[str, str]) -> None:
        if args.env.deterministic:
            set_deterministic()
        self.learner = args.build()
        for name, (there, here) in changed(made_from, args.made_from(self.learner)).items():
            raise ValueError(
                f"the {name} on {platform.node()} has digest {str(here)[:12]}..., the command's {str(there)[:12]}...: "
                "put the same on every node"
            )
        self.learner.restore(state)
        self.validation = args.validation() if args.run.eval_every else None
        self._begun: set[tuple[int, int]] = set()

    def share(self, told: Broadcast, part: int) -> Share:
        """Return what a part gives to a gradient step."""
        if told.epoch and (told.done, part) not in self._begun:
            # Another replica had begun it, and died: what it rolled out comes back.
            self.learner.follow(told.done, told.first)
            self.learner.share(part, 0)
        self.learner.follow(told.done, told.weights)
        self._begun = {begun for begun in self._begun if begun[0] == told.done} | {(told.done, part)}
        share = self.learner.share(part, told.epoch)
        return replace(share, gradients=[gradient.cpu() for gradient in share.gradients])

    def measure(self, state: State, batch: int) -> list[Row]:
        """Return the rows of a batch of validation traces."""
        if self.validation is None:
            raise ValueError("the run has no validation: --eval-every is 0")
        self.learner.restore(state)
        return self.validation.rows(self.learner.policy, batch)


class Replicas:
    """The replicas of a learner.

    Parameters
    ----------
    args : SharedArgs
        What the learner was built from, and where replicas are made.
    learner : SharedLearner
        The learner.
    """

    def __init__(self, args: SharedArgs, learner: SharedLearner) -> None:
        self.learner = learner
        self.crew = Crew(args.crew, Replica, (args, _on_cpu(learner.state()), args.made_from(learner)), args.env.device)

    def update(self) -> dict[str, float]:
        """Make one update of the learner, and return its metrics."""
        learner = self.learner
        first = learner.weights()

        def make(epoch: int) -> Sequence[Share]:
            told = Broadcast(learner.done, epoch, first, learner.weights() if epoch else first)
            return list(self.crew.map("share", told, range(learner.parts)))

        return learner.update(make)

    def measure(self, validation: Validation) -> list[Row]:
        """Return the rows of all validation traces."""
        batches = self.crew.map("measure", _on_cpu(self.learner.state()), range(validation.batches))
        return [row for rows in batches for row in rows]

    def close(self) -> None:
        """Dismiss the replicas."""
        self.crew.close()


def _on_cpu(state: State) -> State:
    """Return a state that any node can read, whatever GPUs it has."""
    return State({name: tensor.cpu() for name, tensor in state.tensors.items()}, state.values)
