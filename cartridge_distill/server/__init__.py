"""An embedded inference server that speaks Tokasaurus' protocol, over any transformers decoder.

Start it with ``python -m cartridge_distill.server --model ... --cartridge-dir ...`` (``--help``
teaches), or inside a process with :class:`~cartridge_distill.server.running.BackgroundServer`.

==============  ================================================================
``settings``    what can be set
``app``         HTTP: paths, disconnects, errors
``answering``   what the routes ask of an engine, whichever computes
``protocol``    refusals, requests -> jobs, results -> answers
``cartridges``  cartridges by id, loaded once and never again
``engine``      one thread, continuous batching
``beginnings``  long beginnings of plain prompts, computed once and kept
``rows``        what is asked of the engine and what it gives back
``layout``      where the tokens of one forward lie: buffers, segments, groups
``attention``   ragged rows behind a cartridge they all share
``sampling``    repeatable draws; which log-probs are reported
``running``     uvicorn, foreground or in a thread
``openai``      OpenAI's chat API over the same engine, for people and their tools
``playground``  a page that asks it: one question, three answers side by side
==============  ================================================================

It stands in for the real server where there is no GPU, and fails where that one fails: an id is
loaded once, unknown fields are refused, a token count that is not a multiple of 16 is refused.
Better than the real one only in ways that cannot mislead: nothing is pickled, nothing leaks.

Nothing is imported here: the command line must be able to set the environment before torch loads.
"""
