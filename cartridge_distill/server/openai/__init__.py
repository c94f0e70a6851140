"""OpenAI's chat API, in models of its own: what its documentation says, or a 400 that says why not.

=============  ====================================================================
``requests``   what may be asked: offered, accepted without effect, or refused by name
``answers``    what comes back, whole and as chunks of a stream
``errors``     OpenAI's form of an error, with ``param`` and ``code``
``translate``  an OpenAI request as a request of the Tokasaurus protocol
``tokens``     tokens as strings and bytes
``text``       from tokens to text that is never taken back, and its log-probs
``app``        the routes of ``cartridge-distill serve``
=============  ====================================================================

Training talks the Tokasaurus protocol (``cartridge_distill.rollout.protocol``), which this is not:
nothing here carries token ids or a fingerprint. The gateway offers the same requests and answers
in front of any server of that protocol; it uses all modules but the last three, which need a
tokenizer.

Nothing is imported here: the gateway must be able to load the models alone.
"""
