"""Recipes: mergekit's YAML files, turned into the same plan as the command line."""

import re


def is_recipe(text: str) -> bool:
    """Whether an argument of `peru merge` names a recipe: a YAML file, or a model card."""
    return bool(re.fullmatch(r".*\.(ya?ml|md)", text, re.IGNORECASE))
