"""Pretrain the bundled LLM on the trace families, from random weights to a Hugging Face model directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter

from experiments.cli import run
from experiments.curriculum import ANSWER, PLAIN, Batch, Lesson, curriculum
from experiments.quality import Arguments as QualityArguments
from experiments.quality import table
from experiments.tiny_model import build_model, build_tokenizer
from kvenv.files import digest, read_json, sealed, unsealed, write_atomic
from kvenv.lock import hold
from kvenv.traces import FAMILIES
from kvenv.traces.draw import Draw

WARM_UP = 200  # steps over which the learning rate rises
LOG_SECONDS = 10.0  # between two lines of the log
SIZES = "layers hidden heads kv_heads head_dim mlp tokens".split()
RECIPE = (*SIZES, "seed", "learning_rate", "weight_decay", "plain_weight", "scale")  # must not change on --resume
AVERAGED = 50  # steps over which the running answer accuracy is averaged


@dataclass
class Arguments:
    """Pretrain the bundled LLM on the trace families."""

    out: Path = Path("runs/pretrain")
    """Directory for the model, the checkpoint and the TensorBoard events."""
    resume: bool = False
    """Go on from the checkpoint in --out instead of refusing to overwrite it."""
    seed: int = 0
    """Seeds the weights and the data."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """PyTorch device; on CUDA the forward pass runs in bfloat16 autocast."""
    layers: int = 5
    """Decoder layers."""
    hidden: int = 192
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key-value heads."""
    head_dim: int = 32
    """Dimensions of a head."""
    mlp: int = 512
    """Width of the MLP."""
    tokens: int = 32768
    """Tokens of a batch."""
    learning_rate: float = 1e-3
    """Peak learning rate: linear warm-up over 200 steps, cosine decay to a fiftieth of it in the last lesson."""
    weight_decay: float = 0.01
    """AdamW's weight decay of the matrices."""
    plain_weight: float = 0.3
    """Weight of the mean loss over the tokens that are no answers, where the answers' is 1."""
    scale: float = 1.0
    """Multiplies the most steps of every lesson but the last."""
    final_steps: int = 10000
    """Steps of the last lesson, over which the learning rate decays."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after this many minutes; 0 means never."""
    save_every: int = 500
    """Steps between checkpoints."""
    workers: int = 2
    """Processes that make traces; 0 makes them in this one."""
    traces: int = 100
    """Held-out traces per family and length in the final table."""


class Batches(Dataset):
    """The batches of a lesson by step: equal seeds and steps give equal batches in any process."""

    def __init__(self, lesson: Lesson, tokenizer: Any, seed: int, tokens: int) -> None:
        self.lesson, self.tokenizer, self.seed, self.tokens = lesson, tokenizer, seed, tokens

    def __getitem__(self, step: int) -> Batch:
        rng = Draw("pretrain", self.seed, self.lesson.name, step)
        length = rng.pick(self.lesson.lengths)
        return self.lesson.make(rng, self.tokenizer, max(4, self.tokens // length), length)


@dataclass
class Progressed:
    """Where training is: what a checkpoint holds beside weights and moments. Data needs no other random state."""

    lesson: int = 0
    lesson_step: int = 0
    step: int = 0
    seconds: float = 0.0
    accuracies: list[float] = field(default_factory=list)


class Pretraining:
    """Model, optimizer and where training is, with everything that moves them on."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.lessons = curriculum(arguments.scale, arguments.final_steps)
        self.tokenizer = build_tokenizer()
        model: Any = build_model(
            self.tokenizer,
            seed=arguments.seed,
            layers=arguments.layers,
            hidden=arguments.hidden,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            mlp=arguments.mlp,
        )
        self.model = model.to(arguments.device)
        self.logged = 0.0
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": arguments.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=arguments.device.startswith("cuda"))
        self.at = Progressed()
        self.console = Console()

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        rate = self.arguments.learning_rate * min(1.0, (self.at.step + 1) / WARM_UP)
        if self.at.lesson == len(self.lessons) - 1:
            share = self.at.lesson_step / self.lessons[-1].steps
            rate *= 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share))
        return float(rate)

    def update(self, batch: Batch) -> dict[str, float | torch.Tensor]:
        """Take one optimizer step and return its scalars (on the device, so that nothing waits for them)."""
        device = self.arguments.device
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        kinds = torch.from_numpy(batch.kinds).to(device, non_blocking=True)[:, 1:]
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
        answer, plain = (kinds == ANSWER).float(), (kinds == PLAIN).float()
        answer_loss = (nll * answer).sum() / answer.sum().clamp(min=1)
        plain_loss = (nll * plain).sum() / plain.sum().clamp(min=1)
        loss = answer_loss + self.arguments.plain_weight * plain_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            hit = (logits.argmax(-1) == tokens[:, 1:]).float() * answer
            scalars: dict[str, float | torch.Tensor] = {
                "loss/answer": answer_loss.detach(),
                "loss/plain": plain_loss.detach(),
                "accuracy/all": hit.sum() / answer.sum().clamp(min=1),
                "optimizer/gradient_norm": norm,
                "optimizer/learning_rate": rate,
            }
            families = torch.from_numpy(batch.family).to(device)
            if batch.family[0] >= 0:
                for number, name in enumerate(FAMILIES):
                    mine = (families == number).float()[:, None]
                    scalars[f"accuracy/{name}"] = (hit * mine).sum() / (answer * mine).sum().clamp(min=1)
        return scalars

    def save(self) -> None:
        """Write the checkpoint: weights and moments named by step, then the JSON file that names them."""
        folder = self.arguments.out / "checkpoint"
        moments = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value.detach().cpu().contiguous()
        weights = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters()}
        step = self.at.step
        digests = {}
        for file, tensors in ((f"weights-{step}.safetensors", weights), (f"moments-{step}.safetensors", moments)):
            write_atomic(folder / file, to_safetensors(tensors))
            digests[file] = digest(folder / file)
        recipe = {key: getattr(self.arguments, key) for key in RECIPE}
        state = sealed({"at": asdict(self.at), "arguments": recipe, "sha256": digests})
        write_atomic(folder / "state.json", json.dumps(state, indent=2))
        for old in folder.glob("*.safetensors"):
            if not old.stem.endswith(f"-{step}"):
                old.unlink()
        self.write_model()

    def load(self) -> None:
        """Go on from the checkpoint.

        Raises
        ------
        ValueError
            If it was written with other arguments, or is damaged.
        """
        folder = self.arguments.out / "checkpoint"
        checkpoint = read_json(folder / "state.json", "a checkpoint")
        if not isinstance(checkpoint, dict) or not {"at", "arguments", "sha256"} <= set(checkpoint):
            raise ValueError(f"{folder / 'state.json'} is not a checkpoint of this command")
        checkpoint = unsealed(checkpoint, folder / "state.json")
        for file, promised in checkpoint["sha256"].items():
            if digest(folder / file) != promised:
                raise ValueError(f"{folder / file} is damaged: its digest is not the one in state.json")
        for key, value in checkpoint["arguments"].items():
            if getattr(self.arguments, key) != value:
                raise ValueError(
                    f"--{key.replace('_', '-')} is {getattr(self.arguments, key)}, the checkpoint has {value}"
                )
        self.at = Progressed(**checkpoint["at"])
        weights = load_file(folder / f"weights-{self.at.step}.safetensors")
        moments = load_file(folder / f"moments-{self.at.step}.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
                state = {key: moments[f"{name}/{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
                # The fused optimizer wants its step counts on the device, as everything else; on CPU nothing moves.
                self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}

    def write_model(self) -> None:
        """Write the model directory in Hugging Face format; each file is whole at any time."""
        aside, there = self.arguments.out / "model.new", self.arguments.out / "model"
        self.model.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        there.mkdir(exist_ok=True)
        for file in aside.iterdir():
            file.replace(there / file.name)
        aside.rmdir()

    def batches(self, lesson: Lesson) -> Iterator[Batch]:
        """Yield the rest of a lesson's batches."""
        data = Batches(lesson, self.tokenizer, self.arguments.seed, self.arguments.tokens)
        workers = self.arguments.workers
        steps = range(self.at.lesson_step, lesson.steps)
        prefetch = 4 if workers else None
        return iter(DataLoader(data, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=prefetch))

    def run(self) -> bool:
        """Train to the end, or until the time is up; return whether the end was reached."""
        began, before = time.monotonic(), self.at.seconds
        limit = self.arguments.max_minutes * 60 or float("inf")
        with SummaryWriter(str(self.arguments.out), purge_step=self.at.step) as writer, self._progress() as progress:
            while self.at.lesson < len(self.lessons):
                lesson = self.lessons[self.at.lesson]
                bar = progress.add_task(lesson.name, total=lesson.steps, completed=self.at.lesson_step, accuracy=0.0)
                for batch in self.batches(lesson):
                    scalars = self.update(batch)
                    self.at.seconds = before + time.monotonic() - began
                    accuracy, over = self._advance(lesson, float(scalars["accuracy/all"]))
                    progress.update(bar, advance=1, accuracy=accuracy)
                    if self.at.step % 20 == 0:
                        self._write(writer, scalars, lesson, accuracy)
                    if self.at.step % self.arguments.save_every == 0:
                        self.save()
                    if self.at.seconds - before > limit:
                        self.save()
                        return False
                    if over:
                        break
                progress.update(bar, visible=False)
        self.save()
        return True

    def _advance(self, lesson: Lesson, accuracy: float) -> tuple[float, bool]:
        # Returns the running accuracy and whether the lesson is over, in which case the next one begins.
        self.at.step += 1
        self.at.lesson_step += 1
        self.at.accuracies = [*self.at.accuracies[1 - AVERAGED :], accuracy]
        running = float(np.mean(self.at.accuracies))
        learned = len(self.at.accuracies) == AVERAGED and running > lesson.until
        over = learned or self.at.lesson_step == lesson.steps
        if over:
            self.at.lesson, self.at.lesson_step, self.at.accuracies = self.at.lesson + 1, 0, []
        return running, over

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers {task.fields[accuracy]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def _write(self, writer: Any, scalars: dict[str, Any], lesson: Lesson, accuracy: float) -> None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, float(value), self.at.step)
        writer.add_scalar("lesson", self.at.lesson, self.at.step)
        if self.at.seconds - self.logged >= LOG_SECONDS:
            self.logged = self.at.seconds
            tags = [tag for tag in scalars if tag.startswith(("accuracy/", "loss/"))]
            values = "  ".join(f"{tag.split('/')[1]} {float(scalars[tag]):.3f}" for tag in tags)
            self.console.print(
                f"{self.at.seconds:.0f} s, step {self.at.step}, {lesson.name}: running {accuracy:.3f}  {values}"
            )


def check(arguments: Arguments) -> None:
    """Refuse arguments that cannot work.

    Raises
    ------
    ValueError
        Naming the argument, its value and what would be right.
    """
    for name in (*SIZES, "final_steps", "save_every", "traces"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: choose 1 or more")
    if arguments.heads % arguments.kv_heads:
        raise ValueError(f"--heads {arguments.heads} is no multiple of --kv-heads {arguments.kv_heads}")
    if arguments.learning_rate <= 0:
        raise ValueError(f"--learning-rate is {arguments.learning_rate}: choose a number above 0")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device} cannot be used here: {error}") from error
    there = (arguments.out / "checkpoint" / "state.json").exists()
    if there and not arguments.resume:
        raise ValueError(f"--out {arguments.out} holds a checkpoint: add --resume or choose another directory")
    if arguments.resume and not there:
        raise ValueError(f"--resume: --out {arguments.out} holds no checkpoint")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, args=argv, prog="kvenv pretrain")
    check(arguments)
    with hold(arguments.out):
        _pretrain(arguments)


def _pretrain(arguments: Arguments) -> None:
    """Train where nobody else writes."""
    pretraining = Pretraining(arguments)
    if arguments.resume:
        pretraining.load()
    console = pretraining.console
    if not pretraining.run():
        console.print(f"Time is up after {pretraining.at.step} steps: go on with --resume.")
    quality = QualityArguments(traces=arguments.traces, device=arguments.device)
    console.print(table(pretraining.model.eval(), pretraining.tokenizer, quality))
    console.print(f"Model: {arguments.out / 'model'} ({pretraining.at.step} steps, {pretraining.at.seconds:.0f} s)")
    console.print(f"Curves: tensorboard --logdir {arguments.out}")


if __name__ == "__main__":
    run(main)
