"""A griffe extension: shows `answer = blocking(calls.answer)` of the SDK as the method that it is.

Name, arguments and docstring are those of the function; the session, which a method brings along, and the cursor
of a listing are left out, and what a driver makes of the result is said as `drivers._presented` says it. What the
docstrings of the SDK say of arguments, a line or more for each, becomes lists.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

RETURNS = {
    "blocking": "{}",
    "awaiting": "{}",
    "blocking_each": "Iterator[{}]",
    "awaiting_each": "AsyncIterator[{}]",
    "blocking_events": "Iterator[{}]",
    "awaiting_events": "AsyncIterator[{}]",
}
ARGUMENT = re.compile(r"(?m)^([a-z_]+(?:, [a-z_]+)*):(?= )")
SENTENCE = re.compile(r"\n(?=[A-Z])")
WRAPPINGS = ("Steps[", "Rows[", "Feed[")
LEFT_OUT = {"session", "cursor"}


class Methods(griffe.Extension):
    """Puts functions in the place of such attributes."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look at every class of the clients' modules."""
        _fence_drawings(pkg["clients"]["errors"].docstring)
        for module in pkg["clients"].modules.values():
            for kind in module.classes.values():
                _list_arguments(kind.docstring)
                for name, attribute in list(kind.attributes.items()):
                    driver, _, argument = str(attribute.value).rstrip(")").partition("(")
                    if driver in RETURNS:
                        where, _, flow = argument.partition(".")  # a module may have another name here
                        path = module.resolve(where).removeprefix(f"{pkg.name}.")
                        kind.set_member(name, _method(name, driver, pkg[path][flow]))


def _list_arguments(docstring: griffe.Docstring | None) -> None:
    if docstring and ARGUMENT.search(docstring.value):
        docstring.value = ARGUMENT.sub(r"\n- `\1`:", SENTENCE.sub(r"\n\n", docstring.value))


def _fence_drawings(docstring: griffe.Docstring) -> None:
    parts = docstring.value.split("\n\n")
    docstring.value = "\n\n".join(f"```text\n{part}\n```" if "├──" in part else part for part in parts)


def _method(name: str, driver: str, flow: griffe.Function) -> griffe.Function:
    result = str(flow.returns)
    for wrapping in WRAPPINGS:
        if result.startswith(wrapping):
            result = result.removeprefix(wrapping).removesuffix("]")
    own = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
    given = [parameter for parameter in flow.parameters if parameter.name not in LEFT_OUT]
    _list_arguments(flow.docstring)
    method = griffe.Function(
        name,
        parameters=griffe.Parameters(*own, *given),
        returns=RETURNS[driver].format(result),
        docstring=flow.docstring,
        lineno=flow.lineno,
        endlineno=flow.endlineno,
    )
    if driver == "awaiting":
        method.labels.add("async")
    return method
