"""Folders of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
METRICS = ROOT / "tests" / "data" / "metrics"
REFERENCES = ROOT / "tests" / "references"
