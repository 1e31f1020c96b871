"""Folders of the repository used by tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
METRICS = ROOT / "tests" / "data" / "metrics"
REFERENCES = ROOT / "tests" / "references"
