"""Which optional packages are installed here: found without importing them."""

from importlib.util import find_spec

# Packages on which a decision depends.
CONSIDERED = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "flash_attn",
    "flash_attn_interface",
    "peft",
    "torch",
    "torchao",
    "transformer_engine",
    "transformers",
    # Trackers (`mpt.recipe.trackers`).
    *("azureml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flytekit", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)


def installed_packages() -> frozenset[str]:
    """Name those of the considered packages that are installed in this environment."""
    return frozenset(name for name in CONSIDERED if find_spec(name) is not None)
