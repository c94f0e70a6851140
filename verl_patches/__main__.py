"""`python -m verl_patches`: apply, check or revert the patches onto veRL."""

import sys

from verl_patches.manage import main

if __name__ == "__main__":
    sys.exit(main())
