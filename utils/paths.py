"""Where the course lies. Standard library only: what runs before the installation imports it too."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
WORKBOOK = Path(os.environ.get("COURSE_WORKBOOK") or ROOT / "workbook").resolve()  # a class has one for each learner
