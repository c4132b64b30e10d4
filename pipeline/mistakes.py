"""What becomes of an exception: a user's mistake is a message, a fault of ours keeps its traceback."""

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from shlex import quote
from typing import Any

from typer import Exit
from typer.core import TyperGroup

from pipeline import console
from stages.stopping import Terminated

OUR_PACKAGES = {"pipeline", "stages", "store"}
RESUMES = "the same command goes on from the last shard or checkpoint written"
INTERRUPTED = f"interrupted; {RESUMES}"
TERMINATED = f"terminated; {RESUMES}"


def user_message(error: BaseException) -> str | None:
    """Text to show for a user's mistake, or None when the error is a fault of ours.

    Our own error classes are raised for users only; a plain ValueError out of a library is a bug.
    """
    ours = type(error).__module__.partition(".")[0] in OUR_PACKAGES
    return str(error) if ours or isinstance(error, OSError) else None


class GuardedGroup(TyperGroup):
    """Turns a user's mistake into exit code 2, an interruption into 130, SIGTERM into 143."""

    def invoke(self, ctx: Any) -> object:
        """Run the command line."""
        arguments = [*ctx._protected_args, *ctx.args]  # running it consumes them
        try:
            return super().invoke(ctx)
        except Terminated:
            console.fail(TERMINATED)
            raise Exit(143) from None
        except KeyboardInterrupt:
            console.fail(INTERRUPTED)
            raise Exit(130) from None
        except (ValueError, OSError) as error:
            message = user_message(error)
            if message is None:
                raise
            console.fail(self._with_params(message, arguments))
            raise Exit(2) from error

    def _with_params(self, message: str, arguments: Sequence[str]) -> str:
        """Give each command that a message advises the parameter file that this one was given."""
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--params")
        given = parser.parse_known_args(arguments)[0].params
        if given is None:
            return message
        takers = [
            name
            for name, command in self.commands.items()
            if any(one.name == "params" and one.default is not None for one in command.params)
        ]
        advised = rf"`(sak (?:{'|'.join(takers)})\b[^`]*)`"
        return re.sub(advised, lambda found: f"`{found[1]} --params {quote(given)}`", message)
