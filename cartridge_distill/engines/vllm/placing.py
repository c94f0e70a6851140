"""Where a cartridge's tokens go in vLLM's cache, and which of its heads and layers a process has.

vLLM's cache is made of blocks; a request has one list of block ids for each *group* of layers
(one group in most models; full and sliding layers apart in hybrid ones). A token's *slot* is
``block id * block size + place in the block``. Block 0 is vLLM's null block: it stands where a
sliding window has left a token behind, which therefore is not written.

Nothing here needs vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cartridge_distill.util.errors import ConfigError

NULL_BLOCK = 0
_NUMBER = re.compile(r"\d+")


def slots(
    block_ids: Sequence[int], block_size: int, start: int, end: int
) -> tuple[list[int], list[int]]:
    """The slots of the tokens ``start..end-1`` of a request.

    Returns:
        Tokens and their slots, equally many; tokens in a null block are left out.

    Raises:
        ValueError: the blocks do not reach to ``end``.
    """
    if start < 0 or end > len(block_ids) * block_size:
        raise ValueError(
            f"tokens {start}..{end - 1} do not lie in {len(block_ids)} blocks of {block_size}"
        )
    tokens, places = [], []
    for token in range(start, end):
        block = block_ids[token // block_size]
        if block != NULL_BLOCK:
            tokens.append(token)
            places.append(block * block_size + token % block_size)
    return tokens, places


def layer_number(name: str) -> int:
    """The number of a layer by vLLM's name for it, ``model.layers.3.self_attn.attn``.

    Raises:
        ConfigError: the name has no number, or several.
    """
    numbers = [part for part in name.split(".") if _NUMBER.fullmatch(part)]
    if len(numbers) != 1:
        raise ConfigError(
            f"vLLM calls an attention layer {name!r}, which does not say which layer it is; "
            "cartridges are not served with this model; fix: use another"
        )
    return int(numbers[0])


def heads_of_rank(total: int, rank: int, ranks: int) -> slice:
    """The KV heads that one of several tensor-parallel ranks has.

    Args:
        total: KV heads of the layer. Where there are more ranks than heads, each head is on
            several.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if total % ranks and ranks % total:
        raise ConfigError(
            f"{total} KV heads cannot be shared out to {ranks} ranks; fix: start vLLM with "
            "another --tensor-parallel-size"
        )
    if ranks >= total:
        head = rank * total // ranks
        return slice(head, head + 1)
    each = total // ranks
    return slice(rank * each, (rank + 1) * each)
