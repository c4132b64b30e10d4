"""The parameter files under recipes/: what their headers say, and their sizes.

A recipe is written for ViT-B teachers and a ViT-B student. The published sizes (teacher, student)
differ in names of models and in folders alone, so another size is the same text with other names.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pipeline.report import Report

FOLDER = Path(__file__).parents[1] / "recipes"
STATED = ("data", "teachers", "command", "time", "disk", "result")
"""What every header tells, a line each."""
SIZES = ("BB", "BS", "LB", "LL")
"""Published sizes: the teachers' letter, then the student's."""
LARGE_TEACHERS = {
    "timm:vit_base_patch14_dinov2.": "timm:vit_large_patch14_dinov2.",
    "timm:vit_base_patch16_clip_384.": "timm:vit_large_patch14_clip_336.",
    "timm:samvit_base_patch16.": "timm:samvit_large_patch16.",
}
STUDENTS = {"S": "vit_small_patch16_384.", "L": "vit_large_patch16_384."}


class RecipeError(ValueError):
    """No such recipe, or not in this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One file under recipes/."""

    name: str
    text: str
    stated: dict[str, str]
    """What the header's lines `# key: value` say."""

    @property
    def sizes(self) -> tuple[str, ...]:
        """Sizes it comes in; none where it has models of its own."""
        return tuple(self.stated["sizes"].split(", ")) if "sizes" in self.stated else ()

    def at(self, size: str | None) -> str:
        """Return the parameter file of a size; None is the file as written.

        Raises:
            RecipeError: it does not come in that size.
        """
        if size is None:
            return self.text
        if size not in self.sizes:
            known = ", ".join(self.sizes) or "none: it has models of its own"
            raise RecipeError(f"recipe '{self.name}' has no size {size!r}; its sizes: {known}")
        changes = {"/BB/": f"/{size}/"}
        changes |= LARGE_TEACHERS if size[0] == "L" else {}
        if size[1] in STUDENTS:
            changes["vit_base_patch16_384."] = STUDENTS[size[1]]
        text = self.text
        for written, other in changes.items():
            text = text.replace(written, other)
        return text


def all_recipes() -> list[Recipe]:
    """Return every recipe, by name."""
    return [_read(path) for path in sorted(FOLDER.glob("*.yaml"))]


def recipe(name: str) -> Recipe:
    """Return one recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    found = {entry.name: entry for entry in all_recipes()}
    if name not in found:
        near = get_close_matches(name, found, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(found)}"
        raise RecipeError(f"no recipe '{name}'; {advice}")
    return found[name]


def listing() -> Report:
    """Return a table of all recipes."""
    entries = all_recipes()
    return Report(
        columns=("recipe", "sizes", *STATED),
        rows=tuple(
            (entry.name, ", ".join(entry.sizes) or None, *(entry.stated[key] for key in STATED))
            for entry in entries
        ),
        data={"recipes": [{"name": entry.name, "sizes": list(entry.sizes),
                           **{key: entry.stated[key] for key in STATED}}
                          for entry in entries]},
        remarks=("sizes are teachers, then student; commands take --params FILE",),
    )  # fmt: skip


def _read(path: Path) -> Recipe:
    text = path.read_text()
    header = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    pairs = (line.partition(": ") for line in header)
    stated = {key: value for key, _, value in pairs if key in (*STATED, "sizes")}
    if missing := [key for key in STATED if key not in stated]:
        raise RecipeError(f"{path}: the header does not state {', '.join(missing)}")
    return Recipe(name=path.stem, text=text, stated=stated)
