"""Gather the reports of many runs into one table of GLUE: `python launcher/glue_table.py outputs/glue`."""

import sys

from prunadapt_ds.commands.glue_table import main

if __name__ == "__main__":
    sys.exit(main())
