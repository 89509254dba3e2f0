"""Preflight: what a stage is about to train on, looked at before it costs anything (`align check`)."""
