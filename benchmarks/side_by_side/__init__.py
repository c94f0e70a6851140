"""The ways that `benchmarks/alternatives.py` sets side by side, on the same work.

=================  ================================================================
``work``           the work as a folder that any Python with torch can read
``ours``           a step of the plain loop of ``training/study``
``cases``          which document, answers and cartridge; writes their data
``floor``          products that the work needs, and how fast the machine multiplies
``environment``    the alternatives' environment: makes it, runs a child in it
``table``          medians, ratios, agreement
``plain``          what the children share: padding, forwards, loss, clock
``peft_loop``      child: PEFT's CARTRIDGE in a plain loop; `generate` with a cache
``trl_trainer``    child: TRL's SDFTTrainer with PEFT's CARTRIDGE
=================  ================================================================

``work``, ``plain``, ``peft_loop`` and ``trl_trainer`` run in the alternatives' environment, where
this project is not installed: they import torch, transformers, peft, trl and each other alone.
"""
