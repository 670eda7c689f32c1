"""`python -m align.cli`: the `align` command, where there is none on the path."""

import sys

from align.cli import main

sys.exit(main())
