"""Compare runs in one table and one page: `python launcher/compare.py outputs/a outputs/sweep --output_dir outputs`."""

import sys

from prunadapt_ds.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
