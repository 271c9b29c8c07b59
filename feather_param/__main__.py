"""``python -m feather_param`` is ``feather-param``."""

import sys

from feather_param.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
