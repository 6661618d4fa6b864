"""Run the CUDA suite on this machine's GPU and keep the outcome: `python -m data.recorded.cuda_gpu`.

Writes data/recorded/cuda_gpu.json: machine, date, command, and what became of each test.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from utils.paths import ROOT

TARGET = ROOT / "data/recorded/cuda_gpu.json"
SUITE = ("tests/cuda/test_gpu.py", "tests/cuda/test_nvrtc.py")


def main():
    """Record the suite. Exit status: pytest's; 2 where there is no GPU, and then nothing is written."""
    import torch

    if not torch.cuda.is_available():
        print("There is no CUDA GPU here, or this torch was built without CUDA: nothing was recorded.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = ["-m", "pytest", "-q", *SUITE, f"--junitxml={results}"]
        status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        outcomes = read_outcomes(results.read_text(encoding="utf-8"))
    record = {
        "machine": describe_machine(torch),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m data.recorded.cuda_gpu",
        "outcomes": outcomes,
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(TARGET, ROOT)}")
    return status


def describe_machine(torch):
    """What a reader needs to judge the run: GPU, its memory and architecture, versions."""
    properties = torch.cuda.get_device_properties(0)
    from utils.cuda import gpu

    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "nvrtc": "{}.{}".format(*gpu.nvrtc_version()),
        "system": sys.platform,
    }


def read_outcomes(xml):
    """{test: "passed", or "failed" or "skipped" with the reason} from pytest's JUnit file."""
    outcomes = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        outcome = "passed"
        for kind in ("failure", "error", "skipped"):
            if (found := case.find(kind)) is not None:
                word = "skipped" if kind == "skipped" else "failed"
                outcome = f"{word}: {(found.get('message') or '').splitlines()[0][:200]}"
        outcomes[case.get("name")] = outcome
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
