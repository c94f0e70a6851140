"""What a cartridge is worth: one harness for the table, for LongHealth and during training.

================  ===============================================================
docs/evaluation.md has the formulas, and the columns and keys of the files.
"""
