"""The blocks of a recipe, one file a concern; `mpt.recipe.schema` puts them together."""
