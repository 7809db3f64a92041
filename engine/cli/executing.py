"""The command `exec`.

Async.
"""

from contextlib import nullcontext

import click

from engine.app import Engine
from engine.cli.completion import container_names
from engine.cli.context import Context
from engine.cli.naming import container_named
from engine.cli.run_options import (
    check_terminal,
    environment_option,
    stdin_option,
    terminal_option,
    user_option,
    workdir_option,
)
from engine.cli.running import run
from engine.cli.terminal import raw
from engine.errors import CommandFailed
from engine.running.containerizer import open_containerizer
from engine.running.options import ExecOptions
from engine.running.runc import find_runtime

__all__ = ["execute"]


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("word", metavar="CONTAINER", shell_complete=container_names)
@click.argument("arguments", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@stdin_option
@terminal_option
@environment_option
@workdir_option
@user_option
@click.pass_obj
def execute(
    context: Context,
    word: str,
    arguments: tuple[str, ...],
    stdin: bool,
    terminal: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str,
) -> None:
    """Run a further command in a container that runs.

    It ends with the exit code of COMMAND. Ctrl-C kills that, but with -t it is typed.
    """
    check_terminal(stdin=stdin, terminal=terminal)
    options = ExecOptions(args=arguments, env=env, cwd=workdir or "", user=user, terminal=terminal)

    async def work(engine: Engine) -> int:
        name = container_named(engine.stores, word).id
        async with open_containerizer(engine) as containers:
            try:
                return await containers.execute(
                    name, options, stdin=0 if stdin else None, stdout=1, stderr=2
                )
            except CommandFailed as error:
                if find_runtime(None).name == "runc":  # it has said so on standard error
                    return error.code
                raise

    # The runtime has the terminal meanwhile; it may be killed before it gives it back.
    with raw(0) if stdin and terminal else nullcontext():
        code = run(context, work)
    if code:
        raise click.exceptions.Exit(code)
