"""`python -m vcposim` is the `vcposim` command."""

import sys

from vcposim.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
