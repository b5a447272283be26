"""What is done with a recipe or a model; orchestration and run folders only.

jobs.settings   CompareSettings, MeasureSettings: what a job is asked for; imports no torch
jobs.compare    Comparison: train methods side by side, measure them
jobs.measure    Measurement: measure one model at one checkpoint
"""
