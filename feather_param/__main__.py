"""``python -m feather_param`` is ``feather-param``."""

import sys

from feather_param.utils import signals


def main() -> int:
    """Run the command and return its exit status. Ctrl-C also ends it while torch is imported."""
    signals.end_at_once()
    from feather_param.cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
