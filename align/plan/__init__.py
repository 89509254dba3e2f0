"""What a pipeline will take, before anything of it is loaded: memory on every GPU, time, batch sizes, a launcher.

shapes    what a base and its adapters are made of, counted exactly and without weights
rows      how long the rows are that a stage reads
memory    bytes, as pure functions with their sources
rates     floating point operations, and how many a second
planning  a config's plan: the above, stage by stage
report    the plan as text
"""
