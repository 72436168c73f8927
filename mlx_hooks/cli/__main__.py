"""``python -m mlx_hooks.cli``: the same as ``neuroscope``."""

import sys

from . import main

sys.exit(main())
