"""The rooms in their order, for the tests of imports and of the pages that list them."""

from __future__ import annotations

# The rooms of the core, lowest first: each imports only itself and what stands before it.
ROOMS = (
    "util",
    "cartridge",
    "rollout",
    "sync",
    "model",
    "data",
    "distill",
    "server",
    "engines",
    "gateway",
    "evaluation",
    "report",
    "cli",
    "api",
)
# The same of the glue; what lies beside its rooms (hooks, launch, manage, ...) is in no order.
GLUE_ROOMS = ("platform", "config", "actor", "rollout", "trainer", "launching", "pipeline")
ROOMS_OF = {"cartridge_distill": ROOMS, "verl_patches": GLUE_ROOMS}
