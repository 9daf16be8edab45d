"""Run cases in arms, measure what comes out, compare arms, and report."""
