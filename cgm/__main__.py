"""`python -m cgm`, which is the command `cgm`."""

import sys

from cgm.cli import main

sys.exit(main())
