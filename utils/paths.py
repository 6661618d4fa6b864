"""Where the course lies. Standard library only: what runs before the installation imports it too."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
WORKBOOK = ROOT / "workbook"
