"""From the losses of rollouts to what windows are paid and how rollouts of one trace compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.decode import Losses, full_cache_losses
from kvenv.rewards import FullLosses, WindowLosses, low_entropy
from kvenv.traces import Trace

CREDITS = ("trajectory", "window", "attention")
"""What picks can be credited with: their trajectory's return, what is paid from their window on, or what is paid for
the targets whose queries would have attended to what went (:mod:`agents.attention_credit`)."""


def group_advantages(reward: Tensor, group: int, credit: str = "trajectory") -> Tensor:
    """Return how much better a rollout does than the others of its trace, in standard deviations of their returns.

    Parameters
    ----------
    reward : Tensor (N, J)
        Of each window, the G rollouts of a trace side by side.
    group : int
        G.
    credit : {"trajectory", "window"}
        Compare whole returns, or at each window what is still to come. The unit is the same: the last windows, in which
        little is at stake, count little.

    Returns
    -------
    Tensor (N, J)
        0 where all rollouts of a trace are paid alike.
    """
    to_go = reward.flip(1).cumsum(dim=1).flip(1)
    returns = to_go[:, :1].expand(reward.shape) if credit == "trajectory" else to_go
    grouped = returns.unflatten(0, (-1, group))
    return _in_spreads(grouped - grouped.mean(dim=1, keepdim=True), to_go[:, 0], group)


def target_advantages(
    reward: Callable[[WindowLosses], Tensor], windows: WindowLosses, rollouts: int, group: int
) -> Tensor:
    """Return how much more a rollout is paid for each target than the others of its trace.

    Rewards pay windows; what they pay a target is their slope in its loss times how far that is from the group's mean:
    for the LM losses exactly the target's share, for others to first order.

    Parameters
    ----------
    reward : callable
        Pays windows; differentiable in their losses.
    windows : WindowLosses
        N * J rows of W targets, the J windows of a rollout and the G rollouts of a trace side by side.
    rollouts, group : int
        N and G.

    Returns
    -------
    Tensor (N, J * W)
        In standard deviations of the group's returns, times W; 0 where all rollouts of a trace are paid alike.

    Raises
    ------
    ValueError
        If the reward is no differentiable function of the losses.
    """
    full = windows.full
    with torch.enable_grad():
        nll = windows.nll.detach().requires_grad_()
        paid = reward(replace(windows, nll=nll, run_full=lambda: full))
        if not paid.requires_grad:
            raise ValueError("credit 'attention' needs a reward that is a differentiable function of losses.nll")
        (slope,) = torch.autograd.grad(paid.sum(), nll)
    loss, slope = (x.reshape(rollouts // group, group, -1) for x in (windows.nll, slope))
    share = slope * (loss - loss.mean(dim=1, keepdim=True)) * windows.interval
    return _in_spreads(share, paid.detach().reshape(rollouts, -1).sum(dim=1), group)


def _in_spreads(grouped: Tensor, returns: Tensor, group: int) -> Tensor:
    """Return what rollouts get (M, G, ...) in standard deviations of their group's returns (N,), as (N, ...)."""
    whole = returns.reshape(-1, group, *(1,) * (grouped.ndim - 2))
    spread = whole.std(dim=1, keepdim=True, correction=0)
    # A spread of rounding errors is none.
    alike = spread <= 1e-6 * whole.abs().amax(dim=1, keepdim=True)
    return torch.where(alike, 0.0, grouped / spread).flatten(0, 1)


def window_losses(
    model: PreTrainedModel, traces: Sequence[Trace], losses: Losses, capacity: int, interval: int
) -> WindowLosses:
    """Return the losses of rollouts, window by window, as reward functions get them.

    Parameters
    ----------
    model : PreTrainedModel
        Makes the full-cache run, once per trace.
    traces : sequence of Trace
        The M traces.
    losses : Losses
        Of N rollouts, those of a trace side by side: entry t - 1 of target t.
    capacity, interval : int
        C, the position of the first decision, after which targets are paid for, and W.

    Returns
    -------
    WindowLosses
        N * J rows of W targets: the J windows of a rollout side by side.
    """
    group, device = len(losses.nll) // len(traces), losses.nll.device
    length = max(len(trace.tokens) for trace in traces)
    windows = -(-(length - 1 - capacity) // interval)

    def cut(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x[:, capacity:], (0, windows * interval - (length - 1 - capacity)))
        return padded.repeat_interleave(len(losses.nll) // len(x), dim=0).reshape(-1, interval)

    def run_full() -> FullLosses:
        full = full_cache_losses(model, [trace.tokens for trace in traces])
        low = torch.zeros_like(full.nll, dtype=torch.bool)
        for row, trace in enumerate(traces):
            scored = slice(capacity, len(trace.tokens) - 1)
            low[row, scored] = low_entropy(full.entropy[row, scored])
        count = low.sum(dim=1).repeat_interleave(group * windows)
        return FullLosses(cut(full.nll), cut(full.entropy), cut(low), count)

    answer = torch.zeros(len(traces), length - 1, dtype=torch.bool)
    for row, trace in enumerate(traces):
        for start, stop in trace.answers:
            answer[row, start - 1 : stop - 1] = True
    targets = torch.arange(1, length, device=device).expand(len(traces), -1)
    lengths = torch.tensor([len(trace.tokens) for trace in traces], device=device)
    valid = targets < lengths[:, None]
    return WindowLosses(
        nll=cut(losses.nll),
        entropy=cut(losses.entropy),
        correct=cut(losses.correct),
        valid=cut(valid),
        answer=cut(answer.to(device)),
        positions=cut(targets),
        interval=interval,
        run_full=run_full,
    )


def rollout_sums(losses: WindowLosses, reward: Tensor) -> dict[str, float]:
    """Return what :func:`rollout_metrics` needs of some rollouts; it adds up over whatever is rolled out apart.

    Parameters
    ----------
    losses : WindowLosses
        All windows of rollouts that were made side by side.
    reward : Tensor (N, J)
        What they paid.
    """
    low = losses.full.low_entropy
    sums: dict[str, int | Tensor] = {
        "rollouts": len(reward),
        "reward": reward.sum(),
        "targets": losses.valid.sum(),
        "nll": losses.nll.sum(),
        "certain": low.sum(),
        "increase": (losses.increase * low).sum(),
        "answers": losses.answer.sum(),
        "answer_nll": (losses.nll * losses.answer).sum(),
    }
    return {f"sum/{name}": float(value) for name, value in sums.items()}


def rollout_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return means over rollouts or targets, by TensorBoard tag; of the answers only if there are any.

    Parameters
    ----------
    sums : mapping of str to float
        From :func:`rollout_sums`, added up.
    """

    def mean(of: str, over: str) -> float:
        return sums[f"sum/{of}"] / sums[f"sum/{over}"]

    metrics = {
        "rollout/ep_rew_mean": mean("reward", "rollouts"),
        "rollout/lm_loss": mean("nll", "targets"),
        "rollout/low_entropy_increase": mean("increase", "certain"),
    }
    if sums["sum/answers"]:
        metrics["rollout/answer_loss"] = mean("answer_nll", "answers")
    return metrics
