"""Self-study: the model writes its own training prompts from the document.

As in the Cartridges paper (arXiv 2506.06266): a chunk of the document is put into the context of
the base model, a *seed prompt* of one of five kinds asks it for a question or a task, and what it
writes becomes a training prompt.

===========  ====================================================================
``plan``     which chunk, kind, wording and seed each generation has
``writing``  the generations, over HTTP, into a journal that survives a kill
``sifting``  what is kept of them, and why the rest is not
===========  ====================================================================

Every generation is a task: a function of (documents, seed, number) alone. What is kept is decided
from the journal, in the order of the tasks. So a run that was killed goes on where it stood and
ends with the same prompts.

Not done here: answers. On-policy the student writes them while it trains.
"""
