"""A real Tokasaurus server that survives thousands of cartridge versions.

On-policy training sends the server a new cartridge id each step. The branch of Tokasaurus that
serves cartridges (``geoff/cartridges``, pinned in :mod:`.guard`) loses almost all blocks of each
cartridge that it evicts, and after some 64 versions of 2,048 tokens in a cache of 131,072 it stops
with "Could not pick N blocks". It also goes on believing that an evicted id is loaded. A patch puts
hooks into it, which call this package::

    python -m verl_patches apply --package tokasaurus         # once, and `revert` takes them out
    python -m cartridge_distill.engines.tokasaurus --check    # is it the known one, with the patch?
    python -m cartridge_distill.engines.tokasaurus model=meta-llama/Llama-3.2-3B-Instruct port=10210

====================  ==========================================================================
``tokasaurus.patch``  the hooks
``guard``             refuses a Tokasaurus that is not the pinned one with the hooks, by its hash
``allocator``         which blocks go when the cache is full: all of a cartridge, with its prompts'
                      pages
``loading``           when a cartridge is written into the cache: once for each time it gets blocks
``launch``            starts the server's processes, and ends all when one of them ends
====================  ==========================================================================

What is promised, and by what:

* **Every block is on the free list, in the prefix tree, or in a resident cartridge.** Blocks that
  are freed go to the free list first, whatever the need of the moment; blocks are taken from there.
* **An evicted id is reloaded, never read as if it were still there.** The note that an id's weights
  are in the cache lives on the cartridge's first block and goes with it (see :mod:`.loading` for
  why reloading, not refusing).
* **Prompt pages computed behind a cartridge leave the cache with it**, so no page outlives the keys
  and values that it was computed from.
* **A server without the repairs does not start**, unless it is asked for as ``--unrepaired``. The
  gateway's other defence (``--defence restart``) works with any Tokasaurus.

Nothing here imports Tokasaurus until it is asked to start one, and nothing needs more than the
standard library, torch and what Tokasaurus itself needs.
"""
