"""Teachers of other packages by name: entry points of the group `sak.teachers`, or `module:Class`.

Knows no torch, so that they can be listed quickly.
"""

from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from typing import Any

from stages.extract.errors import TeacherError, UnknownTeacherError
from store.errors import nearest

GROUP = "sak.teachers"


def custom_teachers() -> dict[str, str]:
    """Return the teachers that installed packages offer: `module:Class` by name.

    Raises:
        TeacherError: two packages offer one of the same name.
    """
    found: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry.value)
        if other != entry.value:
            raise TeacherError(
                f"two packages offer a teacher {entry.name!r}: {other} and {entry.value}; "
                f"name the class itself, custom:{entry.value}"
            )
    return found


def find_entry(name: str) -> EntryPoint:
    """Return what `name` stands for: `module:Class` itself, else an installed entry point.

    Raises:
        UnknownTeacherError: no package offers a teacher of this name.
    """
    if ":" in name:
        return EntryPoint(name=name, value=name, group=GROUP)
    offered = custom_teachers()
    if name not in offered:
        raise UnknownTeacherError(
            f"no installed package offers a teacher {name!r} (entry points of the group {GROUP}); "
            + (nearest(name, offered) if offered else "none offers any")
            + ". A class can be named as well: custom:my_package:MyTeacher"
        )
    return EntryPoint(name=name, value=offered[name], group=GROUP)


def load_class(entry: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        UnknownTeacherError: there is no such module or class.
    """
    try:
        return entry.load()
    except ImportError as error:
        raise UnknownTeacherError(
            f"custom:{entry.name}: {entry.value} cannot be imported: {error}. Install its package "
            "into this environment (`pip install -e folder`), or put its folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UnknownTeacherError(f"custom:{entry.name}: {error}") from error
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise UnknownTeacherError(
            f"custom:{entry.name}: importing {entry.value} fails with "
            f"{type(error).__name__}: {error}"
        ) from error


def package_of(module: str) -> str:
    """Return the distribution that a module belongs to with its version, else the module's root."""
    root = module.partition(".")[0]
    names = packages_distributions().get(root)
    return f"{names[0]} {version(names[0])}" if names else root
