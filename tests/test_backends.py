from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import sdcore
from sdcore import backends
from sdcore.ops import sliced_wasserstein

X, Y = torch.rand(8, 3), torch.rand(8, 3)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process, with what this one was given and ``environment``."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_default_on_a_cpu_is_cpp() -> None:
    assert backends.unavailable("cpp") is None, "the C++ module should be built where tests run"
    assert backends.default("sliced_wasserstein_binned", "cpu") == "cpp"


def test_forcing_selects_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("reference", "cpp"):
        found = backends._implementations["sliced_wasserstein_exact"][name]
        spy = backends.Implementation(
            lambda *args, name=name, run=found.run: (taken.append(name), run(*args))[1],
            found.refuses,
        )
        monkeypatch.setitem(backends._implementations["sliced_wasserstein_exact"], name, spy)
    sliced_wasserstein(X, Y)
    with sdcore.backend("reference"):
        sliced_wasserstein(X, Y)
        with sdcore.backend("cpp"):
            sliced_wasserstein(X, Y)
        sliced_wasserstein(X, Y)
    with pytest.raises(ZeroDivisionError), sdcore.backend("reference"):
        raise ZeroDivisionError
    sliced_wasserstein(X, Y)
    assert taken == ["cpp", "reference", "cpp", "reference", "cpp"]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of reference.*'cudnn'"):
        sdcore.backend("cudnn").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_backend_says_why() -> None:
    with (
        pytest.raises(
            backends.BackendError, match=r"'cuda' cannot run here: .*(GPU|nvcc|SDCORE_BUILD_CUDA=0)"
        ),
        sdcore.backend("cuda"),
    ):
        raise AssertionError("entered")


def test_backend_without_the_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(backends._implementations["sliced_wasserstein_exact"], "cpp")
    with (
        pytest.raises(backends.BackendError, match="exact has no cpp implementation"),
        sdcore.backend("cpp"),
    ):
        sliced_wasserstein(X, Y)


def test_refusal_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = backends._implementations["sliced_wasserstein_exact"]["cpp"]
    refusing = backends.Implementation(found.run, lambda *args: "it is Sunday")
    monkeypatch.setitem(backends._implementations["sliced_wasserstein_exact"], "cpp", refusing)
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level(logging.WARNING, "sdcore"):
        sliced_wasserstein(X, Y)
        sliced_wasserstein(X, Y)
    assert [r.getMessage() for r in caplog.records] == [
        "sliced_wasserstein_exact: not using the cpp backend: it is Sunday"
    ]
    with sdcore.backend("cpp"), pytest.raises(backends.BackendError, match="it is Sunday"):
        sliced_wasserstein(X, Y)


def test_environment_variable() -> None:
    code = """
        import torch, sdcore
        from sdcore.ops import sliced_wasserstein
        sliced_wasserstein(torch.rand(4, 3), torch.rand(4, 3))
    """
    assert run_python(code, SDCORE_BACKEND="reference").returncode == 0
    wrong = run_python(code, SDCORE_BACKEND="tpu")
    assert wrong.returncode != 0 and "backend must be one of" in wrong.stderr
    missing = run_python(code, SDCORE_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert missing.returncode != 0 and "'triton' was asked for and cannot run" in missing.stderr


def test_environment_variable_with_a_wrong_name_does_not_break_import() -> None:
    assert run_python("import sdcore", SDCORE_BACKEND="tpu").returncode == 0


WITHOUT_COMPILED_MODULES = """
    import importlib.util
    hidden, real = ("sdcore._cpu", "sdcore._cuda"), importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name in hidden else real(name)
    import json, torch, sdcore
    from sdcore import backends
    from sdcore.ops import sliced_wasserstein
    x = torch.rand(9, 3, requires_grad=True)
    for method in ("exact", "binned"):
        sliced_wasserstein(x, torch.rand(8, 3), method=method).backward()
    print(json.dumps([backends.default("sliced_wasserstein_binned", "cpu"),
                      backends.unavailable("cpp"), backends.unavailable("cuda")]))
"""


def test_works_without_compiled_modules() -> None:
    result = run_python(WITHOUT_COMPILED_MODULES)
    assert result.returncode == 0, result.stderr
    default, cpp, cuda = json.loads(result.stdout)
    assert default == "reference" and cpp and cuda
    assert "not using the cpp backend" in result.stderr


def test_the_build_tells_why_a_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        backends, "build_report", lambda: {"cuda": {"built": False, "reason": "no nvcc there"}}
    )
    assert backends._load.__wrapped__("_cuda") == (None, "no nvcc there")
    assert backends._load.__wrapped__("_cpu") == (None, "sdcore._cpu is not built")


def test_a_broken_module_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that is no library, as after a copy that broke off."""
    file = tmp_path / "_cpu.so"
    file.write_bytes(b"\x7fELF and no more")
    loader = importlib.machinery.ExtensionFileLoader("sdcore._cpu", str(file))
    spec = importlib.util.spec_from_file_location("sdcore._cpu", file, loader=loader)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(
        importlib, "import_module", lambda name: importlib.util.module_from_spec(spec)
    )
    module, reason = backends._load.__wrapped__("_cpu")
    assert module is None and reason.startswith("sdcore._cpu does not load: ")


def test_a_module_of_another_version_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cpu_module(), "version", "0.0.9")
    _, reason = backends._load.__wrapped__("_cpu")
    assert reason == f"sdcore._cpu was built from sdcore 0.0.9, this is {sdcore.__version__}"


@pytest.mark.parametrize(
    "built, capability, expected",
    [
        ([80, 90], (9, 0), None),
        ([80], (8, 6), None),
        ([86], (8, 0), "compiled for sm_86, and this GPU is sm_80"),
        ([80], (7, 0), "compiled for sm_80, and this GPU is sm_70"),
        ([80, 90], (12, 0), None),
        ([80, 120], (9, 0), "compiled for sm_80, sm_120, and this GPU is sm_90"),
    ],
)
def test_which_gpus_machine_code_runs_on(
    monkeypatch: pytest.MonkeyPatch, built: list[int], capability: tuple[int, int], expected: str
) -> None:
    module = type("Module", (), {"architectures": built})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(backends, "cuda_module", lambda: module)
    assert backends._no_gpu_for_cuda() == expected


def test_importing_is_cheap() -> None:
    """Nothing but torch is imported, and it takes less than half as long again as torch."""
    code = """
        import json, sys, time
        start = time.perf_counter(); import torch; middle = time.perf_counter()
        before = set(sys.modules)
        import sdcore; end = time.perf_counter()
        heavy = {"diffusers", "transformers", "triton", "matplotlib", "ot", "sdcore._cpu"}
        found = sorted(heavy & (set(sys.modules) - before))
        print(json.dumps([end - start, middle - start, found]))
    """
    ratios = []
    for _ in range(3):
        both, alone, heavy = json.loads(run_python(code).stdout)
        assert heavy == []
        ratios.append(both / alone)
    assert min(ratios) < 1.5
