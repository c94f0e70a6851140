"""What a cartridge is worth: one harness for the table, for LongHealth and during training.

==============  ======================================================================
``conditions``  no document, best chunk, untrained and trained cartridge, full document
``retrieval``   the best chunk, by BM25, in as many KV tokens as the cartridge
``data``        questions, held-out prompts and documents of a data folder
``prompts``     questions as token ids
``scoring``     KL to the full-document model; likelihood of options
``answers``     generated answers, as LongHealth is asked
``harness``     all questions under all conditions, a few at a time
``own_text``    divergence on text that a condition writes itself (``--measures``)
``off_context`` divergence from the bare model on unrelated prompts (``--measures``)
``measures``    what their rows come to; ``measure_rows`` are the rows, ``free_answers`` the texts
``journal``     what is done, on disk: a killed evaluation goes on
``bootstrap``   intervals
``results``     rows, files, summary
``table``       the summary as text
``validation``  the scores of a prefix in training
``folder``      all of it, for a data folder, a model and a cartridge
``command``     ``cartridge-distill eval``: its options
``names``       of the table's lines
==============  ======================================================================

docs/evaluation.md has the formulas, and the columns and keys of the files.
"""
