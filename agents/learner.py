"""What every learner is: something that updates a policy, and whose state can be put away and taken up again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

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
