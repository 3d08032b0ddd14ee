from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sdcore
from sdcore import backends, cli, images, info

SMALL = ("--size", "64", "--steps", "40", "--device", "cpu")
QUICK = ("--size", "32", "--steps", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str | Path) -> int:
    """The exit code; argparse exits by itself."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        return left.code


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and measurements that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "POINTS", 400)
    return tmp_path


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("the error comes after the long work")

    monkeypatch.setattr(cli, "recolor", work)


def test_recolor_writes_image_and_figure_and_tells_distances(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recolor", *SMALL) == 0
    assert {file.name for file in workplace.iterdir()} == {"recolored.png", "figure.png"}
    assert Image.open("recolored.png").size == (64, 43)
    assert min(Image.open("figure.png").size) > 1000

    out, err = capsys.readouterr()
    told = {}
    for line in out.splitlines():
        if line.split()[:1] in (["before"], ["after"], ["floor"]):
            name, *values = line.split()
            told[name] = [float(value) for value in values]
    assert told["after"][2] < told["before"][2] / 100
    for metric in (0, 1):
        assert told["after"][metric] < 1.6 * told["floor"][metric]
        assert told["before"][metric] > 5 * told["floor"][metric]
    # By Jensen's inequality, W1 is at most W2, and the sliced distance at most W1 (up to sampling).
    assert all(w1 <= w2 for w1, w2, _ in told.values())
    assert told["before"][2] < told["before"][0]
    assert "Recoloring" in err and "40/40" in err


def test_measures_are_the_named_distances() -> None:
    """Between images of one color each, every distance is known."""
    x, y = torch.zeros(8, 8, 3), torch.zeros(9, 7, 3)
    y[..., 0], y[..., 1] = 0.3, 0.4
    found = cli._measure(x, y, y[:8, :7], quiet=True)
    assert found["before"].w1 == pytest.approx(0.5)
    assert found["before"].w2 == pytest.approx(0.5)
    # The mean of |cos| over the sphere is 1/2; 96 directions come near.
    assert found["before"].sliced_w1 == pytest.approx(0.25, abs=0.02)
    for row in (found["after"], found["floor"]):
        assert (row.w1, row.w2, row.sliced_w1) == pytest.approx((0, 0, 0), abs=1e-7)

    # Half the pixels at a distance of 1, half in place: W1 = 1/2 and W2 = sqrt(1/2).
    y = torch.zeros(8, 8, 3)
    y[:4, :, 2] = 1
    w1, w2 = cli._exact_w1_w2(x.reshape(-1, 3).double(), y.reshape(-1, 3).double())
    assert (w1, w2) == pytest.approx((0.5, 0.5**0.5))


def test_recolor_of_files_is_repeatable_and_quiet(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images.write(images.fit(images.read(images.find("coffee")), 40), Path("source.png"))
    arguments = ("recolor", "source.png", "flower", *QUICK, "--no-figure", "--quiet")
    assert run(*arguments, "--output", "one.png") == 0
    assert run(*arguments, "--output", "two.png") == 0
    assert run(*arguments, "--output", "three.png", "--seed", "1") == 0
    assert capsys.readouterr() == ("", "")
    one, two, three = (Path(f"{name}.png").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    assert not Path("figure.png").exists()


def test_quiet_without_figure_needs_neither_pot_nor_matplotlib(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ot", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run("recolor", *QUICK, "--quiet", "--no-figure") == 0


def test_one_pixel_source(workplace: Path) -> None:
    Image.new("RGB", (1, 1), "red").save("dot.png")
    assert run("recolor", "dot.png", "rocket", *QUICK) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "'nowhere.png' is neither a file nor a sample photo"),
        (["coffee", "nowhere"], "'nowhere' is neither a file.*photos: astronaut"),
        (["."], "is a directory"),
        (["text.png"], "text.png is not an image that Pillow can read"),
        (["coffee", "dot.png"], "REFERENCE must have at least 2 pixels"),
        (["--size", "0"], "--size: must be at least 1; got 0"),
        (["--size", "big"], "--size: must be a whole number; got 'big'"),
        (["--steps", "0"], "--steps: must be at least 1; got 0"),
        (["--directions", "-3"], "--directions: must be at least 1; got -3"),
        (["--seed", "-1"], "--seed: must be 0 to"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--output", "no/such/folder/a.png"], "can't write no/such/folder/a.png"),
        (["--output", "a.txt"], "a.txt must end in one of"),
        (["--output", "dot.png", "dot.png"], "would replace an image that is read"),
        (["--figure", "no/such/folder/a.png"], "can't write no/such/folder/a.png"),
        (["--figure", "a.xyz"], "a.xyz must end in"),
        (["--figure", "./recolored.png"], "would replace an image"),
        (["--figure", "a.png", "--no-figure"], "not allowed with argument"),
        (["--sharpen"], "unrecognized arguments: --sharpen"),
    ],
)
def test_errors_take_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    workplace: Path,
    no_work: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("text.png").write_text("no image")
    Image.new("RGB", (1, 1), "red").save("dot.png")
    before = {file: file.read_bytes() for file in workplace.iterdir()}
    assert run("recolor", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdcore") and err.count("\n") == 1
    assert re.search(message, err)
    assert {file: file.read_bytes() for file in workplace.iterdir()} == before


@pytest.mark.parametrize("module", ["PIL", "ot", "matplotlib.figure", "tqdm"])
def test_missing_package_names_the_extra(
    module: str,
    workplace: Path,
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run("recolor") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'sdcore[cli]'" in err
    assert list(workplace.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(workplace: Path, no_work: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recolor", "--device", "cuda") == 2
    assert "PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["triton", "cuda", "nonsense"])
def test_backend_that_cannot_run_it(
    name: str,
    workplace: Path,
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backends, "_forced", name)
    assert run("recolor", "--device", "cpu") == 2
    err = capsys.readouterr().err
    assert name in err and err.count("\n") == 1
    assert list(workplace.iterdir()) == []


def test_interrupt(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "recolor", interrupted)
    assert run("recolor", *QUICK, "--quiet") == 130
    assert capsys.readouterr().err == "sdcore recolor: interrupted\n"
    assert list(workplace.iterdir()) == []


def test_picture_is_safe_when_the_figure_fails(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run("recolor", *QUICK) == 2
    assert "can't write figure.png: No space left" in capsys.readouterr().err
    assert Image.open("recolored.png").size == (32, 22)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert capsys.readouterr().err.startswith("sdcore: error: the following arguments")


def test_as_a_module() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "sdcore", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (told.returncode, told.stdout) == (0, f"sdcore {sdcore.__version__}\n")


def told_info(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert run("info") == 0
    return facts, capsys.readouterr().out


def test_info_lists_every_op_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    facts, text = told_info(capsys)
    assert facts["versions"]["sdcore"] == sdcore.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert len(facts["devices"]["gpus"]) == torch.cuda.device_count()
    assert facts["ops"].keys() == backends.table().keys()
    for op, found in facts["ops"].items():
        assert tuple(found["implementations"]) == backends.NAMES
        assert found["default"]["cpu"] == backends.default(op, "cpu")
        for row in found["implementations"].values():
            assert row["available"] == (row["reason"] is None)
            assert row["available"] or row["reason"]
        assert op.removesuffix("_backward") in text
    for found in facts["backends"].values():
        assert found["available"] or found["reason"] in text


@pytest.fixture
def fresh_backends() -> Iterator[Callable[[], None]]:
    """Forgets what was found of the modules: call it after breaking them; again at the end."""

    def forget() -> None:
        backends.unavailable.cache_clear()
        backends._load.cache_clear()

    yield forget
    forget()


def test_info_with_a_broken_module(
    fresh_backends: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real_spec, real_import = importlib.util.find_spec, importlib.import_module

    def spec(name: str) -> Any:
        return object() if name == "sdcore._cpu" else real_spec(name)

    def load(name: str, *args: Any) -> Any:
        if name == "sdcore._cpu":
            raise ImportError("undefined symbol: _ZN6sdcore")
        return real_import(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(importlib, "import_module", load)
    fresh_backends()
    facts, text = told_info(capsys)
    assert facts["ops"]["sliced_wasserstein_exact"]["default"]["cpu"] == "reference"
    assert "sdcore._cpu does not load: undefined symbol: _ZN6sdcore" in text


def test_info_with_a_missing_module(
    fresh_backends: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = {
        "cpu": {"built": False, "reason": "a C++ compiler was not found"},
        "cuda": {"built": True, "nvcc": "13.0", "architectures": [80, 90]},
    }
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sdcore._cpu" else real(name)
    )
    monkeypatch.setattr(backends, "build_report", lambda: report)
    fresh_backends()
    facts, text = told_info(capsys)
    assert facts["modules"] == report
    assert not facts["backends"]["cpp"]["available"]
    assert "sdcore._cpu   not built: a C++ compiler was not found" in text
    assert "sdcore._cuda  built: nvcc 13.0, architectures 80 90" in text


@pytest.mark.parametrize("name", ["unavailable", "table", "build_report"])
def test_info_whatever_is_broken(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> None:
        raise AttributeError("module has no attribute 'version'")

    monkeypatch.setattr(backends, name, broken)
    _, text = told_info(capsys)
    assert "AttributeError: module has no attribute 'version'" in text


def test_info_tells_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = info.collect()
    facts["devices"]["gpus"] = [
        {"name": "H200", "compute_capability": "9.0", "memory_bytes": 150 * 2**30}
    ]
    assert "cuda:0  H200, compute capability 9.0, 150.0 GiB" in info.describe(facts)


def test_info_tells_of_a_forced_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDCORE_BACKEND", "reference")
    facts, text = told_info(capsys)
    assert facts["forced_backend"] == "reference"
    assert "SDCORE_BACKEND=reference is set" in text
