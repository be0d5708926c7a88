"""Makes a command line from a settings class, and turns errors into sentences and exit codes.

Precedence: flag > environment (DENOISE_OUTPUT, ...) > configuration file > default; of settings
that exclude each other too.
Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted; a job may return others.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from denoise_core.config import check_keys, nearest, require
from denoise_core.errors import DenoiseError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class SettingsCommand(click.Command):
    """A command whose unknown flags name the nearest known one.

    Flags in `many` take all words that follow, up to the next flag: `--model A B`.
    """

    def __init__(self, *args: Any, many: frozenset[str] = frozenset(), **more: Any) -> None:
        super().__init__(*args, **more)
        self.many = many

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, adding a suggestion to the error about an unknown flag."""
        try:
            return super().parse_args(ctx, repeat_flags(args, self.many))
        except click.NoSuchOption as error:
            known = [name for p in self.params for name in (*p.opts, *p.secondary_opts)]
            hint = "" if error.possibilities else nearest(error.option_name, known)
            raise click.NoSuchOption(
                error.option_name,
                message=error.message + hint,
                possibilities=error.possibilities,
                ctx=ctx,
            ) from None


def repeat_flags(args: list[str], many: frozenset[str]) -> list[str]:
    """Write `--flag A B` as `--flag A --flag B` for the flags in `many`; click knows only that."""
    words: list[str] = []
    flag, taken = "", 0
    for place, word in enumerate(args):
        if word == "--":
            return words + args[place:]
        if word.startswith("-") and word != "-":
            flag, taken = word if word in many else "", 0
        elif flag:
            words += [flag] if taken else []
            taken += 1
        words.append(word)
    return words


def settings_command(
    settings: type,
    run: Callable[[Any], int],
    *,
    name: str,
    help: str,
    interrupted: str = "Finished images are safe; the same command goes on.",
) -> click.Command:
    """Return a command that makes `settings` from its flags and calls `run(settings)`.

    `interrupted` is the sentence for who ends it early.
    """
    hints = typing.get_type_hints(settings)
    fields = dataclasses.fields(settings)
    params: list[click.Parameter] = [_parameter(f, hints[f.name]) for f in fields]
    params.append(
        click.Option(
            ["--config", "config_file"],
            metavar="FILE.toml",
            is_eager=True,
            envvar="DENOISE_CONFIG",
            expose_value=False,
            callback=_read_config(settings),
            help="Settings from a TOML file.",
        )
    )

    def callback(**values: Any) -> None:
        drop_excluded(values, settings, click.get_current_context())
        sys.exit(guarded(lambda: run(settings(**values)), interrupted=interrupted))

    return SettingsCommand(
        name,
        params=params,
        callback=callback,
        help=help,
        many=frozenset(_flag(f) for f in fields if f.metadata["many"]),
        context_settings={"auto_envvar_prefix": "DENOISE", "max_content_width": 100},
    )


# Of the sources of a setting, those that state it, the one that wins first.
LEVELS = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


def drop_excluded(values: dict[str, Any], settings: type, ctx: click.Context) -> None:
    """Take out of `values` what a source states where a higher one states what excludes it.

    `settings.EXCLUSIVE`, where there is one, has the names of which one at most is given.
    """
    for group in getattr(settings, "EXCLUSIVE", ()):
        sources = {name: ctx.get_parameter_source(name) for name in group}
        top = next((level for level in LEVELS if level in sources.values()), None)
        for name in group:
            if sources[name] != top:
                values[name] = None


def guarded(body: Callable[[], int], *, interrupted: str) -> int:
    """Return `body`'s exit code; of an error print a sentence, and return that error's code.

    `interrupted` is the sentence for who ends it early.
    """
    try:
        return body()
    except UsageError as error:
        click.echo(f"Error: {error}", err=True)
        return EXIT_USAGE
    except DenoiseError as error:
        click.echo(f"Error: {error}", err=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        click.echo(f"Interrupted. {interrupted}", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("DENOISE_DEBUG"):
            raise
        text = " ".join(str(error).split())
        click.echo(
            f"Error: a fault of the program, {type(error).__name__}: {text}. Please report it with "
            "what the same command prints under DENOISE_DEBUG=1.",
            err=True,
        )
        return EXIT_FAILED


def _read_config(settings: type) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def callback(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is None:
            return
        try:
            table = tomllib.loads(Path(value).read_text(encoding="utf-8"))
            check_keys(table, settings, source=value)
            ctx.default_map = _values(table, settings, source=value)
        except OSError as error:
            raise click.UsageError(
                f"--config {value}: cannot be read ({error.strerror})."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--config {value}: is not valid TOML ({error}).") from error
        except UsageError as error:
            raise click.UsageError(str(error)) from error

    return callback


# The type of a setting -> what a file may hold for it, and how that is called.
_IN_FILES: dict[Any, tuple[Any, str]] = {
    tuple: (str, "a text or a list of texts"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str | int | float, "a single text or number"),
}


def _values(table: dict[str, Any], settings: type, *, source: str) -> dict[str, Any]:
    """Return a file's values by field; a single value may stand for a list of one."""
    hints = typing.get_type_hints(settings)
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        kind = _plain_type(hints[name])
        many = kind is tuple
        items = value if many and isinstance(value, list) else [value]
        allowed, words = _IN_FILES[kind]
        for item in items:
            fits = isinstance(item, allowed) and (kind is bool or not isinstance(item, bool))
            require(fits, f"{source}: {key} = {item!r}: expected {words}.")
        values[name] = items if many else value
    return values


def _parameter(field: dataclasses.Field[Any], hint: Any) -> click.Parameter:
    meta = field.metadata
    if meta["positional"]:
        return click.Argument([field.name], nargs=-1, metavar=meta["metavar"], required=False)
    flag = _flag(field)
    plain = _plain_type(hint)
    options: dict[str, Any] = {"help": meta["help"], "show_default": True}
    if plain is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif meta["choices"]:
        options["type"] = click.Choice(meta["choices"])
    elif plain is tuple:
        options["multiple"] = True
    else:
        options["type"] = plain
    if meta["metavar"] and plain is not bool:
        options["metavar"] = meta["metavar"]
    if field.default is dataclasses.MISSING:
        options["required"] = True
    elif plain is not tuple or field.default:
        options["default"] = field.default
    return click.Option([flag, field.name], **options)


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _plain_type(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    return typing.get_origin(hint) or hint
