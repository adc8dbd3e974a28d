"""INT8: what to round how finely, found on images; `vimdeploy.quantize.recipe.quantize_model` is the whole of it."""
