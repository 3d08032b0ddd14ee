"""The site: its examples run, its links lead somewhere, and nothing public is missing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as benchmarks
import sdcore
from sdcore import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
# What Sphinx would read, and Markdown shows as it is.
SPHINX = re.compile(r":(?:attr|class|func|math|meth|mod):|^\s*\.\. \w+|::\s*$", re.MULTILINE)


def code(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


@pytest.fixture(scope="module")
def pipe(tokens: Any) -> Any:
    """One for all pages: to make it takes longer than to run most of them."""
    from tests import pipelines

    return pipelines.small(tokens, steps=2)


@pytest.mark.parametrize("page", [page for page in PAGES if code(page)])
def test_code_runs(
    page: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of a page as one program, which is given a pipeline and a prompt."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"prompt": "a star"}
    if re.search(r"\bpipe\b", code(page)):
        names["pipe"] = request.getfixturevalue("pipe")
    elif "embedded" in code(page):
        pytest.importorskip("diffusers")
    given = type(names.get("pipe"))
    exec(compile(code(page), page, "exec"), names)
    assert type(names.get("pipe")) is given  # no example leaves a method on it


def test_a_method_of_your_own(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "steps", 4)
    names: dict[str, Any] = {"prompt": "a star", "pipe": pipe}

    def picture() -> Any:
        return pipe("a star", generator=torch.Generator().manual_seed(0)).images[0]

    plain = picture()
    exec(compile(code("methods.md"), "methods.md", "exec"), names)
    assert len(names["calm"].moves) == 2
    assert names["calmer"].size == plain.size
    assert names["calmer"].tobytes() != plain.tobytes()
    with sdcore.patch(pipe, names["Calm"](0.0)):
        assert picture().tobytes() == plain.tobytes()


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    parsers = {"sdcore": cli._parser(), "python -m benchmarks": benchmarks.parser()}
    for program, parser in parsers.items():
        for line in re.findall(rf"^{program} (.*)$", shell, re.MULTILINE):
            arguments = shlex.split(line, comments=True)
            if arguments[0] not in ("compare", "report"):  # programs of their own
                parser.parse_args(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Also where there is no MkDocs, which looks at their anchors as well."""
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            path = (DOCS / page).parent / target
            assert path.exists(), f"{page} links to {target}"
            assert DOCS in path.resolve().parents, f"{page} links out of the site, to {target}"


def test_each_page_is_in_the_navigation() -> None:
    assert sorted(navigation()) == PAGES


def test_everything_public_has_a_page() -> None:
    """An op, method or other name without one fails here, and so does a page of what is gone."""
    ops = {f"sdcore.ops.{name}.{name}" for name in sdcore.ops.__all__}
    others = {f"sdcore.{name}" for name in sdcore.__all__} - {"sdcore.__version__", "sdcore.ops"}
    shown = [
        name
        for page in navigation()
        for name in re.findall(r"^::: (\S+)$", (DOCS / page).read_text(), re.MULTILINE)
    ]
    assert len(shown) == len(set(shown))
    assert set(shown) >= ops | others
    assert {name for name in shown if name.startswith("sdcore.ops.")} == ops
    methods = (DOCS / "api" / "methods" / "index.md").read_text()
    for name in sdcore.__all__:
        one = getattr(sdcore, name)
        if isinstance(one, type) and issubclass(one, sdcore.Method) and one is not sdcore.Method:
            assert f"| [`{name}`](" in methods
    overview = (DOCS / "api" / "ops" / "index.md").read_text()
    assert all(f"| [`{name}`]({name}.md) |" in overview for name in sdcore.ops.__all__)


def navigation() -> list[str]:
    yaml = pytest.importorskip("yaml")

    def pages(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for one in part.values() if isinstance(part, dict) else part:
                yield from pages(one)

    return list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings", "griffe"):
        pytest.importorskip(name, reason="builds the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # The theme's maintainers warn of MkDocs 2 at each build; the version is fixed here.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "WARNING" not in told and "ERROR" not in told, told
    return folder


class Prose(HTMLParser):
    """The text of a page's article, without its code."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag in ("article", "pre", "code"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("article", "pre", "code"):
            self.inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if self.inside == ["article"]:
            self.text += data


def test_the_site_is_built(site: Path) -> None:
    for page in PAGES:
        assert (site / page).with_suffix(".html").exists()
    assert not list(site.rglob("*.py"))


def test_docstrings_become_markdown(site: Path) -> None:
    for path in site.rglob("*.html"):
        prose = Prose()
        prose.feed(path.read_text())
        found = SPHINX.search(prose.text)
        assert found is None, f"{path.name}: {prose.text[found.start() - 60 : found.end() + 20]}"
        assert "``" not in prose.text, path.name
    wasserstein = (site / "api" / "ops" / "sliced_wasserstein.html").read_text()
    assert re.search(r'<div class="arithmatex">\\\[\s*SW_p\^p = ', wasserstein)
    assert re.search(r'<span class="arithmatex">\\\(SW_p\^p\\\)</span>', wasserstein)
    assert re.search(r'<a [^>]*href="../palette.html#sdcore.Palette"', wasserstein)
    patching = (site / "api" / "patching.html").read_text()
    assert "It differentiates. Runs within" in patching  # from comments above
    assert "after guidance" in patching  # and beside
    assert "Whatever a method" in patching  # from a list in which it has no name
