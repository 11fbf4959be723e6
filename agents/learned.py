"""What every learned policy is: a network, what it was trained for, and two files in which both travel."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.base import Policy
from agents.hub import DESCRIPTION, WEIGHTS, read_description
from kvenv.files import write_atomic
from kvenv.identity import Architecture, ModelIdentity, weights_digest

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

CARD = """
---
{{ card_data }}
---

# {{ name }}

A learned policy of kvenv (type `{{ type }}`): it ranks the cached key-value pairs of a language model, and those that
rank lowest are evicted.

- Trained for {{ model }}; another architecture is refused.
- Budgets in training, in pairs per (layer, KV head): {{ budgets }}.

`policy.json` says how it was trained, `policy.safetensors` holds its weights; there is no code and no pickle here.

```python
import agents

policy = agents.Policy.from_pretrained("owner/name")  # this repository's id, or a directory
```
"""


class LearnedPolicy(  # type: ignore[misc]  # Policy.from_pretrained stands in for the mixin's, which wants a config.json
    Policy,
    PyTorchModelHubMixin,
    library_name="kvenv",
    tags=["kv-cache", "kv-cache-eviction", "reinforcement-learning"],
    model_card_template=CARD,
):
    """A network as a policy that saves, loads, and knows which LLM it was trained for.

    ``save_pretrained(directory)`` and ``push_to_hub(repository)`` are those of :class:`PyTorchModelHubMixin`: they
    write ``policy.json``, ``policy.safetensors`` and, where there is no ``README.md`` yet, a model card.

    Parameters
    ----------
    name : str
        What tables call it.
    training : dict, optional
        How it was made; JSON-able, saved with it.
    model : ModelIdentity, optional
        The LLM that it was trained for.
    budgets : sequence of int, optional
        Those of the training; None if it was for none in particular, or nobody knows.
    interval : int, optional
        W of the training.

    Attributes
    ----------
    type : str
        What ``policy.json`` calls its kind, see :func:`agents.register_type`.
    scorer : nn.Module
        The network, which a subclass sets before it calls ``__init__``.

    Raises
    ------
    ValueError
        If the network doesn't fit that LLM.
    """

    type: ClassVar[str]
    scorer: Any

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Return an object of which the mixin remembers no arguments: they would go to a config.json of its own."""
        return object.__new__(cls)

    def __init__(
        self,
        name: str,
        training: dict[str, Any] | None,
        model: ModelIdentity | None,
        budgets: Sequence[int] | None,
        interval: int | None,
    ) -> None:
        self.name, self.training, self.interval = name, training or {}, interval
        self.budgets = None if budgets is None else tuple(budgets)
        model, own = model or ModelIdentity(None, None, Architecture()), self.architecture
        if difference := own.difference(model.architecture):
            raise ValueError(f"the scorer doesn't fit the model it is said to be trained for: {difference}")
        # What its shape says is known, whoever forgot to write it down.
        told = {name: value for name, value in asdict(own).items() if value is not None}
        self.model = replace(model, architecture=replace(model.architecture, **told))

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """What the network's shape says of the LLM."""

    @abstractmethod
    def about_network(self) -> dict[str, Any]:
        """Return what the description says of the network."""

    @classmethod
    @abstractmethod
    def network(cls, description: dict[str, Any]) -> nn.Module:
        """Return a network of a description's shape, whatever its weights."""

    @classmethod
    @abstractmethod
    def build(cls, description: dict[str, Any], **known: Any) -> Self:
        """Return a policy with what is ``known`` and a description's network."""

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model of another architecture than was trained for; warn once of one with other weights.

        Raises
        ------
        ValueError
            With all that differs.
        """
        self.model.check(model, f"policy {self.name!r}")

    def description(self) -> dict[str, Any]:
        """Return what ``policy.json`` holds."""
        return {
            "type": self.type,
            "name": self.name,
            **self.about_network(),
            "fingerprint": weights_digest(self.scorer.state_dict().items()),
            "model": asdict(self.model),
            "budgets": self.budgets,
            "interval": self.interval,
            "training": self.training,
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write the policy to a directory; options are those of :class:`PyTorchModelHubMixin`.

        Raises
        ------
        ValueError
            If the directory holds something else's ``config.json``, which the mixin would delete.
        """
        foreign = Path(save_directory) / "config.json"
        if foreign.exists():
            raise ValueError(f"{foreign} is no policy's and would be deleted: save to a directory of its own")
        return super().save_pretrained(Path(save_directory), **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights and then the description, whose fingerprint says whether both belong together."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.scorer.state_dict().items()}
        if lost := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise FloatingPointError(
                f"policy {self.name!r} isn't saved: its {', '.join(lost[:3])} hold NaN or infinity"
            )
        write_atomic(save_directory / WEIGHTS, save(tensors))
        write_atomic(save_directory / DESCRIPTION, json.dumps(self.description(), indent=2) + "\n")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the card that says what this is."""
        model, shape = self.model, self.model.architecture
        named = f"`{model.name}`" if model.name else "a model"
        known: dict[str, Any] = {"type": shape.model_type, "layers": shape.layers, "KV heads": shape.kv_heads}
        known["fingerprint"] = model.fingerprint and f"`{model.fingerprint[:12]}...`"
        facts = {
            "name": self.name,
            "type": self.type,
            "model": f"{named} ({', '.join(f'{what} {value}' for what, value in known.items() if value is not None)})",
            "budgets": ", ".join(map(str, self.budgets)) if self.budgets else "none in particular",
        }
        return _WholeCard(str(super().generate_model_card(*args, **{**facts, **kwargs})))

    @classmethod
    def read(cls, directory: Path, device: str = "cpu") -> Self:
        """Return the policy of a directory, which is of this type.

        Parameters
        ----------
        directory : Path
            Where it is.
        device : str
            Where its network goes.

        Raises
        ------
        ValueError
            If a file is malformed or damaged, or the weights don't fit the description.
        FileNotFoundError
            If one is missing.
        """
        description, weights = read_description(directory), directory / WEIGHTS
        with _naming(directory / DESCRIPTION, cls.type):
            known = _known(description)
            with torch.device("meta"):  # which has no memory that a foreign file's shape could fill
                promised = _shapes(cls.network(description).state_dict())
        try:
            tensors = load(weights.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{weights} doesn't hold this scorer's weights: {error}") from error
        if promised != (held := _shapes(tensors)):
            raise ValueError(f"{weights} doesn't hold this scorer's weights: {_difference(promised, held)}")
        with _naming(directory / DESCRIPTION, cls.type):
            policy = cls.build(description, **known)
        policy.scorer.load_state_dict(tensors)
        # Policies of before fingerprints have none.
        found = weights_digest(policy.scorer.state_dict().items())
        if (written := description.get("fingerprint", found)) != found:
            raise ValueError(
                f"{weights} is damaged or of another policy: fingerprint {found[:12]}..., where {DESCRIPTION} promises "
                f"{str(written)[:12]}...: save it again, or go on with its run (--resume), which writes it anew"
            )
        policy.scorer.to(device).eval()
        return policy


class _WholeCard(ModelCard):
    """A card that is written whole or not at all: one that is there is never written anew."""

    def save(self, filepath: Path | str) -> None:
        """Write it."""
        write_atomic(filepath, str(self))


@contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Turn what a malformed description raises into an error that names its file."""
    try:
        yield
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a {kind} policy's description: {error}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and type of tensors by name."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _difference(promised: Mapping[str, object], found: Mapping[str, object]) -> str:
    """Return the first name of tensors that aren't as promised, and both."""
    name = min(name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name))
    return f"{name} is {found.get(name)}, where the shape promises {promised.get(name)}"


def _known(description: dict[str, Any]) -> dict[str, Any]:
    """Return what a description says besides its network's shape."""
    model, budgets, interval = (description.get(name) for name in ("model", "budgets", "interval"))
    return {
        "name": str(description["name"]),
        "training": dict(description.get("training") or {}),
        "model": None if model is None else ModelIdentity.from_json(model),
        "budgets": None if budgets is None else [int(budget) for budget in budgets],
        "interval": None if interval is None else int(interval),
    }
