"""From the losses of rollouts to what windows are paid and how rollouts of one trace compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.decode import Losses, full_cache_losses
from kvenv.rewards import FullLosses, WindowLosses, low_entropy
from kvenv.traces import Trace

CREDITS = ("trajectory", "window")
"""What a decision can be credited with: its trajectory's return, or what is paid from its window on."""


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
    grouped, whole = (x.unflatten(0, (-1, group)) for x in (returns, to_go[:, :1]))
    spread = whole.std(dim=1, keepdim=True, correction=0)
    # A spread of rounding errors is none.
    alike = spread <= 1e-6 * whole.abs().amax(dim=1, keepdim=True)
    return torch.where(alike, 0.0, (grouped - grouped.mean(dim=1, keepdim=True)) / spread).flatten(0, 1)


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


def rollout_metrics(losses: WindowLosses, reward: Tensor) -> dict[str, float]:
    """Return means over rollouts, by TensorBoard tag; of the answers only if there are any.

    Parameters
    ----------
    losses : WindowLosses
        Of all windows.
    reward : Tensor (N, J)
        What they paid.
    """
    answers = losses.answer.sum()
    low = losses.full.low_entropy
    metrics = {
        "rollout/ep_rew_mean": reward.sum(dim=1).mean(),
        "rollout/lm_loss": losses.nll.sum() / losses.valid.sum(),
        "rollout/low_entropy_increase": (losses.increase * low).sum() / low.sum(),
    }
    if answers:
        metrics["rollout/answer_loss"] = (losses.nll * losses.answer).sum() / answers
    return {tag: float(value) for tag, value in metrics.items()}
