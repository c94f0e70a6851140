"""On-policy cartridge distillation: the core, independent of veRL, Ray and Modal.

A *cartridge* is a trainable key/value prefix of P tokens that stands in for a long document
(Eyuboglu et al., arXiv 2506.06266). The rooms, lowest first; each imports only those above it in
this table, and ``tests/test_layers.py`` holds that:

==============  ==============================================================================
``util``        errors, files, journals, processes, parts of every server and command
``cartridge``   the prefix, trainable and as data; files of every format; the Hub
``rollout``     the Tokasaurus protocol, client side
``sync``        publishing a version that the server will serve next
``model``       the frozen model: prompts, packing, attention, the one forward
``data``        documents, records, prompts, self-study, training files
``distill``     teacher, loss, who writes what, checks, training state
``server``      an embedded server that speaks the protocol, and the routes of every server here
``engines``     other inference servers: vLLM through its connector, Tokasaurus repaired
``gateway``     uploads, versions and a token, in front of a server
``evaluation``  what the trained cartridge is worth
``report``      one HTML file about one run or several
``cli``         the commands
``api``         the same from Python: distil, load, ask
==============  ==============================================================================

Axes used in names and docstrings: B sequences, T packed tokens, P prefix tokens, Hq query heads,
H kv heads, D head size, L layers, K teacher top-k, N trained tokens, V vocabulary.
"""

__version__ = "0.2.0"
