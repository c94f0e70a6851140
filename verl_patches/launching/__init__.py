"""Parts of the one launcher, :mod:`verl_patches.launch`."""
