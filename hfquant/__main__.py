"""`python -m hfquant`: the command line without its script."""

import sys

from hfquant.cli import main

sys.exit(main())
