"""What becomes of an exception: a user's mistake is a message, a fault of ours keeps its traceback."""

import errno
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from shlex import quote
from typing import Any

from typer import BadParameter, Exit
from typer.core import TyperGroup

from pipeline import console
from stages.stopping import Terminated

OUR_PACKAGES = {"pipeline", "stages", "store"}
RESUMES = "the same command goes on from the last shard or checkpoint written"
INTERRUPTED = f"interrupted; {RESUMES}"
TERMINATED = f"terminated; {RESUMES}"
_DENIED = "give this user the right to it, or set another path in the parameter file"
_ADVICE = {
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "have the disk mounted writable, or set another path in the parameter file",
    errno.ENOSPC: f"make room; {RESUMES}",
    errno.EDQUOT: f"the quota is used up, make room; {RESUMES}",
}


def user_message(error: BaseException) -> str | None:
    """Text to show for a user's mistake, or None when the error is a fault of ours.

    Our own error classes are raised for users only; a plain ValueError out of a library is a bug.
    """
    ours = type(error).__module__.partition(".")[0] in OUR_PACKAGES
    if isinstance(error, OSError) and not ours:
        place = f"{error.filename}: " if error.filename and error.strerror else ""
        advice = _ADVICE.get(error.errno or 0)
        return f"{place}{error.strerror or error}" + (f"; {advice}" if advice else "")
    return str(error) if ours else None


def _ended(message: str, code: int, arguments: Sequence[str]) -> Exit:
    console.fail(message)
    _tell_machines(message, code, arguments)
    return Exit(code)


def _tell_machines(message: str, code: int, arguments: Sequence[str]) -> None:
    """With `--json` standard output holds one object, whatever becomes of the command."""
    if "--json" in arguments:
        console.show_json({"error": message, "exit_code": code})


class GuardedGroup(TyperGroup):
    """Turns a user's mistake into exit code 2, an interruption into 130, SIGTERM into 143."""

    def invoke(self, ctx: Any) -> object:
        """Run the command line."""
        arguments = [*ctx._protected_args, *ctx.args]  # running it consumes them
        try:
            return super().invoke(ctx)
        except Terminated:
            raise _ended(TERMINATED, 143, arguments) from None
        except KeyboardInterrupt:
            raise _ended(INTERRUPTED, 130, arguments) from None
        except BadParameter as error:  # typer shows it with the usage
            _tell_machines(error.format_message(), error.exit_code, arguments)
            raise
        except (ValueError, OSError) as error:
            message = user_message(error)
            if message is None:
                raise
            raise _ended(self._with_params(message, arguments), 2, arguments) from error

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
