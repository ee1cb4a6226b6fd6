"""How a `zoo` command ends: with a message and an exit status in place of a traceback, unless --debug asks for it."""

from __future__ import annotations

import errno
from typing import Any

import click

from zoo.errors import ZooError, did_you_mean


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    # The option stands before or after the sub-command; either is enough.
    ctx.meta["zoo.debug"] = ctx.meta.get("zoo.debug", False) or value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
)


class Command(click.Command):
    """A command with --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        debug_option(self)


class Group(click.Group):
    """A group whose ZooErrors, and files that cannot be read or written, end with a message and exit status 2, Ctrl-C
    with 130, and that suggests the nearest command."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZooError as error:
            if ctx.meta.get("zoo.debug"):
                raise
            click.echo(f"zoo: {error}", err=True)
            ctx.exit(2)
        except OSError as error:
            # A pipe whose reader has ended is click's; without a number it is no file's fault.
            if ctx.meta.get("zoo.debug") or error.errno in (None, errno.EPIPE):
                raise
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"zoo: {place}{error.strerror}; --debug says where that happened.", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            if ctx.meta.get("zoo.debug"):
                raise
            # Click's own answer has exit status 1, which here says that a trial has failed.
            click.echo("zoo: interrupted; no record is lost, and the same command goes on from here.", err=True)
            ctx.exit(130)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            ctx.fail(f"no command {args[0]!r}.{did_you_mean(args[0], known)} Known: {', '.join(known)}.")
        return super().resolve_command(ctx, args)
