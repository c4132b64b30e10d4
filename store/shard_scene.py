"""Where a shard is checked, and where what is wrong with it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import Codec
from store.findings import Verification
from store.remote import StorePath
from store.teacher_layout import TeacherLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardScene:
    """Where a shard is checked: `usable` (rows of the store,) says which rows must have features.

    `usable` is None where the image table cannot be read; `image` names a row's image. `codecs`
    are those of the targets by name, without those that cannot be read.
    """

    folder: StorePath
    layout: TeacherLayout
    codecs: Mapping[str, Codec]
    shard: int
    usable: NDArray[np.bool_] | None
    image: Callable[[int], str | None]
    found: Verification

    def damage(self, check: str, what: str, **where: Any) -> None:
        """Note damage of this shard, which is mended by computing it again."""
        name = self.folder.name
        mend = (
            f"`sak verify {self.folder.parent} --repair`, then `sak extract-teachers {name}`: "
            "only this shard is computed again"
        )
        self.found.add("damage", check, what, mend, teacher=name, shard=self.shard, **where)
