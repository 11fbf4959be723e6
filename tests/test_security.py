"""Nothing that is loaded runs code or reaches beyond its directory."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import agents
import kvenv
from agents import hub
from agents.checkpoint import load_checkpoint
from experiments import record, train
from experiments.tables import _file_name
from kvenv.files import append_line, write_atomic
from kvenv.lock import LOCK, hold
from kvenv.models import TINY
from kvenv.registry import HUB_ID
from kvenv.store import INDEX, TraceStore

ROOT = Path(__file__).resolve().parent.parent

MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load",
    "np.load", "np.save", "np.savez", "numpy.load", "pd.read_pickle", "torch.hub.load",
}  # fmt: skip
KEYWORDS = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True)}
MODELS = {"AutoModelForCausalLM", "AutoModel"}


def offences(source: str) -> list[str]:
    """Return what a source text does that no file of ours may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {option.arg: option.value for option in node.keywords}
            found += [name] if name in CALLS else []
            found += [
                f"{name}({option}={value})"
                for option, value in KEYWORDS
                if isinstance(given := options.get(option), ast.Constant) and given.value is value
            ]
            if name.split(".")[0] in MODELS and name.endswith(".from_pretrained") and "use_safetensors" not in options:
                found.append(name)
    return found


@pytest.mark.parametrize("package", ["kvenv", "agents", "experiments"])
def test_no_file_of_ours_runs_what_it_loads(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    found = {str(path.relative_to(ROOT)): offences(path.read_text(encoding="utf-8")) for path in files}
    assert {path: told for path, told in found.items() if told} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "exec('1')",
        "import yaml\nyaml.safe_load('x')", "np.load('x')", "subprocess.run('ls', shell=True)", "os.system('ls')",
        "AutoConfig.from_pretrained('x', trust_remote_code=True)", "AutoModelForCausalLM.from_pretrained('x')",
        "f('x', allow_pickle=True)", "f('x', weights_only=False)",
    ],
)  # fmt: skip
def test_the_walk_finds_what_it_must(source: str) -> None:
    assert offences(source)
    assert not offences("model.eval()\nf('x', trust_remote_code=given)\nsubprocess.run(['ls'])")


# Models


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the bundled LLM's directory."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_pickled_weights_are_not_opened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        kvenv.load_model(str(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../elsewhere.safetensors", "/elsewhere.safetensors", 7])
def test_an_index_names_safetensors_beside_it_only(model: Path, file: Any, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    shutil.copy(tmp_path / "elsewhere.safetensors", model / "other.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"names '{file}', and only safetensors beside it are read"):
        kvenv.load_model(str(model))
    index["weight_map"] = dict.fromkeys(weights, "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert kvenv.load_model(str(model)).model.num_parameters() > 0


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../elsewhere.safetensors"])
def test_a_configuration_names_no_other_index(model: Path, file: str, tmp_path: Path) -> None:
    weights, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    shutil.copy(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "my.safetensors.index.json"}))
    (model / "my.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, file)}))
    with pytest.raises(ValueError, match=rf"my\.safetensors\.index\.json names '{file}', and only safetensors"):
        kvenv.load_model(str(model))


@pytest.mark.parametrize("file", ["adapter_model.bin", "../model/model.safetensors", 7])
def test_a_configuration_names_safetensors_beside_it_only(model: Path, file: Any) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "adapter_model.bin")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": file}))
    with pytest.raises(ValueError, match=rf"config\.json names '{file}', and only safetensors beside it are read"):
        kvenv.load_model(str(model))
    (model / "model.safetensors").rename(model / "mine.safetensors")
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    assert kvenv.load_model(str(model)).model.num_parameters() > 0


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_told(model: Path, index: str) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        kvenv.load_model(str(model))


def test_a_model_directory_brings_no_code(model: Path, tmp_path: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for file in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        write_atomic(model / file, code)
    for name, classes in (
        ("config.json", {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.T", None]}),
    ):
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | {"auto_map": classes}))
    loaded = kvenv.load_model(str(model))  # the architecture is a known one, so that its code isn't asked for
    assert type(loaded.model).__module__.startswith("transformers.")
    config = json.loads((model / "config.json").read_text())
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        kvenv.load_model(str(other))
    assert not (tmp_path / "ran").exists()


def test_a_configuration_names_no_kernel(model: Path) -> None:
    """Transformers fetches compiled code from the hub for it where its package for that is installed."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": "evil/kernel"}))
    assert kvenv.load_model(str(model)).model.config._attn_implementation == "kvenv"


# Names that are paths

CLIMBING = [
    "../x",
    "..",
    "a/..",
    "../a/b",
    "a/../b",
    "/a/b",
    "~/a",
    "a/b/c",
    "a\\b",
    "a/",
    "/",
    "",
    "./a",
    "a/.b",
    "-/a",
]


@pytest.mark.parametrize("name", CLIMBING)
def test_hub_ids_do_not_climb(name: str) -> None:
    assert not HUB_ID.fullmatch(name)
    for refuse in (agents.make, hub.find, kvenv.load_model):
        with pytest.raises((ValueError, FileNotFoundError)):
            refuse(name)
    assert HUB_ID.fullmatch("owner/name-1.0")


def test_a_policy_names_a_registered_type_and_no_file(tmp_path: Path) -> None:
    saved = agents.make("imitation-tiny")
    saved.save_pretrained(tmp_path / "policy")  # type: ignore[attr-defined]
    path = tmp_path / "policy" / hub.DESCRIPTION
    description = json.loads(path.read_text())
    for kind in ("agents.scorer.ScorerPolicy.read", "../scorer", "os:system", "scorer\0"):
        path.write_text(json.dumps(description | {"type": kind}))
        with pytest.raises(ValueError, match="unknown policy type"):
            agents.make(tmp_path / "policy")
    path.write_text(json.dumps(description | {"features": "../features"}))
    with pytest.raises(ValueError, match="unknown features"):
        agents.make(tmp_path / "policy")
    # What it says of files is never opened: the LLM's name, and those of its training.
    named = description["model"] | {"name": "/nowhere/else"}
    path.write_text(json.dumps(description | {"model": named, "weights": "/etc/passwd", "training": {"init": "/etc"}}))
    assert agents.make(tmp_path / "policy").name == saved.name


@pytest.mark.parametrize(
    "file", ["../shard-00000.safetensors", "/shard-00000.safetensors", "index.json", "a/b", "..", ""]
)
def test_a_store_names_shards_beside_it_only(file: str, tmp_path: Path) -> None:
    record.main(["--out", str(tmp_path), "--traces", "recall", "--num-traces", "1", "--trace-length", "96"])
    index = json.loads((tmp_path / INDEX).read_text())
    index["shards"][0]["file"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"only shard-NNNNN\.safetensors beside it is read"):
        TraceStore(tmp_path)


def test_a_run_is_gone_on_with_where_it_is(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    small = "imitation --num-traces 2 --trace-length 96 --budgets 32 --hidden 4 --eval-every 0 --traces recall".split()
    train.main([*small, "--updates", "1", "--out", str(here)])
    config = json.loads((here / "config.json").read_text())
    config["arguments"]["run"]["out"] = str(elsewhere)
    del config["seal"]  # of what was written, and whoever wants to can make another
    (here / "config.json").write_text(json.dumps(config))
    train.main(["--resume", str(here), "--updates", "2"])
    assert load_checkpoint(here / "checkpoints").values["done"] == 2
    assert not elsewhere.exists()


@pytest.mark.parametrize("name", [*CLIMBING, "a:b", "\0", "...", "con\n"])
def test_what_a_results_file_names_becomes_one_directory(name: str, tmp_path: Path) -> None:
    inside = (tmp_path / _file_name(name)).resolve()
    assert inside.parent == tmp_path.resolve()


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").symlink_to(target)
    write_atomic(tmp_path / "out" / "results.json", "{}")
    assert target.read_text() == "precious"
    assert (tmp_path / "out" / "results.json").read_text() == "{}"


@pytest.mark.parametrize("write", [lambda link: append_line(link, {}), lambda link: hold(link.parent).__enter__()])
def test_where_lines_or_locks_are_written_a_link_is_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "out" / LOCK
    target.write_text("precious, and without a newline")
    link.parent.mkdir()
    link.symlink_to(target)
    with pytest.raises(OSError, match=re.escape(str(link))):
        write(link)
    assert target.read_text() == "precious, and without a newline"
    assert link.is_symlink()
