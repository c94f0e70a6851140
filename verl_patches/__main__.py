"""`python -m verl_patches`: apply, check or revert the patches onto veRL."""

import sys

from cartridge_distill.util.standard_output import guard_output
from verl_patches.manage import main

if __name__ == "__main__":
    guard_output()
    sys.exit(main())
