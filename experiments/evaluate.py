"""Compare policies on the same traces or tasks at the same budgets: rows, tables, plots, TensorBoard scalars."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from transformers import PreTrainedModel

import agents
from agents import hub
from experiments.crew import Crew, CrewArgs, hired
from experiments.progress import track
from experiments.results import ANSWERS, RESULTS, Results, named, writing
from experiments.tables import report, wide_console
from kvenv.answering import Answer, Decoding, answer, answerable
from kvenv.determinism import set_deterministic
from kvenv.evaluation import FULL, Row, evaluate
from kvenv.identity import check_fingerprint, fingerprint
from kvenv.layerwise import Policy
from kvenv.models import LoadedModel, load_model
from kvenv.registry import HUB_ID
from kvenv.sampling import check_sampling
from kvenv.state import Protection
from kvenv.tasks import ChoiceTask, QuestionTask, Task, TaskSetting, TraceTask, load_tasks
from kvenv.traces import load_traces

NOT_TERMS = ("out", "batch_size", "device", "deterministic", "crew")
"""Arguments that rows don't depend on."""

EVICTED_ONCE_RECENT = 16
"""Newest tokens that are never evicted where a prompt is evicted from once, as in KVP's paper."""


@dataclass
class Args:
    """Compare policies on the same traces or tasks at the same budgets."""

    policies: tuple[str, ...] = ("full", "golden", "random", "streaming", "h2o", "snapkv", "keydiff")
    """Names, directories or hub ids of learned policies, or "full" for no eviction; "random" is always added. Those
    that know the future are left out where answers are generated."""
    budgets: tuple[int, ...] = (32, 64, 128)
    """Pairs that every (layer, KV head) keeps after an eviction."""
    traces: tuple[str, ...] = ()
    """Families, files, datasets or registered names; recall if neither traces nor tasks are given."""
    tasks: tuple[str, ...] = ()
    """The papers' benchmarks: ruler, perplexity, reasoning, zeroshot, entropy, or one of their tasks, e.g. ruler/vt."""
    task_data: Path | None = None
    """Directory of the tasks' files, which else are downloaded where they can be."""
    trace_length: int = 512
    """Tokens of a trace; most tokens of a task's prompt and answer together."""
    first_trace: int = 0
    """Id of the first trace, or example, in the split's sequence."""
    num_traces: int = 200
    """Traces of each family, most examples of each task."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of noise and sampling; as many answers are averaged (average@k)."""
    out: Path = Path("runs/evaluate")
    """Directory for results.json, plots and TensorBoard event files; a second call goes on there."""
    model: str = "tiny"
    """The LLM: "tiny", a directory, a hub id or a registered name."""
    split: str = "test"
    """Split of the traces: train, validation or test."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    schedule: Literal["periodic", "prefill"] | None = None
    """Evict periodically, or once, at the end of the prompt; if not given, as the task's paper does: periodic for
    reasoning, entropy and traces, else prefill."""
    question: Literal["included", "held-out"] | None = None
    """Whether the one eviction of the schedule prefill sees the question, or only what comes before it; if not given,
    as the task's paper does: held out of zeroshot/boolq and zeroshot/gov_report, else included."""
    temperature: float = 0.0
    """Of sampled answers; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that answers are sampled from."""
    chat: bool = True
    """Whether tasks use the tokenizer's chat template, if it has one."""
    sinks: int = 4
    """First tokens of a trace that are never evicted."""
    recent: int | None = None
    """Newest tokens that are never evicted; if not given, the interval, or 16 under the schedule prefill."""
    protect_prompt: bool = False
    """Whether the whole prompt is never evicted."""
    score_from: int | None = None
    """Score only targets of traces above this position, e.g. that of a run with larger budgets; the largest budget plus
    interval if not given."""
    batch_size: int = 16
    """Traces or examples decoded side by side."""
    device: str = "cpu"
    """PyTorch device."""
    dtype: str = "float32"
    """The LLM's dtype."""
    deterministic: bool = False
    """Whether to compute the same bits in every run on a GPU, too, which is slower; on a CPU they always are."""
    crew: tyro.conf.OmitArgPrefixes[CrewArgs] = field(default_factory=CrewArgs)

    def protection(self, schedule: str) -> Protection:
        """Return which pairs are never evicted under a schedule."""
        recent = self.recent
        if recent is None:
            recent = self.interval if schedule == "periodic" else EVICTED_ONCE_RECENT
        return Protection(self.sinks, recent, self.protect_prompt)

    def decoding(self, task: Task) -> Decoding:
        """Return how a task's answers are decoded."""
        schedule = self.schedule or task.schedule
        held_out = task.held_out and schedule == "prefill" if self.question is None else self.question == "held-out"
        return Decoding(self.interval, schedule, self.protection(schedule), held_out, self.temperature, self.top_p)


def make_policies(names: Sequence[str], device: str) -> dict[str, Policy | None]:
    """Return the policies by name, learned ones on ``device``; None is the full cache.

    A saved policy goes by the name saved with it, or by its directory or hub id where another one has that name.

    Raises
    ------
    ValueError
        If a name is unknown; the message lists the known ones.
    """
    known = [FULL, *agents.names()]
    for name in names:
        if name not in known and not os.path.isdir(name) and not HUB_ID.fullmatch(name):
            raise ValueError(
                f"unknown policy {name!r}: known are {', '.join(known)}, or a directory with a policy.json, or a hub id"
            )
    policies: dict[str, Policy | None] = {
        name: None if name == FULL else agents.make(name, **({"device": device} if name in agents.TRAINED else {}))
        for name in names
        if name in known
    }
    for name in names:
        if name not in known:
            learned = agents.make(name, device=device)
            policies[name if learned.name in policies else learned.name] = learned
    return policies


class Evaluator:
    """What is measured: an LLM, policies and tasks.

    All is loaded and looked into before the first is measured: what is wrong with the last is said at once.

    Parameters
    ----------
    args : Args
        The command's.
    expected : str, optional
        Fingerprint of the command's LLM, where it is measured on another node.
    """

    def __init__(self, args: Args, expected: str | None = None) -> None:
        self.args = args
        if args.deterministic:
            set_deterministic()
        self.loaded = load_model(args.model, dtype=args.dtype, device=args.device)
        if expected is not None:
            check_fingerprint(self.loaded.model, expected)
        self.loaded.check_length(args.trace_length)
        self.policies = make_policies(args.policies, args.device)
        names = args.traces or (() if args.tasks else ("recall",))
        self.tasks: list[Task] = [_traces(args, name, self.loaded.tokenizer) for name in names]
        self.tasks += [task for name in args.tasks for task in load_tasks(name, _setting(args, self.loaded.tokenizer))]
        self.ids = [_ids(args, task, self.loaded.model) for task in self.tasks]

    def batches(self, number: int, missing: Sequence[int]) -> list[Sequence[int]]:
        """Return the traces or examples that are missing of a task, as many together as are decoded side by side."""
        task, size = self.tasks[number], self.args.batch_size
        if not isinstance(task, TraceTask):
            size = self.args.decoding(task).side_by_side(task, size)
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def asked(self, number: int) -> dict[str, Policy | None]:
        """Return the policies that a task is asked of: those that know the future can't answer.

        Raises
        ------
        ValueError
            If all do.
        """
        task = self.tasks[number]
        if isinstance(task, TraceTask):
            return self.policies
        left = {name: policy for name, policy in self.policies.items() if policy is None or answerable(policy)}
        if not left:
            raise ValueError(f"policies {list(self.policies)} all know the future, and {task.name} is answered without")
        return left

    def cells(self, number: int, batch: Sequence[int]) -> Iterator[list[Row] | list[Answer]]:
        """Yield what is measured of a batch of a task, one policy at a budget after the other."""
        task, policies = self.tasks[number], self.asked(number)
        if isinstance(task, TraceTask):
            yield from _of_traces(self.args, task, batch, policies, self.loaded)
        else:
            yield from _of_answers(self.args, task, batch, policies, self.loaded)

    def batch(self, number: int, batch: Sequence[int]) -> list[list[Row] | list[Answer]]:
        """Return what is measured of a batch of a task."""
        return list(self.cells(number, batch))


def measure(args: Args) -> list[Row]:
    """Evaluate as ``args`` say, go on where an earlier call stopped, and write after every batch."""
    _check(args)
    evaluator = Evaluator(args)
    with (
        writing(args.out, _terms(args, evaluator.loaded)) as results,
        hired(args.crew, Evaluator, (args, fingerprint(evaluator.loaded.model)), args.device) as crew,
    ):
        for number in range(len(evaluator.tasks)):
            _measure_task(evaluator, number, results, crew)
    return results.rows


def _measure_task(evaluator: Evaluator, number: int, results: Results, crew: Crew | None) -> None:
    """Measure what is missing of a task."""
    args, task, policies = evaluator.args, evaluator.tasks[number], evaluator.asked(number)
    if task.note:
        print(f"{task.name}: {task.note}", file=sys.stderr)
    if out := [name for name in evaluator.policies if name not in policies]:
        print(f"{task.name}: {', '.join(out)} left out: nobody knows the future of what is generated", file=sys.stderr)
    if not isinstance(task, TraceTask) and args.decoding(task).decided_before(task):
        print(f"{task.name}: every option is one token, told before anything is evicted", file=sys.stderr)
    a_batch = len(args.budgets) * len(policies)
    missing = results.missing(task.name, evaluator.ids[number], a_batch * len(args.seeds))
    batches = evaluator.batches(number, missing)
    cells = (
        (cell for done in crew.map("batch", number, batches) for cell in done)
        if crew
        else (cell for batch in batches for cell in evaluator.cells(number, batch))
    )
    measured = track(cells, f"evaluating on {task.name}", total=a_batch * len(batches))
    # Taken in only when all policies ran on the same traces: what a killed run leaves can be compared, too.
    while rows := [row for cell in itertools.islice(measured, a_batch) for row in cell]:
        results.add(rows)


def _of_traces(
    args: Args, task: TraceTask, ids: Sequence[int], policies: dict[str, Policy | None], loaded: LoadedModel
) -> Iterator[list[Row]]:
    """Yield the rows of traces, under the name of the task."""
    schedule = args.schedule or task.schedule
    cells = evaluate(
        policies,
        task.source,
        ids,
        model=loaded.model,
        budgets=args.budgets,
        interval=args.interval,
        schedule=schedule,
        protection=args.protection(schedule),
        seeds=args.seeds,
        score_from=args.score_from,
        batch_size=args.batch_size,
        by_entropy=task.entropy,
    )
    return ([replace(row, traces=task.name) for row in cell] for cell in cells)


def _of_answers(
    args: Args,
    task: QuestionTask | ChoiceTask,
    ids: Sequence[int],
    policies: dict[str, Policy | None],
    loaded: LoadedModel,
) -> Iterator[list[Answer]]:
    """Yield the answers to examples."""
    return answer(
        policies,
        task,
        ids,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        budgets=args.budgets,
        decoding=args.decoding(task),
        seeds=args.seeds,
        split=args.split,
        batch_size=args.batch_size,
    )


def _ids(args: Args, task: Task, model: PreTrainedModel) -> Sequence[int]:
    """Return which traces, or examples, are to be measured: those asked for, as far as there are so many.

    Raises
    ------
    ValueError
        If there is none, or the first can't be asked.
    """
    ids: Sequence[int] = range(args.first_trace, args.first_trace + args.num_traces)
    size = task.source.size if isinstance(task, TraceTask) else len(task.examples)
    if size is not None:
        ids = [number for number in ids if number < size]
    if not ids:
        raise ValueError(f"task {task.name!r} has {size} examples: --first-trace {args.first_trace} is beyond")
    if not isinstance(task, TraceTask):
        args.decoding(task).check(task.examples[ids[0]], model)
    return ids


def _check(args: Args) -> None:
    """Refuse what only the command knows to be wrong, or would find out late."""
    if not args.policies:
        raise ValueError("policies [] must hold at least one")
    for name, values in (("policies", args.policies), ("traces", args.traces), ("tasks", args.tasks)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} {list(values)} must hold nothing twice")
    for name, number, at_least in (
        ("num_traces", args.num_traces, 1),
        ("first_trace", args.first_trace, 0),
        ("batch_size", args.batch_size, 1),
    ):
        if number < at_least:
            raise ValueError(f"{name} {number} must be at least {at_least}")
    least = max(args.budgets, default=0) + args.interval
    if args.schedule != "prefill" and args.score_from is not None and args.score_from < least:
        raise ValueError(
            f"score_from {args.score_from} is below the largest budget plus interval: choose {least} or more"
        )
    check_sampling(args.temperature, args.top_p)
    args.protection(args.schedule or "periodic")


def _traces(args: Args, name: str, tokenizer: Any) -> TraceTask:
    """Return the traces of a name as a task."""
    schedule = args.schedule or "periodic"
    source = load_traces(name, split=args.split, tokenizer=tokenizer, trace_length=args.trace_length, schedule=schedule)
    last = args.first_trace + args.num_traces
    if source.size is not None and last > source.size:
        raise ValueError(
            f"traces {name!r} are {source.size}: --first-trace {args.first_trace} and --num-traces {args.num_traces} "
            "ask for more"
        )
    return TraceTask(source.name, schedule, source)


def _setting(args: Args, tokenizer: Any) -> TaskSetting:
    """Return what benchmarks are made for."""
    return TaskSetting(
        tokenizer=tokenizer,
        length=args.trace_length,
        num_examples=args.first_trace + args.num_traces,
        split=args.split,
        data=args.task_data,
        chat=args.chat,
        schedule=args.schedule,
    )


def _terms(args: Args, loaded: LoadedModel) -> dict[str, Any]:
    """Return all that rows depend on, data by what is in them: not where they go, nor how many are computed at once."""
    terms = {name: value for name, value in asdict(args).items() if name not in NOT_TERMS}
    known = (FULL, *agents.names())
    terms["policies"] = [name if name in known else named(name, hub.find(name)) for name in args.policies]
    terms["traces"] = [named(name, Path(name)) if os.path.isfile(name) else name for name in args.traces]
    if args.task_data is not None and args.task_data.is_dir():
        terms["task_data"] = named(str(args.task_data), args.task_data)
    template = getattr(loaded.tokenizer, "chat_template", None)  # of traces, too: messages are put into it
    return terms | {
        "fingerprint": fingerprint(loaded.model),
        "chat_template": template and hashlib.sha256(str(template).encode()).hexdigest()[:12],
        "eos_token_id": loaded.model.generation_config.eos_token_id,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = tyro.cli(Args, args=argv, prog="kvenv evaluate")
    if args.policies and "random" not in args.policies:  # no comparison is without it, see CONTRIBUTING.md
        args = replace(args, policies=(*args.policies, "random"))
    console = wide_console()
    report(measure(args), args.out, console)
    for what, name in (("rows", RESULTS), ("answers", ANSWERS), ("plot", "loss.png"), ("by entropy", "entropy.png")):
        if (args.out / name).exists():
            console.print(f"{what}: {args.out / name}", soft_wrap=True)
    console.print(f"scalars: tensorboard --logdir {args.out / 'tensorboard'}")


if __name__ == "__main__":
    from experiments.cli import run

    run(main)
