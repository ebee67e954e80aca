"""Recipes: the values of each method, and a whole config from two stock ones."""
