"""How a model is trained, below recipes and jobs.

training.recipe      Recipe, Data: a model, its data and a loss
training.methods     METHODS: what a model can be trained with; imports no torch
training.loop        train: the one training loop
training.folder      RunFolder: the record, weights and state of a run
training.metrics     metrics of a classifier, with their standard errors
training.weights     load_checkpoint: weights from a file of the user's
training.user_code   load_object: ``module:attribute`` from the user's own code
"""
