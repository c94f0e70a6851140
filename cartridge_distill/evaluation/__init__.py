"""What a cartridge is worth: one harness for the table, for LongHealth and during training.

================  ======================================================================
``conditions``    no document, best chunk, untrained and trained cartridge, full document
``retrieval``     the best chunk, by BM25, in as many KV tokens as the cartridge
``data``          questions, held-out prompts and documents of a data folder
``prompts``       questions as token ids
``scoring``       KL to the full-document model; likelihood of options
``answers``       generated answers, as LongHealth is asked
``named_option``  which option an answer names
``harness``       all questions under all conditions, a few at a time
``own_text``      the divergence to the teacher on text that a condition writes itself
``free_answers``  is a free answer right, does it repeat itself?
``off_context``   how much a condition changes answers to unrelated prompts
``measure_rows``  the rows of these measures
``measures``      what the rows come to: scores, and the curve over position
``journal``       what is done, on disk: a killed evaluation goes on
``identity``      what the rows depend on, for the journal
``bootstrap``     intervals
``shading``       where along a document's text the cartridge goes astray
``results``       rows, files, summary
``table``         the summary as text
``validation``    the scores of a prefix in training
``folder``        all of it, for a data folder, a model and a cartridge
``progress``      what is said meanwhile
``command``       ``cartridge-distill eval``: its options
``names``         of the table's lines
================  ======================================================================

docs/evaluation.md has the formulas, and the columns and keys of the files.
"""
