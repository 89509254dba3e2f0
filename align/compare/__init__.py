"""Proof: statistics, evaluation and the report."""
