"""`python -m convert SRC DST`, the same as `twotower convert SRC DST`."""

import sys

from twotower_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
