"""The label store, the simulated panel and (in a later release) the labelling app."""
