"""``python -m statecache``: the command line."""

import sys

from statecache.cli import main

if __name__ == "__main__":
    sys.exit(main())
