"""What becomes of an exception: a user's mistake is a message, a fault of ours keeps its traceback."""

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
            console.fail(message)
            raise Exit(2) from error
