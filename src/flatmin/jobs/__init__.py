"""What is done with a recipe or a model; orchestration and run folders only.

jobs.settings   TrainJobSettings, CompareSettings, MeasureSettings: what a job is asked for; imports no torch
jobs.train      TrainingRun: train one recipe with one method
jobs.compare    Comparison: train methods side by side, measure them
jobs.measure    Measurement: measure one model at one checkpoint
"""
