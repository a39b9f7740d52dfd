"""Run every tier, or what is named, and write what came out to tests/results/: commit, counts, duration; a file for each choice
of paths and day.

python tests/summary.py                                     everything
python tests/summary.py full tests/slurm                    a tier, below some paths
python tests/summary.py full tests/unit --args -n 2         with options of pytest
"""

import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    start = time.monotonic()
    words, _, options = " ".join(sys.argv[1:]).partition("--args")
    paths = [word for word in words.split() if "/" in word]
    tiers = " or ".join([word for word in words.split() if "/" not in word] or ["fast", "ci", "slurm", "full"])
    command = [sys.executable, "-m", "pytest", "-q", "-m", tiers, "-p", "no:cacheprovider", *options.split(), *paths]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line.strip())
    code = process.wait()
    counts = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no test ran")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    today = datetime.date.today().isoformat()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    text = [
        f"# Full tier, {today}",
        f"- {tiers}, in {', '.join(paths) or 'all tests'}",
        f"- commit {commit}{' with uncommitted changes' if dirty else ''}",
        f"- {counts.strip('= ')}",
        f"- {time.monotonic() - start:.0f} s, exit code {code}",
        *(f"- {line}" for line in failed),
    ]
    folder = ROOT / "tests" / "results"
    folder.mkdir(exist_ok=True)
    below = "".join(f"-{Path(path).stem.removeprefix('test_')}" for path in paths)
    (folder / f"full-{today}{below}.md").write_text("\n".join(text) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
