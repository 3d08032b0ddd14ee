"""The build: what setup.py decides, and whether its report is true of what it built."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sdcore
from sdcore.backends import build_report

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"cpu": "sdcore._cpu", "cuda": "sdcore._cuda"}
needs_cuda_module = pytest.mark.skipif(
    not build_report().get("cuda", {}).get("built"), reason="sdcore._cuda is not built"
)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module, its functions at hand and setup() not called."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("sdcore_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value, wish", [(None, "auto"), ("", "auto"), ("0", "0"), ("1", "1")])
def test_cuda_wish(build, value, wish):
    assert build.cuda_wish({} if value is None else {"SDCORE_BUILD_CUDA": value}) == wish


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", " 1"])
def test_cuda_wish_rejects(build, value):
    with pytest.raises(ValueError, match=f"SDCORE_BUILD_CUDA must be .*{value}"):
        build.cuda_wish({"SDCORE_BUILD_CUDA": value})


@pytest.mark.parametrize(
    "value, archs",
    [("", []), ("80", [80]), ("90;80", [80, 90]), ("80, 90 120;80", [80, 90, 120])],
)
def test_asked_architectures(build, value, archs):
    assert build.asked_architectures({"SDCORE_CUDA_ARCHS": value}) == archs
    assert build.asked_architectures({}) == []


@pytest.mark.parametrize("value", ["sm_80", "8.0", "80;native", "8", "1200", "-80"])
def test_asked_architectures_rejects(build, value):
    with pytest.raises(ValueError, match="SDCORE_CUDA_ARCHS must be"):
        build.asked_architectures({"SDCORE_CUDA_ARCHS": value})


NVCC_12 = [50, 60, 70, 75, 80, 86, 87, 89, 90]
NVCC_13 = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]


@pytest.mark.parametrize(
    "asked, present, supported, archs",
    [
        ([], [], NVCC_13, [80, 86, 89, 90, 100, 120]),
        ([], [], NVCC_12, [80, 86, 89, 90]),
        ([], [90], NVCC_13, [90]),
        ([], [90, 86, 90], NVCC_13, [86, 90]),
        # Neither a GPU newer than nvcc nor one older: the list ends in PTX for the newer.
        ([], [100], NVCC_12, [80, 86, 89, 90]),
        ([], [70], NVCC_13, [80, 86, 89, 90, 100, 120]),
        ([75], [90], NVCC_13, [75]),
    ],
)
def test_choose_architectures(build, asked, present, supported, archs):
    assert build.choose_architectures(asked, present, supported) == archs


def test_choose_architectures_refuses(build):
    with pytest.raises(build.Unavailable, match="does not support 70"):
        build.choose_architectures([70, 80], [], NVCC_13)
    with pytest.raises(build.Unavailable, match="none of the architectures"):
        build.choose_architectures([], [], [50, 60])


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_job_count_rejects(build, value):
    with pytest.raises(ValueError, match="MAX_JOBS must be"):
        build.job_count({"MAX_JOBS": value})


def test_job_count(build):
    assert build.job_count({"MAX_JOBS": "3"}) == 3
    assert build.job_count({}) >= 1


def test_find_nvcc_order(build, tmp_path):
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch(mode=0o755)
    environ = {"CUDA_HOME": str(tmp_path / "none"), "PATH": str(tmp_path / "path" / "bin")}
    assert build.find_nvcc(environ) == f"{tmp_path}/path/bin/nvcc"
    environ["CUDA_PATH"] = str(tmp_path / "home")
    assert build.find_nvcc(environ) == f"{tmp_path}/home/bin/nvcc"


@pytest.mark.parametrize(
    "output, error",
    [
        ("[1/2] compile a.cpp\nFAILED: a.o\ng++ -c a.cpp\na.cpp:3:1: error: no x\n", "a.cpp:3:1"),
        ("a.cpp:1:10: fatal error: x.h: No such file\ncompilation terminated.", "a.cpp:1:10"),
        ("FAILED: a.o\nnvcc a.cu\na.cu(4): error: no y\n1 error detected", "a.cu(4): error"),
        ("ptxas info : fine\nptxas error   : Too much shared data\n", "ptxas error"),
        ("g++ -o m.so\n/usr/bin/ld: cannot find -lcudart_static", "/usr/bin/ld: cannot find"),
        ("Killed", "Killed"),
        ("", "it printed nothing"),
    ],
)
def test_first_error(build, output, error):
    assert build.first_error(output).startswith(error)


def test_a_compiler_is_tried(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(build.Unavailable, match=r"not found .*no-such-compiler"):
        build.find_compiler()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'broken: error: cannot compile' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unavailable, match="broken: error: cannot compile"):
        build.find_compiler()


def run_setup(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext, into a folder of its own."""
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "name, value",
    [("SDCORE_BUILD_CUDA", "yes"), ("SDCORE_CUDA_ARCHS", "hopper"), ("MAX_JOBS", "0")],
)
def test_bad_variables_are_errors(build, tmp_path, name, value):
    answer = run_setup(tmp_path, **{name: value})
    assert answer.returncode != 0
    assert f"{name} must be" in answer.stderr and value in answer.stderr
    assert "Traceback" not in answer.stderr


def test_cuda_that_is_demanded_and_missing_is_an_error(build, tmp_path):
    missing = str(tmp_path / "no-such-compiler")
    answer = run_setup(tmp_path, SDCORE_BUILD_CUDA="1", CXX=missing)
    assert answer.returncode != 0
    assert "SDCORE_BUILD_CUDA=1, but" in answer.stderr
    assert not list(tmp_path.rglob("_build.json"))


@pytest.mark.parametrize("kind", MODULES)
def test_report_agrees_with_what_is_there(kind):
    assert build_report(), "there is no report: install sdcore (pip install -e .)"
    report = build_report()[kind]
    there = importlib.util.find_spec(MODULES[kind]) is not None
    assert report["built"] is there
    if there:
        module = importlib.import_module(MODULES[kind])
        assert module.version == sdcore.__version__
        assert report["compiler"]
    else:
        assert report["reason"]


def test_modules_are_built_where_they_can_be(build):
    """A compile error leaves a module out and lets the installation go on; not so the tests."""
    try:
        build.find_compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    assert build_report().get("cpu", {}).get("built"), build_report()
    try:
        build.find_nvcc(os.environ)
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    if os.environ.get("SDCORE_BUILD_CUDA") == "0":
        pytest.skip("SDCORE_BUILD_CUDA=0")
    assert build_report()["cuda"]["built"], build_report()


def test_triton_kernels_are_installed_inside_sdcore():
    assert importlib.util.find_spec("sdcore.triton_kernels") is not None


@needs_cuda_module
def test_cuda_module_tells_its_architectures():
    from sdcore import _cuda

    assert _cuda.architectures == build_report()["cuda"]["architectures"]
    assert all(isinstance(arch, int) for arch in _cuda.architectures)


@needs_cuda_module
def test_cuda_module_works_without_a_gpu():
    """In a process that sees no GPU, so that it tests the same thing on every machine."""
    code = "from sdcore import _cuda; print(_cuda.devices())"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert answer.stdout.strip() == "[]", answer.stderr
