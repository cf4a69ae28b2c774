"""What `make audit` does: known vulnerabilities in what ships, from the runtime lock.

pip-audit itself ends with "No known vulnerabilities found" when its service answered for no package at all, which
happens behind an index proxy. Here that is a failure of its own: 0 all clear, 1 vulnerable, 2 not audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements.lock"
TIMEOUT_SECONDS = 300  # a request a package, one after another


def main() -> int:
    """Audit the lock and say what was found."""
    options = ["--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json"]
    command = [sys.executable, "-m", "pip_audit", *options, "--requirement", str(LOCK)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"audit: NOT AUDITED: the vulnerability service did not answer in {TIMEOUT_SECONDS} s")
        return 2
    if not done.stdout.startswith("{"):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"audit: NOT AUDITED: {reason}")
        return 2
    return report(json.loads(done.stdout)["dependencies"])


def report(packages: list[dict[str, Any]]) -> int:
    """Print what pip-audit says of each package; the exit code."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    findings = [(package, finding) for package in packages for finding in package.get("vulns", [])]
    for package, finding in findings:
        fixed = ", ".join(finding["fix_versions"]) or "no version yet"
        print(f"audit: {package['name']} {package['version']}: {finding['id']}, fixed in {fixed}")
    if skipped:
        print(
            f"audit: NOT AUDITED: the vulnerability service knows nothing of {len(skipped)} of {len(packages)} packages"
        )
    if findings:
        return 1
    if skipped:
        return 2
    print(f"audit: {len(packages)} packages, no known vulnerability")
    return 0


if __name__ == "__main__":
    sys.exit(main())
