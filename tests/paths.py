"""The folders that tests read."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
SHARED = ROOT.parent / "shared"  # samples of real data and models; where it is absent, tests that need it skip
