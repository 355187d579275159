"""``python -m fastshard``."""

import sys

from fastshard.cli import main

sys.exit(main())
