"""Preference records, aggregation of labels, reward training, scoring and trust."""
