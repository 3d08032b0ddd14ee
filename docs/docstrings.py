"""Makes Markdown of the docstrings, which are Google's style with some of Sphinx's markup in it.

mkdocstrings loads it as an extension of Griffe, which reads the source. What it turns into
Markdown is all that the docstrings have: ``.. math::``, roles such as ``:class:``, and code after
two colons. Comments that begin with ``#:``, and those beside fields, become the docstrings of
attributes without one.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

MATH = re.compile(r"^( *)\.\. math::(.*)\n((?:(?:\1 +.*)?\n)*)", re.MULTILINE)
CODE = re.compile(r"^( *)(\S.*?)?( ?)::\n\n((?:\1    .*\n|\n)+)", re.MULTILINE)
INLINE_MATH = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):`([^`]+)`")
SECTION = re.compile(r"^([A-Z]\w+):\n((?:    .*\n|\n)+)", re.MULTILINE)
LISTS = ("Args", "Attributes", "Raises")
ITEM = re.compile(r"^    (?! )", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None and obj.is_attribute:
            obj.docstring = commented(obj)

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        for parameter in func.parameters:
            if parameter.kind is griffe.ParameterKind.var_positional:
                parameter.default = None  # Griffe says "()", as if it could be left out

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def commented(attribute: griffe.Object) -> griffe.Docstring | None:
    """What the comments above it that begin with ``#:`` say, or, of a field, the one beside it."""
    lines = attribute.lines_collection[attribute.filepath]
    found: list[str] = []
    for line in reversed(lines[: attribute.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        found.insert(0, line.strip().removeprefix("#:").strip())
    field = attribute.annotation is not None and attribute.parent.is_class
    if not found and field:
        found = re.findall(r"  # (.+)$", lines[attribute.lineno - 1])
    return griffe.Docstring("\n".join(found), parent=attribute) if found else None


def markdown(text: str, obj: griffe.Object) -> str:
    text = SECTION.sub(_section, text + "\n")
    text = MATH.sub(_block, text)
    text = CODE.sub(_code, text)
    text = INLINE_MATH.sub(lambda found: rf"\({' '.join(found[1].split())}\)", text)
    text = ROLE.sub(lambda found: _reference(found[1], obj), text)
    return text.rstrip()


def _block(found: re.Match[str]) -> str:
    margin, first, rest = found.groups()
    lines = [line.strip() for line in (first, *rest.splitlines()) if line.strip()]
    return "\n".join(f"{margin}{line}".rstrip() for line in ("", r"\[", *lines, r"\]", "", ""))


def _code(found: re.Match[str]) -> str:
    """Two colons after a space, or alone, vanish; after a word they leave one."""
    margin, before, space, code = found.groups()
    head = f"{margin}{before}{'' if space else ':'}\n\n" if before else ""
    lines = [line.removeprefix(margin + "    ") for line in code.rstrip().splitlines()]
    fenced = ["```python", *lines, "```"]
    return head + "".join(f"{margin}{line}".rstrip() + "\n" for line in fenced) + "\n"


def _reference(target: str, obj: griffe.Object) -> str:
    """A link to what is in the site, else the name alone."""
    name = target.removeprefix("~")
    text = name.rpartition(".")[2] if target.startswith("~") else name
    try:
        path = name if name.startswith("sdcore.") else obj.resolve(name)
    except griffe.NameResolutionError:
        path = f"{obj.path}.{name}"
    # An op has the name of its module, which shadows it for Griffe.
    path = re.sub(r"^sdcore\.ops\.(\w+)$", r"sdcore.ops.\1.\1", path)
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'


def _section(found: re.Match[str]) -> str:
    title, body = found.groups()
    return _list(title, body) if title in LISTS else _text(title, body)


def _text(title: str, body: str) -> str:
    """Griffe would take what stands before a colon in it for a type, or frame it."""
    lines = [line.removeprefix("    ") for line in body.strip("\n").splitlines()]
    text = "\n".join(lines)
    return f'<span class="doc-section-title">{title}:</span>\n\n{text}\n\n'


def _list(title: str, body: str) -> str:
    """What is no ``name: text`` is a sentence about the whole, and follows it."""
    items, others = [], []
    for item in ITEM.split(body)[1:]:
        named = re.match(r"[^:\n]+:(?!:)\s", item)
        (items if named else others).append(f"    {item.rstrip()}\n")
    told = "\n".join(" ".join(one.split()) + "\n" for one in others)
    return f"{title}:\n{''.join(items)}\n{told}\n" if told else f"{title}:\n{''.join(items)}\n"
