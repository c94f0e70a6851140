"""What ties `cartridge_distill` to veRL 0.9.1: patches (hooks only) and the code they call.

`python -m verl_patches apply` puts the patches on. Importing this package imports neither veRL
nor Ray; its modules do.
"""
