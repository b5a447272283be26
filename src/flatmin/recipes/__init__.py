"""What is trained: models and data by name, and the class for your own.

Recipe, Data              a model, its data and a loss
find_recipe, RECIPES      the library's recipes by name, or ``module:attribute``
"""

from ..training.recipe import Data, Recipe
from .find import RECIPES, find_recipe
from .images import cifar10, digits, fashion_mnist

__all__ = ["RECIPES", "Data", "Recipe", "cifar10", "digits", "fashion_mnist", "find_recipe"]
