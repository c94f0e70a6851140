"""Cartridges on disk, one module a format; ``checkpoint`` is the door to all.

================  ==================================================  =====================
format            files                                               module
================  ==================================================  =====================
``native``        ``cartridge.safetensors`` + ``cartridge.json``      ``native``
``hazyresearch``  one ``.pt``, both spellings of "frozen"             ``hazyresearch``
``tokasaurus``    ``cartridge.pt`` + ``config.yaml``                  ``tokasaurus``
``peft``          ``adapter_model.safetensors`` +                     ``peft``
                  ``adapter_config.json``
================  ==================================================  =====================

Each module has ``read(path) -> StoredCartridge`` and ``write(cartridge, path, overwrite)``. What
travels between them is a :class:`~cartridge_distill.cartridge.snapshot.Snapshot` in the dtype of
the file, so that a conversion keeps every bit, and what the file says about itself. Only ``native``
holds all of the latter; the others keep the base model at most.

Reading never runs pickled code. Writing is atomic: a reader sees a whole cartridge or none.

Needs torch, safetensors and yaml alone: the gateway writes with it where no model library is.
"""
