"""veRL on a CPU, and on a Ray cluster that is there already."""
