"""An explanation as one HTML file that needs nothing else: no network and no other files.

The page is a template, one script of this package and the explanation as JSON. Whatever a model or
a user wrote reaches the page as text only: escaped in the template, and through ``textContent`` in
the script. The policy of the page lets no other script run.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jinja2

from vlm_steer import __version__

__all__ = ["render_explanation"]

# Inside a script element, nothing may look like its end or like markup.
_HARMLESS = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def render_explanation(payload: Mapping[str, Any]) -> str:
    """The page of an explanation.

    Args:
        payload: From ``ExplainResult.to_json``, as plain data.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_steer.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("explain.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("explain.html.j2").render(
        page=payload,
        version=__version__,
        script=_as_is(script),
        digest=_as_is(digest),
        payload=_as_is(json.dumps(payload, allow_nan=False).translate(_HARMLESS)),
    )


def _as_is(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)
