"""A study: recipes side by side, on documents of one's own, without veRL around each run.

``python -m training.study GRID --out OUT`` runs a grid file: arms x seeds x documents. A run is a
plain loop over the pieces that veRL's engine trains with, in one process that loads the model once;
its losses are a veRL run's to 1e-6 (``tests/training/study/test_same_as_verl.py``). What a plain
loop leaves out: a server, HTTP, several ranks, staleness.

================  ================================================================
``settings``      what describes a run
``rollouts``      student and teacher write, with the embedded server's engine
``loop``          one run: write, score, step, save
``grid``          the grid file: read, checked, registered
``documents``     the study's documents: prompts, questions, files
``gate``          does the full document beat no document?
``evaluating``    all measures of a cartridge at a fixed step
``running``       every run of a grid, one after the other
``table``         mean and spread over seeds, with what each arm cost
================  ================================================================
"""
