"""The reference pages that are written from what they describe: `make reference`.

`http.md` from the app's OpenAPI document, `cli.md` from the commands, `settings.md` from the settings. They are
committed, so that they can be read anywhere; a test holds that they are current.
"""

from __future__ import annotations

import tempfile
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from pydantic_core import PydanticUndefined

from servetune.cli import app as commands
from servetune.server.app import declared_scopes
from servetune.server.settings import Settings
from tests.fakes import USER_KEY, World

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by `make reference`: change what it describes instead. -->\n"
COMPLETION = {"install_completion", "show_completion", "help"}

HTTP = """\
Keys go into `Authorization: Bearer KEY`. Errors are [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problems
([`Problem`](#problem)) with a stable `code`; any address may refuse with 400, 403, 408, 413, 422 or 500. Every
`POST` takes an `Idempotency-Key`. A running server has this document as `/openapi.json`, and to click at `/docs`.
"""
CLI = """\
`servetune --install-completion` completes commands in your shell. Commands that talk to a server take `-o json`
for one JSON document on stdout. Exit codes: 1 refused, 2 usage, 3 no server.
"""
SETTINGS = """\
Each is a variable `SERVETUNE_NAME`, or a line of `servetune.toml` in the folder where the server is started; some
are options of `servetune serve` and `worker`, which come first. `servetune config` shows what they resolve to, and
from where.
"""
SCOPES = {"open": "no key", "user": "a user key, where the server has any", "admin": "the admin key"}
UNTOLD = {"400", "403", "408", "413", "422", "500"}  # what every address may refuse; the introduction tells them


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


def pages() -> dict[str, str]:
    """The text of each page by file name."""
    return {
        "http.md": _page("HTTP", _http()),
        "cli.md": _page("Command line", _cli()),
        "settings.md": _page("Settings", _settings()),
    }


def _page(title: str, lines: Iterator[str]) -> str:
    return "\n".join([NOTE, f"# {title}", "", *lines]).rstrip("\n") + "\n"


# --- HTTP --------------------------------------------------------------------------------------------


def _http() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as home:
        app = World(Path(home), user_keys=(USER_KEY,)).app
        document, scopes = app.openapi(), dict(declared_scopes(app))
    yield HTTP
    addresses: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            [scope] = scopes[path] if path in scopes else scopes[_with_converter(path, scopes)]
            told = "\n".join(_operation(operation, scope))
            addresses.setdefault(told, []).append(f"`{method.upper()} {path}`")
    for told, names in addresses.items():
        yield from (f"## {', '.join(names)}", "", told)
    yield from ("## Types", "")
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _type(name, schema)


def _with_converter(path: str, scopes: Mapping[str, Any]) -> str:
    """`/problems/{code}` is declared as `/problems/{code:path}`."""
    return next(each for each in scopes if each.replace(":path}", "}") == path)


def _operation(operation: Mapping[str, Any], scope: str) -> Iterator[str]:
    yield from (_prose(operation.get("description", "")), "", f"Needs {SCOPES[scope]}.", "")
    asked = [each for each in operation.get("parameters", ()) if each["name"] != "Idempotency-Key"]
    if asked:
        yield from ("| parameter | in | type | |", "|---|---|---|---|")
        for each in asked:
            about = _cell(each.get("description", ""))
            yield f"| `{each['name']}` | {each['in']} | {_kind(each['schema'])} | {about} |"
        yield ""
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"- takes {_kind(content.get('schema', {}))} as `{media}`"
    for status, reply in operation["responses"].items():
        if status.startswith("2"):
            for media, content in reply.get("content", {}).items():
                yield f"- gives {_kind(content.get('schema', {}))} as `{media}`"
    refusals = [status for status in operation["responses"] if status[0] in "45" and status not in UNTOLD]
    if refusals:
        yield f"- may also refuse with {', '.join(refusals)}"
    yield ""


def _type(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "", _prose(schema.get("description", "")), "")
    if "properties" not in schema:
        return
    yield from ("| field | type | |", "|---|---|---|")
    needed = schema.get("required", ())
    for field, of in schema["properties"].items():
        about = [_cell(of.get("description", "")), f"default `{_shown(of['default'])}`" if "default" in of else ""]
        mark = " (needed)" if field in needed else ""
        yield f"| `{field}`{mark} | {_kind(of)} | {'; '.join(filter(None, about))} |"
    yield ""


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema as a few words of Markdown."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower().replace('[', '').replace(']', '')})"
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{_shown(value)}`" for value in schema.get("enum", [schema.get("const")]))
    for among in ("anyOf", "oneOf", "allOf"):
        if among in schema:
            return " or ".join(dict.fromkeys(_kind(each) for each in schema[among]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    values = schema.get("additionalProperties")
    if isinstance(values, dict):
        return f"object of {_kind(values)}"
    return str(schema.get("type", "anything"))


# --- the command line --------------------------------------------------------------------------------


def _cli() -> Iterator[str]:
    yield CLI
    yield from _help("servetune", typer.main.get_command(commands))


def _help(name: str, command: Any) -> Iterator[str]:
    yield from (f"## `{name}`", "", _prose(command.help or ""), "")
    given = [each for each in command.params if each.name not in COMPLETION]
    if given:
        yield from ("| | type | default | |", "|---|---|---|---|")
    for each in given:
        takes = "flag" if getattr(each, "is_flag", False) else _taken(each.type_descriptor.annotation)
        default = f"`{_shown(each.default)}`" if each.default not in (None, False, ()) else ""
        about = _cell(getattr(each, "help", None) or "")
        if variable := getattr(each, "envvar", None):
            about = f"{about} Variable: `{variable}`."
        yield f"| {_spelled(each)} | {takes}{', repeatable' if each.multiple else ''} | {default} | {about} |"
    yield ""
    for inner, its in getattr(command, "commands", {}).items():
        yield from _help(f"{name} {inner}", its)


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = parameter.name.upper()
        return f"`{name}`" if parameter.required else f"`[{name}]`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _taken(kind: Any) -> str:
    """What a value is, of a type annotation."""
    inner = [each for each in typing.get_args(kind) if each is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if inner:
        return _taken(inner[0])
    if issubclass(kind, Enum):
        return " or ".join(f"`{each.value}`" for each in kind)
    return {str: "text", int: "number", float: "number", Path: "path"}[kind]


# --- settings ----------------------------------------------------------------------------------------


def _settings() -> Iterator[str]:
    yield SETTINGS
    yield from ("| setting | type | default | |", "|---|---|---|---|")
    described = Settings.model_json_schema()
    for name, field in Settings.model_fields.items():
        kind = _kind(described["properties"][name])
        default = "by the machine" if field.default is PydanticUndefined else f"`{_default(field.default)}`"
        yield f"| `{name}` | {kind} | {default} | {_cell(field.description or '')} |"


def _default(value: object) -> str:
    return "none" if value in (None, (), {}) else _shown(value)


# --- parts -------------------------------------------------------------------------------------------


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _prose(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
