"""What is trained: models and data by name, and the classes for your own.

Classification, Data, Recipe    a classifier of tensors in memory; ``Recipe(name, model, data)`` makes one
Supervised, classification      any model, loss and data: tensors, data sets or loaders
find_recipe, RECIPES            the library's recipes by name, or ``module:attribute``
"""

from .classifier import Classification, Data, Recipe
from .find import RECIPES, find_recipe
from .images import cifar10, digits, fashion_mnist
from .supervised import Supervised, classification

__all__ = ["RECIPES", "Classification", "Data", "Recipe", "Supervised", "cifar10", "classification", "digits",
           "fashion_mnist", "find_recipe"]
