"""A crew on Ray: answers in the order of the items, whoever dies meanwhile, and errors as the workers raise them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import crew as module
from experiments import evaluate, record, train
from experiments.crew import Crew, CrewArgs, Host, hired

ray: Any = pytest.importorskip("ray")

LOCAL = CrewArgs("local", workers=2)


class Clerk:
    """A worker that says who it is, or does as it is told."""

    def __init__(self, office: Path) -> None:
        self.office = office

    def who(self, greeting: str, item: int) -> tuple[str, int, int]:
        """Answer; even items take longer, so that answers come out of turn."""
        time.sleep(0.1 * (item % 2 == 0))
        return greeting, item, os.getpid()

    def die(self, once: bool, item: int) -> int:
        """Die of item 3, for the first time or always."""
        note = self.office / f"died of {item}"
        if item == 3 and not (once and note.exists()):
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * item

    def where(self, *_: object) -> str:
        """Return where it works."""
        return os.getcwd()

    def refuse(self, _: None, item: int) -> int:
        """Refuse item 2."""
        if item == 2:
            raise ValueError(f"item {item} is impossible")
        return item


class Newcomer(Clerk):
    """One that dies of its first starts, so many of them."""

    def __init__(self, office: Path, deaths: int) -> None:
        super().__init__(office)
        if len(list(office.glob("start *"))) < deaths:
            (office / f"start {os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Start Ray once for the tests here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    """Return a crew of two clerks."""
    with hired(LOCAL, Clerk, (tmp_path,), "cpu") as made:
        assert made is not None
        yield made


def test_answers_come_in_order_and_items_go_to_workers_by_their_numbers(crew: Crew) -> None:
    answers = list(crew.map("who", "hello", range(9)))
    assert [(greeting, item) for greeting, item, _ in answers] == [("hello", item) for item in range(9)]
    even, odd = ({pid for _, item, pid in answers if item % 2 == rest} for rest in (0, 1))
    assert len(even) == len(odd) == 1
    assert even != odd
    assert os.getpid() not in even | odd
    assert list(crew.map("who", "hello", [])) == []


def test_who_dies_is_replaced_and_what_it_was_doing_done_again(crew: Crew) -> None:
    before = {pid for *_, pid in crew.map("who", "", range(2))}
    with pytest.warns(UserWarning, match="worker 1 died and was replaced: .*died"):
        assert list(crew.map("die", True, range(8))) == [10 * item for item in range(8)]
    after = {pid for *_, pid in crew.map("who", "", range(2))}
    assert len(after - before) == 1
    assert len(crew) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:worker . died")
def test_what_kills_every_worker_is_given_up(crew: Crew) -> None:
    with pytest.raises(ChildProcessError, match=r"^3 workers died of die 3, .*take fewer at once"):
        list(crew.map("die", False, range(8)))


@pytest.mark.slow
def test_without_room_for_another_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hired(LOCAL, Clerk, (tmp_path,), "cpu") as made:
        assert made is not None
        monkeypatch.setattr(module, "PATIENCE", 1.0)
        # A worker of three cores finds no place here.
        made._host = ray.remote(Host).options(num_cpus=3)
        with pytest.warns(UserWarning, match=r"worker 1 died, no other came up within 1 s, 1 go on"):
            assert list(made.map("die", True, range(8))) == [10 * item for item in range(8)]
        assert len(made) == 1


@pytest.mark.slow
def test_who_dies_of_the_start_is_replaced_until_it_is_given_up(tmp_path: Path) -> None:
    with hired(CrewArgs("local", workers=1), Newcomer, (tmp_path, 1), "cpu") as made:
        assert made is not None
        assert [item for _, item, _ in made.map("who", "", range(3))] == [0, 1, 2]
    with pytest.raises(ChildProcessError, match=r"^3 workers died of their start, "):
        Crew(CrewArgs("local", workers=1), Newcomer, (tmp_path, 99))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:worker 1 died, no other came up within 1 s")
def test_who_found_no_place_joins_when_there_is_one(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    # It waits for a core, and gets the dead worker's before the new one.
    guest = ray.remote(Host).options(num_cpus=1).remote()
    seated = guest.__ray_ready__.remote()
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    assert list(crew.map("die", True, range(8))) == [10 * item for item in range(8)]
    assert len(crew) == 1
    ray.get(seated)
    ray.kill(guest)

    def work_until_it_is_there() -> None:
        deadline = time.monotonic() + 240  # a busy machine may take a minute to import PyTorch
        while len(crew) < 2 and time.monotonic() < deadline:
            assert [item for _, item, _ in crew.map("who", "", range(2))] == [0, 1]

    with pytest.warns(UserWarning, match="another worker came up, 2 go on"):
        work_until_it_is_there()
    assert len({pid for *_, pid in crew.map("who", "", range(2))}) == 2


def test_workers_find_files_where_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with hired(CrewArgs("local", workers=1), Clerk, (tmp_path,), "cpu") as made:
        assert made is not None
        assert list(made.map("where", None, [0])) == [str(tmp_path)]


@pytest.mark.parametrize("port", ["1", "99999"])
def test_where_nobody_listens_is_said_at_once(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would ask for minutes"))
    with pytest.raises(ValueError, match=rf"--ray 127\.0\.0\.1:{port}: no cluster answers there"):
        CrewArgs(f"127.0.0.1:{port}").connect()


def test_another_version_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match=r"^--ray auto: Version mismatch: .*Ray: 2\.1 Python: 3\.9"):
        CrewArgs("auto").connect()


def test_what_a_worker_raises_is_raised(crew: Crew) -> None:
    with pytest.raises(ValueError, match=r"^item 2 is impossible$") as raised:
        list(crew.map("refuse", None, range(4)))
    assert raised.type is ValueError
    assert next(crew.map("who", "", [0]))[1] == 0, "the crew goes on"


@pytest.mark.slow
def test_what_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "PATIENCE", 2.0)
        with pytest.raises(
            ValueError, match=r"--workers 3 of 1 CPUs and 0 GPUs: within 2 s . were up; the cluster has 2"
        ):
            Crew(CrewArgs("local", workers=3), Clerk, (tmp_path,))
    with pytest.raises(TypeError, match="Clerk"):
        Crew(LOCAL, Clerk, ())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (CrewArgs("local", workers=0), "--workers 0 is impossible"),
        (CrewArgs("local", worker_cpus=0), "--worker-cpus 0 is impossible"),
        (CrewArgs("local", worker_gpus=-1.0), r"--worker-gpus -1\.0 is impossible"),
    ],
)
def test_numbers_that_cannot_be_are_refused(args: CrewArgs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args.connect()


def test_workers_ask_for_gpus_where_they_compute_on_one() -> None:
    assert CrewArgs().gpus("cpu") == 0
    assert CrewArgs().gpus("cuda") == CrewArgs().gpus("cuda:0") == 1
    assert CrewArgs(worker_gpus=0.5).gpus("cuda") == 0.5


@pytest.mark.parametrize("command", [train, record, evaluate])
def test_without_ray_the_commands_say_what_to_install(command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--ray", "local", "--out", str(tmp_path / "out")]
    with pytest.raises(ImportError, match=r"pip install 'kvenv\[ray\]'"):
        command.main(["grpo", *arguments] if command is train else [*arguments, "--trace-length", "512"])
    assert not (tmp_path / "out").exists()
