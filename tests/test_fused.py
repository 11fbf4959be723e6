"""The fused kernels without a GPU: values in the interpreter, machine code, and what happens where they fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kvenv import fused

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton on this platform")


@needs_triton
def test_the_interpreter_computes_what_pytorch_does() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


STATISTICS, SCORES = {"SUMS": 5, "EXTREMES": True}, {"SUMS": 1, "EXTREMES": False}
KERNELS = [("attend_kernel", {}), ("reduce_kernel", STATISTICS), ("reduce_kernel", SCORES)]
CONFIGURATIONS = [
    *(("bf16", dim, queries) for dim in (64, 128) for queries in (1, 32, 256)),
    *(("fp32", dim, 256) for dim in (64, 128)),
    *(("bf16", 48, 256), ("bf16", 256, 256), ("fp16", 128, 256)),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compiled(kernel: str, dtype: str, head_dim: int, queries: int, capability: int, fixed: dict[str, Any]) -> Any:
    """Compile a kernel as :func:`kvenv.fused.attend` would on a device of a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvenv import kernels

    function = getattr(kernels, kernel)
    fixed = fused.configuration(DTYPES[dtype], head_dim, queries) | fixed
    if queries == 1:  # Triton compiles for a size of 1 anew
        fixed |= dict.fromkeys({"heads", "groups", "queries", "members"} & set(function.arg_names), 1)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    types = dict.fromkeys(function.arg_names, "i32") | {"scaling": "fp32"} | dict.fromkeys(fixed, "constexpr")
    types |= dict.fromkeys({"reach", "held", "weights", "highest", "mass", "received"} & set(types), "*fp32")
    types |= dict.fromkeys({"query", "key", "value", "output"} & set(types), f"*{dtype}")
    # What Triton finds out about real arguments: tensors, and the strides of their slots, are aligned.
    aligned = [i for i, name in enumerate(types) if types[name][0] == "*" or name.startswith(("key_", "value_"))]
    source = ASTSource(function, types, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_machine_code(result: Any, folder: Path) -> None:
    """Compare a compiled kernel with what every GPU since sm_80 has: 99 KiB of shared memory, enough registers."""
    from triton import knobs

    assert result.metadata.shared <= 99 * 1024
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spilled = int(usage.split("STACK:")[1].split()[0])
    assert spilled <= 64, f"more than 16 registers are spilled to memory: {usage}"


@needs_triton
@pytest.mark.parametrize(("kernel", "fixed"), KERNELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_hopper_gets_machine_code(
    kernel: str, fixed: dict[str, Any], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_machine_code(compiled(kernel, dtype, 128, 256, 90, fixed), tmp_path)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "head_dim", "queries"), CONFIGURATIONS)
def test_every_configuration_gets_machine_code(
    dtype: str, head_dim: int, queries: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, fixed in KERNELS:
        check_machine_code(compiled(kernel, dtype, head_dim, queries, capability, fixed), tmp_path)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged from here on; nothing is known of any device."""
    fused._works.cache_clear()
    caplog.set_level(logging.WARNING, logger="kvenv")
    yield caplog
    fused._works.cache_clear()


def test_what_the_kernels_are_not_for_is_not_tried(
    warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not fused.serves(torch.zeros(1, 1, 1, 1, 64))
    assert not fused._works(CPU, torch.float64, 64)
    assert not fused._works(CPU, torch.float32, 256)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not fused._works(CPU, torch.float32, 64)
    assert not warnings.records


@needs_triton
def test_where_the_kernels_cannot_run_it_is_said_once(warnings: pytest.LogCaptureFixture) -> None:
    # Triton raises for tensors of a CPU, as it does on a device that it has no compiler for.
    for _ in range(2):
        assert not fused._works(CPU, torch.bfloat16, 64)
    assert len(warnings.records) == 1
    assert "fused attention of torch.bfloat16 and 64 dimensions fails on cpu" in warnings.text


@pytest.mark.parametrize("wrong", ["output", "sums", "extremes", None])
def test_kernels_that_miscalculate_are_not_used(
    wrong: str | None, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*case: Any, **options: bool) -> fused.Attended:
        exact = fused.reference(*case, **options)
        return replace(exact, **{wrong: getattr(exact, wrong) * 1.01}) if wrong else exact

    monkeypatch.setattr(fused, "attend", attend)
    monkeypatch.setattr(fused, "find_spec", lambda name: "there")
    assert fused._works(CPU, torch.float32, 64) == (wrong is None)
    assert ("not close" in warnings.text) == (wrong is not None)
