"""Work spread over processes and machines that need not know of each other: each takes every n-th item.

No process waits for another, so none can hang when another dies; what is left is done by running the command again.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`.

    Attributes:
        row: of this process's progress bar among those of the same machine.
    """

    index: int = 0
    count: int = 1
    row: int = 0

    def part(self, items: Sequence[Item]) -> list[Item]:
        """The items that are this part's."""
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f" (part {self.index + 1} of {self.count})" if self.count > 1 else ""


def process_shard(shard: int, num_shards: int) -> Shard:
    """The part of this process: shard `shard` of `num_shards`, divided among the processes of `accelerate launch`.

    Raises:
        UserError: a shard that does not exist.
    """
    if num_shards < 1 or not 0 <= shard < num_shards:
        raise UserError(f"shard={shard} must be 0 or more and below num_shards={num_shards}")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Shard(shard * processes + rank, num_shards * processes, int(os.environ.get("LOCAL_RANK", "0")))
