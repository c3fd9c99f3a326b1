"""The trackers that `training.report_to` can name: transformers' own integrations, and what each needs to be there."""

from dataclasses import dataclass

from mpt.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Tracker:
    """A tracker's top-level packages, and what pip calls them."""

    packages: tuple[str, ...]
    requirement: str


# The names are those of transformers 5.23 (INTEGRATION_TO_CALLBACK); a test compares them with the installed one's.
TRACKERS = {
    "azure_ml": Tracker(("azureml",), "azureml-core"),
    "clearml": Tracker(("clearml",), "clearml"),
    "codecarbon": Tracker(("codecarbon",), "codecarbon"),
    "comet_ml": Tracker(("comet_ml",), "comet-ml"),
    "dagshub": Tracker(("dagshub", "mlflow"), "dagshub mlflow"),
    "dvclive": Tracker(("dvclive",), "dvclive"),
    "flyte": Tracker(("flytekit",), "flytekit"),
    "kubeflow": Tracker((), ""),
    "mlflow": Tracker(("mlflow",), "mlflow"),
    "neptune": Tracker(("neptune",), "neptune"),
    "swanlab": Tracker(("swanlab",), "swanlab"),
    "tensorboard": Tracker(("tensorboard",), "tensorboard"),
    "trackio": Tracker(("trackio",), "trackio"),
    "wandb": Tracker(("wandb",), "wandb"),
}
PACKAGES = tuple(sorted({package for tracker in TRACKERS.values() for package in tracker.packages}))


def asked_trackers(recipe: Recipe) -> list[str]:
    """List what `training.report_to` says, each once; "none" and null are nothing, "all" stays a word."""
    asked = recipe.training_keys.get("report_to")
    names = [asked] if isinstance(asked, str) else list(asked or [])
    return [name for name in dict.fromkeys(names) if name != "none"]
