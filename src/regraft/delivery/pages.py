"""Pages: what all HTML of regraft has in common. The only file that imports jinja2.

Names of classes, files and folders come from anywhere: templates escape all that they show
(`autoescape`), and `readable` spells out what would be invisible or turn the text around. A page
needs no network and runs no script that its policy does not name by hash.
"""

import base64
import hashlib
import math
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from regraft.errors import readable
from regraft.progress import duration


def asset(name: str) -> str:
    """Returns the text of a file beside this one."""
    return files("regraft.delivery").joinpath(name).read_text(encoding="utf-8")


def source_hash(text: str) -> str:
    """Returns the name by which a Content-Security-Policy allows an inline script or style."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def rendered(template: str, styles: tuple[str, ...], **values: Any) -> str:
    """Returns a page.

    Args:
        template: Extends `page.html.jinja`, or is it.
        styles: Style sheets, in order; they are inlined.
        values: What the template shows; filters: number, signed, p_value, whole, duration,
            shown, placeless, figure.

    Raises:
        KeyError: A value lacks what the template shows.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined, UndefinedError
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return (
            readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        )

    environment = Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "number": number,
        "signed": signed,
        "p_value": p_value,
        "whole": whole,
        "duration": duration,
        "shown": shown,
        "placeless": placeless,
        "figure": Markup,  # only for what delivery/figures.py draws
    }
    environment.filters.update(filters)
    style = "\n".join(map(asset, styles))
    policy = f"default-src 'none'; style-src {source_hash(style)}; img-src data:"
    try:
        page = environment.get_template(template).render(
            values, style=Markup(style), policy=Markup(policy)
        )
    except UndefinedError as error:
        raise KeyError(str(error)) from error
    return page.strip() + "\n"


def number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:.{digits}f}".replace("-", "\u2212")


def signed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "unknown"
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def p_value(value: float) -> str:
    """Returns `p = 0.012`, or `p < 0.001`: it is never 0."""
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def whole(value: int) -> str:
    return f"{int(value):,}"  # int: what is undefined has no format, and must say so


def shown(value: Any) -> str:
    """Returns a setting as people write it."""
    match value:
        case None:
            return "\u2013"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case [int(height), int(width)]:
            return f"{height} \u00d7 {width}"
        case list():
            return ", ".join(map(shown, value))
        case dict():
            return ", ".join(f"{key} {shown(one)}" for key, one in value.items())
    return str(value)


def placeless(text: str) -> str:
    """Returns text in which absolute paths are cut down to their last part."""
    quoted = r"(?<=`)(?:[A-Za-z]:)?[/\\][^`]*[/\\]"
    bare = r"(?:(?<=[\s'\"(=])|^)(?:[A-Za-z]:)?[/\\][^\s`'\"]*[/\\]"
    return re.sub(f"{quoted}|{bare}", "\u2026/", text)
