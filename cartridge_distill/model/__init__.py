"""The frozen model: loading, prompts, packing, packed attention, the one forward."""
