"""What every learner is: something that updates a policy, and whose state can be put away and taken up again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from agents.base import Policy


@dataclass
class State:
    """All that a learner needs to go on as if it had never stopped.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Weights, optimizer moments, random states.
    values : dict
        JSON-able rest: counters, cursors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def check_finite(self) -> None:
        """Refuse NaN and infinity, which nobody could go on from.

        Raises
        ------
        FloatingPointError
            Naming the tensors.
        """
        lost = [name for name, x in self.tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise FloatingPointError(f"the learner's {', '.join(lost[:3])}{more} hold NaN or infinity")


class Learner(ABC):
    """Trains a policy, one :meth:`update` at a time.

    Attributes
    ----------
    name : str
        What commands, run directories and saved policies call it.
    config : dataclass
        Its hyper-parameters.
    done : int
        Updates made so far.
    learnt_from : sequence of str
        Names of the traces of the newest update.
    """

    name: ClassVar[str]
    config: Any
    done: int = 0
    learnt_from: Sequence[str] = ()

    @abstractmethod
    def update(self) -> dict[str, float]:
        """Make one gradient update and return its metrics by TensorBoard tag."""

    @property
    @abstractmethod
    def policy(self) -> Policy:
        """The policy as trained so far."""

    @abstractmethod
    def state(self) -> State:
        """Return a copy of everything that the next update depends on."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Go on from a state: the updates that follow are those that followed there, bit for bit on a CPU.

        Raises
        ------
        ValueError
            If the state is of another learner or other shapes.
        """

    def check(self, state: State) -> None:
        """Refuse the state of another learner.

        Raises
        ------
        ValueError
            If it is.
        """
        if state.values.get("learner") != self.name:
            raise ValueError(f"the state is of learner {state.values.get('learner')!r}, not {self.name!r}")


@dataclass(frozen=True)
class Share:
    """What one part of an update gives.

    Attributes
    ----------
    gradients : list of Tensor
        Of the scorer's weights, or of those that the part concerns.
    sums : dict of str to float
        What is reported; it adds up over the parts.
    traces : sequence of str
        Names of those that it was learnt from.
    """

    gradients: list[Tensor]
    sums: dict[str, float]
    traces: Sequence[str]


class SharedLearner(Learner):
    """A learner whose updates are put together from parts, each of which follows from weights and numbers alone.

    So it doesn't matter where a part is made: here, one after the other, or by replicas of this learner side by side.
    The update is the same, bit for bit where the same number of threads made it.

    Attributes
    ----------
    scorer : nn.Module
        What is trained.
    epochs : int
        Gradient steps of an update.
    """

    scorer: nn.Module
    epochs: int = 1

    @property
    @abstractmethod
    def parts(self) -> int:
        """How many parts an update has, wherever they are made."""

    @abstractmethod
    def share(self, part: int, epoch: int) -> Share:
        """Return what a part gives to a gradient step of the next update; those of a part come in turn."""

    @abstractmethod
    def step(self, shares: Sequence[Share]) -> dict[str, float]:
        """Make a gradient step from the shares of all parts, in order, and return the metrics."""

    def update(self, make: Callable[[int], Sequence[Share]] | None = None) -> dict[str, float]:
        """Make one update and return its metrics by TensorBoard tag.

        Parameters
        ----------
        make : callable, optional
            Returns the shares of all parts, in order, for a gradient step; if not given, they are made here.
        """
        metrics: dict[str, float] = {}
        for epoch in range(self.epochs):
            shares = make(epoch) if make else [self.share(part, epoch) for part in range(self.parts)]
            self.learnt_from = [name for share in shares for name in share.traces]
            metrics = self.step(shares)
        self.done += 1
        return metrics

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the scorer's weights on the CPU, which a replica needs to make a share."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.scorer.state_dict().items()}

    def follow(self, done: int, weights: dict[str, Tensor]) -> None:
        """Take the weights of a learner that has made ``done`` updates."""
        self.scorer.load_state_dict(weights)
        self.done = done


def total(shares: Sequence[Share]) -> dict[str, float]:
    """Return what shares report, summed in their order."""
    return {name: sum(share.sums[name] for share in shares) for name in shares[0].sums}


def check_numbers(config: Any, positive: Collection[str], **least: int) -> None:
    """Refuse hyper-parameters that can't be.

    Parameters
    ----------
    config : Any
        Has them as attributes.
    positive : collection of str
        Those that must be above 0.
    **least : int
        The least that others may be.

    Raises
    ------
    ValueError
        Naming the first impossible one.
    """
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name} {getattr(config, name)} is impossible: it must be at least {bound}")
    for name in positive:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} {getattr(config, name)} is impossible: it must be positive")
