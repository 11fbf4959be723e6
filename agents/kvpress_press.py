"""kvenv's policies in kvpress (0.5.5): a ``ScorerPress`` whose scores are a policy's priorities.

kvpress needs transformers < 5.3, kvenv's environments need a newer one; what ranks pairs runs with either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

try:
    from kvpress import ScorerPress
    from kvpress.utils import compute_n_kept, get_prerope_query_states
except ImportError as error:
    raise ImportError(
        "agents.kvpress_press needs kvpress, which needs transformers<5.3: in a virtual environment of its own, "
        f"pip install kvpress==0.5.5 gymnasium && pip install --no-deps kvenv ({error})"
    ) from error

from kvenv.attention import attention_probabilities, causal_bias
from kvenv.identity import check_policy
from kvenv.rotary import Rotary
from kvenv.state import LayerState, Protection, check_integer
from kvenv.statistics import WindowStatistics
from kvenv.windows import cut

SUPPORTED = frozenset({"stats", "last_attention"})
"""Needs of policies that can be met here."""

INTERVAL = 16
"""W where neither the policy nor the caller says one."""


class KVEnvPress(ScorerPress):
    """A policy of kvenv as a press: keeps what ``EvictingCache(..., schedule="prefill")`` keeps of a prompt.

    Parameters
    ----------
    policy : callable
        Maps a :class:`kvenv.LayerState` to keep-priorities: what :func:`agents.make` makes.
    compression_ratio : float
        Share of the prompt's pairs that go.
    interval : int, optional
        W of the attention statistics, whose last window ends with the prompt; the policy's own if not given.
    protection : Protection, optional
        Pairs never evicted; if not given, the first 4 and the newest 16.

    Raises
    ------
    ValueError
        If the policy needs what a press doesn't know.

    Examples
    --------
    >>> press = KVEnvPress(agents.make("owner/name"), compression_ratio=0.5)  # doctest: +SKIP
    >>> with press(model):  # doctest: +SKIP
    ...     model(input_ids, past_key_values=cache)
    """

    def __init__(
        self,
        policy: Callable[[LayerState], Tensor],
        compression_ratio: float = 0.0,
        *,
        interval: int | None = None,
        protection: Protection | None = None,
    ) -> None:
        super().__init__(compression_ratio)
        self.needs: frozenset[str] = getattr(policy, "needs", frozenset())
        if unknown := self.needs - SUPPORTED:
            raise ValueError(
                f"policy {getattr(policy, 'name', policy)!r} needs {', '.join(sorted(unknown))}: a press knows a "
                f"prompt's keys, values and positions, and {', '.join(sorted(SUPPORTED))}"
            )
        self.policy, self.protection = policy, protection or Protection()
        self.interval = (getattr(policy, "interval", None) or INTERVAL) if interval is None else interval
        check_integer("interval", self.interval, 1)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Let the policy refuse a model that it wasn't trained for; kvpress calls it before it hooks in.

        Raises
        ------
        ValueError
            The policy's, with its reason.
        """
        check_policy(self.policy, model)

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the policy's priorities, and above all of them what is protected.

        Parameters
        ----------
        module : nn.Module
            A layer's attention.
        hidden_states : Tensor (N, S, hidden)
            What the layer got of the prompt.
        keys, values : Tensor (N, H, S, D)
            The prompt's pairs.
        attentions : Tensor or None
            Not looked at.
        kwargs : dict
            What else the layer got: ``position_embeddings``, and ``attention_mask`` if there is one.

        Returns
        -------
        Tensor (N, H, S)

        Raises
        ------
        ValueError
            If this isn't a whole prompt, prompts are padded, or what is kept doesn't hold what is protected.
        """
        fed, read = kwargs["position_embeddings"][0].shape[1], hidden_states.shape[1]
        if not fed == read == keys.shape[2]:
            raise ValueError(
                f"a policy ranks a whole prompt, not {keys.shape[2]} pairs of {read} hidden states in a call of {fed} "
                "tokens: presses that work by chunks or while decoding can't have it as their base"
            )
        _refuse_padding(kwargs.get("attention_mask"))
        state = self._state(module, hidden_states, keys, values)
        priorities = self.policy(state)
        top = priorities.masked_fill(~state.mask, -torch.inf).amax()
        return torch.where(state.mask, priorities, top + top.abs() + 1)

    def _state(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor) -> LayerState:
        """Return what a policy sees of a layer when the prompt has been read."""
        rows, heads, length = keys.shape[:3]
        budget = compute_n_kept(length, self.compression_ratio)
        self.protection.check(budget)
        rotary = Rotary.of(module)
        positions = torch.arange(length, device=keys.device).expand(rows, heads, length)
        next_position = positions.new_full((rows,), length)
        attention = self._statistics(module, hidden_states, keys, rotary) if self.needs else None
        return LayerState(
            layer=module.layer_idx,
            keys=keys,
            values=values,
            positions=positions,
            groups=module.config.num_attention_heads // heads,
            rotary=rotary,
            mask=self.protection.candidates(positions, next_position, next_position),
            filled=torch.ones_like(positions, dtype=torch.bool),
            next_position=next_position,
            prompt_length=next_position,
            budget=torch.full_like(next_position, budget),
            interval=self.interval,
            stats=attention.of(0) if attention else None,
            last_attention=attention.last[0] if attention else None,
        )

    def _statistics(self, module: Any, hidden_states: Tensor, keys: Tensor, rotary: Rotary) -> WindowStatistics:
        """Return the attention statistics of the prompt's windows, the last of which ends with it."""
        rows, heads, length = keys.shape[:3]
        query = get_prerope_query_states(module, hidden_states)
        pad = -length % self.interval
        query = F.pad(rotary.rotate(query, torch.arange(length, device=keys.device)), (0, 0, pad, 0))
        query = query.unflatten(1, (heads, -1))
        precise = torch.promote_types(keys.dtype, torch.float32)
        positions = torch.arange(-pad, length, device=keys.device).expand(rows, -1)
        windows = cut(positions, positions >= 0, range(0, length + pad + 1, self.interval), precise)
        statistics = WindowStatistics((1, rows, heads, length), query.shape[2], precise, keys.device)
        held = torch.arange(length, device=keys.device, dtype=precise)
        for window in windows:
            asked = query[:, :, :, window.start : window.stop]
            bias = causal_bias(window.reach, held, precise)
            statistics.add(0, attention_probabilities(asked, keys, bias, module.scaling), window)
        return statistics


def _refuse_padding(mask: Tensor | None) -> None:
    """Refuse a mask by which the last token doesn't see all others: positions would be those of another text."""
    if mask is None:
        return
    # Attention functions want it as (N, S), as booleans (N, 1, S, S), or as what is added to logits.
    additive = mask.dim() == 4 and mask.is_floating_point()
    seen = mask == 0 if additive else mask.bool()
    if not seen[..., -1, :].all() if mask.dim() == 4 else not seen.all():
        raise ValueError("prompts are padded: a press tells positions by counting, give prompts one at a time")
