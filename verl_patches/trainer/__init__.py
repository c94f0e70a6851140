"""The trainer, the folder of a run, and what notices that a process died."""
