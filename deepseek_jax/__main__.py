"""`python -m deepseek_jax` is `deepseek-jax`."""

import sys

from deepseek_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
