"""`python -m twotower_jax.cli`."""

import sys

from twotower_jax.cli import main

sys.exit(main())
