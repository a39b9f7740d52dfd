"""One table from the reports of many runs: `python launcher/glue_table.py outputs/glue`. Training is not needed for it."""

import sys

from prunadapt_ds.glue_table import main

if __name__ == "__main__":
    sys.exit(main())
