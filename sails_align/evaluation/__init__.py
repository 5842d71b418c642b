"""From responses to verdicts to rates with intervals."""
