"""README.md and docs/benchmarks.md say what the committed CSVs say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the pages are templates")

from benchmarks import report


@pytest.mark.parametrize("page", report.PAGES)
def test_pages_are_what_the_csvs_make_of_the_templates(page: str) -> None:
    assert report.PAGES[page].read_text() == report.rendered(page), (
        "edit benchmarks/templates, and run python -m benchmarks.report"
    )


@pytest.mark.parametrize("page", report.PAGES)
def test_templates_hold_no_figure_of_their_own(page: str) -> None:
    template = (report.TEMPLATES / page).read_text()
    assert report.measured_in(template) == []
    for figure in ("12.3 ms", "11 times as fast", "97.5 %", "1.5 GiB", "74×", "6 min", "5.3e-05"):
        assert report.measured_in(f"{template}\nIt takes {figure}.") != []


def test_a_changed_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the page, and in the file that it comes from."""
    assert report.differing() == []
    results = report.Results(report.RESULTS)
    case = {"case": report.SDXL, "implementation": "ColorGuidance, quality"}
    seconds = results.seconds("color_guidance_h100", **case)
    text = report.PAGES["README.md"].read_text()
    assert f" {seconds} " in text
    changed = tmp_path / "README.md"
    changed.write_text(text.replace(f" {seconds} ", " 1.23 ", 1))
    with monkeypatch.context() as patched:
        patched.setitem(report.PAGES, "README.md", changed)
        assert report.differing() == ["README.md"]
        with pytest.raises(SystemExit, match=r"not what the CSVs say: README\.md"):
            report.main(["--check"])
    folder = tmp_path / "results"
    shutil.copytree(report.RESULTS, folder)
    file = folder / "color_guidance_h100.csv"
    taken = results.row("color_guidance_h100", **case)["milliseconds"]
    file.write_text(file.read_text().replace(taken, "12345.6"))
    monkeypatch.setattr(report, "RESULTS", folder)
    assert report.differing() == ["README.md", "benchmarks.md"]


def test_exactly_one_row_is_meant(tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_text(
        "case,implementation,dtype,milliseconds,check\n"
        "a,ours,float32,2.0,peak 3.5 GiB\na,ours,float16,1,\na,theirs,float32,8,\nb,ours,x,4,\n"
    )
    results = report.Results(tmp_path)
    assert results.times("times", "a", "theirs", "ours", "float32") == "4.00"
    assert results.ms("times", "b", "ours") == "4.00"
    assert results.found("times", r"peak ([\d.]+)", case="a", dtype="float32", check="peak 3.5 GiB")
    for case in ("a", "c"):
        with pytest.raises(report.NoFigureError, match=f"rows with .*'{case}'"):
            results.ms("times", case, "ours")
    with pytest.raises(report.NoFigureError, match="peak"):
        results.found("times", "peak", case="b")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.01234, "0.0123"), (4.0, "4.00"), (79.84, "79.8"), (669.1, "669"), (10812.3, "10,812")],
)
def test_three_digits(number: float, text: str) -> None:
    assert report.significant(number) == text


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    report.draw(tmp_path / "chart")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "chart.svg").read_text()


def test_curves_of_the_committed_files_are_drawn() -> None:
    results = report.Results(report.RESULTS)
    curved = {name: charts for name in results.files() if (charts := results.curves(name))}
    assert "sliced_wasserstein-float32" in curved["quick_cpu"]
    for name, charts in curved.items():
        for chart in charts:
            assert (report.CURVES / name / f"{chart}.png").exists()
