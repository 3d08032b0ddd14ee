"""``python -m sdcore`` is the command ``sdcore``."""

import sys

from sdcore.cli import main

sys.exit(main())
