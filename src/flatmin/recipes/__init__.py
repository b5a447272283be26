"""Recipes and the jobs over them: only data, model and objective differ; the training loop is one.

Recipe, Data, find_recipe     what is trained
train                         one short training loop, resumable bit for bit
compare                       methods side by side: choose ρ, train, measure, write a run folder
"""

from .compare import CompareSettings, Comparison
from .images import cifar10, digits, fashion_mnist
from .recipe import Data, Recipe, find_recipe

RECIPES = {r.name: r for r in (digits, fashion_mnist, cifar10)}

__all__ = [
    "RECIPES", "CompareSettings", "Comparison", "Data", "Recipe", "cifar10", "digits", "fashion_mnist", "find_recipe",
]
