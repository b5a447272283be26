"""How a model is trained, below recipes and jobs.

training.methods     METHODS: what a model can be trained with; imports no torch
training.protocol    Recipe: what is trained; Place, Batches, Metric
training.run         Training: the one training loop
training.settings    TrainSettings: how long and in what way
training.streams     batches of tensors and loaders that can be resumed
training.state       checkpoints of a run
training.folder      RunFolder: the record, weights and state of a run
training.metrics     metrics of a classifier, with their standard errors
training.weights     load_checkpoint: weights from a file of the user's
training.user_code   load_object: ``module:attribute`` from the user's own code
"""
