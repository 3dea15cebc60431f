"""Which blocks of a KV cache are whose, and which hold the beginnings of prompts that others may share.

A full block of a prompt is known by its tokens and by the block before it, so that equal beginnings of prompts lead to the same blocks. A
block that nobody holds any more keeps what it holds, and can still be found, until it is taken for something else: the one that was given
back first goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BLOCK_SIZE = 32
"""Positions of a block: a head's are 8 KiB in a row with 64 floats each."""

_Key = tuple[int, bytes]
_NOTHING_BEFORE = -1


def num_blocks_for(num_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-num_positions // BLOCK_SIZE)


class BlockPool:
    """Hands out blocks 0 to `num_blocks` - 1, to any number of holders each.

    Attributes:
      num_blocks: N.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._keys: dict[int, tuple[_Key, int]] = {}  # of a block that can be found: how, and the name of what it holds
        self._found: dict[_Key, int] = {}
        self._next_name = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def num_cached(self, token_ids: np.ndarray) -> int:
        """How many positions of a prompt [T] int32 are held already, at least one fewer than it has: its last token has to be computed."""
        return len(self._match(token_ids)[0]) * BLOCK_SIZE

    def take(self, token_ids: np.ndarray, num_positions: int) -> tuple[list[int], int] | None:
        """Blocks for a sequence, the first of them shared where its prompt begins as one before it did.

        Whoever shares a block reads it after the first has written it: prompts are to be processed in the order of these calls.

        Args:
          token_ids: [T] int32, its prompt.
          num_positions: that it may reach.

        Returns:
          the blocks, in the order of their positions, and how many positions of the prompt they hold already, see `num_cached`; None: too
          few are free, and nothing was taken.
        """
        names = _full_blocks(token_ids)
        shared, before = self._match(token_ids)
        needed = num_blocks_for(num_positions) - len(shared)
        if needed > self.num_free - sum(not self._holders[block] for block in shared):
            return None
        for block in shared:
            self._hold(block)
        fresh = [self._take_oldest() for _ in range(needed)]
        for tokens, block in zip(names[len(shared) :], fresh, strict=False):
            before = self._remember(block, (before, tokens))
        return shared + fresh, len(shared) * BLOCK_SIZE

    def give_back(self, blocks: Sequence[int]) -> None:
        """Ends one holding of each block; the last ones become free first, as fewer prompts begin with what they hold."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def _match(self, token_ids: np.ndarray) -> tuple[list[int], int]:
        """The blocks that hold a prompt's beginning, its last token excepted, and the name of what they hold."""
        blocks, before = [], _NOTHING_BEFORE
        for tokens in _full_blocks(token_ids[:-1]):
            block = self._found.get((before, tokens))
            if block is None:
                break
            blocks.append(block)
            before = self._keys[block][1]
        return blocks, before

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1

    def _take_oldest(self) -> int:
        block = next(iter(self._free))
        self._hold(block)
        if block in self._keys:
            del self._found[self._keys.pop(block)[0]]
        return block

    def _remember(self, block: int, key: _Key) -> int:
        """Makes a block findable; names are never used twice, so that nothing is found behind what is gone."""
        name, self._next_name = self._next_name, self._next_name + 1
        if key not in self._found:
            self._found[key], self._keys[block] = block, (key, name)
        return name


def _full_blocks(token_ids: np.ndarray) -> list[bytes]:
    """The tokens of each full block of a prompt."""
    whole = len(token_ids) // BLOCK_SIZE
    return [token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE].tobytes() for i in range(whole)]
